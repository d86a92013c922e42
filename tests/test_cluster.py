"""The grid on a real Ray of this machine: workers that die, cells that fail, a driver stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import WORDS, write_checkpoint

from experiments import cluster, grid
from sweet_jax.config import UserError
from sweet_jax.exits.outputs import ExitOutputs

ROOT = Path(__file__).parent.parent
METHODS = ("sweet", "early_exit", "multi_model")
CELLS = tuple(f"sst2-{method}" for method in METHODS)


@pytest.fixture(scope="module")
def two_workers():
    """Address of a cluster of one node, where two cells of a CPU each run side by side."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(initialize_head=True, head_node_args=node)
        yield made.address
        made.shutdown()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """Options of cells of 2 replicas and 60 steps, with a checkpoint after each fifth."""
    data = tmp_path_factory.mktemp("glue")
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "shallow", layers=2)
    rng = np.random.default_rng(0)
    (data / "sst2").mkdir()
    for split, count in (("train", 80), ("validation", 40)):
        labels = rng.integers(0, 2, count)
        noise = [" ".join(rng.choice(WORDS[2:], rng.integers(1, 12))) for _ in labels]
        texts = [f"{WORDS[y]} {words}" for y, words in zip(labels, noise, strict=True)]
        table = pa.table({"sentence": texts, "label": labels, "idx": np.arange(count)})
        pq.write_table(table, data / "sst2" / f"{split}.parquet")
    return [
        *(f"--data_dir={data}", f"--checkpoint={checkpoint}", "--exits=1,2", "--tasks=sst2"),
        *("--seeds=0,1", "--learning_rates=3e-3", "--max_length=32", "--train_size=70"),
        *("--set", "epochs=8", "--set", "batch_size=8", "--set", "checkpoint_every=5"),
    ]


def command(arguments: list[str], folder: Path) -> list[str]:
    return [*arguments, f"--output={folder / 'out'}", f"--workdir={folder / 'work'}"]


def run_here(arguments: list[str]) -> int:
    return grid.main(grid.__doc__, grid.method_cells, lambda options, records: None, arguments)


def driver(arguments: list[str]) -> subprocess.Popen:
    """The command in a process of its own, which must not compute: it has no platform to."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.grid", "--engine=ray", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "none_that_exists"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def manifest(folder: Path) -> dict:
    return json.loads((folder / "out" / "manifest.json").read_text())


def record(folder: Path, name: str) -> dict:
    return json.loads((folder / "out" / "cells" / f"{name}.json").read_text())


def checkpoints(folder: Path, name: str) -> set[int]:
    """Steps of the whole checkpoints of a cell in progress."""
    found = (folder / "work" / name).glob("checkpoints/*/*")
    return {int(path.name) for path in found if path.name.isdigit()}


def until(happened, process: subprocess.Popen, seconds: float = 120.0):
    """What `happened` gives, once it gives anything, while the process runs."""
    deadline = time.monotonic() + seconds
    while not (found := happened()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


@pytest.fixture(scope="module")
def swept(two_workers, arguments, tmp_path_factory):
    """(folder, the driver's lines, step of the checkpoint at the kill) of a sweep one of whose
    workers is killed in the middle of its cell."""
    folder = tmp_path_factory.mktemp("swept")
    process = driver([*command(arguments, folder), f"--address={two_workers}"])
    lines: list[str] = []

    def place():  # lines come as cells begin: the first is killed
        lines.append(process.stdout.readline())
        return re.match(r"(\S+) on \S+, process (\d+)", lines[-1])

    try:
        name, pid = until(place, process).groups()
        step = max(until(lambda: checkpoints(folder, name), process))
        os.kill(int(pid), signal.SIGKILL)
        assert not (folder / "out" / "cells" / f"{name}.json").exists()
        out, errors = process.communicate(timeout=240)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    return folder, name, step, [*lines, *out.splitlines(keepends=True)]


def test_a_killed_worker_s_cell_is_finished_and_every_cell_once(swept):
    folder, name, step, lines = swept
    states = manifest(folder)
    assert set(states) == set(CELLS)
    assert {state["state"] for state in states.values()} == {"done"}
    assert {n: state["attempts"] for n, state in states.items()} == {
        n: 2 if n == name else 1 for n in CELLS
    }
    assert 0 < step < 56  # of 7 batches in 8 epochs: the kill was in the middle
    text = "".join(lines)
    begun = re.findall(r"^(\S+) on \S+, process (\d+)$", text, re.MULTILINE)
    assert sorted(n for n, _ in begun) == sorted([*CELLS, name])
    assert len({pid for _, pid in begun}) == 4  # a process for each
    assert f"{name}: its worker died (WorkerCrashedError), begun again\n" in text
    ended = re.findall(r"^\[(\d)/3\] (\S+) done, \d+ min left$", text, re.MULTILINE)
    assert [int(number) for number, _ in ended] == [1, 2, 3]
    assert sorted(n for _, n in ended) == sorted(CELLS)
    assert not [p for p in (folder / "work").iterdir() if not p.name.startswith(".")]


@pytest.fixture(scope="module")
def local(arguments, tmp_path_factory) -> Path:
    """The same cells by the engine of this process, with a command that is run to its end."""
    folder = tmp_path_factory.mktemp("local")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "experiments.grid", *command(arguments, folder)]
    subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name", CELLS)
def test_records_equal_those_of_the_local_engine(swept, local, name):
    ours, theirs = record(swept[0], name), record(local, name)
    assert ours.pop("timing").keys() == theirs.pop("timing").keys()
    assert ours["config"] == theirs["config"]
    for replica, other in zip(ours["replicas"], theirs["replicas"], strict=True):
        scores = [[e["score"] for e in r["individual"]] for r in (replica, other)]
        assert scores[0] == scores[1]
        assert replica["area"] == pytest.approx(other["area"], abs=1e-6)
        np.testing.assert_allclose(replica["temperatures"], other["temperatures"], rtol=1e-3)
    for split in ("calibration", "validation"):
        logits = [
            ExitOutputs.load(folder / "out" / "outputs" / name / f"{split}.npz").logits
            for folder in (swept[0], local)
        ]
        np.testing.assert_allclose(*logits, atol=1e-5)


def test_what_is_done_is_not_run_again(swept, arguments, monkeypatch, capsys):
    """Records are what counts: without a manifest, and with no Ray to connect to."""
    folder = swept[0]
    (folder / "out" / "manifest.json").unlink()
    full = [*command(arguments, folder), "--engine=ray", "--address=127.0.0.1:1"]
    assert run_here(full) == 0
    assert {s["state"] for s in manifest(folder).values()} == {"done"}
    assert "[" not in capsys.readouterr().out


def test_stopped_it_saves_and_the_same_command_goes_on(two_workers, arguments, local, tmp_path):
    full = [*command(arguments, tmp_path), f"--address={two_workers}", "--methods=sweet"]
    full += ["--set", "checkpoint_every=1000"]  # saves none but when it is stopped
    process = driver(full)
    try:
        log = tmp_path / "work" / CELLS[0] / "metrics"
        until(lambda: log.parent.exists() and any(log.parent.rglob("*events*")), process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert "the same command goes on from there" in errors
    assert manifest(tmp_path) == {CELLS[0]: {"state": "missing"}}
