"""Every policy's exact curve, and a bootstrap of one, against the plain loop over examples.

    python -m experiments.benchmarks.policies

40,000 examples, 4 exits, 3 classes, random logits, 1,000 calibration rows. The loop decides example
by example at one threshold, and is scaled up to the curve's thresholds (for the bootstrap: to its
draws and thresholds); its point must equal the exact curve's. Seconds on one core.
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np

from sweet_jax import ExitOutputs, simulate
from sweet_jax.exits.bootstrap import bootstrap_curve
from sweet_jax.exits.bounds import ORACLES, best_thresholds, oracle, single_exit_hull
from sweet_jax.exits.calibration import Calibrator, fit_calibrators
from sweet_jax.exits.policies import POLICIES, exit_confidences


def random_outputs(rows: int, seed: int) -> ExitOutputs:
    """Returns random logits, labels and learning-to-exit scores."""
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(4, rows, 3)), rng.integers(0, 3, rows)
    return ExitOutputs(logits, labels, [1, 2, 4, 6], exit_scores=rng.random((1, 4, rows)))


def loop(outputs: ExitOutputs, scores: np.ndarray, threshold: float) -> tuple[float, float]:
    """Returns (cost, accuracy) of one threshold, example by example."""
    exits, rows = scores.shape
    given, labels, cost = outputs.predictions[0], outputs.labels[0], outputs.cost
    spent, right = 0.0, 0
    for n in range(rows):
        at = next((e for e in range(exits - 1) if scores[e, n] >= threshold), exits - 1)
        spent += cost[at]
        right += int(given[at, n] == labels[n])
    return spent / rows, right / rows


def main() -> None:
    """Prints a line for each policy, the sum, the bootstrap and the bounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=40_000)
    parser.add_argument("--draws", type=int, default=1000)
    options = parser.parse_args()
    outputs = random_outputs(options.examples, 0)
    time_policies(outputs, fit_calibrators(random_outputs(1000, 1)))
    time_bootstrap(outputs, options.draws)
    time_bounds(outputs)


def time_policies(outputs: ExitOutputs, fitted: Sequence[Calibrator]) -> None:
    """Prints the seconds of every policy's exact curve and of a loop, and their sums."""
    sums = np.zeros(2)
    for policy in POLICIES:
        began = time.perf_counter()
        curve = simulate(outputs, policy, calibrators=fitted)
        exact = time.perf_counter() - began
        count, scores = (
            len(np.unique(curve.threshold)),
            exit_confidences(outputs, policy, fitted)[0],
        )
        middle = float(curve.threshold[0, count // 2])
        began = time.perf_counter()
        point = loop(outputs, scores, middle)
        plain = (time.perf_counter() - began) * count
        assert np.allclose(point, (curve.cost[0, count // 2], curve.score[0, count // 2]))
        print(
            f"{policy:>26}: {count:>6} thresholds, exact {exact:.2f} s, loop {plain:.0f} s, ratio "
            f"{plain / exact:.0f}"
        )
        sums += (exact, plain)
    print(f"{'all policies':>26}: exact {sums[0]:.2f} s, loop {sums[1]:.0f} s")


def time_bootstrap(outputs: ExitOutputs, draws: int) -> None:
    """Prints the seconds of bootstrap bands and of a loop."""
    began = time.perf_counter()
    bands = bootstrap_curve(outputs, draws=draws)
    spent = time.perf_counter() - began
    began = time.perf_counter()
    loop(outputs, exit_confidences(outputs, "confidence")[0], float(bands.threshold[0, 0]))
    plain = (time.perf_counter() - began) * draws * bands.threshold.shape[1]
    print(
        f"{draws} bootstrap draws of a curve at {bands.threshold.shape[1]} thresholds: "
        f"{spent:.2f} s, loop {plain:.0f} s, ratio {plain / spent:.0f}"
    )


def time_bounds(outputs: ExitOutputs) -> None:
    """Prints the seconds of the oracles and the floor, and of a threshold for each exit."""
    began = time.perf_counter()
    single_exit_hull(outputs, 0)
    for kind in ORACLES:
        oracle(outputs, 0, kind)
    middle = time.perf_counter()
    best_thresholds(outputs, 0, exit_confidences(outputs, "confidence")[0])
    print(
        f"oracles and floor {middle - began:.2f} s, a threshold for each exit "
        f"{time.perf_counter() - middle:.2f} s"
    )


if __name__ == "__main__":
    main()
