"""The grid on a real Ray of this machine: workers that die, cells that fail, a driver stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import cluster, grid
from experiments.options import make_parser
from experiments.records import read_study
from sweet_jax.errors import UserError
from sweet_jax.exits.outputs import ExitOutputs

ROOT = Path(__file__).parent.parent
METHODS = ("sweet", "early_exit", "multi_model")
CELLS = tuple(f"sst2-{method}" for method in METHODS)
pytestmark = pytest.mark.usefixtures("one_device_in_module")  # as many as the workers have


CLUSTER = """
from ray.cluster_utils import Cluster

node = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=node)
print("at", cluster.address, flush=True)
input()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def two_workers():
    """Address of a cluster of one node, where two cells of a CPU each run side by side.

    In a process of its own: Ray forks, which a process with jax's threads should not.
    """
    pytest.importorskip("ray")
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:  # waits for its end
        for line in process.stdout:
            if line.startswith("at "):
                yield line.split()[1]
                break
        else:
            pytest.fail("no Ray cluster was started")
        process.communicate("\n", timeout=60)


@pytest.fixture(scope="module")
def arguments(cell_options) -> list[str]:
    """Options of cells of 2 replicas and 28 steps, with a checkpoint after each fourth."""
    return [
        *(*cell_options, "--learning_rates=3e-3", "--train_size=70"),
        *("--set", "epochs=4", "--set", "batch_size=8", "--set", "checkpoint_every=4"),
    ]


def command(arguments: list[str], folder: Path) -> list[str]:
    return [*arguments, f"--output={folder / 'out'}", f"--workdir={folder / 'work'}"]


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
    return json.loads((folder / "work" / "manifest.json").read_text())


def outputs(folder: Path, name: str) -> Path:
    return folder / "work" / "outputs" / name


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
        assert not outputs(folder, name).exists()
        out, errors = process.communicate(timeout=240)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    return folder, name, step, [*lines, *out.splitlines(keepends=True)]


@pytest.mark.nightly
def test_a_killed_worker_s_cell_is_finished_and_every_cell_once(swept):
    folder, name, step, lines = swept
    states = manifest(folder)
    assert set(states) == set(CELLS)
    assert {state["state"] for state in states.values()} == {"done"}
    assert {n: state["attempts"] for n, state in states.items()} == {
        n: 2 if n == name else 1 for n in CELLS
    }
    assert 0 < step < 28  # of 7 batches in 4 epochs: the kill was in the middle
    text = "".join(lines)
    begun = re.findall(r"^(\S+) on \S+, process (\d+)$", text, re.MULTILINE)
    assert sorted(n for n, _ in begun) == sorted([*CELLS, name])
    assert len({pid for _, pid in begun}) == 4  # a process for each
    assert f"{name}: its worker died (WorkerCrashedError), started again\n" in text
    ended = re.findall(r"^\[(\d)/3\] (\S+) done, \d+ min left$", text, re.MULTILINE)
    assert [int(number) for number, _ in ended] == [1, 2, 3]
    assert sorted(n for _, n in ended) == sorted(CELLS)
    left = {p.name for p in (folder / "work").iterdir() if not p.name.startswith(".")}
    assert left == {"outputs", "manifest.json"}


@pytest.fixture(scope="module")
def local(arguments, tmp_path_factory) -> Path:
    """A folder with the same cells by the engine of this process."""
    folder = tmp_path_factory.mktemp("local")
    assert grid.run([*command(arguments, folder), "--set", "checkpoint_every=1000"]) == 0
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize("name", CELLS)
def test_records_equal_those_of_the_local_engine(swept, local, name):
    ours, theirs = (read_study(f / "out")[0][name] for f in (swept[0], local))
    assert ours.config == theirs.config
    for one, other in zip(ours.runs, theirs.runs, strict=True):
        assert one.scores == other.scores
        assert one.area == pytest.approx(other.area, abs=1e-6)
    results = [
        json.loads((outputs(f, name) / "results.json").read_text()) for f in (swept[0], local)
    ]
    for replica, other in zip(*(r["replicas"] for r in results), strict=True):
        np.testing.assert_allclose(replica["temperatures"], other["temperatures"], rtol=1e-3)
    for split in ("calibration", "validation"):
        logits = [
            ExitOutputs.load(outputs(folder, name) / f"{split}.npz").logits
            for folder in (swept[0], local)
        ]
        np.testing.assert_allclose(*logits, atol=1e-5)


@pytest.mark.nightly
def test_what_is_done_is_not_run_again(swept, arguments, monkeypatch, capsys):
    """Records are what counts: without a manifest, and with no Ray to connect to."""
    folder = swept[0]
    (folder / "work" / "manifest.json").unlink()
    full = [*command(arguments, folder), "--engine=ray", "--address=127.0.0.1:1"]
    assert grid.run(full) == 0
    assert {s["state"] for s in manifest(folder).values()} == {"done"}
    assert "[" not in capsys.readouterr().out


@pytest.mark.nightly
def test_stopped_it_saves_and_the_same_command_goes_on(two_workers, arguments, tmp_path, capsys):
    full = [*command(arguments, tmp_path), "--methods=sweet", "--set", "epochs=60"]
    full += ["--set", "checkpoint_every=1000"]  # of 420 steps: saved but by a stop
    log = tmp_path / "work" / CELLS[0] / "metrics.jsonl"

    def stop():
        while not log.exists():  # it is there when training begins
            if over.wait(0.01):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    over = threading.Event()
    thread = threading.Thread(target=stop)
    thread.start()
    try:
        status = grid.run([*full, "--engine=ray", f"--address={two_workers}"])
    finally:
        over.set()
        thread.join()
    assert status == 1
    said = "stopped with 0 of 1 cells ended; run the same command to resume"
    assert said in capsys.readouterr().err
    assert manifest(tmp_path) == {CELLS[0]: {"state": "missing"}}
    assert 0 < max(checkpoints(tmp_path, CELLS[0])) < 420
    assert grid.run(full) == 0  # with the other engine
    assert manifest(tmp_path)[CELLS[0]]["state"] == "done"


@pytest.mark.slow
def test_a_failed_cell_does_not_stop_the_others(arguments, tmp_path, monkeypatch):
    """On a Ray that the command starts, and ends."""
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    process = driver(
        [
            *(*command(arguments, tmp_path), "--tasks=rte,sst2", "--methods=sweet"),
            *("--set", "epochs=1", "--set", "checkpoint_every=1000"),
        ]
    )
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 1  # there are no rows of rte
    states = manifest(tmp_path)
    assert states["rte-sweet"]["state"] == "failed"
    assert states["rte-sweet"]["error"].startswith("AbsentFileError: ")
    assert states["rte-sweet"]["attempts"] == 1
    assert states["sst2-sweet"]["state"] == "done"
    assert "rte-sweet failed: AbsentFileError: " in errors
    assert "Traceback" not in errors
    assert all(re.match(r"(rte|sst2)-sweet on |\[[12]/2\] ", line) for line in out.splitlines())


@pytest.mark.nightly
def test_a_cell_whose_worker_dies_too_often_is_given_up(two_workers, arguments, tmp_path):
    full = [*command(arguments, tmp_path), "--methods=sweet", "--worker_retries=0"]
    process = driver([*full, f"--address={two_workers}"])
    try:
        begun = until(
            lambda: re.match(r"\S+ on \S+, process (\d+)", process.stdout.readline()), process
        )
        os.kill(int(begun[1]), signal.SIGKILL)
        errors = process.communicate(timeout=240)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1, errors
    assert manifest(tmp_path)[CELLS[0]] == {
        "state": "failed",
        "error": "its worker died (WorkerCrashedError) at attempt 1",
        "attempts": 1,
    }


def test_without_ray_there_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert grid.run([*command(arguments, tmp_path), "--engine=ray"]) == 2
    error = capsys.readouterr().err
    assert "pip install -e '.[cluster]'" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cpus_per_cell=0"], "--cpus_per_cell must be 1 or more; got 0"),
        (["--gpus_per_cell=-1"], "--gpus_per_cell must be 0 or more; got -1"),
        (["--worker_retries=-1"], "--worker_retries must be 0 or more; got -1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        cluster.check_options(make_parser().parse_args(flags))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://host:10001", "'ray://host:10001' is not HOST:PORT"),
        ("127.0.0.1:1", "no Ray cluster can be reached at '127.0.0.1:1'"),
        ("head", "no Ray cluster can be reached at 'head'"),
    ],
)
def test_addresses_of_no_cluster_get_one_line(arguments, tmp_path, address, message, capsys):
    pytest.importorskip("ray")  # which is imported, and not started
    full = [*command(arguments, tmp_path), "--engine=ray", f"--address={address}"]
    assert grid.run(full) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


BOX, HOST = {"CPU": 32.0, "GPU": 8.0}, {"CPU": 96.0, "TPU": 4.0}


@pytest.mark.parametrize(
    ("flags", "nodes", "wanted"),
    [
        ([], [{"CPU": 2.0}], (1, 0, 0)),
        ([], [{"CPU": 2.0}, BOX], (1, 1, 0)),
        ([], [HOST], (1, 0, 1)),
        ([], [BOX, HOST], (1, 1, 0)),
        (["--tpus_per_cell=4"], [BOX, HOST], (1, 0, 4)),
        (["--gpus_per_cell=0", "--cpus_per_cell=16"], [BOX], (16, 0, 0)),
        (["--gpus_per_cell=8", "--cpus_per_cell=33"], [BOX, HOST], None),
        (["--gpus_per_cell=1"], [{"CPU": 2.0}], None),
    ],
)
def test_a_cell_takes_whole_devices_of_one_node(flags, nodes, wanted):
    options = make_parser().parse_args(flags)
    if wanted is None:
        with pytest.raises(
            UserError, match=r"no node has the resources of a cell, .*; the largest have "
        ):
            cluster.required_resources(options, nodes)
    else:
        assert cluster.required_resources(options, nodes) == dict(
            zip(("CPU", "GPU", "TPU"), wanted, strict=True)
        )
