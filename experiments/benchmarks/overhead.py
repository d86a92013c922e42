"""Measures the time that the JAX engine spends outside its programs, for one text at a time.

    python -m experiments.benchmarks.overhead
    python -m experiments.benchmarks.overhead --beside=DIR    # in turns with another checkout
    python -m experiments.benchmarks.overhead --sizes         # milliseconds per text by batch size

MiniLM's shape with random heads at layers 1, 2, 4 and 6 classifies texts of 24 tokens that pass
every exit, on one core. "in the programs" is the time from the call of each program until its
outputs are available. The rest of `AdaptiveClassifier.predict`, from the string to the prediction,
is overhead, measured in the same calls. With --beside, processes of both checkouts are run in
turns. Prints milliseconds of processor time, which other programs disturb less than the wall clock.
Takes about half a minute for a checkout, and some minutes with --sizes.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from experiments.benchmarks.tables import table_head, table_row
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.errors import UserError

_TEXTS, _TURNS, _TOKENS, _EXITS = 400, 3, 24, (1, 2, 4, 6)


def compare(model: str, checkouts: dict[str, Path]) -> None:
    """Prints a row for each checkout."""
    times: dict[str, list[list[float]]] = {name: [] for name in checkouts}
    script = Path(__file__).resolve().with_name("overhead_process.py")
    for _ in range(_TURNS):
        for name, root in checkouts.items():
            command = [sys.executable, str(script), model, str(_TEXTS), str(_TOKENS)]
            environment = os.environ | {"PYTHONPATH": str(root)}
            process = subprocess.run(
                command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            times[name] += json.loads(process.stdout)
    print(table_head("side", "a text", "in the programs", "overhead an exit, median", "least"))
    for name, rows in times.items():
        whole, inside = (statistics.median(column) for column in zip(*rows, strict=True))
        overhead = [(total - part) / len(_EXITS) for total, part in rows]
        numbers = (whole, inside, statistics.median(overhead), min(overhead))
        print(table_row(name, *(f"{n:.{d}f}" for n, d in zip(numbers, (2, 2, 3, 3), strict=True))))


def measure_sizes(model: str) -> None:
    """Prints the milliseconds per text of one stage, by length and batch size, without splits."""
    from sweet_jax import AdaptiveClassifier
    from sweet_jax.inference.batch_split import Splitting
    from sweet_jax.inference.engine import StageBatch

    engine = AdaptiveClassifier.from_pretrained(model, engine="jax").engine
    # No option turns splitting off; this measurement decides from which size on batches are split.
    engine._splitting = Splitting(float("inf"), 0.0)  # type: ignore[attr-defined]
    stage = engine.stages(exit_rates=[0.0] * len(_EXITS))[2]
    sizes = (1, 2, 4, 8, 16, 32)
    print(table_head("tokens", *map(str, sizes)))
    for length in (16, 24, 32, 48, 64, 96, 128):
        cells = []
        for size in sizes:
            rows = np.stack([np.arange(size), np.full(size, length)]).astype(np.int32)
            states, times = engine.new_states(size, length), []
            for _ in range(max(8, 600 // (size * length))):
                start = time.process_time()
                states = engine.run(stage, StageBatch(length, rows), states).states
                times.append(time.process_time() - start)
            cells.append(f"{1e3 * min(times) / size:.2f}")
        print(table_row(length, *cells), flush=True)


def main(argv: list[str] | None = None) -> None:
    """Prints the overhead of each checkout, or with --sizes the times of a stage."""
    parser = ArgumentParser("experiments.benchmarks.overhead", __doc__ or "")
    parser.add_argument("--beside", type=Path, help="root folder of another checkout")
    parser.add_argument("--sizes", action="store_true", help="time one stage by batch size instead")
    options = parser.parse_args(argv)
    if options.beside and not (options.beside / "sweet_jax").is_dir():
        raise UserError(f"--beside={str(options.beside)!r} is not a checkout of this project")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])  # before jax starts its threads
    from experiments.benchmarks.engines import CHECKPOINT
    from experiments.benchmarks.random_models import write_with_random_heads

    checkouts = {"this": Path(__file__).resolve().parents[2]}
    if options.beside:
        checkouts["beside"] = options.beside.resolve()
    with tempfile.TemporaryDirectory() as name:
        write_with_random_heads(Path(name) / "model", CHECKPOINT, _EXITS, max_length=128)
        if options.sizes:
            measure_sizes(f"{name}/model")
        else:
            compare(f"{name}/model", checkouts)


if __name__ == "__main__":
    sys.exit(run_command(main))
