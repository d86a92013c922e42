"""Tests of commands whose standard output is closed or full, or lacks some characters."""

import contextlib
import os
import subprocess
import sys

import pytest

from sweet_jax import cli

# The train command, with a training that logs a non-ASCII character and prints a line.
TRAINING = """
import logging, sys, sweet_jax.main
from sweet_jax.standard_output import print_text

def train(command):
    for _ in range(2):
        logging.getLogger("sweet_jax").info("classes: \\u00e9")
        print_text("done")

sweet_jax.main.parse = lambda argv: None
sweet_jax.main._train = train
sys.exit(sweet_jax.main.main(["main"]))
"""


@contextlib.contextmanager
def closed_pipe():
    """Yields the writing end of a pipe whose reading end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def run_python(*arguments, stdout=subprocess.PIPE, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_training_continues_when_stdout_is_closed():
    with closed_pipe() as pipe:
        process = run_python("-c", TRAINING, stdout=pipe)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_full_disk_is_reported_in_one_line():
    with open("/dev/full", "w") as full:
        process = run_python("-c", TRAINING, stdout=full)
    assert process.returncode == 1
    assert process.stderr.startswith("error: files cannot be written (No space left on device)")
    assert process.stderr.count("\n") == 1


def test_characters_outside_the_output_encoding_are_escaped():
    process = run_python("-c", TRAINING, PYTHONIOENCODING="ascii")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == "classes: \\xe9\ndone\n" * 2


@pytest.mark.parametrize("argument", ["version", "--help"])
def test_command_succeeds_when_stdout_is_closed(argument):
    with closed_pipe() as pipe:
        process = run_python("-m", "sweet_jax.cli", argument, stdout=pipe)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "version"])
def test_help_works_without_docstrings(name, capsys, monkeypatch):
    """As under PYTHONOPTIMIZE=2."""
    monkeypatch.setattr(f"{cli.COMMANDS[name][0]}.__doc__", None)
    with pytest.raises(SystemExit) as raised:
        cli.main([name, "--help"])
    assert raised.value.code == 0
    assert "None" not in capsys.readouterr().out.partition("options:")[0]
