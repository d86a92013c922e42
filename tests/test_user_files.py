"""Tests of users' files: formats, compression, layouts, several parts and unusual labels."""

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import random
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweet_jax.config import Config
from sweet_jax.data.column_names import parse_names
from sweet_jax.data.file_lists import expand_files
from sweet_jax.data.load import load_dataset
from sweet_jax.data.records import column_names, read_records
from sweet_jax.data.splits import split_calibration_rows, stratified_split
from sweet_jax.data.tables import Columns
from sweet_jax.errors import UserError
from sweet_jax.objectives.label_checks import describe_classes, label_warnings

TEXTS = [f"text {i}, or so" for i in range(12)]
LABELS = [("ham", "spam")[i % 2] for i in range(12)]
ROWS = [{"text": t, "label": c} for t, c in zip(TEXTS, LABELS, strict=True)]


def csv_text(delimiter: str = ",") -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, ("text", "label"), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue()


def make_table() -> pa.Table:
    return pa.Table.from_pylist(ROWS)


def write_ipc(path, stream: bool) -> None:
    table, open_writer = make_table(), pa.ipc.new_stream if stream else pa.ipc.new_file
    with open_writer(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


def write_excel(path) -> None:
    import openpyxl

    book = openpyxl.Workbook()
    book.active.append(["text", "label"])
    for row in ROWS:
        book.active.append(list(row.values()))
    book.save(path)


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
COLUMNS = {"text": TEXTS, "label": LABELS}
WRITERS = {
    "rows.csv.gz": lambda path: path.write_bytes(gzip.compress(csv_text().encode())),
    "rows.tsv.bz2": lambda path: path.write_bytes(bz2.compress(csv_text("\t").encode())),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "rows.jsonl.xz": lambda path: path.write_bytes(lzma.compress(LINES.encode())),
    "utf16.csv": lambda path: path.write_text(csv_text(), "utf-16", newline=""),
    "utf16_be.tsv": lambda path: path.write_bytes(b"\xfe\xff" + csv_text("\t").encode("utf-16-be")),
    "utf16.jsonl": lambda path: path.write_text(LINES, "utf-16", newline=""),
    "semicolon.csv": lambda path: path.write_text(csv_text(";"), newline=""),
    "tabs.csv": lambda path: path.write_text(csv_text("\t"), newline=""),
    "named.csv": lambda path: path.write_text("sep=;\n" + csv_text(";"), newline=""),
    "array.json": lambda path: path.write_text(json.dumps(ROWS)),
    "array.jsonl": lambda path: path.write_text(json.dumps(ROWS)),
    "pretty_array.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "pretty.jsonl": lambda path: path.write_text(
        "".join(json.dumps(row, indent=1) + "\n" for row in ROWS)
    ),
    "lines.json": lambda path: path.write_text(LINES),
    "columns.json": lambda path: path.write_text(json.dumps(COLUMNS)),
    "pandas.json": lambda path: path.write_text(
        json.dumps({name: {str(i): v for i, v in enumerate(c)} for name, c in COLUMNS.items()})
    ),
    "data.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS}, indent=2)),
    "file.arrow": lambda path: write_ipc(path, stream=False),
    "stream.arrow": lambda path: write_ipc(path, stream=True),
    "file.feather": lambda path: write_ipc(path, stream=False),
    "book.xlsx": write_excel,
}


def load(*files, **values):
    values = {"task": "own", "text_columns": "text", **values}
    return load_dataset(Config(data_files=",".join(map(str, files)), **values))


def read_back(path, label: str | None = "label") -> list:
    return list(read_records(path, Columns(("text",), label)))


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_same_rows_for_training_and_prediction(tmp_path, name):
    WRITERS[name](tmp_path / name)
    labelled, unlabelled = read_back(tmp_path / name), read_back(tmp_path / name, None)
    assert [r.values for r in labelled] == [tuple(row.values()) for row in ROWS]
    assert [r.values for r in unlabelled] == [(text,) for text in TEXTS]
    assert [r.row for r in labelled] == list(range(1, 13))
    assert load(tmp_path / name).classes == ("ham", "spam")
    assert set(column_names(tmp_path / name)) >= {"text", "label"}


@pytest.mark.parametrize(
    "name", [name for name in WRITERS if name.endswith((".gz", ".bz2", ".xz"))]
)
def test_truncated_compressed_file_is_refused_in_one_line(tmp_path, name):
    WRITERS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) - 9])
    with pytest.raises(UserError, match=r"could not read .*rows") as error:
        read_back(tmp_path / name)
    assert "\n" not in str(error.value)


FIELDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=8),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_output_of_the_csv_module_is_read_back(tmp_path_factory, rows, quoting):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=quoting).writerows([("text", "label"), *rows])
    expected = [tuple(value or None for value in row) for row in rows]
    assert [record.values for record in read_back(path)] == expected
    assert [record.values for record in read_back(path, None)] == [row[:1] for row in expected]


def test_empty_row_within_a_sheet_is_kept(tmp_path):
    import openpyxl

    book = openpyxl.Workbook()
    for row in (["text", "label"], ["a", 1], [None, None], [None, None], ["b", 2], [None, None]):
        book.active.append(row)
    book.save(tmp_path / "rows.xlsx")
    records = [(record.row, record.values) for record in read_back(tmp_path / "rows.xlsx")]
    assert records == [(1, ("a", "1")), (2, (None, None)), (3, (None, None)), (4, ("b", "2"))]


def test_long_json_array_element_is_read_and_damaged_one_refused(tmp_path):
    numbers = list(range(5000))
    rows = [{"text": f"t{i}", "label": "x", "numbers": numbers, "more": {"n": i}} for i in range(3)]
    content = json.dumps(rows, indent=1)
    (tmp_path / "rows.json").write_text(content)
    assert [record.values[0] for record in read_back(tmp_path / "rows.json")] == ["t0", "t1", "t2"]
    no_comma, no_end = content.replace("4000,", "4000", 1), content[:-2]
    for damaged in (no_comma, no_end, content.replace('"x"', '"x')):
        (tmp_path / "rows.json").write_text(damaged)
        with pytest.raises(UserError, match="JSON array that is damaged in line"):
            read_back(tmp_path / "rows.json")


def test_several_files_are_read_as_one_split(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    for i in range(3):
        pq.write_table(make_table().slice(4 * i, 4), folder / f"part-{i}.parquet")
    (folder / ".part-9.parquet").write_bytes(b"hidden")
    (folder / "README").write_text("no table")
    parts = sorted(folder.glob("part-*"))
    for source in (folder, folder / "part-*.parquet", "+".join(map(str, parts))):
        assert load(source).digest() == load(folder).digest()
    dataset = load(folder, parts[1])
    assert [t for (t,) in dataset.train.texts] == TEXTS
    assert [t for (t,) in dataset.validation.texts] == TEXTS[4:8]
    with pytest.raises(UserError, match=r"no file matches .*part-\*\.csv"):
        load(folder / "part-*.csv")


def test_file_name_may_contain_a_comma(tmp_path):
    (tmp_path / "a,b.csv").write_text(csv_text())
    assert load(tmp_path / "a,b.csv").classes == ("ham", "spam")


def test_error_names_the_file_among_several(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text(csv_text() + ("x,\n" if name == "b" else ""))
    with pytest.raises(UserError, match=r"column 'label' is empty in row 13 .*of .*b\.csv"):
        load(f"{tmp_path}/a.csv+{tmp_path}/b.csv")
    (tmp_path / "c.csv").write_text("body,label\na,b\n")
    pq.write_table(pa.table({"text": [1], "label": ["b"]}), tmp_path / "d.parquet")
    for part in (tmp_path / "c.csv", tmp_path / "d.parquet"):
        with pytest.raises(UserError, match=rf"^the data: '{part}': .*column 'text'"):
            load(f"{tmp_path}/a.csv+{part}")


@pytest.mark.parametrize(
    ("header", "column"),
    [
        ('"text, original",label', "text, original"),
        ('"a, b, c",label', "a, b, c"),
        ('"say ""text""",label', 'say "text"'),
        (" text,label", " text"),
        (" text ,label", "text"),
        ("text,label", " text "),
        ("the text,label", "the text"),
    ],
)
def test_column_is_found_by_its_full_name(tmp_path, header, column):
    (tmp_path / "rows.csv").write_text(header + "\n" + csv_text().split("\n", 1)[1])
    dataset = load(tmp_path / "rows.csv", text_columns=column)
    assert len(dataset.task.text_columns) == 1
    assert len(dataset.train.texts) + len(dataset.validation.texts) == 12


def test_quoted_column_names_may_contain_commas(tmp_path):
    (tmp_path / "rows.csv").write_text(
        '"a, b","c, d",label\n' + "".join(f"x{i},y,{'kl'[i % 2]}\n" for i in range(9))
    )
    task = load(tmp_path / "rows.csv", text_columns='"a, b", "c, d"').task
    assert task.text_columns == ("a, b", "c, d")


@pytest.mark.parametrize(
    ("name", "header", "names"),
    [
        ("rows.csv", "id,text", ("id", "text")),
        ("rows.csv", "text,id", ("text", "id")),
        ("rows.tsv", "id,text,n", ("id", "text", "n")),
        ("rows.csv", "id;text", ("id", "text")),
        ("rows.csv", '"id,text"', ("id,text",)),
        ("rows.csv", "id,text;n", ("id,text", "n")),
        ("rows.tsv", "id,text", ("id,text",)),
    ],
)
def test_csv_separator_is_inferred_from_requested_columns(tmp_path, name, header, names):
    (tmp_path / name).write_text(f"{header}\n")
    assert column_names(tmp_path / name, "id,text") == names


def test_column_names_may_span_several_lines():
    assert parse_names('a,\n "b\nc"\r\nd') == ("a", "b\nc", "d")


def test_dataset_saved_to_disk_is_read_with_its_splits(tmp_path):
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "review": datasets.Value("string"),
            "stars": datasets.ClassLabel(names=["bad", "good"]),
        }
    )
    rows = {"id": range(12), "review": TEXTS, "stars": [i % 2 for i in range(12)]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.save_to_disk(str(tmp_path / "one"))
    splits = {"train": saved, "test": saved.select(range(4))}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "two"))

    def read(name, **values):
        return load_dataset(Config(task="own", dataset=str(tmp_path / name), **values))

    without_splits, with_splits = read("one"), read("two")
    assert without_splits.task.text_columns == ("review",)
    assert without_splits.task.label_column == "stars"
    assert without_splits.classes == with_splits.classes == ("bad", "good")
    assert len(without_splits.train.texts) + len(without_splits.validation.texts) == 12
    assert (len(with_splits.train.texts), len(with_splits.validation.texts)) == (12, 4)
    repeated = set(with_splits.validation.texts) & set(with_splits.train.texts)
    assert (without_splits.repeated, with_splits.repeated) == (0, len(repeated))
    one_split = read("two", splits="test")
    assert len(one_split.train.texts) + len(one_split.validation.texts) == 4
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"could not read the saved data set .*one': "):
        read("one")
    with pytest.raises(UserError, match=r"unknown split of .*'tests': did you mean 'test'\?"):
        read("two", splits="train,tests")
    with pytest.raises(
        UserError, match="data_files is 'a' and dataset is 'b': set only one of them"
    ):
        load_dataset(Config(task="own", dataset="b", data_files="a"))


def test_invalid_rows_are_skipped_only_with_skip_invalid(tmp_path, caplog):
    content = csv_text() + ",ham\nno label,\nthree,fields,here\n \t,spam\n"
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(UserError) as error:
        load(tmp_path / "rows.csv")
    assert str(error.value).endswith(
        "row 15 (line 16): 3 fields, but the header has 2 "
        "(3 more invalid rows; --config.skip_invalid=True skips such rows)"
    )
    (tmp_path / "one.csv").write_text(csv_text() + "alone\n")
    with pytest.raises(UserError) as error:
        load(tmp_path / "one.csv")
    assert str(error.value).endswith(
        ": 1 field, but the header has 2 (--config.skip_invalid=True skips such rows)"
    )
    with caplog.at_level(logging.WARNING):
        dataset = load(tmp_path / "rows.csv", skip_invalid=True)
    assert sorted(dataset.train.texts + dataset.validation.texts) == sorted((t,) for t in TEXTS)
    (line,) = caplog.messages
    assert line.startswith("skipped 4 invalid rows of ")
    assert "row 13 (line 14): column 'text' is empty; row 14 (line 15): column 'label'" in line


def test_empty_text_files_are_skipped_with_skip_invalid(tmp_path, caplog):
    for number, (text, label) in enumerate(zip([*TEXTS, " "], [*LABELS, "ham"], strict=True)):
        (tmp_path / label).mkdir(exist_ok=True)
        (tmp_path / label / f"{number:02}.txt").write_text(text)
    with caplog.at_level(logging.WARNING):
        dataset = load(tmp_path, skip_invalid=True)
    assert sorted(dataset.train.texts + dataset.validation.texts) == sorted((t,) for t in TEXTS)
    (line,) = caplog.messages
    assert line.startswith("skipped 1 invalid rows of ")
    assert "ham/12.txt' is empty" in line


def test_class_of_one_repeated_text_stays_in_training(tmp_path):
    rows = csv_text() + "the same,other\n" * 6
    (tmp_path / "rows.csv").write_text(rows)
    for seed in range(4):
        dataset = load(tmp_path / "rows.csv", split_seed=seed, validation_fraction=0.3)
        other = dataset.classes.index("other")
        assert dataset.train.labels.tolist().count(other) == 6
        assert other not in dataset.validation.labels
        assert len(dataset.validation.labels) > 0


def test_error_for_label_without_training_rows_quotes_a_text(tmp_path):
    (tmp_path / "t.csv").write_text(csv_text())
    (tmp_path / "v.csv").write_text(csv_text() + "first of two,Spam\nsecond,Spam\n")
    with pytest.raises(UserError, match=r"label 'Spam' \(2 rows, the text 'first of two'\)"):
        load(tmp_path / "t.csv", tmp_path / "v.csv")


@pytest.mark.parametrize(
    ("train", "validation", "classes"),
    [
        (("0.0", "1.0"), ("0", "1"), ("0.0", "1.0")),
        (("0", "1"), ("0.0", "1.000"), ("0", "1")),
        (("-1", "1"), ("-1.0", "1"), ("-1", "1")),
    ],
)
def test_integer_labels_match_between_training_and_validation_files(
    tmp_path, train, validation, classes
):
    for name, labels in (("t", train), ("v", validation)):
        rows = [f"{name}{i},{labels[i % 2]}\n" for i in range(6)]
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(rows))
    dataset = load(tmp_path / "t.csv", tmp_path / "v.csv")
    assert dataset.classes == classes
    assert dataset.validation.labels.tolist() == [0, 1] * 3


def test_labels_of_one_file_are_classes_by_their_spelling(tmp_path):
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"t{i},{('1', '1.0', '01')[i % 3]}\n" for i in range(9))
    )
    assert set(load(tmp_path / "rows.csv").classes) == {"1", "1.0", "01"}


@pytest.mark.parametrize(
    "names",
    [
        ("neg", "neg "),
        ("neg", "Neg"),
        ("e\u0301t\u00e9", "\u00e9t\u00e9"),
        ("pos", "pos\u00a0"),
        ("1", "1.0"),
        ("1", "01"),
        ("ﬁn", "fin"),
    ],
)
def test_similar_labels_are_warned_about(names):
    (warning,) = label_warnings({names[0]: 3, "other": 30, names[1]: 4})
    assert all(f"{name!a} ({count})" in warning for name, count in zip(names, (3, 4), strict=True))
    assert not label_warnings({names[0]: 7, "other": 30})


def test_large_numeric_labels_are_not_similar():
    assert not label_warnings({str(2**63): 5, str(2**63 + 1): 5})


@pytest.mark.parametrize(
    ("label", "fix"),
    [
        ("a|b", "set --config.objective=multi_label"),
        ("['a', 'b']", "write them as a|b, and set --config.objective=multi_label"),
        ('["a"]', "write them as a|b, and set --config.objective=multi_label"),
    ],
)
def test_labels_that_list_several_are_warned_about(label, fix):
    """pandas writes a column of lists to CSV as Python writes lists."""
    (warning,) = label_warnings({label: 9, "a": 10})
    assert warning.startswith(f"labels such as {label!r} are one class each: ")
    assert warning.endswith(fix)
    assert not label_warnings({"[spam]": 9, "[ham]": 10})


def test_labels_like_measurements_or_ids_are_warned_about():
    measurements = {f"{i / 10}": 2 for i in range(51)}
    (warning,) = label_warnings(measurements)
    assert warning.startswith("the labels are 51 different numbers, such as 0.0")
    assert not label_warnings({str(i): 2 for i in range(20)})  # numbers of classes
    assert not label_warnings({"0.0": 10, "0.5": 10, "1.0": 10})  # half stars
    (warning,) = label_warnings({f"id {i}": 1 for i in range(40)} | {"x": 2})
    assert "id" in warning


def test_column_with_a_different_label_in_every_row_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"t{i},{i}\n" for i in range(40)))
    with pytest.raises(UserError, match=r"all 40 rows have different labels .*--config\.label"):
        load(tmp_path / "rows.csv")


def test_long_labels_are_shortened_in_messages(tmp_path):
    names = [letter * 100_000 for letter in "ab"]
    assert len(describe_classes(dict.fromkeys(names, 9))) < 200
    assert len("".join(label_warnings({names[0]: 3, f"{names[0]} ": 9}))) < 400
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": str(i), "label": names[i % 2]}) + "\n" for i in range(12))
    )
    (tmp_path / "new.csv").write_text("text,label\na,b\n")
    with pytest.raises(UserError, match=r"label 'b' .* is not among") as error:
        load(tmp_path / "rows.jsonl", tmp_path / "new.csv")
    assert len(str(error.value)) < 400


def test_classes_are_described_with_their_row_counts():
    assert describe_classes({"a": 2, "b": 9}) == "2 classes (rows of each): 'b' 9, 'a' 2"
    line = describe_classes({f"c{i}": i for i in range(1, 31)})
    assert line.startswith("30 classes (rows of each): 'c30' 30, 'c29' 29")
    assert "… 10 others …" in line
    assert line.endswith("'c2' 2, 'c1' 1")


@pytest.mark.parametrize("seed", range(5))
def test_stratified_split_keeps_class_of_one_row_in_training(seed):
    labels = np.asarray([0] * 30 + [1] * 30 + [2] + [3] * 2)
    for fraction in (0.1, 0.5, 0.9):
        training, validation = stratified_split(labels, fraction, np.random.default_rng(seed))
        assert set(labels[training]) == {0, 1, 2, 3}
        assert 2 not in labels[validation]
        assert len(training) + len(validation) == 63


def test_drawn_training_rows_have_every_class():
    labels = np.asarray([0] * 990 + [1] * 5 + [2] * 5)
    for seed in range(20):
        config = Config(train_size=20, calibration="held_out")
        training, calibration = split_calibration_rows(labels, config, seed)
        assert set(labels[training]) == {0, 1, 2}
        assert len(training) + len(calibration) == 20
    with pytest.raises(UserError, match="the 1 training rows drawn are all of one class"):
        split_calibration_rows(labels, Config(train_size=1, calibration="held_out"), 0)


def test_split_of_one_file_works_with_rare_classes(tmp_path):
    rng = random.Random(0)
    names = ["pos", "neg"] * 60 + ["rare a", "rare b", "rare c"]
    rows = "".join(f"text {rng.random()},{name}\n" for name in names)
    (tmp_path / "rows.csv").write_text("text,label\n" + rows)
    dataset = load(tmp_path / "rows.csv")
    assert set(dataset.classes) == set(names)
    assert set(dataset.train.labels.tolist()) == set(range(5))


@pytest.mark.slow
def test_mutated_files_are_read_or_refused_in_one_line():
    script = Path(__file__).with_name("fuzz_inputs.py")  # a process, because it measures its memory
    command = [sys.executable, str(script), "--count=400", "--seed=1"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


RECORD = '{"text": "a", "label": "x", "more": {"n": 1}}'
LAYOUTS = {  # each has two records
    "two arrays": f"[{RECORD}]\n[{RECORD}]",
    "a list of objects without indentation": f'{{"data": [\n{RECORD},\n{RECORD}\n]}}',
    "columns in another order": '{"text": {"0": "a", "1": "b"}, "label": {"1": "y", "0": "x"}}',
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_json_layouts_keep_every_record(tmp_path, name):
    (tmp_path / "rows.json").write_text(LAYOUTS[name])
    records = read_back(tmp_path / "rows.json")
    assert len(records) == 2
    assert records[0].values == ("a", "x")
    assert records[1].values in (("a", "x"), ("b", "y"))


def test_json_line_with_a_list_is_read_as_a_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "x", "data": []}\n')
    assert [record.values for record in read_back(tmp_path / "rows.jsonl")] == [("a", "x")]


def test_long_list_of_nested_objects_is_read(tmp_path):
    rows = [{"text": f"t{i}", "label": "x", "more": {"n": i}} for i in range(3000)]
    (tmp_path / "rows.json").write_text(json.dumps({"data": rows}, indent=2))
    assert len(read_back(tmp_path / "rows.json")) == 3000


def test_unclosed_quote_does_not_merge_csv_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('id,text,label\n1,"open,pos\n2,fine,neg\n3,ok",pos\n4,last,neg\n')
    records = list(read_records(path, Columns(("text",), "label")))
    assert len(records) == 4
    assert records[0].error is not None
    assert records[1].values == ("fine", "neg")


def test_unclosed_quote_does_not_merge_rows_of_a_single_column(tmp_path):
    (tmp_path / "rows.csv").write_text('text\n"open\n' + "fine\n" * 3000 + 'end"\n')
    records = list(read_records(tmp_path / "rows.csv", Columns(("text",))))
    assert len(records) == 3002
    assert sum(record.error is None for record in records) >= 3000


def test_integer_labels_match_between_files_of_one_split(tmp_path):
    for name, labels in (("i", ("0", "1")), ("f", ("0.0", "1.0"))):
        rows = [f"{name}{i},{labels[i % 2]}\n" for i in range(8)]
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(rows))
    assert load(f"{tmp_path}/i.csv+{tmp_path}/f.csv").classes == ("0", "1")


def test_text_files_of_a_folder_may_be_utf16(tmp_path):
    for i in range(6):
        file = tmp_path / "ab"[i % 2] / f"{i}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"text {i}", "utf-16")
    dataset = load(tmp_path)
    assert ("text 0",) in dataset.train.texts + dataset.validation.texts


@pytest.mark.parametrize("positions", [range(10, 14), range(40, 60)])
@pytest.mark.parametrize("name", [name for name in WRITERS if name.endswith((".gz", ".xz"))])
def test_damaged_compressed_file_is_refused_in_one_line(tmp_path, name, positions):
    WRITERS[name](tmp_path / name)
    data = bytearray((tmp_path / name).read_bytes())
    for position in positions:
        data[position] ^= 0xFF
    (tmp_path / name).write_bytes(bytes(data))
    with pytest.raises(UserError) as error:
        load(tmp_path / name)
    assert "\n" not in str(error.value)


def test_parquet_column_name_with_a_leading_space_is_found(tmp_path):
    pq.write_table(make_table().rename_columns(["text", " label"]), tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet").classes == ("ham", "spam")


def test_long_list_of_files_is_not_taken_for_a_file_name(tmp_path):
    for i in range(40):
        (tmp_path / f"part-{i:03}.csv").write_text(f"text,label\ntext {i},{'xy'[i % 2]}\n")
    listed = "+".join(str(path) for path in sorted(tmp_path.iterdir()))
    dataset = load(listed)
    assert len(dataset.train.texts) + len(dataset.validation.texts) == 40


def test_ignored_files_of_folder_or_pattern_are_logged(tmp_path, caplog):
    (tmp_path / "parts" / "old").mkdir(parents=True)
    for name in ("a.csv", "b.CSV", "part-00003", "c.csv.zip", "notes.txt", ".hidden"):
        (tmp_path / "parts" / name).write_text(csv_text())
    load(tmp_path / "parts")
    listed = ", ".join(repr(f"{tmp_path}/parts/{n}") for n in ("c.csv.zip", "notes.txt", "old"))
    assert caplog.messages == [f"ignored in '{tmp_path}/parts': {listed} and 1 more"]
    caplog.clear()
    (tmp_path / "parts" / "c.csv").symlink_to("gone.csv")
    for source in (tmp_path / "parts", tmp_path / "parts" / "*.csv"):
        with pytest.raises(UserError, match=r"c\.csv' is a link to a file that does not exist"):
            load(source)
    assert len(expand_files(f"{tmp_path}/parts/[ao]*")) == 1
    assert caplog.messages[-1] == f"ignored in '{tmp_path}/parts/[ao]*': '{tmp_path}/parts/old'"


def test_folder_of_texts_takes_suffixes_in_any_case_and_refuses_tables(tmp_path, caplog):
    for name in ("x/1.txt", "y/1.TXT", "y/2.md", "y/deep/1.txt", "z/1.doc"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("a text")
    assert load(tmp_path, tmp_path).classes == ("x", "y")
    listed = ", ".join(repr(f"{tmp_path}/{name}") for name in ("y/2.md", "y/deep", "z"))
    assert caplog.messages == [f"ignored in '{tmp_path}': {listed}"] * 2
    (tmp_path / "notes.csv").write_text(csv_text())
    message = r"has tables, such as 'notes.csv', and folders of texts, such as 'x': pass .*/\*\.csv"
    with pytest.raises(UserError, match=message):
        load(tmp_path)
