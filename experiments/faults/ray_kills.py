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

from experiments.faults import kills
from experiments.faults.compare import count_bits, differing_bits
from experiments.faults.inputs import RECIPE, labelled_texts, write_inputs
from experiments.faults.kills import Reference, await_kill, phases_ahead, plan_kill
from experiments.faults.launch import ROOT
from experiments.faults.phases import Watch

_CELL = "sst2-sweet"
_DRIVER = 0.2  # share of the kills that end the driver
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
    """Holds where a Ray cluster of this machine is, and its logs."""

    address: str
    logs: Path
    cache: Path  # of its workers' compiled programs


@dataclasses.dataclass(frozen=True)
class CellWatch(Watch):
    """Watches a cell, whose directory goes when its outputs are copied."""

    def phase(self) -> str:
        """Returns the phase; "report" from the outputs on, until the worker ends."""
        finished = self.workdir.parent / "outputs" / _CELL / "results.json"
        return "report" if finished.exists() else super().phase()


@contextlib.contextmanager
def cluster(cache: Path) -> Iterator[Cluster]:
    """Runs a cluster of one node in a process of its own until the block ends."""
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
            raise RuntimeError("no Ray cluster was started")
        process.communicate("\n", timeout=120)


@contextlib.contextmanager
def driver(where: Cluster, inputs: Path, folder: Path) -> Iterator[subprocess.Popen]:
    """Runs the command of the grid; its output goes to FOLDER/driver.out and .err."""
    special = {"task", "exits", "text_columns", "learning_rates", "train_size", "max_length"}
    command = [sys.executable, "-m", "experiments.grid", "--engine=ray"]
    command += [f"--address={where.address}", "--worker_retries=1000", "--retry"]
    command += [f"--data_dir={inputs / 'glue'}", f"--checkpoint={inputs / 'checkpoint'}"]
    command += ["--tasks=sst2", "--methods=sweet", "--seeds=0"]
    for key in ("exits", "learning_rates"):
        command.append(f"--{key}={','.join(map(str, RECIPE[key]))}")
    command += [f"--{key}={RECIPE[key]}" for key in ("train_size", "max_length")]
    command += [f"--set={key}={_json(v)}" for key, v in RECIPE.items() if key not in special]
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


def _json(value: Any) -> str:
    return (
        {True: "true", False: "false"}.get(value, str(value))
        if isinstance(value, bool)
        else str(value)
    )


def write_rows(inputs: Path) -> None:
    """Writes the rows as the parquet files of a GLUE task."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = inputs / "glue" / "sst2"
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, seed in (("train", 144, 0), ("validation", 36, 1)):
        texts, labels = zip(*labelled_texts(count, seed), strict=True)
        table = pa.table({"sentence": texts, "label": labels, "idx": range(count)})
        pq.write_table(table, folder / f"{split}.parquet")


def undisturbed(where: Cluster, inputs: Path, folder: Path) -> None:
    """Runs the undisturbed grid FOLDER/whole where it is missing."""
    run = folder / "whole"
    if (run / "work" / "outputs" / _CELL / "results.json").exists():
        return
    shutil.rmtree(run, ignore_errors=True)
    with driver(where, inputs, run) as process:
        process.wait(900)
    if process.returncode:
        raise RuntimeError(f"the undisturbed grid failed: {(run / 'driver.err').read_text()}")


def _workers(folder: Path) -> list[int]:
    """Returns the processes that a driver began its cell in."""
    text = (folder / "driver.out").read_text()
    return [int(pid) for pid in _STARTED.findall(text)]


def _errors(where: Cluster, pid: int) -> Path:
    """Returns the file of a worker's standard error."""
    return next(where.logs.glob(f"worker-*-{pid}.err"), Path("none"))


def _differing(one: Path, other: Path) -> tuple[int, list[str]]:
    """Returns the bits that were compared of two grids, and what differs."""
    runs = [folder / "work" / "outputs" / _CELL for folder in (one, other)]
    bits, names = differing_bits(*runs)
    scores = [(folder / "out" / "scores.csv").read_bytes() for folder in (one, other)]
    if scores[0] != scores[1]:
        names.append(f"scores.csv: {8 * max(map(len, scores))}")
    return bits + 8 * len(scores[0]), names


def run_round(where: Cluster, mode: str, number: int, folder: Path, seed: int, hit: Counter):
    """Kills a grid of one cell until it ends by itself; returns the record of all its kills.

    Raises RuntimeError if the command fails.
    """
    inputs = folder.parent / "inputs"
    write_inputs(inputs)
    write_rows(inputs)
    known = kills.undisturbed("single", kills.setup_of("single", folder.parent), folder.parent)
    undisturbed(where, inputs, folder)
    run, rng = folder / f"run-{seed}-{number}", random.Random(f"{seed}/{mode}/{number}")
    if cold := rng.random() < 0.3:
        shutil.rmtree(where.cache, ignore_errors=True)
    log = kills.KillLog(folder / f"{run.name}-kills.jsonl")
    while True:
        with driver(where, inputs, run) as process:
            killed: dict[str, Any] | None = {"victims": []}
            while killed is not None and killed["victims"] != ["driver"]:
                killed = None
                if len(log.read()) < kills.MOST:
                    killed = _next_kill(rng, where, run, process, known, hit + log.phases())
                if killed is not None:
                    log.add(killed)
                    print(f"{mode} {number}: killed {killed}", flush=True)
            if killed is None:
                process.wait(kills.LAST)
                break
    if process.returncode:
        raise RuntimeError(f"{run} did not resume: {(run / 'driver.err').read_text()[-2000:]}")
    bits, names = _differing(folder / "whole", run)
    record = {"mode": mode, "round": number, "cold": cold, "kills": log.read(), "bits": bits}
    record |= {"differing": count_bits(names), "names": names[:20], "left": []}
    print(f"{mode} {number}: {record['differing']} of {bits} bits differ {names[:5]}", flush=True)
    if not names:
        shutil.rmtree(run)
        log.path.unlink(missing_ok=True)
    return record


def _next_kill(
    rng: random.Random,
    where: Cluster,
    run: Path,
    process: subprocess.Popen,
    known: Reference,
    hit: Counter,
) -> dict[str, Any] | None:
    """Kills the next worker of the cell, or its driver; None where the driver ends before."""
    began, before = time.time(), len(_workers(run))
    while len(found := _workers(run)) == before:
        if process.poll() is not None:
            return None
        time.sleep(0.02)
    pid, cell = found[-1], run / "work" / _CELL
    watch = CellWatch(cell, began, _errors(where, pid), known.last_step, known.total)
    choose = functools.partial(plan_kill, rng, hit, known)
    plan = await_kill(
        choose,
        phases_ahead(cell, known.last_step),
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
    """Returns whether a process runs: exists, and is not only waited for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
