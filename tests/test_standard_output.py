"""Commands whose standard output is closed or full, or cannot encode every character."""

import contextlib
import os
import subprocess
import sys

import pytest

from sweet_jax import cli

# As the command does, with a training that logs a letter and prints a line.
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
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def run(*arguments, stdout=subprocess.PIPE, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_a_training_goes_on_when_nobody_reads_it():
    with closed_pipe() as pipe:
        done = run("-c", TRAINING, stdout=pipe)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_line_beside_the_log():
    with open("/dev/full", "w") as full:
        done = run("-c", TRAINING, stdout=full)
    assert done.returncode == 1
    assert done.stderr.startswith("error: files cannot be written (No space left on device)")
    assert done.stderr.count("\n") == 1


def test_letters_that_the_output_lacks_are_escaped():
    done = run("-c", TRAINING, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "classes: \\xe9\ndone\n" * 2


@pytest.mark.parametrize("argument", ["version", "--help"])
def test_what_nobody_reads_is_no_error(argument):
    with closed_pipe() as pipe:
        done = run("-m", "sweet_jax.cli", argument, stdout=pipe)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "version"])
def test_help_does_without_docstrings(name, capsys, monkeypatch):
    """As under PYTHONOPTIMIZE=2."""
    monkeypatch.setattr(f"{cli.COMMANDS[name][0]}.__doc__", None)
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert "None" not in capsys.readouterr().out.partition("options:")[0]
