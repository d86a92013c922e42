"""Tests of the reader of tables and texts for training and prediction: records and errors."""

import bz2
import csv
import gzip
import json
import lzma
import random
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sweet_jax.config import Config
from sweet_jax.data.load import load_dataset
from sweet_jax.data.records import last_position, read_records
from sweet_jax.data.tables import Columns
from sweet_jax.errors import UserError

TEXT = Columns(("text",))


def write(path, content: str):
    path.write_text(content, newline="")
    return path


def texts_of(path, columns: Columns = TEXT) -> list:
    """Returns the text of every record, or for an invalid one a tuple of its error."""
    return [r.values[0] if r.error is None else (r.error,) for r in read_records(path, columns)]


def labels_of(path) -> list:
    return [r.values[-1] for r in read_records(path, Columns(("text",), "label"))]


def load_training_data(path, text_columns: str = "text"):
    files = f"{path},{path}"
    return load_dataset(Config(task="own", data_files=files, text_columns=text_columns))


def refusal_message(path, text_columns: str = "text") -> str:
    with pytest.raises(UserError) as error:
        load_training_data(path, text_columns)
    assert "\n" not in str(error.value)
    return str(error.value)


def csv_rows(count: int, **changes: str) -> str:
    """Returns a CSV of text and label; line_N=... replaces line N, counted from the header."""
    lines = ["text,label", *(f"text {i},{'ab'[i % 2]}" for i in range(count))]
    for name, line in changes.items():
        lines[int(name.removeprefix("line_")) - 1] = line
    return "\n".join(lines) + "\n"


STRAY = {  # replaced lines, then the error of the first of them
    "never closed": ({"line_5": '"said he,a'}, "a quote in line 5 is not closed"),
    "never closed, in the last line": ({"line_31": '"said he,a'}, "a quote in line 31 is not"),
    "met by a quote within a text": (
        {"line_5": '"said he,a', "line_20": 'he "said" so,b'},
        "a quote in line 5 is not closed properly before line 20",
    ),
    "met by another one": (
        {"line_5": '"said he,a', "line_20": '"said she,b'},
        "a quote in line 5 is not closed properly before line 20",
    ),
    "met by a row that is quoted": (
        {"line_5": '"said he,a', "line_9": '"said, she",b'},
        "a quote in line 5 is not closed properly before line 9",
    ),
    "met by a quote at the end of a text": (
        {"line_5": '"said he,a', "line_20": 'a screen of 42",b'},
        "looks like several rows: a quote in line 5 is closed only in line 20",
    ),
    "met by one at the end, of a row with too many fields": (
        {"line_5": '"said he,a', "line_20": 'a screen of 42",b,c'},
        "looks like several rows: a quote in line 5 is closed only in line 20",
    ),
}


@pytest.mark.parametrize("name", STRAY)
def test_stray_quote_in_a_csv_spoils_only_its_own_row(tmp_path, name):
    lines, message = STRAY[name]
    path = write(tmp_path / "rows.csv", csv_rows(30, **lines))
    first = int(next(iter(lines)).removeprefix("line_"))
    assert f"row {first - 1} (line {first}): {message}" in refusal_message(path)
    texts = texts_of(path)
    assert len(texts) == 30
    assert texts[first - 2][0].startswith(message)
    assert [n + 2 for n, text in enumerate(texts) if text == f"text {n}"] == [
        n for n in range(2, 32) if f"line_{n}" not in lines
    ]


def test_unclosed_quote_in_a_large_csv_spoils_only_its_own_row(tmp_path):
    path = write(
        tmp_path / "rows.csv", csv_rows(25_000, line_7='"said he,a', line_15000='b "so",b')
    )
    texts = texts_of(path)
    assert len(texts) == 25_000
    assert [n + 2 for n, text in enumerate(texts) if isinstance(text, tuple)] == [7]


@pytest.mark.parametrize(
    "content",
    [
        "id\ttext\tlabel\n" + '1\t"said he\ta\n2\tso\tb\n3\ta screen of 42"\ta\n4\tmore\tb\n',
        "label\ttext\n" + 'a\t"said he\nb\tso\na\ta screen of 42"\nb\tmore\n',
    ],
)
def test_stray_quote_in_a_tsv_spoils_only_its_own_row(tmp_path, content):
    path = write(tmp_path / "rows.tsv", content)
    message = "looks like several rows: a quote in line 2 is closed only in line 4"
    assert message in refusal_message(path)
    error, *texts = texts_of(path)
    assert error[0].startswith(message)
    assert texts == ["so", 'a screen of 42"', "more"]


PROSE = [
    "Dear all,\nthanks for coming, see you\nBest,\nBob",
    "12 Main St, Springfield\nBerlin, Germany\nParis, France\nRome, Italy",
    "It costs 1,000\nor 2,000\nI say",
    'He said "no",\nshe said "yes"\n',
    "\n\n\n",
    "a,b\n\nc,d\n\ne,f\n\ng,h",
    "one line\r\nanother,\r\n",
    '"',
    '""\n""',
    "x" * 100_000 + "\n" + "y" * 100_000,
    "\n".join(f"line {n}, of many" for n in range(9000)),
]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("order", [("text", "label"), ("label", "text"), ("id", "text", "label")])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_multi_line_texts_of_csv_and_tsv_are_read_unchanged(tmp_path, suffix, order, quoting):
    path = tmp_path / f"rows.{suffix}"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",", quoting=quoting)
        writer.writerow(order)
        for number, text in enumerate(PROSE):
            row = {"id": number, "text": text, "label": "ab"[number % 2]}
            writer.writerow([row[name] for name in order])
    assert texts_of(path) == PROSE
    assert labels_of(path) == ["ab"[number % 2] for number in range(len(PROSE))]


def test_random_tables_written_by_the_csv_module_are_read_unchanged(tmp_path):
    rng, path = random.Random(1), tmp_path / "rows.csv"
    pieces = ["foo", "bar, baz", "\n", "\n\n", '"', '""', "x\r\ny", ", ", "word ", "é", " "]
    for _ in range(60):
        texts = ["z" + "".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(20)]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator=rng.choice(["\n", "\r\n"]))
            writer.writerow(["id", "text", "label"])
            writer.writerows([i, text, "ab"[i % 2]] for i, text in enumerate(texts))
        assert texts_of(path) == texts


def test_csv_records_have_the_line_number_where_they_begin(tmp_path):
    content = 'text,label\n\n"a\nb",x\n\nc,y,z\n,y\n'
    path = write(tmp_path / "rows.csv", content)
    records = list(read_records(path, TEXT))
    assert [(r.values, r.row, r.line) for r in records] == [
        (("a\nb",), 1, 3),
        ((), 2, 6),
        ((None,), 3, 7),
    ]
    assert records[1].error == "3 fields, but the header has 2"
    assert records[-1].position == last_position(path) == len(content)


def test_bom_sep_line_and_blank_line_before_a_csv_header_are_skipped(tmp_path):
    for prefix in ("", "\n", "sep=,\n", "\ufeff", "\ufeffsep=,\r\n"):
        path = write(tmp_path / "rows.csv", f"{prefix}text , label\na,007\nb,01\n")
        assert texts_of(path) == ["a", "b"]
        assert load_training_data(path).classes == ("01", "007")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id;title\n1;a\n", "unknown column 'text'"),
        ("b.csv", b"t\xe9xt\na\n", "its first line is not UTF-8; save it as UTF-8"),
        ("b.csv.gz", b"text,label\na,b\n", "Not a gzipped file"),
        ("c.csv", b"text,text\na,b\n", "column 'text' occurs more than once"),
        ("d.json", b'[{"text": "a"}, {"text"}]', "is a JSON array that is damaged in line 1"),
        ("e.jsonl", b'\n [\n{"text": "a"}\n', "is a JSON array that is damaged in line 4"),
        ("f.jsonl", b'{"txt": "a"}\n{"txt": "b", "c": 1}\n', "did you mean 'txt'?"),
        ("g.csv", b"\n\n", "no first line with the names of its columns"),
        ("h.csv", b'"text,label\na,x\n', "a quote in line 1 is not closed"),
        ("i.xls", b"text\na\n", "must end in one of .csv, .tsv, .jsonl, .json, .ndjson, .parquet"),
    ],
)
def test_training_and_prediction_refuse_the_same_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert message in refusal_message(path)
    with pytest.raises(UserError) as error:
        list(read_records(path, TEXT))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "compress", "suffix"),
    [
        ("a.csv", gzip.compress, ".gz"),
        ("a.tsv", bz2.compress, ".bz2"),
        ("a.jsonl", lzma.compress, ".xz"),
    ],
)
def test_compressed_file_without_its_suffix_is_said_to_be_compressed(
    tmp_path, name, compress, suffix
):
    path = tmp_path / name
    path.write_bytes(compress(b"text,label\na,b\n"))
    assert refusal_message(path).endswith(f"compressed: rename it to {path.name + suffix!r}")


def test_error_of_an_unknown_column_lists_few_names_and_cuts_long_ones(tmp_path):
    """A file without a header begins with a text, which is taken for the name of a column."""
    names = [f"c{number}" for number in range(2000)]
    many = write(tmp_path / "many.csv", ",".join(names) + "\n")
    listed = ", ".join(map(repr, names[:10]))
    message = f"unknown column 'text': choose one of {listed} and 1990 more"
    assert refusal_message(many).endswith(message)
    columns = refusal_message(many, text_columns="")
    assert columns.endswith(f"the columns are {listed} and 1990 more")
    long = write(tmp_path / "long.csv", "word " * 60_000 + ",ham\n")
    message = f"unknown column 'text': choose one of '{'word ' * 11}wo…', 'ham'"
    assert refusal_message(long).endswith(message)
    none = write(tmp_path / "none.jsonl", "{}\n")
    assert refusal_message(none).endswith("unknown column 'text': there are no columns")


def test_txt_files_are_read_for_prediction_but_refused_for_training(tmp_path):
    path = write(tmp_path / "rows.txt", 'a "b"\n\nc\r\n')
    assert texts_of(path) == ['a "b"', "", "c"]
    assert "must end in one of" in refusal_message(path)
    with pytest.raises(UserError, match="this model takes pairs"):
        list(read_records(path, Columns(("a", "b"))))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "ndjson"])
def test_json_objects_may_span_several_lines(tmp_path, suffix):
    objects = [{"text": f"text {n}", "label": n % 2, "other": [{"a": {}}, []]} for n in range(9)]
    formatted = (json.dumps(item, indent=n % 4 or None) for n, item in enumerate(objects))
    path = write(tmp_path / f"rows.{suffix}", "\n".join(formatted) + "\n")
    assert texts_of(path) == [item["text"] for item in objects]
    assert load_training_data(path).classes == ("0", "1")


def test_invalid_json_object_spoils_only_its_own_record(tmp_path):
    lines = ['{"text": "a"}', '{"text": ', '{"text": "b"}', '{"text": "c', '{"text": "d"}']
    lines += ["{", '  "text": "e",', '  "label": oops', "}", "5", '{"text": "f"}', '{"text":']
    path = write(tmp_path / "rows.jsonl", "\n".join(lines))
    texts = texts_of(path)
    assert [text for text in texts if isinstance(text, str)] == ["a", "b", "d", "f"]
    assert len(texts) == len(lines)
    assert all(error[0].startswith("not ") for error in texts if isinstance(error, tuple))
    message = refusal_message(
        write(tmp_path / "rows.jsonl", '{"text": "a", "label": 1}\n{"text": \n')
    )
    assert "row 2 (line 2): not JSON: Expecting value" in message


def test_first_json_object_may_lack_a_column(tmp_path):
    path = write(tmp_path / "rows.jsonl", '{"label": 1}\n{"text": "a", "label": 2}\n')
    assert texts_of(path) == [None, "a"]
    assert "column 'text' is empty in row 1" in refusal_message(path)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["2020-01-01", "2021-01-01"], ["2020-01-01", "2021-01-01"]),
        ([2**63, 2**63 + 1], ["9223372036854775808", "9223372036854775809"]),
        ([0.0, 1.0, 1], ["0.0", "1.0", "1.0"]),
        ([0, 1, 1.0, 1.5], ["0", "1", "1", "1.5"]),
        ([True, False], ["True", "False"]),
        (["01", "1", " 1"], ["01", "1", " 1"]),
        ([1, None, float("nan")], ["1", None, None]),
    ],
)
def test_json_labels_keep_their_written_form(tmp_path, labels, expected):
    lines = [json.dumps({"text": "a", "label": label}) for label in labels]
    assert labels_of(write(tmp_path / "rows.jsonl", "\n".join(lines))) == expected


@pytest.mark.parametrize(
    ("labels", "value"), [([1, "1"], "'1'"), ([True, 1], "1"), (["a", {"b": 1}], "{'b': 1}")]
)
def test_json_labels_of_mixed_types_are_refused(tmp_path, labels, value):
    lines = [json.dumps({"text": "a", "label": label}) for label in labels]
    message = refusal_message(write(tmp_path / "rows.jsonl", "\n".join(lines)))
    assert "row 2 (line 2): column 'label' is" in message
    assert value in message


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary()),
        *(pa.binary_view(), pa.dictionary(pa.int32(), pa.string())),
    ],
)
def test_parquet_text_may_have_any_string_or_binary_type(tmp_path, kind):
    texts = ["a", "é", "a", "b"] * 700
    values = pa.array(texts).dictionary_encode() if pa.types.is_dictionary(kind) else texts
    if not isinstance(values, pa.Array):
        binary = pa.types.is_binary(kind) or "binary" in str(kind)
        values = pa.array([text.encode() for text in texts] if binary else texts, kind)
    path = tmp_path / "rows.parquet"
    try:
        pq.write_table(pa.table({"text": values, "label": values}), path)
    except pa.ArrowNotImplementedError as error:  # views, in older versions
        pytest.skip(str(error))
    assert texts_of(path) == labels_of(path) == texts
    assert load_training_data(path).classes == ("a", "b", "é")
    assert last_position(path) == len(texts)


def test_numeric_text_column_is_refused_for_prediction(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match="column 'text' holds values of type int64, not text"):
        list(read_records(path, TEXT))


def test_folder_named_like_a_hive_partition_adds_no_column(tmp_path):
    path = tmp_path / "label=5" / "rows.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"text": ["a", "b"], "label": ["x", "y"]}), path)
    assert load_training_data(path).classes == ("x", "y")


def test_hidden_and_archive_files_of_a_folder_are_ignored(tmp_path):
    for name in ("x/1.txt", "y/1.txt", "y/._1.txt", ".checkpoints/1.txt", "__MACOSX/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a text")
    dataset = load_training_data(tmp_path)
    assert dataset.classes == ("x", "y")
    assert len(dataset.train.texts) == 2


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "txt"])
def test_memory_of_reading_does_not_grow_with_the_file(tmp_path, suffix):
    line = json.dumps({"text": "word " * 200}) if suffix == "jsonl" else "word " * 200
    path = tmp_path / f"rows.{suffix}"
    write(path, "text\n" * (suffix == "csv") + f"{line}\n" * 12_000)
    tracemalloc.start()
    count = sum(record.error is None for record in read_records(path, TEXT))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 12_000
    assert peak < path.stat().st_size / 3
