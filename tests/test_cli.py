"""The command line: its help, and what it says of bad input (one line, exit status 2)."""

import dataclasses
import errno
import fcntl
import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sweet_jax
from sweet_jax import cli
from sweet_jax.config import Config, describe_keys
from sweet_jax.config.key import key_metadata
from sweet_jax.main import main, parse

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("restored_logging")


@pytest.fixture
def line(options, tmp_path):
    """A command line that would run: the program's arguments, with the workdir last."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"def get_config(): return {options!r}")
    return [f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]


@pytest.fixture
def refused(line, tmp_path, capsys):
    """A function from more arguments to the one line that the command prints of them."""

    def refused(*arguments: str) -> str:
        before = contents(tmp_path / "run")
        status = main(["main", *line, *arguments])
        printed = capsys.readouterr()
        assert status == 2
        assert printed.out == ""
        assert contents(tmp_path / "run") == before
        return one_error(printed.err)

    return refused


@pytest.fixture
def altered(checkpoint, tmp_path):
    """A function that copies the checkpoint, with other values in one of its JSON files."""

    def altered(name: str = "config.json", **values) -> Path:
        folder = shutil.copytree(checkpoint, tmp_path / "altered")
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return folder

    return altered


def one_error(stderr: str) -> str:
    """The message, after checking that it is one line and nothing else is said."""
    assert stderr.endswith("\n")
    (message,) = stderr.splitlines()
    assert message.startswith("error: ")
    return message.removeprefix("error: ")


def contents(folder: Path) -> dict[str, bytes] | None:
    """Every file below a folder, or None if there is no such folder."""
    if not folder.exists():
        return None
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "sweet_jax.main", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_explains_every_key_and_exits_0():
    done = command("--help")
    assert done.returncode == 0
    assert "--workdir" in done.stdout
    keys = {key.name: key for key in describe_keys()}
    for field in dataclasses.fields(Config):
        _, _, rest = done.stdout.partition(f"\n  {field.name} = ")
        key = keys[field.name]
        assert key.meaning
        assert key.allowed
        said = f"{key.default} {key.meaning} Allowed: {key.allowed} "
        assert " ".join(rest.split()).startswith(" ".join(said.split()))


def test_the_default_in_help_is_one_that_the_command_line_takes():
    for key in describe_keys():
        if key.default in ('""', "none given"):
            continue
        argument = f"--config.{key.name}={key.default}"
        config, *_ = parse(["main", "--config=configs/glue.py", "--workdir=x", argument])
        assert getattr(config, key.name) == getattr(Config(), key.name)


def test_the_choices_in_help_are_the_values_that_are_taken():
    described = {key.name: key for key in describe_keys()}
    for field in dataclasses.fields(Config):
        names = key_metadata(field).names(field.default)
        if names:
            allowed = [name or '""' for name in names]
            allowed += ["module:OBJECT"] if key_metadata(field).allows_reference else []
            assert described[field.name].allowed.split(", ") == allowed


def test_help_may_be_cut_short():
    """As `| head` does: that the rest of the text has no reader is no error."""
    shell = f"{sys.executable} -m sweet_jax.main --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


def test_the_console_command_is_installed_by_the_name_sweet_jax():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["sweet-jax"].partition(":")
    assert getattr(importlib.import_module(module), function) is cli.main


def test_an_installed_copy_holds_every_file_of_the_package():
    """Among them py.typed, by which type checkers of other programs read our annotations."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    globs = tool["setuptools"]["package-data"].items()
    held = {path for name, found in globs for each in found for path in folder(name).glob(each)}
    present = {path for path in (ROOT / "sweet_jax").rglob("*.*") if path.is_file()}
    assert {path for path in present - held if path.suffix not in (".py", ".pyc")} == set()
    assert ROOT / "sweet_jax" / "py.typed" in held


def folder(module: str) -> Path:
    return ROOT.joinpath(*module.split("."))


@pytest.mark.parametrize("arguments", [["version"], ["--help"], [], ["train", "--help"]])
def test_help_and_version_do_not_import_jax(arguments):
    program = (
        "import sys; from sweet_jax.cli import main\n"
        f"try: status = main({arguments!r})\n"
        "except SystemExit as end: status = end.code\n"
        "sys.exit('jax was imported' if 'jax' in sys.modules else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_version_is_the_package_s(capsys):
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out == f"{sweet_jax.__version__}\n"


def test_help_of_the_console_command_names_all_commands(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name in (
        "train",
        "simulate",
        "predict",
        "serve",
        "export",
        "quantize",
        "recalibrate",
        "version",
    ):
        assert f"\n  {name} " in printed


@pytest.mark.parametrize(
    "name", ["simulate", "predict", "serve", "export", "quantize", "recalibrate"]
)
def test_each_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: sweet-jax {name} ")


def test_train_is_the_main_module(line, capsys):
    assert cli.main(["train", *line, "--config.exits=1,2"]) == 2
    once = one_error(capsys.readouterr().err)
    assert main(["main", *line, "--config.exits=1,2"]) == 2
    assert one_error(capsys.readouterr().err) == once
    assert "exits must end with the encoder's last layer, 3" in once


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["simulate", "--run=absent"], "'absent' is not a finished run"),
        (["predict", "--modl=absent"], "unknown option '--modl': did you mean '--model'?"),
        (["predict", "--model=absent"], "pass --input=FILE and --output=FILE, or --measure"),
    ],
)
def test_a_wrong_command_gets_one_line(arguments, words, capsys):
    assert cli.main(arguments) == 2
    assert words in one_error(capsys.readouterr().err)


def test_an_interruption_of_the_imports_is_one_line(capsys, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    assert cli.main(["report", "runs/a"]) == 1
    assert capsys.readouterr().err == "interrupted\n"


def test_the_process_exits_2_with_one_line(line, tmp_path):
    done = command(*line, "--config.exits=1,2")
    assert done.returncode == 2
    assert "exits must end with the encoder's last layer, 3" in one_error(done.stderr)
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.exitz=1", "unknown config key 'exitz': did you mean 'exits'?"),
        ("--confg.exits=1", "unknown argument '--confg.exits=1'"),
        ("--config.exits=1,2,5", "last layer, 3"),
        ("--config.exits=1,2", "last layer, 3"),
        ("--config.exits=2,1,3", "exits must be ascending without repeats; got (2, 1, 3)"),
        ("--config.exits=0,3", "exits must be layer numbers from 1"),
        ("--config.method=swet", "unknown method 'swet': did you mean 'sweet'?"),
        ("--config.isolation=2", "isolation must be from 0 to 1"),
        ("--config.max_length=65", "set --config.max_length=64 or less"),
        ("--config.text_columns=txt", "unknown column 'txt': did you mean 'text'?"),
        ("--config.label_column=lable", "unknown column 'lable': did you mean 'label'?"),
        ("--config.data_files=absent.csv", "the data: 'absent.csv' does not exist"),
        ("--config.data_files=pkg://absent_package_x/a.csv", "pip install"),
        ("--config.train_size=3", "3 training rows are too few"),
        ("--config.checkpoint=./absent", "checkpoint './absent' is not a directory"),
        ("--config.checkpoint=absent/absent", "neither a local directory nor found on the hub"),
    ],
)
def test_a_bad_value_is_refused(refused, argument, words):
    assert words in refused(argument)


def test_a_platform_without_devices_is_refused(refused, monkeypatch):
    def no_devices():
        raise AssertionError  # as JAX does where CUDA is asked for and not there

    monkeypatch.setattr("jax.devices", no_devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert "no device with JAX_PLATFORMS='cuda': unset it, or name a platform" in refused()


def test_an_unknown_task_is_refused(refused):
    assert "unknown task 'mprc': did you mean 'mrpc'?" in refused(
        "--config.task=mprc", "--config.data_files="
    )


@pytest.mark.parametrize(
    ("train", "validation", "words"),
    [
        ("a,x\nb,x\n", "c,x\n", "all training rows have the label 'x'"),
        (
            "a,x\nb,y\n",
            "c,z\n",
            "the validation file: label 'z' (1 row, the text 'c') is not among the training labels",
        ),
        ("a,x\n,y\n", "c,x\n", "the training file: column 'text' is empty in row 2 (line 3) of"),
        ("a,x\n,y\n,y\n", "c,x\n", "and 1 more invalid rows: fill it"),
        ("a,x\nb,y\n", "c,\n", "the validation file: column 'label' is empty in row 1"),
        ("", "c,x\n", "the training file has no rows"),
        ("a,x\nb,y\n", "", "the validation file has no rows"),
    ],
)
def test_rows_that_will_not_do_are_refused(refused, tmp_path, train, validation, words):
    paths = []
    for name, body in (("train.csv", train), ("validation.csv", validation)):
        paths.append(tmp_path / name)
        paths[-1].write_text(f"text,label\n{body}")
    assert words in refused(f"--config.data_files={paths[0]},{paths[1]}")


def test_nan_in_text_is_refused(refused, tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [1.0, float("nan")], "label": ["x", "y"]}), path)
    assert "column 'text' holds values of type double, not text" in refused(
        f"--config.data_files={path}"
    )


def test_nothing_but_the_error_is_said_of_rows_that_repeat(refused, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"text {i % 30},{i % 2}\n" for i in range(60)))
    assert "3 training rows are too few" in refused(
        f"--config.data_files={path}", "--config.train_size=3"
    )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'; supported are bert, roberta, deberta"),
        ({"hidden_size": 32}, "do not fit its config: misshapen: "),
        ({"hidden_act": "softplus"}, "the activation 'softplus'"),
        (
            {"position_embedding_type": "relative_key"},
            "'relative_key'; only 'absolute' is",
        ),
        ({"num_attention_heads": 3}, "num_attention_heads"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(refused, altered, values, words):
    assert words in refused(f"--config.checkpoint={altered(**values)}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
    ],
)
def test_a_damaged_json_file_of_a_checkpoint_is_refused(refused, altered, name, content):
    folder = altered()
    (folder / name).write_text(content)
    assert str(folder) in refused(f"--config.checkpoint={folder}")


def test_a_tokenizer_without_padding_is_refused(refused, altered):
    folder = altered("tokenizer_config.json", pad_token=None)
    assert "pad" in refused(f"--config.checkpoint={folder}")


@pytest.mark.parametrize("keep", [0.0, 0.05, 0.5, 0.999])
def test_damaged_tensors_are_refused(refused, altered, keep):
    folder = altered()
    path = folder / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * keep))
    message = refused(f"--config.checkpoint={folder}")
    assert str(path) in message
    assert "damaged" in message


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_an_incomplete_checkpoint_is_refused(refused, altered, name):
    folder = altered()
    (folder / name).unlink()
    assert str(folder) in refused(f"--config.checkpoint={folder}")


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_workdir_that_cannot_be_written_to_is_refused(refused, tmp_path, below):
    file = tmp_path / "file"
    file.write_text("mine")
    workdir = file / below
    assert f"workdir '{workdir}' cannot be written to" in refused(f"--workdir={workdir}")
    assert file.read_text() == "mine"


def test_a_workdir_of_another_configuration_is_refused(refused, line, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / ".lock").touch()
    (workdir / "config.json").write_text(json.dumps({"epochs": 3, "data_sha256": ""}))
    message = refused("--config.epochs=2")
    assert "belongs to another configuration" in message
    assert "epochs is 3 there and 2 here" in message


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_workdir_with_an_unreadable_config_is_refused(refused, tmp_path, content):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / ".lock").touch()
    (workdir / "config.json").write_text(content)
    assert str(workdir / "config.json") in refused()


def test_a_workdir_in_use_is_refused(refused, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with (workdir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # the run must ask for the whole directory
        assert "is in use by another run" in refused()


def test_a_file_system_without_locks_is_refused(refused, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()

    def lacks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("sweet_jax.file_lock.fcntl.flock", lacks)
    assert "without locks (Function not implemented)" in refused()


def test_the_home_of_nobody_is_refused(refused):
    assert "~nobody.at.all/run: Could not determine home" in refused("--workdir=~nobody.at.all/run")


@pytest.mark.parametrize("missing", ["--config", "--workdir"])
def test_a_missing_argument_is_refused(line, missing, capsys):
    assert main(["main", *(a for a in line if not a.startswith(f"{missing}="))]) == 2
    assert "--config=FILE and --workdir=DIR" in one_error(capsys.readouterr().err)
