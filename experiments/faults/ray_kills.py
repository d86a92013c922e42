"""Kills processes of a grid on Ray: the worker that runs a cell, or the driver."""

import contextlib
import dataclasses
import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.faults.compare import differing_bits
from experiments.faults.inputs import RECIPE, labelled_texts, write_inputs
from experiments.faults.kills import MAX_KILLS, MAX_SECONDS, KillLog, make_record
from experiments.faults.launch import ROOT
from experiments.faults.phases import Watch
from experiments.faults.plans import phases_ahead, plan_kill, wait_for_plan
from experiments.faults.reference import Reference, make_setup, run_undisturbed

_CELL = "sst2-sweet"
_DRIVER = 0.2  # share of the kills that hit the driver
_EMPTY_CACHE = 0.3  # share of the runs that start with an empty compilation cache
_STARTED = re.compile(rf"^{_CELL} on \S+, process (\d+)$", re.MULTILINE)
_CLUSTER = """
from ray.cluster_utils import Cluster

node = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=node)
print("at", cluster.address, cluster.head_node.get_session_dir_path(), flush=True)
input()
cluster.shutdown()
"""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Describes a Ray cluster on this machine."""

    address: str
    logs: Path  # folder
    cache: Path  # folder of its workers' compiled programs


@dataclasses.dataclass(frozen=True)
class CellWatch(Watch):
    """Watches a cell of the grid, whose directory is removed after its outputs are copied."""

    def phase(self) -> str:
        """Returns the phase, "report" from the copy of the outputs until the worker ends."""
        finished = self.workdir.parent / "outputs" / _CELL / "results.json"
        return "report" if finished.exists() else super().phase()


@contextlib.contextmanager
def start_cluster(cache: Path) -> Iterator[Cluster]:
    """Runs a cluster of one node, in a process, until the block ends.

    Raises RuntimeError if it does not start.
    """
    environment = os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", _CLUSTER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("at "):
                _, address, session = line.split()
                yield Cluster(address, Path(session) / "logs", cache)
                break
        else:
            raise RuntimeError("the Ray cluster did not start")
        process.communicate("\n", timeout=120)


@contextlib.contextmanager
def started_driver(cluster: Cluster, inputs: Path, folder: Path) -> Iterator[subprocess.Popen]:
    """Starts the command of the grid, and kills it at the end of the block.

    Its output goes to FOLDER/driver.out and FOLDER/driver.err.
    """
    own_options = {"task", "exits", "text_columns", "learning_rates", "train_size", "max_length"}
    command = [sys.executable, "-m", "experiments.grid", "--engine=ray"]
    command += [f"--address={cluster.address}", "--worker_retries=1000", "--retry"]
    command += [f"--data_dir={inputs / 'glue'}", f"--checkpoint={inputs / 'checkpoint'}"]
    command += ["--tasks=sst2", "--methods=sweet", "--seeds=0"]
    for key in ("exits", "learning_rates"):
        command.append(f"--{key}={','.join(map(str, RECIPE[key]))}")
    command += [f"--{key}={RECIPE[key]}" for key in ("train_size", "max_length")]
    command += [f"--set={key}={_format(v)}" for key, v in RECIPE.items() if key not in own_options]
    command += [f"--output={folder / 'out'}", f"--workdir={folder / 'work'}"]
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "RAY_USAGE_STATS_ENABLED": "0"}
    with (folder / "driver.out").open("w") as output, (folder / "driver.err").open("w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=errors)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _format(value: Any) -> str:
    """Returns a value as --set takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def write_rows(inputs: Path) -> None:
    """Writes learnable rows as the parquet files of a GLUE task."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = inputs / "glue" / "sst2"
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, seed in (("train", 144, 0), ("validation", 36, 1)):
        texts, labels = zip(*labelled_texts(count, seed), strict=True)
        table = pa.table({"sentence": texts, "label": labels, "idx": range(count)})
        pq.write_table(table, folder / f"{split}.parquet")


def run_undisturbed_grid(cluster: Cluster, inputs: Path, folder: Path) -> None:
    """Runs the undisturbed grid FOLDER/whole, unless it exists.

    Raises RuntimeError if it fails.
    """
    run = folder / "whole"
    if (run / "work" / "outputs" / _CELL / "results.json").exists():
        return
    shutil.rmtree(run, ignore_errors=True)
    with started_driver(cluster, inputs, run) as process:
        process.wait(900)
    if process.returncode:
        raise RuntimeError(f"the undisturbed grid failed: {(run / 'driver.err').read_text()}")


def _workers(folder: Path) -> list[int]:
    """Returns the ids of the processes in which a driver has started its cell."""
    text = (folder / "driver.out").read_text()
    return [int(pid) for pid in _STARTED.findall(text)]


def _errors(cluster: Cluster, pid: int) -> Path:
    """Returns the file with a worker's stderr; it does not exist if Ray has written none."""
    return next(cluster.logs.glob(f"worker-*-{pid}.err"), cluster.logs / "none")


def _differing(one: Path, other: Path) -> tuple[int, list[str]]:
    """Returns the number of bits compared in two grids, and what differs."""
    runs = [folder / "work" / "outputs" / _CELL for folder in (one, other)]
    bits, differences = differing_bits(*runs)
    scores = [(folder / "out" / "scores.csv").read_bytes() for folder in (one, other)]
    if scores[0] != scores[1]:
        differences.append(f"scores.csv: {8 * max(map(len, scores))}")
    return bits + 8 * len(scores[0]), differences


def run_round(
    cluster: Cluster, mode: str, number: int, folder: Path, seed: int, hits: Counter
) -> dict[str, Any]:
    """Kills a grid of one cell until it ends by itself; returns the record of all its kills.

    cluster: where it runs. The other arguments are as for `kills.run_round`. Raises RuntimeError if
    the command fails.
    """
    inputs = folder.parent / "inputs"
    write_inputs(inputs)
    write_rows(inputs)
    reference = run_undisturbed("single", make_setup("single", folder.parent), folder.parent)
    run_undisturbed_grid(cluster, inputs, folder)
    run, rng = folder / f"run-{seed}-{number}", random.Random(f"{seed}/{mode}/{number}")
    if cold := rng.random() < _EMPTY_CACHE:
        shutil.rmtree(cluster.cache, ignore_errors=True)
    log = KillLog(folder / f"{run.name}-kills.jsonl")
    while True:
        with started_driver(cluster, inputs, run) as process:
            kill: dict[str, Any] | None = {"victims": []}
            while kill is not None and kill["victims"] != ["driver"]:
                kill = None
                if len(log.read()) < MAX_KILLS:
                    phases = hits + log.phases()
                    kill = _kill_next(rng, cluster, run, process, reference, phases)
                if kill is not None:
                    log.add(kill)
                    print(f"{mode} {number}: killed {kill}", flush=True)
            if kill is None:
                process.wait(MAX_SECONDS)
                break
    if process.returncode:
        raise RuntimeError(f"{run} did not resume: {(run / 'driver.err').read_text()[-2000:]}")
    bits, differences = _differing(folder / "whole", run)
    record = make_record(mode, number, cold, log, bits, differences, left=[])
    if not differences:
        shutil.rmtree(run)
        log.path.unlink(missing_ok=True)
    return record


def _kill_next(
    rng: random.Random,
    cluster: Cluster,
    run: Path,
    process: subprocess.Popen,
    reference: Reference,
    hits: Counter,
) -> dict[str, Any] | None:
    """Kills the next worker of the cell, or its driver, at a moment that is chosen for the worker.

    Args:
      rng: generator of random numbers.
      cluster: where the grid runs.
      run: folder of the grid.
      process: the driver.
      reference: the undisturbed run.
      hits: number of earlier kills in each phase.

    Returns:
      The record of the kill, or None if the worker or the driver has ended before.

    """
    start, before = time.time(), len(_workers(run))
    while len(workers := _workers(run)) == before:
        if process.poll() is not None:
            return None
        time.sleep(0.02)
    pid, cell = workers[-1], run / "work" / _CELL
    errors = _errors(cluster, pid)
    watch = CellWatch(cell, start, errors, reference.last_step, reference.total)
    plan = wait_for_plan(
        functools.partial(plan_kill, rng, hits, reference),
        phases_ahead(cell, reference.last_step),
        watch,
        lambda: _is_alive(pid) and process.poll() is None,
    )
    if plan is None:
        return None
    victim = "driver" if rng.random() < _DRIVER else "worker"
    if not _is_alive(pid):
        return None
    if victim == "driver":
        process.send_signal(signal.SIGKILL)
        process.wait()
    else:
        os.kill(pid, signal.SIGKILL)
        while _is_alive(pid):
            time.sleep(0.002)
    return {"phase": watch.phase(), "victims": [victim], "aimed": plan.phase}


def _is_alive(pid: int) -> bool:
    """Returns whether a process exists and is neither a zombie nor dead."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
