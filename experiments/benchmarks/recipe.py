"""Times the parts of the recipe for own data: mean pooling, the probe and the refit.

    python -m experiments.benchmarks.recipe
    python -m experiments.benchmarks.recipe --shape=bert-base --rows=1000

All parts use a random encoder of one shape in float32. The first table compares a training step
with mean pooling and one that reads the first token: seconds, timed in turns, and MiB of
temporaries. The last line compares a probe of all exits with an epoch of Early-Exit's training on
the same rows; a probe is the forward pass of the frozen encoder over the rows, and the logistic
regressions on its features. A refit does the same work. Takes about 3 minutes on 2 cores. Expected
for MiniLM's shape: SWEET's step takes longer with the mean, because the last layer of each exit is
then computed and trained at all tokens, and Early-Exit's step takes little longer.
"""

import statistics
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from experiments.benchmarks.shapes import SHAPES, Shape, Size, make_training_step, parse_size
from experiments.benchmarks.tables import describe_machine, table_head, table_row
from experiments.benchmarks.timing import time_in_turns
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.training.probe import fit_classifiers
from sweet_jax.training.step import evaluate_step

_POOLINGS = ("first", "mean")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table of the steps and the line of the probe."""
    parser = ArgumentParser("experiments.benchmarks.recipe", __doc__ or "")
    parser.add_argument("--shape", default="minilm", choices=SHAPES, help="(default minilm)")
    parser.add_argument(
        "--size", type=parse_size, default=Size(16, 128), help="batch x length (default 16x128)"
    )
    parser.add_argument("--rows", type=int, default=6000, help="of the probe (default 6000)")
    parser.add_argument("--classes", type=int, default=2, help="of the probe (default 2)")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps (default 10)")
    options = parser.parse_args(argv)
    shape, size, rows = SHAPES[options.shape], options.size, options.rows
    print(describe_machine("optax", "scikit-learn"))
    print(f"{options.shape}, batch {size}, float32\n")
    print(table_head("step", "first, s", "mean, s", "x first", "first, MiB", "mean, MiB"))
    means = {}
    for method in ("early_exit", "sweet"):
        steps = [make_training_step(shape, method, size, pooling=p) for p in _POOLINGS]
        for step in steps:
            step.take()
        times = time_in_turns([step.take for step in steps], options.rounds)
        first, means[method] = (statistics.median(seconds) for seconds in times)
        cells = (f"{first:.3f}", f"{means[method]:.3f}", f"{means[method] / first:.2f}")
        memory = [f"{step.temporaries / 2**20:.0f}" for step in steps]
        print(table_row(method, *cells, *memory))
    epoch = means["early_exit"] * rows / size.batch
    features, forward = _compute_features(shape, size, rows)
    regressions = _time_regressions(features, options.classes)
    print(
        f"\nprobe or refit of {rows} rows of {size.length} tokens, {options.classes} classes: "
        f"pass {forward:.1f} s, regressions {regressions:.1f} s, together "
        f"{(forward + regressions) / epoch:.2f} of an epoch of Early-Exit's training "
        f"({epoch:.1f} s); features {features.nbytes / 2**20:.0f} MiB"
    )


def _compute_features(shape: Shape, size: Size, rows: int) -> tuple[np.ndarray, float]:
    """Returns features float32 [1, E, N, H] of random rows, and the seconds of computing them."""
    graphdef, values = nnx.split(shape.model(pooling="mean"))
    params = nnx.to_pure_dict(values)
    program = jax.jit(lambda p, b: evaluate_step(graphdef, p, b, features=True).features)
    rng, count = np.random.default_rng(0), 2 * size.batch

    def random_batch() -> dict[str, np.ndarray]:
        ids = rng.integers(1, shape.config.vocab_size, (count, size.length), dtype=np.int32)
        return {"input_ids": ids, "token_type_ids": 0 * ids, "mask": ids > 0}

    jax.block_until_ready(program(params, random_batch()))  # compiles
    start = time.perf_counter()
    parts = [np.asarray(program(params, random_batch())) for _ in range(-(-rows // count))]
    features = np.concatenate(parts, axis=1)[None, :, :rows]
    return features, time.perf_counter() - start


def _time_regressions(features: np.ndarray, classes: int) -> float:
    """Returns the seconds of the regressions on labels that follow a noisy linear rule."""
    rows = np.arange(features.shape[2])
    rng = np.random.default_rng(1)
    x = features[0, -1]
    x = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-6)
    logits = x @ rng.normal(size=(x.shape[1], classes)) / np.sqrt(x.shape[1])
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)[None]
    cut = max(1, len(rows) // 10)
    start = time.perf_counter()
    fit_classifiers(features, labels, rows[None, cut:], rows[None, :cut], classes)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(run_command(main))
