"""Tests of `sweet-jax predict`: its outputs, resumption, kept columns and errors."""

import contextlib
import csv
import errno
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sweet_jax import predict
from sweet_jax.data.tables import Columns, Record
from sweet_jax.inference import classifier, prediction_file
from sweet_jax.inference.predictions import Prediction


@pytest.fixture(scope="module", autouse=True)
def engines_loaded_once():
    """The commands share an engine, as otherwise each of them would compile the same programs."""
    engines: dict = {}
    load_engine = classifier.load_engine

    def load_once(name, model, *options):
        key = (name, model.folder, *options)
        if key not in engines:
            engines[key] = load_engine(name, model, *options)
        return engines[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "load_engine", load_once)
        yield


@pytest.fixture
def predict_rows(sweet, tmp_path):
    """Function (name, content, *options) -> exit status and rows of the output.

    Writes the content to a file of this name and runs the command on it.
    """

    def run(name: str, content: str, *more: str) -> tuple[int, list[dict]]:
        (tmp_path / name).write_text(content)
        output = tmp_path / "out.jsonl"
        status = predict.main(
            [
                f"--model={sweet.classifier.model.folder}",
                f"--input={tmp_path / name}",
                f"--output={output}",
                "--batch_size=1",
                *more,
            ]
        )
        return status, read_json_lines(output) if output.exists() else []

    return run


@contextlib.contextmanager
def interrupted_at_row(number: int, monkeypatch):
    """Interrupts the command, as Ctrl-C does, at the row of this number."""
    add, count = prediction_file.Tally.add, 0

    def interrupt(self, prediction) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise KeyboardInterrupt
        add(self, prediction)

    with monkeypatch.context() as patch:
        patch.setattr(prediction_file.Tally, "add", interrupt)
        yield


def json_lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def text_lines(texts) -> str:
    return json_lines({"text": text} for text in texts)


def read_json_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_probability_and_cost_have_at_most_six_decimals():
    prediction = Prediction("a", np.asarray([0.98765432, 0.01234568]), 2, 0.1 + 0.2, 0.98765432)
    reader = SimpleNamespace(stream_rows=lambda texts, batch_size: (prediction for _ in texts))
    record = Record(("a text",), None, position=7, row=1, line=1)
    rows = predict._predict_rows(reader, [record], Columns(("text",), None), 1)
    expected = {"label": "a", "probability": 0.987654, "exit": 2, "cost": 0.3}
    assert list(rows) == [(expected, 7)]


def test_predictions_equal_those_of_the_classifier_in_row_order(sweet, predict_rows, capsys):
    expected = sweet.classifier.at(threshold=0.8).predict(sweet.texts, 1)
    status, predictions = predict_rows("in.jsonl", text_lines(sweet.texts), "--threshold=0.8")
    assert status == 0
    assert [row["label"] for row in predictions] == expected.labels.tolist()
    assert [row["exit"] for row in predictions] == expected.exits.tolist()
    np.testing.assert_allclose([row["cost"] for row in predictions], expected.cost)
    np.testing.assert_allclose(
        [row["probability"] for row in predictions], expected.probabilities.max(axis=1), atol=1e-5
    )
    summary = capsys.readouterr().out.splitlines()[-1]
    assert summary.startswith(f"{len(predictions)} rows (0 with an error)")
    assert f"mean cost {expected.cost.mean():.4f}, exits: " in summary
    share = (expected.exits == 4).mean()
    assert f"{share:.1%} at layer 4" in summary


@pytest.mark.parametrize(
    ("name", "content", "rows", "errors"),
    [
        (
            "in.csv",
            'label,text\nx,word1\ny,\nz,"word2\nword3"\nz,too,many\nq,word4\n',
            5,
            {1: "column 'text' is empty", 3: "3 fields, but the header has 2"},
        ),
        ("in.tsv", "text\tn\nword1\t2\n\t3\n", 2, {1: "column 'text' is empty"}),
        (
            "in.csv",
            'text,n\n"word1,2\nword2,3\nword3 "word4" word5,4\n',
            3,
            {0: "a quote in line 2 is not closed properly before line 4"},
        ),
        ("in.txt", "word1\n\n \nword2 word3\n", 4, dict.fromkeys((1, 2), "column 'text' is empty")),
        ("in.csv", "text,n\nword1,2\n  ,3\n", 2, {1: "column 'text' is empty"}),
        (
            "in.jsonl",
            '{"text": "word1"}\n{"text": 5}\nnonsense\n[1]\n{"other": 1}\n{"text": "word2"}\n'
            '{"text": ""}\n{"text": " \\t"}\n',
            8,
            {
                1: "column 'text' is not text but 5",
                2: "not JSON",
                3: r"not an object but '\[1\]'",
                **dict.fromkeys((4, 6, 7), "column 'text' is empty"),
            },
        ),
    ],
)
def test_rows_without_valid_text_get_an_error_and_are_counted(
    predict_rows, capsys, name, content, rows, errors
):
    status, predictions = predict_rows(name, content, "--threshold=0.8")
    assert (status, len(predictions)) == (0, rows)
    for number, row in enumerate(predictions):
        if number in errors:
            assert list(row) == ["error"]
            assert re.match(errors[number], row["error"])
        else:
            assert list(row) == ["label", "probability", "exit", "cost"]
    assert f"({len(errors)} with an error)" in capsys.readouterr().out


def test_truncated_output_is_resumed_and_checked_against_its_identity(
    sweet, predict_rows, tmp_path, capsys
):
    content = text_lines(sweet.texts * 2)
    _, complete = predict_rows("in.jsonl", content, "--threshold=0.8")
    output = tmp_path / "out.jsonl"
    lines = output.read_bytes().splitlines(keepends=True)
    for rows_left in (40, 0):
        output.write_bytes(b"".join(lines[:rows_left]) + lines[rows_left][:12])
        status, resumed = predict_rows("in.jsonl", content, "--threshold=0.8")
        assert status == 0
        assert [row["exit"] for row in resumed] == [row["exit"] for row in complete]
        assert output.read_bytes().splitlines(keepends=True)[:rows_left] == lines[:rows_left]
        printed = capsys.readouterr()
        assert f"{len(complete)} rows" in printed.out.splitlines()[-1]
        assert "note" not in printed.err
    assert predict_rows("in.jsonl", content, "--threshold=0.8") == (0, resumed)
    printed = capsys.readouterr().err
    assert "already contains every row, so nothing was predicted; its model, target" in printed
    # A finished output of another target is refused even if its last rows would be the same.
    assert predict_rows("in.jsonl", content, "--threshold=0.80001") == (2, resumed)
    assert "was made with another threshold, '0.8'" in capsys.readouterr().err
    more = content + text_lines(sweet.texts[:3])
    status, extended = predict_rows("in.jsonl", more, "--threshold=0.8")
    assert (status, extended[: len(resumed)], len(extended)) == (0, resumed, len(resumed) + 3)
    (tmp_path / ".out.jsonl.identity.json").unlink()  # as if the output had been moved
    assert predict_rows("in.jsonl", more, "--threshold=0.80001") == (0, extended)
    assert "only its last 32 rows were compared" in capsys.readouterr().err
    assert not (tmp_path / ".out.jsonl.identity.json").exists()


def test_interrupted_output_is_resumed_only_with_its_own_target_and_input(
    sweet, predict_rows, tmp_path, capsys, monkeypatch
):
    content = text_lines(sweet.texts)
    with interrupted_at_row(9, monkeypatch):
        status, partial = predict_rows("in.jsonl", content, "--threshold=0.8")
    assert status == 1
    assert 0 < len(partial) < len(sweet.texts)
    assert "resumes where the output ends" in capsys.readouterr().err
    status, unchanged = predict_rows("in.jsonl", content, "--threshold=0.81")
    assert (status, unchanged) == (2, partial)
    assert "was made with another threshold, '0.8'" in capsys.readouterr().err
    status, unchanged = predict_rows("in.jsonl", text_lines(sweet.texts[::-1]), "--threshold=0.8")
    assert (status, unchanged) == (2, partial)  # a file of the same size with other rows
    assert "not made with this model, target and input" in capsys.readouterr().err
    status, predictions = predict_rows("in.jsonl", content, "--threshold=0.8")
    assert (status, len(predictions)) == (0, len(sweet.texts))
    assert predictions[: len(partial)] == partial
    assert "input" not in json.loads((tmp_path / ".out.jsonl.identity.json").read_text())


@pytest.mark.parametrize("content", [b"", b'{"model": ', b"[]", b"5", b"\xff"])
def test_damaged_identity_is_reported_in_one_line_and_can_be_removed(
    predict_rows, tmp_path, capsys, content
):
    rows = text_lines(["word1", "word2"])
    _, complete = predict_rows("in.jsonl", rows, "--threshold=0.8")
    identity = tmp_path / ".out.jsonl.identity.json"
    identity.write_bytes(content)
    capsys.readouterr()
    assert predict_rows("in.jsonl", rows, "--threshold=0.8") == (2, complete)
    assert capsys.readouterr().err == f"error: '{identity}' is damaged: remove it\n"
    identity.unlink()
    assert predict_rows("in.jsonl", rows, "--threshold=0.8") == (0, complete)


def run_predict(sweet, *arguments: str) -> int:
    """Runs the command with the arguments, at threshold 0.8; returns its exit status."""
    model = f"--model={sweet.classifier.model.folder}"
    return predict.main([model, "--threshold=0.8", "--batch_size=1", *arguments])


ROWS = [
    {"id": 7, "text": "word1 word2", "label": "gold", "when": "2020-01-01", "share": 0.5},
    {"id": 8, "text": None, "label": "gold", "when": "2020-01-02", "share": None},
    {"id": 9, "text": "word3", "label": "", "when": "x", "share": 2.0},
]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_kept_columns_are_written_in_every_output_format(sweet, tmp_path, suffix):
    (tmp_path / "in.jsonl").write_text(json_lines(ROWS))
    output = tmp_path / f"out.{suffix}"
    keep = "--keep=id,label,when,share"
    assert run_predict(sweet, f"--input={tmp_path / 'in.jsonl'}", f"--output={output}", keep) == 0
    if suffix == "jsonl":
        predictions = read_json_lines(output)
    elif suffix == "csv":
        with output.open(newline="", encoding="utf-8") as file:
            predictions = list(csv.DictReader(file))
    else:
        predictions = pq.read_table(output).to_pylist()
        assert pq.read_schema(output).field("id").type == pa.int64()
        assert pq.read_schema(output).field("when").type == pa.string()
    as_written = str if suffix == "csv" else lambda value: value
    assert [row["id"] for row in predictions] == [as_written(7), as_written(8), as_written(9)]
    assert [row["input_label"] for row in predictions] == ["gold", "gold", ""]
    assert [row["when"] for row in predictions] == ["2020-01-01", "2020-01-02", "x"]
    assert [bool(row.get("error")) for row in predictions] == [False, True, False]
    assert [bool(row.get("label")) for row in predictions] == [True, False, True]
    hidden_files = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert hidden_files == [".out.jsonl.identity.json"] * (suffix == "jsonl")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_interrupted_table_is_resumed_and_finished_table_is_not_replaced(
    sweet, tmp_path, capsys, monkeypatch, suffix
):
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in sweet.texts))
    output = tmp_path / f"out.{suffix}"
    arguments = [f"--input={tmp_path / 'in.txt'}", f"--output={output}"]
    with interrupted_at_row(9, monkeypatch):
        assert run_predict(sweet, *arguments) == 1
    assert not output.exists()
    assert run_predict(sweet, *arguments) == 0
    finished = output.read_bytes()
    assert f"{len(sweet.texts)} rows" in capsys.readouterr().out
    assert run_predict(sweet, *arguments) == 2
    assert "exists: choose another file, or remove it" in capsys.readouterr().err
    assert output.read_bytes() == finished


def test_predictions_can_be_written_to_stdout_and_dev_null(sweet, tmp_path, capfd):
    (tmp_path / "in.txt").write_text("word1\nword2\n")
    source = f"--input={tmp_path / 'in.txt'}"
    assert run_predict(sweet, source, "--output=/dev/stdout") == 0
    stdout, stderr = capfd.readouterr()
    assert [next(iter(json.loads(line))) for line in stdout.splitlines()] == ["label", "label"]
    assert "2 rows (0 with an error)" in stderr
    assert run_predict(sweet, source, "--output=/dev/null") == 0
    assert "2 rows" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl", "in.csv", "in.tsv"])
def test_output_that_is_the_input_or_a_folder_is_refused(sweet, tmp_path, capsys, name):
    """Not with the advice to remove an output that exists: that would remove the input."""
    content = text_lines(["word1"]) if name == "in.jsonl" else "text\nword1\n"
    path = tmp_path / name
    path.write_text(content)
    assert run_predict(sweet, f"--input={path}", f"--output={path}") == 2
    error = capsys.readouterr().err
    assert error == "error: --output and --input are the same file: choose another --output\n"
    assert path.read_text() == content
    assert run_predict(sweet, f"--input={path}", f"--output={tmp_path}") == 2
    assert "is a folder" in capsys.readouterr().err


def test_input_in_a_folder_without_permission_is_not_said_to_be_absent(
    sweet, tmp_path, capsys, monkeypatch
):
    stat = os.stat

    def refuse(path, *arguments, **options):
        if str(path).endswith("in.csv"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    output = tmp_path / "out.jsonl"
    assert run_predict(sweet, f"--input={tmp_path / 'in.csv'}", f"--output={output}") == 2
    assert f"Permission denied, '{tmp_path / 'in.csv'}'" in capsys.readouterr().err


def test_kept_integers_beyond_int64_are_written_as_text_in_parquet(sweet, tmp_path):
    rows = [{"text": "word1", "n": 2**63}, {"text": "word2", "n": 1.5}]
    (tmp_path / "in.jsonl").write_text(json_lines(rows))
    output = tmp_path / "out.parquet"
    assert (
        run_predict(sweet, f"--input={tmp_path / 'in.jsonl'}", f"--output={output}", "--keep=n")
        == 0
    )
    assert [row["n"] for row in pq.read_table(output).to_pylist()] == [str(2**63), "1.5"]


def test_output_with_a_long_file_name_is_written(sweet, tmp_path):
    (tmp_path / "in.csv").write_text("text\nword1\n")
    output = tmp_path / f"{'a' * 225}.csv"
    assert run_predict(sweet, f"--input={tmp_path / 'in.csv'}", f"--output={output}") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"in.csv", output.name}


def test_input_without_a_row_that_can_be_classified_is_refused_in_one_line(predict_rows, capsys):
    status, predictions = predict_rows("in.jsonl", '{"text": 5}\n{"text": null}\n')
    assert status == 2
    assert [list(row) for row in predictions] == [["error"], ["error"]]
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert refusal.startswith("error: none of the 2 rows of ")
    assert refusal.endswith(": check the text columns (text)")


def test_keep_accepts_all_columns_of_a_csv(predict_rows):
    """The list equals the header line, but is not the name of a single column."""
    status, rows = predict_rows("in.csv", "id,text\n7,a\n", "--keep=id,text")
    assert status == 0
    assert [(row["id"], row["text"]) for row in rows] == [("7", "a")]


def test_row_with_an_error_has_its_kept_columns(sweet, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "text": 5}\n{"id": 2, "text": "word1"}\n')
    output = tmp_path / "out.jsonl"
    assert (
        run_predict(sweet, f"--input={tmp_path / 'in.jsonl'}", f"--output={output}", "--keep=id")
        == 0
    )
    first, second = read_json_lines(output)
    assert first == {"error": "column 'text' is not text but 5", "id": 1}
    assert second["id"] == 2


def test_text_column_whose_name_has_a_comma_is_found(sweet, tmp_path):
    (tmp_path / "in.csv").write_text('id;"a, or b";n\n7;word1;x\n')
    output = tmp_path / "out.jsonl"
    arguments = [f"--input={tmp_path / 'in.csv'}", f"--output={output}", "--text_columns=a, or b"]
    assert run_predict(sweet, *arguments, "--keep=id,n") == 0
    assert [json.loads(output.read_text())[key] for key in ("id", "n")] == ["7", "x"]


@pytest.mark.parametrize("name", ["out.tsv", "out.xlsx", "out.jsonl.gz"])
def test_unsupported_output_format_is_refused(sweet, tmp_path, capsys, name):
    (tmp_path / "in.txt").write_text("word1\n")
    assert run_predict(sweet, f"--input={tmp_path / 'in.txt'}", f"--output={tmp_path / name}") == 2
    assert "choose .jsonl, .csv or .parquet" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_files_of_a_folder_are_read_as_one_input(sweet, tmp_path):
    (tmp_path / "parts").mkdir()
    for i, text in enumerate(("word1", "word2", "word3")):
        (tmp_path / "parts" / f"{i}.csv").write_text(f"n,text\n{i},{text}\n")
    output = tmp_path / "out.jsonl"
    assert (
        run_predict(sweet, f"--input={tmp_path / 'parts'}", f"--output={output}", "--keep=n") == 0
    )
    assert [row["n"] for row in read_json_lines(output)] == ["0", "1", "2"]


def test_missing_column_in_a_later_file_is_refused_before_output_starts(sweet, tmp_path, capsys):
    (tmp_path / "parts").mkdir()
    for i, name in enumerate(("text", "body")):
        (tmp_path / "parts" / f"{i}.csv").write_text(f"n,{name}\n1,word1\n")
    before = set(tmp_path.iterdir())
    assert (
        run_predict(sweet, f"--input={tmp_path / 'parts'}", f"--output={tmp_path / 'out.jsonl'}")
        == 2
    )
    message = f"error: '{tmp_path}/parts/1.csv': unknown column 'text': choose one of 'n', 'body'"
    assert capsys.readouterr().err.splitlines() == [message]
    assert set(tmp_path.iterdir()) == before


def test_files_of_a_saved_model_have_equal_permissions(sweet):
    folder = sweet.classifier.model.folder
    assert len({path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_file()}) == 1


@pytest.mark.parametrize(
    "content", ["notes", "notes\n", '"error"\n', '{"a": 1}\n', '{"label": "x", "text": "a"}']
)
def test_existing_file_that_is_not_an_output_is_not_overwritten(sweet, tmp_path, capsys, content):
    (tmp_path / "out.jsonl").write_text(content)
    (tmp_path / "in.txt").write_text("word1\n")
    model = sweet.classifier.model.folder
    arguments = [f"--model={model}", f"--input={tmp_path / 'in.txt'}"]
    assert predict.main([*arguments, f"--output={tmp_path / 'out.jsonl'}"]) == 2
    assert "line 1 is not a prediction of this command" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == content


def test_finished_output_of_another_target_or_input_is_not_overwritten(
    sweet, predict_rows, tmp_path, capsys
):
    predict_rows("in.jsonl", text_lines(sweet.texts), "--threshold=0.8")
    before = (tmp_path / "out.jsonl").read_bytes()
    status, _ = predict_rows("in.jsonl", text_lines(sweet.texts), "--threshold=2")
    assert status == 2
    assert "was made with another threshold, '0.8'" in capsys.readouterr().err
    status, _ = predict_rows("in.jsonl", text_lines(sweet.texts[::-1]), "--threshold=0.8")
    assert status == 2
    assert "not made with this model, target and input" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content", "more", "message"),
    [
        ("in.csv", "txet,label\na,b\n", [], "unknown column 'text': did you mean 'txet'?"),
        ("in.jsonl", '{"txet": "a"}\n', [], "unknown column 'text'"),
        ("in.csv", "text\na\n", ["--text_columns=a,b"], "takes 1 text column(s)"),
        ("in.csv", "", [], "no first line with the names of its columns"),
        ("in.csv", "text\na\n", ["--input=."], "is not a file of texts"),
        ("in.csv", "text\na\n", ["--input=+"], "'+' names no file"),
        ("in.csv", "text\na\n", [f"--input={'a' * 5000}"], "does not exist"),
        *(
            ("in.csv", "text\na\n", [f"--output={'a' * length}.jsonl"], "File name too long")
            for length in (300, 240)
        ),
        (
            *("in.csv", "text,label,input_label\na,b,c\n", ["--keep=label,input_label"]),
            "--keep has 'label' and 'input_label', which would both be 'input_label' in the output",
        ),
        ("in.csv", "text\na\n", ["--measure"], "remove --input and --output"),
        ("in.xls", "text\na\n", [], "must end in one of .csv"),
        ("in.csv", "text\na\n", ["--accuracy=1.2"], "--accuracy must be from 0 to 1; got 1.2"),
        ("in.csv", "text\na\n", ["--level=0.9"], "also set --risk or --agreement"),
        ("in.csv", "text\na\n", ["--policy=sure"], "unknown policy 'sure'"),
        ("in.csv", "text\na\n", ["--cost=0.1"], "cost=0.1 cannot be met: the best on"),
        ("in.csv", "text\na\n", ["--batch_size=0"], "batch_size must be at least 1; got 0"),
        ("in.csv", "text\na\n", ["--dtype=int4"], "does not support precision 'int4': choose"),
        ("in.csv", "text\na\n", ["--model=nowhere/model"], "neither a local directory nor"),
    ],
)
def test_invalid_input_or_option_is_refused_in_one_line(
    predict_rows, tmp_path, capsys, name, content, more, message
):
    status, _ = predict_rows(name, content, *more)
    assert status == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out.jsonl").exists()
