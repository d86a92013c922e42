"""The command line: its help, and its errors for bad input (one line, exit status 2)."""

import contextlib
import dataclasses
import errno
import fcntl
import importlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sweet_jax
from sweet_jax import cli
from sweet_jax.config import Config, describe_keys
from sweet_jax.config.key import key_metadata
from sweet_jax.help_text import wrap_help
from sweet_jax.main import main, parse

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("restored_logging")


@pytest.fixture
def run_arguments(options, tmp_path):
    """Returns the arguments of a valid run, with the workdir last."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(f"def get_config(): return {options!r}")
    return [f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]


@pytest.fixture
def error_message(run_arguments, tmp_path, capsys):
    """Returns a function that runs the command with more arguments and returns its error."""

    def run_refused(*arguments: str) -> str:
        before = read_files(tmp_path / "run")
        status = main(["main", *run_arguments, *arguments])
        captured = capsys.readouterr()
        assert status == 2
        assert captured.out == ""
        assert read_files(tmp_path / "run") == before
        return one_error(captured.err)

    return run_refused


@pytest.fixture
def altered_checkpoint(checkpoint, tmp_path):
    """Returns a function that copies the checkpoint and changes values in one of its JSON files."""

    def copy_altered(name: str = "config.json", **values) -> Path:
        folder = shutil.copytree(checkpoint, tmp_path / "altered")
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return folder

    return copy_altered


def one_error(stderr: str) -> str:
    """Returns the error message, after checking that stderr is its one line and no more."""
    assert stderr.endswith("\n")
    (message,) = stderr.splitlines()
    assert message.startswith("error: ")
    return message.removeprefix("error: ")


def read_files(folder: Path) -> dict[str, bytes] | None:
    """Returns the contents of all files below a folder, or None if there is no such folder."""
    if not folder.exists():
        return None
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_process(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def run_main(*arguments: str) -> subprocess.CompletedProcess:
    return run_process(sys.executable, "-m", "sweet_jax.main", *arguments)


def test_help_describes_every_config_key():
    process = run_main("--help")
    assert process.returncode == 0
    assert "--workdir" in process.stdout
    keys = {key.name: key for key in describe_keys()}
    for field in dataclasses.fields(Config):
        _, _, rest = process.stdout.partition(f"\n  {field.name} = ")
        key = keys[field.name]
        assert key.meaning
        assert key.allowed
        description = f"{key.default} {key.meaning} Allowed: {key.allowed} "
        assert " ".join(rest.split()).startswith(" ".join(description.split()))


def test_defaults_in_help_are_accepted_by_the_command_line():
    for key in describe_keys():
        if key.default in ('""', "none given"):
            continue
        argument = f"--config.{key.name}={key.default}"
        config, *_ = parse(["main", "--config=configs/glue.py", "--workdir=x", argument])
        assert getattr(config, key.name) == getattr(Config(), key.name)


def test_choices_in_help_are_the_accepted_values():
    described = {key.name: key for key in describe_keys()}
    for field in dataclasses.fields(Config):
        names = key_metadata(field).names(field.default)
        if names:
            allowed = [name or '""' for name in names]
            allowed += ["module:OBJECT"] if key_metadata(field).allows_reference else []
            assert described[field.name].allowed.split(", ") == allowed


def test_help_piped_to_head_is_no_error():
    shell = f"{sys.executable} -m sweet_jax.main --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    process = run_process("bash", "-c", shell)
    assert process.returncode == 0
    assert process.stderr == ""
    assert len(process.stdout.splitlines()) == 1


def test_console_script_sweet_jax_calls_cli_main():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["sweet-jax"].partition(":")
    assert getattr(importlib.import_module(module), function) is cli.main


def test_package_data_contains_every_file_of_the_package():
    """One of them is py.typed, without which type checkers ignore the annotations."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    globs = tool["setuptools"]["package-data"].items()
    packaged = {
        path
        for module, patterns in globs
        for pattern in patterns
        for path in ROOT.joinpath(*module.split(".")).glob(pattern)
    }
    present = {path for path in (ROOT / "sweet_jax").rglob("*.*") if path.is_file()}
    assert {path for path in present - packaged if path.suffix not in (".py", ".pyc")} == set()
    assert ROOT / "sweet_jax" / "py.typed" in packaged


@pytest.mark.parametrize("arguments", [["version"], ["--help"], [], ["train", "--help"]])
def test_help_and_version_do_not_import_jax(arguments):
    program = (
        "import sys; from sweet_jax.cli import main\n"
        f"try: status = main({arguments!r})\n"
        "except SystemExit as end: status = end.code\n"
        "sys.exit('jax was imported' if 'jax' in sys.modules else status)"
    )
    process = run_process(sys.executable, "-c", program)
    assert process.returncode == 0, process.stderr
    assert process.stdout


def test_version_command_prints_the_package_version(capsys):
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out == f"{sweet_jax.__version__}\n"


def test_help_of_console_script_names_all_commands(capsys):
    assert cli.main(["--help"]) == 0
    stdout = capsys.readouterr().out
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
        assert f"\n  {name} " in stdout


@pytest.mark.parametrize(
    "name", ["simulate", "predict", "serve", "export", "quantize", "recalibrate"]
)
def test_each_command_prints_its_usage(name, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main([name, "--help"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: sweet-jax {name} ")


@pytest.mark.parametrize("name", list(cli.COMMANDS))
@pytest.mark.parametrize("width", [80, 100, 200])
def test_help_is_as_wide_as_the_terminal_and_at_most_100_columns(name, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    with contextlib.suppress(SystemExit):
        cli.main([name, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= min(width, 100)
    if name != "version":
        assert max(map(len, lines)) > min(width, 100) - 5


def test_help_text_is_wrapped_again_within_its_columns(monkeypatch):
    """Short lines stay: only lines that were full in the source are joined to the next one."""
    monkeypatch.setenv("COLUMNS", "60")
    words = " ".join(f"word{number}" for number in range(60))
    texts = [
        "\n".join(
            [
                textwrap.fill(words, width),
                "A short line.",
                "",
                textwrap.fill(
                    words, width, initial_indent="  --name=X  ", subsequent_indent=" " * 12
                ),
                "  --other   short",
            ]
        )
        for width in (100, 60)
    ]
    assert wrap_help(texts[0]) == texts[1]


def test_train_command_prints_the_same_error_as_main(run_arguments, capsys):
    assert cli.main(["train", *run_arguments, "--config.exits=1,2"]) == 2
    error = one_error(capsys.readouterr().err)
    assert main(["main", *run_arguments, "--config.exits=1,2"]) == 2
    assert one_error(capsys.readouterr().err) == error
    assert "exits must end with the encoder's last layer, 3" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["simulate", "--run=absent"], "'absent' is not a finished run"),
        (["predict", "--modl=absent"], "unknown option '--modl': did you mean '--model'?"),
        (["quantize", "--model=absent"], "unknown option '--model': choose one of '--run'"),
        (["predict", "--model="], "--model is empty: set a value, or remove it"),
        (["serve", "--model", ""], "--model is empty: set a value, or remove it"),
        (["report", ""], "an argument is empty: set a value, or remove it"),
        (["simulate", "--run="], "--run is empty: set a value, or remove it"),
        (["predict", "--model=absent"], "pass --input=FILE and --output=FILE, or --measure"),
    ],
)
def test_invalid_command_is_refused_in_one_line(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in one_error(capsys.readouterr().err)


def test_interrupt_during_imports_is_reported_in_one_line(capsys, monkeypatch):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupt)
    assert cli.main(["report", "runs/a"]) == 1
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "ImportError from KeyboardInterrupt()"])
def test_interrupt_while_the_command_starts_is_reported_in_one_line(error):
    """Before `run_command` is imported; libraries in C raise errors of their own during imports."""
    program = (
        "import sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'numpy': raise {error}\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from sweet_jax.cli import main\n"
        "sys.exit(main(['version']))"
    )
    process = run_process(sys.executable, "-c", program)
    assert (process.returncode, process.stdout, process.stderr) == (1, "", "interrupted\n")


def test_process_exits_with_status_2_and_one_line(run_arguments, tmp_path):
    process = run_main(*run_arguments, "--config.exits=1,2")
    assert process.returncode == 2
    assert "exits must end with the encoder's last layer, 3" in one_error(process.stderr)
    assert process.stdout == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
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
def test_invalid_config_value_is_refused(error_message, argument, message):
    assert message in error_message(argument)


def test_platform_without_devices_is_refused(error_message, monkeypatch):
    def no_devices():
        raise AssertionError  # as JAX does if CUDA is requested but absent

    monkeypatch.setattr("jax.devices", no_devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert "no device with JAX_PLATFORMS='cuda': unset it, or name a platform" in error_message()


def test_unknown_task_is_refused(error_message):
    assert "unknown task 'mprc': did you mean 'mrpc'?" in error_message(
        "--config.task=mprc", "--config.data_files="
    )


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ("a,x\nb,x\n", "c,x\n", "all training rows have the label 'x'"),
        (
            "a,x\nb,y\n",
            "c,z\n",
            "validation.csv': label 'z' (1 row, the text 'c') is not among the training labels",
        ),
        ("a,x\n,y\n", "c,x\n", "the training file: column 'text' is empty in row 2 (line 3) of"),
        ("a,x\n,y\n,y\n", "c,x\n", "and 1 more invalid rows: fill it"),
        ("a,x\nb,y\n", "c,\n", "the validation file: column 'label' is empty in row 1"),
        ("", "c,x\n", "the training file has no rows"),
        ("a,x\nb,y\n", "", "the validation file has no rows"),
    ],
)
def test_invalid_rows_are_refused(error_message, tmp_path, train, validation, message):
    paths = []
    for name, body in (("train.csv", train), ("validation.csv", validation)):
        paths.append(tmp_path / name)
        paths[-1].write_text(f"text,label\n{body}")
    assert message in error_message(f"--config.data_files={paths[0]},{paths[1]}")


def test_numeric_text_column_is_refused(error_message, tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [1.0, float("nan")], "label": ["x", "y"]}), path)
    assert "column 'text' holds values of type double, not text" in error_message(
        f"--config.data_files={path}"
    )


def test_error_is_printed_without_a_warning_of_repeated_rows(error_message, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"text {i % 30},{i % 2}\n" for i in range(60)))
    assert "3 training rows are too few" in error_message(
        f"--config.data_files={path}", "--config.train_size=3"
    )


@pytest.mark.parametrize(
    ("values", "message"),
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
def test_unsupported_checkpoint_architecture_is_refused(
    error_message, altered_checkpoint, values, message
):
    assert message in error_message(f"--config.checkpoint={altered_checkpoint(**values)}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
    ],
)
def test_damaged_json_file_of_checkpoint_is_refused(
    error_message, altered_checkpoint, name, content
):
    folder = altered_checkpoint()
    (folder / name).write_text(content)
    assert str(folder) in error_message(f"--config.checkpoint={folder}")


def test_tokenizer_without_padding_token_is_refused(error_message, altered_checkpoint):
    folder = altered_checkpoint("tokenizer_config.json", pad_token=None)
    assert "pad" in error_message(f"--config.checkpoint={folder}")


@pytest.mark.parametrize("kept_share", [0.0, 0.05, 0.5, 0.999])
def test_truncated_tensors_are_refused(error_message, altered_checkpoint, kept_share):
    folder = altered_checkpoint()
    path = folder / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * kept_share))
    message = error_message(f"--config.checkpoint={folder}")
    assert str(path) in message
    assert "damaged" in message


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_incomplete_checkpoint_is_refused(error_message, altered_checkpoint, name):
    folder = altered_checkpoint()
    (folder / name).unlink()
    assert str(folder) in error_message(f"--config.checkpoint={folder}")


@pytest.mark.parametrize("subfolder", ["", "a/b"])
def test_unwritable_workdir_is_refused(error_message, tmp_path, subfolder):
    file = tmp_path / "file"
    file.write_text("mine")
    workdir = file / subfolder
    assert f"workdir '{workdir}' cannot be written to" in error_message(f"--workdir={workdir}")
    assert file.read_text() == "mine"


def test_workdir_of_another_configuration_is_refused(error_message, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / ".lock").touch()
    (workdir / "config.json").write_text(json.dumps({"epochs": 3, "data_sha256": ""}))
    message = error_message("--config.epochs=2")
    assert "belongs to another configuration" in message
    assert "epochs is 3 there and 2 here" in message


@pytest.mark.parametrize("content", ["{", "[]"])
def test_workdir_with_damaged_config_is_refused(error_message, tmp_path, content):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / ".lock").touch()
    (workdir / "config.json").write_text(content)
    assert str(workdir / "config.json") in error_message()


def test_workdir_in_use_is_refused(error_message, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with (workdir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # the run must ask for an exclusive lock
        assert "is in use by another run" in error_message()


def test_file_system_without_locks_is_refused(error_message, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("sweet_jax.file_lock.fcntl.flock", refuse)
    assert "without locks (Function not implemented)" in error_message()


def test_home_folder_of_unknown_user_is_refused(error_message):
    assert "~nobody.at.all/run: Could not determine home" in error_message(
        "--workdir=~nobody.at.all/run"
    )


@pytest.mark.parametrize("missing", ["--config", "--workdir"])
def test_missing_argument_is_refused(run_arguments, missing, capsys):
    assert main(["main", *(a for a in run_arguments if not a.startswith(f"{missing}="))]) == 2
    assert "--config=FILE and --workdir=DIR" in one_error(capsys.readouterr().err)
