"""The command answers every row of a file, once, and says what it could not read."""

import contextlib
import csv
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sweet_jax import predict
from sweet_jax.inference import prediction_file


@pytest.fixture
def command(sweet, tmp_path):
    """Runs the command on rows written as a file; returns its status and the output's objects."""

    def call(name: str, content: str, *more: str) -> tuple[int, list[dict]]:
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
        lines = output.read_text().splitlines() if output.exists() else []
        return status, [json.loads(line) for line in lines]

    return call


@contextlib.contextmanager
def interrupted_at_row(number: int, monkeypatch):
    """Interrupts commands, as Ctrl-C does, when they count a row of this number."""
    add, count = prediction_file.Tally.add, 0

    def interrupt(self, answer) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise KeyboardInterrupt
        add(self, answer)

    with monkeypatch.context() as patch:
        patch.setattr(prediction_file.Tally, "add", interrupt)
        yield


def jsonl(texts) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_the_command_answers_every_row_in_order(sweet, command, capsys):
    wanted = sweet.classifier.at(threshold=0.8).predict(sweet.texts, 1)
    status, answers = command("in.jsonl", jsonl(sweet.texts), "--threshold=0.8")
    assert status == 0
    assert [a["label"] for a in answers] == wanted.labels.tolist()
    assert [a["exit"] for a in answers] == wanted.exits.tolist()
    np.testing.assert_allclose([a["cost"] for a in answers], wanted.cost)
    np.testing.assert_allclose(
        [a["probability"] for a in answers], wanted.probabilities.max(axis=1), atol=1e-5
    )
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"{len(answers)} rows (0 with an error)")
    assert f"mean cost {wanted.cost.mean():.4f}, exits: " in line
    share = (wanted.exits == 4).mean()
    assert f"{share:.1%} at layer 4" in line


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
def test_rows_without_a_text_are_reported_and_counted(command, capsys, name, content, rows, errors):
    status, answers = command(name, content, "--threshold=0.8")
    assert (status, len(answers)) == (0, rows)
    for place, answer in enumerate(answers):
        if place in errors:
            assert list(answer) == ["error"]
            assert re.match(errors[place], answer["error"])
        else:
            assert list(answer) == ["label", "probability", "exit", "cost"]
    assert f"({len(errors)} with an error)" in capsys.readouterr().out


def test_a_command_cut_short_resumes_where_the_output_ends(sweet, command, tmp_path, capsys):
    content = jsonl(sweet.texts * 2)
    _, whole = command("in.jsonl", content, "--threshold=0.8")
    output = tmp_path / "out.jsonl"
    lines = output.read_bytes().splitlines(keepends=True)
    for cut in (40, 0):
        output.write_bytes(b"".join(lines[:cut]) + lines[cut][:12])
        status, again = command("in.jsonl", content, "--threshold=0.8")
        assert status == 0
        assert [a["exit"] for a in again] == [a["exit"] for a in whole]
        assert output.read_bytes().splitlines(keepends=True)[:cut] == lines[:cut]
        printed = capsys.readouterr()
        assert f"{len(whole)} rows" in printed.out.splitlines()[-1]
        assert "note" not in printed.err
    assert command("in.jsonl", content, "--threshold=0.8") == (0, again)
    printed = capsys.readouterr().err
    assert "already contains every row, so nothing was predicted; its model, target" in printed
    # A finished output of another target is no output of this one, whatever its last rows are.
    assert command("in.jsonl", content, "--threshold=0.80001") == (2, again)
    assert "was made with another threshold, '0.8'" in capsys.readouterr().err
    more = content + jsonl(sweet.texts[:3])
    status, longer = command("in.jsonl", more, "--threshold=0.8")
    assert (status, longer[: len(again)], len(longer)) == (0, again, len(again) + 3)
    (tmp_path / ".out.jsonl.identity.json").unlink()  # of an output that was moved
    assert command("in.jsonl", more, "--threshold=0.80001") == (0, longer)
    assert "only its last 32 rows were compared" in capsys.readouterr().err
    assert not (tmp_path / ".out.jsonl.identity.json").exists()  # nor is it known now


def test_an_interrupted_command_knows_by_what_it_was_begun(
    sweet, command, tmp_path, capsys, monkeypatch
):
    content = jsonl(sweet.texts)
    with interrupted_at_row(9, monkeypatch):
        status, begun = command("in.jsonl", content, "--threshold=0.8")
    assert status == 1
    assert 0 < len(begun) < len(sweet.texts)
    assert "resumes where the output ends" in capsys.readouterr().err
    status, still = command("in.jsonl", content, "--threshold=0.81")
    assert (status, still) == (2, begun)
    assert "was made with another threshold, '0.8'" in capsys.readouterr().err
    status, still = command("in.jsonl", jsonl(sweet.texts[::-1]), "--threshold=0.8")
    assert (status, still) == (2, begun)  # as many bytes, but the rows are others
    assert "not made with this model, target and input" in capsys.readouterr().err
    status, found = command("in.jsonl", content, "--threshold=0.8")
    assert (status, len(found)) == (0, len(sweet.texts))
    assert found[: len(begun)] == begun
    assert "input" not in json.loads((tmp_path / ".out.jsonl.identity.json").read_text())


def call(sweet, *arguments: str) -> int:
    model = f"--model={sweet.classifier.model.folder}"
    return predict.main([model, "--threshold=0.8", "--batch_size=1", *arguments])


ROWS = [
    {"id": 7, "text": "word1 word2", "label": "gold", "when": "2020-01-01", "share": 0.5},
    {"id": 8, "text": None, "label": "gold", "when": "2020-01-02", "share": None},
    {"id": 9, "text": "word3", "label": "", "when": "x", "share": 2.0},
]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_columns_are_carried_along_into_every_format(sweet, tmp_path, suffix):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    output = tmp_path / f"out.{suffix}"
    keep = "--keep=id,label,when,share"
    assert call(sweet, f"--input={tmp_path / 'in.jsonl'}", f"--output={output}", keep) == 0
    if suffix == "jsonl":
        found = [json.loads(line) for line in output.read_text().splitlines()]
    elif suffix == "csv":
        with output.open(newline="", encoding="utf-8") as file:
            found = list(csv.DictReader(file))
    else:
        found = pq.read_table(output).to_pylist()
        assert pq.read_schema(output).field("id").type == pa.int64()
        assert pq.read_schema(output).field("when").type == pa.string()
    text = str if suffix == "csv" else lambda value: value
    assert [row["id"] for row in found] == [text(7), text(8), text(9)]
    assert [row["input_label"] for row in found] == ["gold", "gold", ""]
    assert [row["when"] for row in found] == ["2020-01-01", "2020-01-02", "x"]
    assert [bool(row.get("error")) for row in found] == [False, True, False]
    assert [bool(row.get("label")) for row in found] == [True, False, True]
    hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert hidden == [".out.jsonl.identity.json"] * (suffix == "jsonl")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_an_interrupted_table_is_resumed_and_a_finished_one_is_left_alone(
    sweet, tmp_path, capsys, monkeypatch, suffix
):
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in sweet.texts))
    output = tmp_path / f"out.{suffix}"
    arguments = [f"--input={tmp_path / 'in.txt'}", f"--output={output}"]
    with interrupted_at_row(9, monkeypatch):
        assert call(sweet, *arguments) == 1
    assert not output.exists()
    assert call(sweet, *arguments) == 0
    whole = output.read_bytes()
    assert f"{len(sweet.texts)} rows" in capsys.readouterr().out
    assert call(sweet, *arguments) == 2
    assert "exists: choose another file, or remove it" in capsys.readouterr().err
    assert output.read_bytes() == whole


def test_predictions_go_to_standard_output_and_nowhere(sweet, tmp_path, capfd):
    (tmp_path / "in.txt").write_text("word1\nword2\n")
    source = f"--input={tmp_path / 'in.txt'}"
    assert call(sweet, source, "--output=/dev/stdout") == 0
    out, err = capfd.readouterr()
    assert [next(iter(json.loads(line))) for line in out.splitlines()] == ["label", "label"]
    assert "2 rows (0 with an error)" in err
    assert call(sweet, source, "--output=/dev/null") == 0
    assert "2 rows" in capfd.readouterr().err


def test_the_input_is_never_emptied(sweet, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("word1\n")
    path = tmp_path / "in.txt"
    assert call(sweet, f"--input={path}", f"--output={path}") == 2
    assert "--output and --input are the same file" in capsys.readouterr().err
    assert path.read_text() == "word1\n"
    assert call(sweet, f"--input={path}", f"--output={tmp_path}") == 2
    assert "is a folder" in capsys.readouterr().err


def test_large_numbers_are_carried_into_a_table(sweet, tmp_path):
    rows = [{"text": "word1", "n": 2**63}, {"text": "word2", "n": 1.5}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.parquet"
    assert call(sweet, f"--input={tmp_path / 'in.jsonl'}", f"--output={output}", "--keep=n") == 0
    assert [row["n"] for row in pq.read_table(output).to_pylist()] == [str(2**63), "1.5"]


def test_a_long_name_of_an_output_is_written(sweet, tmp_path):
    (tmp_path / "in.csv").write_text("text\nword1\n")
    output = tmp_path / f"{'a' * 225}.csv"
    assert call(sweet, f"--input={tmp_path / 'in.csv'}", f"--output={output}") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"in.csv", output.name}


def test_a_file_of_which_no_row_can_be_classified_is_status_3(command):
    status, found = command("in.jsonl", '{"text": 5}\n{"text": null}\n')
    assert status == 3
    assert [list(row) for row in found] == [["error"], ["error"]]


def test_all_columns_of_a_table_are_carried_along(command):
    """The list of them is the header, which is not one column of this name."""
    status, rows = command("in.csv", "id,text\n7,a\n", "--keep=id,text")
    assert status == 0
    assert [(row["id"], row["text"]) for row in rows] == [("7", "a")]


def test_a_row_whose_text_is_none_keeps_what_is_carried_along(sweet, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "text": 5}\n{"id": 2, "text": "word1"}\n')
    output = tmp_path / "out.jsonl"
    assert call(sweet, f"--input={tmp_path / 'in.jsonl'}", f"--output={output}", "--keep=id") == 0
    first, second = [json.loads(line) for line in output.read_text().splitlines()]
    assert first == {"error": "column 'text' is not text but 5", "id": 1}
    assert second["id"] == 2


def test_a_column_with_a_comma_is_found_in_a_file_with_semicolons(sweet, tmp_path):
    (tmp_path / "in.csv").write_text('id;"a, or b";n\n7;word1;x\n')
    output = tmp_path / "out.jsonl"
    arguments = [f"--input={tmp_path / 'in.csv'}", f"--output={output}", "--text_columns=a, or b"]
    assert call(sweet, *arguments, "--keep=id,n") == 0
    assert [json.loads(output.read_text())[key] for key in ("id", "n")] == ["7", "x"]


@pytest.mark.parametrize("name", ["out.tsv", "out.xlsx", "out.jsonl.gz"])
def test_formats_that_are_not_written_are_refused(sweet, tmp_path, capsys, name):
    (tmp_path / "in.txt").write_text("word1\n")
    assert call(sweet, f"--input={tmp_path / 'in.txt'}", f"--output={tmp_path / name}") == 2
    assert "choose .jsonl, .csv or .parquet" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_several_files_are_one_input(sweet, tmp_path):
    (tmp_path / "parts").mkdir()
    for i, text in enumerate(("word1", "word2", "word3")):
        (tmp_path / "parts" / f"{i}.csv").write_text(f"n,text\n{i},{text}\n")
    output = tmp_path / "out.jsonl"
    assert call(sweet, f"--input={tmp_path / 'parts'}", f"--output={output}", "--keep=n") == 0
    assert [json.loads(line)["n"] for line in output.read_text().splitlines()] == ["0", "1", "2"]


def test_a_later_file_without_the_columns_is_named_before_an_output_is_begun(
    sweet, tmp_path, capsys
):
    (tmp_path / "parts").mkdir()
    for i, name in enumerate(("text", "body")):
        (tmp_path / "parts" / f"{i}.csv").write_text(f"n,{name}\n1,word1\n")
    before = set(tmp_path.iterdir())
    assert call(sweet, f"--input={tmp_path / 'parts'}", f"--output={tmp_path / 'out.jsonl'}") == 2
    refusal = f"error: '{tmp_path}/parts/1.csv': unknown column 'text': choose one of 'n', 'body'"
    assert capsys.readouterr().err.splitlines() == [refusal]
    assert set(tmp_path.iterdir()) == before


def test_what_is_saved_has_the_mode_of_the_umask(sweet):
    folder = sweet.classifier.model.folder
    assert len({path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_file()}) == 1


@pytest.mark.parametrize(
    "content", ["notes", "notes\n", '"error"\n', '{"a": 1}\n', '{"label": "x", "text": "a"}']
)
def test_a_file_that_is_no_output_is_left_alone(sweet, tmp_path, capsys, content):
    (tmp_path / "out.jsonl").write_text(content)
    (tmp_path / "in.txt").write_text("word1\n")
    model = sweet.classifier.model.folder
    arguments = [f"--model={model}", f"--input={tmp_path / 'in.txt'}"]
    assert predict.main([*arguments, f"--output={tmp_path / 'out.jsonl'}"]) == 2
    assert "line 1 is not a prediction of this command" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == content


def test_an_output_of_another_target_or_input_is_left_alone(sweet, command, tmp_path, capsys):
    command("in.jsonl", jsonl(sweet.texts), "--threshold=0.8")
    before = (tmp_path / "out.jsonl").read_bytes()
    status, _ = command("in.jsonl", jsonl(sweet.texts), "--threshold=2")
    assert status == 2
    assert "was made with another threshold, '0.8'" in capsys.readouterr().err
    status, _ = command("in.jsonl", jsonl(sweet.texts[::-1]), "--threshold=0.8")
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
        ("in.csv", "text\na\n", ["--cost=0.1"], "infeasible: the best reachable"),
        ("in.csv", "text\na\n", ["--batch_size=0"], "batch_size must be at least 1; got 0"),
        ("in.csv", "text\na\n", ["--dtype=int4"], "does not support precision 'int4': choose"),
        ("in.csv", "text\na\n", ["--model=nowhere/model"], "neither a local directory nor"),
    ],
)
def test_bad_input_of_the_command(command, tmp_path, capsys, name, content, more, message):
    status, _ = command(name, content, *more)
    assert status == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out.jsonl").exists()
