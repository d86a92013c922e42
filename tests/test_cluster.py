"""The grid on a local Ray cluster: killed workers, failed cells and a stopped driver."""

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
CLUSTER_PROGRAM = """
from ray.cluster_utils import Cluster

node = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=node)
print("at", cluster.address, flush=True)
input()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster_address():
    """Starts a cluster of one node, on which two cells of one CPU run side by side.

    It has its own process, since Ray forks, which a process with JAX's threads should not do.
    """
    pytest.importorskip("ray")
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER_PROGRAM],
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:  # waits until it ends
        for line in process.stdout:
            if line.startswith("at "):
                yield line.split()[1]
                break
        else:
            pytest.fail("no Ray cluster was started")
        process.communicate("\n", timeout=60)


@pytest.fixture(scope="module")
def arguments(cell_options) -> list[str]:
    """Returns options of cells of 2 replicas and 28 steps, with a checkpoint every 4 steps."""
    return [
        *(*cell_options, "--learning_rates=3e-3", "--train_size=70"),
        *("--set", "epochs=4", "--set", "batch_size=8", "--set", "checkpoint_every=4"),
    ]


def with_folders(arguments: list[str], folder: Path) -> list[str]:
    return [*arguments, f"--output={folder / 'out'}", f"--workdir={folder / 'work'}"]


def start_driver(arguments: list[str]) -> subprocess.Popen:
    """Starts the command in a process without a platform, since a driver must not compute."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.grid", "--engine=ray", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "none_that_exists"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / "work" / "manifest.json").read_text())


def outputs_folder(folder: Path, name: str) -> Path:
    return folder / "work" / "outputs" / name


def checkpoint_steps(folder: Path, name: str) -> set[int]:
    """Returns the steps of the complete checkpoints of a cell in progress."""
    paths = (folder / "work" / name).glob("checkpoints/*/*")
    return {int(path.name) for path in paths if path.name.isdigit()}


def wait_for(condition, process: subprocess.Popen, seconds: float = 120.0):
    """Returns what `condition` returns once that is true; fails if the process ends before."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return result


@pytest.fixture(scope="module")
def interrupted_sweep(cluster_address, arguments, tmp_path_factory):
    """Runs a sweep, one of whose workers is killed in the middle of its cell.

    Returns (folder, name of that cell, step of its newest checkpoint then, lines of the driver).
    """
    folder = tmp_path_factory.mktemp("swept")
    process = start_driver([*with_folders(arguments, folder), f"--address={cluster_address}"])
    lines: list[str] = []

    def read_start():  # a line per started cell, the first of which is killed
        lines.append(process.stdout.readline())
        return re.match(r"(\S+) on \S+, process (\d+)", lines[-1])

    try:
        name, pid = wait_for(read_start, process).groups()
        step = max(wait_for(lambda: checkpoint_steps(folder, name), process))
        os.kill(int(pid), signal.SIGKILL)
        assert not outputs_folder(folder, name).exists()
        stdout, errors = process.communicate(timeout=240)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    return folder, name, step, [*lines, *stdout.splitlines(keepends=True)]


@pytest.mark.nightly
def test_cell_of_killed_worker_is_resumed_and_every_cell_ends_once(interrupted_sweep):
    folder, name, step, lines = interrupted_sweep
    states = read_manifest(folder)
    assert set(states) == set(CELLS)
    assert {state["state"] for state in states.values()} == {"done"}
    assert {n: state["attempts"] for n, state in states.items()} == {
        n: 2 if n == name else 1 for n in CELLS
    }
    assert 0 < step < 28  # of 7 batches in 4 epochs: the kill was in the middle
    stdout = "".join(lines)
    started = re.findall(r"^(\S+) on \S+, process (\d+)$", stdout, re.MULTILINE)
    assert sorted(n for n, _ in started) == sorted([*CELLS, name])
    assert len({pid for _, pid in started}) == 4  # one for each start
    assert f"{name}: its worker died (WorkerCrashedError), started again\n" in stdout
    ended = re.findall(r"^\[(\d)/3\] (\S+) done, \d+ min left$", stdout, re.MULTILINE)
    assert [int(number) for number, _ in ended] == [1, 2, 3]
    assert sorted(n for _, n in ended) == sorted(CELLS)
    remaining = {p.name for p in (folder / "work").iterdir() if not p.name.startswith(".")}
    assert remaining == {"outputs", "manifest.json"}


@pytest.fixture(scope="module")
def local_sweep(arguments, tmp_path_factory) -> Path:
    """Runs the same cells with the local engine; returns their folder."""
    folder = tmp_path_factory.mktemp("local")
    assert grid.run([*with_folders(arguments, folder), "--set", "checkpoint_every=1000"]) == 0
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize("name", CELLS)
def test_ray_records_equal_those_of_the_local_engine(interrupted_sweep, local_sweep, name):
    folders = (interrupted_sweep[0], local_sweep)
    ray_record, local_record = (read_study(folder / "out")[0][name] for folder in folders)
    assert ray_record.config == local_record.config
    for ray_run, local_run in zip(ray_record.runs, local_record.runs, strict=True):
        assert ray_run.scores == local_run.scores
        assert ray_run.area == pytest.approx(local_run.area, abs=1e-6)
    results = [
        json.loads((outputs_folder(folder, name) / "results.json").read_text())
        for folder in folders
    ]
    for actual, expected in zip(*(r["replicas"] for r in results), strict=True):
        np.testing.assert_allclose(actual["temperatures"], expected["temperatures"], rtol=1e-3)
    for split in ("calibration", "validation"):
        logits = [
            ExitOutputs.load(outputs_folder(folder, name) / f"{split}.npz").logits
            for folder in folders
        ]
        np.testing.assert_allclose(*logits, atol=1e-5)


@pytest.mark.nightly
def test_finished_cells_are_not_rerun(interrupted_sweep, arguments, capsys):
    """The records alone tell that cells are finished: there is neither a manifest nor a Ray."""
    folder = interrupted_sweep[0]
    (folder / "work" / "manifest.json").unlink()
    full_command = [*with_folders(arguments, folder), "--engine=ray", "--address=127.0.0.1:1"]
    assert grid.run(full_command) == 0
    assert {state["state"] for state in read_manifest(folder).values()} == {"done"}
    assert "[" not in capsys.readouterr().out


@pytest.mark.nightly
def test_stopped_driver_saves_and_the_same_command_resumes(
    cluster_address, arguments, tmp_path, capsys
):
    full_command = [*with_folders(arguments, tmp_path), "--methods=sweet", "--set", "epochs=60"]
    full_command += ["--set", "checkpoint_every=1000"]  # beyond its 420 steps: only a stop saves
    log = tmp_path / "work" / CELLS[0] / "metrics.jsonl"

    def stop():
        while not log.exists():  # training creates it
            if finished.wait(0.01):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    finished = threading.Event()
    thread = threading.Thread(target=stop)
    thread.start()
    try:
        status = grid.run([*full_command, "--engine=ray", f"--address={cluster_address}"])
    finally:
        finished.set()
        thread.join()
    assert status == 1
    message = "stopped with 0 of 1 cells ended; run the same command to resume"
    assert message in capsys.readouterr().err
    assert read_manifest(tmp_path) == {CELLS[0]: {"state": "missing"}}
    assert 0 < max(checkpoint_steps(tmp_path, CELLS[0])) < 420
    assert grid.run(full_command) == 0  # with the other engine
    assert read_manifest(tmp_path)[CELLS[0]]["state"] == "done"


@pytest.mark.nightly
def test_failed_cell_does_not_stop_the_others(arguments, tmp_path, monkeypatch):
    """The command starts and ends its own Ray."""
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    process = start_driver(
        [
            *(*with_folders(arguments, tmp_path), "--tasks=rte,sst2", "--methods=sweet"),
            *("--set", "epochs=1", "--set", "checkpoint_every=1000"),
        ]
    )
    stdout, errors = process.communicate(timeout=240)
    assert process.returncode == 1  # there are no rows of rte
    states = read_manifest(tmp_path)
    assert states["rte-sweet"]["state"] == "failed"
    assert states["rte-sweet"]["error"].startswith("AbsentFileError: ")
    assert states["rte-sweet"]["attempts"] == 1
    assert states["sst2-sweet"]["state"] == "done"
    assert "rte-sweet failed: AbsentFileError: " in errors
    assert "Traceback" not in errors
    assert all(re.match(r"(rte|sst2)-sweet on |\[[12]/2\] ", line) for line in stdout.splitlines())


@pytest.mark.nightly
def test_cell_fails_when_its_worker_dies_too_often(cluster_address, arguments, tmp_path):
    full_command = [*with_folders(arguments, tmp_path), "--methods=sweet", "--worker_retries=0"]
    process = start_driver([*full_command, f"--address={cluster_address}"])
    try:
        started = wait_for(
            lambda: re.match(r"\S+ on \S+, process (\d+)", process.stdout.readline()), process
        )
        os.kill(int(started[1]), signal.SIGKILL)
        errors = process.communicate(timeout=240)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1, errors
    assert read_manifest(tmp_path)[CELLS[0]] == {
        "state": "failed",
        "error": "its worker died (WorkerCrashedError) at attempt 1",
        "attempts": 1,
    }


def test_missing_ray_is_reported_in_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert grid.run([*with_folders(arguments, tmp_path), "--engine=ray"]) == 2
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
def test_invalid_resource_options_are_refused(flags, message):
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
def test_unreachable_cluster_address_is_refused_in_one_line(
    arguments, tmp_path, address, message, capsys
):
    pytest.importorskip("ray")  # it is imported but not started
    full_command = [*with_folders(arguments, tmp_path), "--engine=ray", f"--address={address}"]
    assert grid.run(full_command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


GPU_NODE, TPU_NODE = {"CPU": 32.0, "GPU": 8.0}, {"CPU": 96.0, "TPU": 4.0}


@pytest.mark.parametrize(
    ("flags", "nodes", "expected"),
    [
        ([], [{"CPU": 2.0}], (1, 0, 0)),
        ([], [{"CPU": 2.0}, GPU_NODE], (1, 1, 0)),
        ([], [TPU_NODE], (1, 0, 1)),
        ([], [GPU_NODE, TPU_NODE], (1, 1, 0)),
        (["--tpus_per_cell=4"], [GPU_NODE, TPU_NODE], (1, 0, 4)),
        (["--gpus_per_cell=0", "--cpus_per_cell=16"], [GPU_NODE], (16, 0, 0)),
        (["--gpus_per_cell=8", "--cpus_per_cell=33"], [GPU_NODE, TPU_NODE], None),
        (["--gpus_per_cell=1"], [{"CPU": 2.0}], None),
    ],
)
def test_cell_requires_whole_devices_of_one_node(flags, nodes, expected):
    options = make_parser().parse_args(flags)
    if expected is None:
        with pytest.raises(
            UserError, match=r"no node has the resources of a cell, .*; the largest have "
        ):
            cluster.required_resources(options, nodes)
    else:
        assert cluster.required_resources(options, nodes) == dict(
            zip(("CPU", "GPU", "TPU"), expected, strict=True)
        )
