"""Times the exact curve of all thresholds against one pass over the examples per threshold.

    python -m experiments.benchmarks.simulate

40,000 examples, 4 exits, 3 classes, random logits, one replica, one core. The other side evaluates
200 of the distinct thresholds with vectorized numpy, and its time is scaled up to all of them. Its
points must equal the exact curve's. Takes a few seconds.
"""

import sys
import time

import numpy as np

from sweet_jax import ExitOutputs, simulate
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.exits.policies import exit_confidences

_MEASURED = 200  # thresholds of the side with one pass per threshold


def evaluate_threshold(
    outputs: ExitOutputs, confidences: np.ndarray, threshold: float
) -> tuple[float, float]:
    """Returns the cost and the accuracy of one threshold; confidences are float [R, E, N]."""
    leaves = confidences[0] >= threshold  # [E, N]
    leaves[-1] = True
    exits = leaves.argmax(axis=0)  # [N]
    correct = outputs.predictions[0][exits, np.arange(len(exits))] == outputs.labels[0]
    return float(outputs.cost[exits].mean()), float(correct.mean())


def main(argv: list[str] | None = None) -> None:
    """Prints the seconds of both sides and their ratio."""
    parser = ArgumentParser("experiments.benchmarks.simulate", __doc__ or "")
    parser.add_argument("--examples", type=int, default=40_000, help="(default 40,000)")
    options = parser.parse_args(argv)
    rng, n = np.random.default_rng(0), options.examples
    logits, labels = rng.normal(size=(4, n, 3)), rng.integers(0, 3, n)
    outputs = ExitOutputs(logits, labels, np.asarray([1, 2, 4, 6]))
    start = time.perf_counter()
    curve = simulate(outputs)
    exact = time.perf_counter() - start
    start = time.perf_counter()
    simulate(outputs, metric="matthews")
    matthews = time.perf_counter() - start
    count = len(np.unique(curve.threshold))
    thresholds = curve.threshold[0][np.linspace(0, count - 1, _MEASURED).astype(int)]
    start = time.perf_counter()
    confidences = exit_confidences(outputs, "confidence")
    points = np.asarray([evaluate_threshold(outputs, confidences, t) for t in thresholds])
    scaled = (time.perf_counter() - start) / _MEASURED * count
    read = simulate(outputs, thresholds=thresholds)
    assert np.allclose(points, np.stack([read.cost[0], read.score[0]], axis=-1))
    print(
        f"{n} examples, {count} thresholds: exact curve {exact:.2f} s (Matthews {matthews:.2f} s), "
        f"a pass per threshold {scaled:.0f} s, ratio {scaled / exact:.0f}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
