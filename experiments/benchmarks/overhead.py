"""Measures the JAX engine beside its programs: milliseconds an exit, one text at a time.

    python -m experiments.benchmarks.overhead
    python -m experiments.benchmarks.overhead --beside=DIR    # another checkout, taking turns
    python -m experiments.benchmarks.overhead --sizes         # of batches: milliseconds per text

MiniLM's shape with random heads at layers 1, 2, 4 and 6, texts of 24 tokens that pass every exit,
on one core. "in the programs" is the time from the call of each program until its outputs are
there; the rest of `AdaptiveClassifier.predict`, from the string to the prediction, is overhead. It
is measured in the same calls, of which each side's children take turns; the time is that of the
processor, which other programs disturb less than the clock.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

TEXTS, TURNS, TOKENS, EXITS = 400, 3, 24, 4


def measure(folder: str) -> list[list[float]]:
    """Returns [milliseconds of a prediction, of these in the programs] of every text."""
    import jax

    from sweet_jax import AdaptiveClassifier
    from sweet_jax.inference.engine_jax import JaxEngine

    inside, make = [0.0], JaxEngine._program

    def timed(engine: JaxEngine, *key):
        program = make(engine, *key)

        def run(*arguments):
            began = time.process_time()
            found = program(*arguments)
            jax.block_until_ready(found)
            inside[0] += time.process_time() - began
            return found

        return run

    JaxEngine._program = timed
    classifier = AdaptiveClassifier.from_pretrained(folder, engine="jax", threshold=2.0)
    text, found = " ".join(["film"] * (TOKENS - 2)), []
    for _ in range(TEXTS + 20):
        inside[0], began = 0.0, time.process_time()
        classifier.predict([text], 1, "latency")
        found.append([1e3 * (time.process_time() - began), 1e3 * inside[0]])
    return found[20:]  # the first compile and fill caches


def compare(folder: str, sides: dict[str, Path]) -> None:
    """Prints a line for each checkout."""
    times: dict[str, list[list[float]]] = {name: [] for name in sides}
    for _ in range(TURNS):
        for name, root in sides.items():
            command = [sys.executable, str(Path(__file__).resolve()), f"--model={folder}"]
            environment = os.environ | {"PYTHONPATH": str(root)}
            done = subprocess.run(
                command, cwd=root, env=environment, check=True, stdout=subprocess.PIPE, text=True
            )
            times[name] += json.loads(done.stdout)
    print("| side | a text | in the programs | overhead an exit, median | least |")
    print("| --- | --- | --- | --- | --- |")
    for name, rows in times.items():
        whole, inside = (statistics.median(column) for column in zip(*rows, strict=True))
        each = [(a - b) / EXITS for a, b in rows]
        print(
            f"| {name} | {whole:.2f} | {inside:.2f} | {statistics.median(each):.3f} | "
            f"{min(each):.3f} |"
        )


def measure_sizes(folder: str) -> None:
    """Prints the milliseconds per text of one stage, by batch size and length, unsplit."""
    from sweet_jax import AdaptiveClassifier
    from sweet_jax.inference.batch_split import Splitting
    from sweet_jax.inference.engine import StageBatch

    engine = AdaptiveClassifier.from_pretrained(folder, engine="jax").engine
    # Unsplit, which no option asks for: what is measured here decides where to split.
    engine._splitting = Splitting(float("inf"), 0.0)  # type: ignore[attr-defined]
    stage = engine.stages(exit_rates=[0.0] * EXITS)[2]
    sizes = (1, 2, 4, 8, 16, 32)
    print(f"| tokens | {' | '.join(map(str, sizes))} |")
    print(f"{'| --- ' * (1 + len(sizes))}|")
    for length in (16, 24, 32, 48, 64, 96, 128):
        found = []
        for size in sizes:
            rows = np.stack([np.arange(size), np.full(size, length)]).astype(np.int32)
            states, times = engine.new_states(size, length), []
            for _ in range(max(8, 600 // (size * length))):
                began = time.process_time()
                states = engine.run(stage, StageBatch(length, rows), states).states
                times.append(time.process_time() - began)
            found.append(f"{1e3 * min(times) / size:.2f}")
        print(f"| {length} | {' | '.join(found)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", type=Path, help="another checkout")
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--model", help=argparse.SUPPRESS)  # of a child
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    if options.model:
        json.dump(measure(options.model), sys.stdout)
        return
    from experiments.benchmarks.engines import CHECKPOINT, write_model

    here = Path(__file__).resolve().parents[2]
    sides = {"this": here} | ({"beside": options.beside.resolve()} if options.beside else {})
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name) / "model", CHECKPOINT, (1, 2, 4, 6))
        measure_sizes(f"{name}/model") if options.sizes else compare(f"{name}/model", sides)


if __name__ == "__main__":
    main()
