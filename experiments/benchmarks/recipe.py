"""Times the recipe's parts: mean pooling against the first token, the probe, the refit.

    python -m experiments.benchmarks.recipe
    python -m experiments.benchmarks.recipe --shape=bert-base --rows=1000

Of a random encoder of a shape, float32, in one run: the training step with either pooling (seconds
and MiB of temporaries; the two sides take turns), and, against the time of one epoch of that
training, a probe of all exits: the pass of the frozen encoder over the rows, and the logistic
regressions on its features, of as many classes as --classes says. A refit is the same work. About
3 minutes on 2 cores. Expected for MiniLM's shape: SWEET's step takes longer with the mean, since an
exit's last layer is then computed and trained at all tokens; Early-Exit's little.
"""

import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from experiments.benchmarks.shapes import (
    SHAPES,
    Shape,
    Size,
    head_line,
    parser,
    row,
    size,
    table_head,
    training_steps,
)
from sweet_jax.training.probe import fit_classifiers
from sweet_jax.training.step import evaluate_step

_POOLINGS = ("first", "mean")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    options = parser(__doc__)
    options.add_argument("--shape", default="minilm", choices=SHAPES)
    options.add_argument("--size", type=size, default=Size(16, 128), help="default: 16x128")
    options.add_argument("--rows", type=int, default=6000, help="of the probe")
    options.add_argument("--classes", type=int, default=2)
    options.add_argument("--rounds", type=int, default=10, help="steps of each side")
    chosen = options.parse_args(argv)
    shape = SHAPES[chosen.shape]
    print(head_line("optax", "scikit-learn"))
    print(f"{chosen.shape}, batch {chosen.size}, float32\n")
    print(table_head("step", "first, s", "mean, s", "x first", "first, MiB", "mean, MiB"))
    epoch = 0.0
    for method in ("early_exit", "sweet"):
        steps = [training_steps(shape, method, chosen.size, pooling=p) for p in _POOLINGS]
        first, mean = _medians([s.take for s in steps], chosen.rounds)
        memory = [s.temporaries / 2**20 for s in steps]
        cells = (f"{first:.3f}", f"{mean:.3f}", f"{mean / first:.2f}")
        print(row(method, *cells, *(f"{m:.0f}" for m in memory)))
        epoch = epoch or mean * chosen.rows / chosen.size.batch
    print()
    features, seconds = _features(shape, chosen.size, chosen.rows)
    fitted = _fit(features, chosen.classes)
    print(
        f"probe or refit of {chosen.rows} rows of {chosen.size.length} tokens, {chosen.classes} "
        f"classes: pass {seconds:.1f} s, regressions {fitted:.1f} s, together "
        f"{(seconds + fitted) / epoch:.2f} of an epoch of Early-Exit's training ({epoch:.1f} s); "
        f"features {features.nbytes / 2**20:.0f} MiB"
    )


def _medians(sides: Sequence, rounds: int) -> list[float]:
    """Returns the median seconds of each side, which take turns; the first round is not counted."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds + 1):
        for place, take in enumerate(sides):
            began = time.perf_counter()
            take()
            times[place].append(time.perf_counter() - began)
    return [statistics.median(each[1:]) for each in times]


def _features(shape: Shape, size: Size, rows: int) -> tuple[np.ndarray, float]:
    """Returns features float32 [1, E, N, H] of random rows, and the seconds of the pass."""
    model = shape.model(pooling="mean")
    graphdef, values = nnx.split(model)
    params = nnx.to_pure_dict(values)
    program = jax.jit(lambda p, b: evaluate_step(graphdef, p, b, features=True).features)
    rng = np.random.default_rng(0)

    def batch(count: int) -> dict[str, np.ndarray]:
        ids = rng.integers(1, shape.config.vocab_size, (count, size.length), dtype=np.int32)
        return {"input_ids": ids, "token_type_ids": 0 * ids, "mask": ids > 0}

    count = 2 * size.batch
    jax.block_until_ready(program(params, batch(count)))  # compiled
    began = time.perf_counter()
    parts = [np.asarray(program(params, batch(count))) for _ in range(-(-rows // count))]
    found = np.concatenate(parts, axis=1)[None, :, :rows]
    return found, time.perf_counter() - began


def _fit(features: np.ndarray, classes: int) -> float:
    """Returns the seconds of the regressions, with labels that a noisy linear rule gives."""
    rows = np.arange(features.shape[2])
    rng = np.random.default_rng(1)
    x = features[0, -1]
    x = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-6)
    scores = x @ rng.normal(size=(x.shape[1], classes)) / np.sqrt(x.shape[1])
    labels = (scores + rng.gumbel(size=scores.shape)).argmax(axis=1)[None]
    cut = max(1, len(rows) // 10)
    began = time.perf_counter()
    fit_classifiers(features, labels, rows[None, cut:], rows[None, :cut], classes)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
