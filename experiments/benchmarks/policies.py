"""Times the exact curve of every policy, and a bootstrap of one, against a loop over examples.

    python -m experiments.benchmarks.policies

40,000 examples, 4 exits, 3 classes, random logits, 1,000 calibration rows, one core. The loop
chooses the exit of one example after another at one threshold. Its point must equal the exact
curve's, and its time is scaled up to all thresholds of the curve (for the bootstrap, to all draws
and thresholds). Takes some seconds.
"""

import sys
import time
from collections.abc import Sequence

import numpy as np

from sweet_jax import ExitOutputs, simulate
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.exits.bootstrap import bootstrap_curve
from sweet_jax.exits.bounds import ORACLES, best_thresholds, oracle, single_exit_hull
from sweet_jax.exits.calibration import Calibrator, fit_calibrators
from sweet_jax.exits.policies import POLICIES, exit_confidences


def main(argv: list[str] | None = None) -> None:
    """Prints a line for each policy, and lines for their sum, the bootstrap and the bounds."""
    parser = ArgumentParser("experiments.benchmarks.policies", __doc__ or "")
    parser.add_argument("--examples", type=int, default=40_000, help="(default 40,000)")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap (default 1,000)")
    options = parser.parse_args(argv)
    outputs = random_outputs(options.examples, 0)
    time_policies(outputs, fit_calibrators(random_outputs(1000, 1)))
    time_bootstrap(outputs, options.draws)
    time_bounds(outputs)


def random_outputs(rows: int, seed: int) -> ExitOutputs:
    """Returns random logits, labels and learning-to-exit scores."""
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(4, rows, 3)), rng.integers(0, 3, rows)
    layers = np.asarray([1, 2, 4, 6])
    return ExitOutputs(logits, labels, layers, exit_scores=rng.random((1, 4, rows)))


def loop_over_examples(
    outputs: ExitOutputs, confidences: np.ndarray, threshold: float
) -> tuple[float, float]:
    """Returns the cost and the accuracy of one threshold; confidences are float [E, N]."""
    exits, rows = confidences.shape
    predictions, labels, cost = outputs.predictions[0], outputs.labels[0], outputs.cost
    total_cost, correct = 0.0, 0
    for n in range(rows):
        at = next((e for e in range(exits - 1) if confidences[e, n] >= threshold), exits - 1)
        total_cost += cost[at]
        correct += int(predictions[at, n] == labels[n])
    return total_cost / rows, correct / rows


def time_policies(outputs: ExitOutputs, calibrators: Sequence[Calibrator]) -> None:
    """Prints the seconds of each policy's exact curve and of the loop, and their sums."""
    sums = np.zeros(2)
    for policy in [name for name, rule in POLICIES.items() if rule.suits(outputs.objective)]:
        start = time.perf_counter()
        curve = simulate(outputs, policy, calibrators=calibrators)
        exact = time.perf_counter() - start
        count = len(np.unique(curve.threshold))
        confidences = exit_confidences(outputs, policy, calibrators)[0]
        start = time.perf_counter()
        point = loop_over_examples(outputs, confidences, float(curve.threshold[0, count // 2]))
        loop = (time.perf_counter() - start) * count
        assert np.allclose(point, (curve.cost[0, count // 2], curve.score[0, count // 2]))
        print(
            f"{policy:>26}: {count:>6} thresholds, exact {exact:.2f} s, loop {loop:.0f} s, ratio "
            f"{loop / exact:.0f}"
        )
        sums += (exact, loop)
    print(f"{'all policies':>26}: exact {sums[0]:.2f} s, loop {sums[1]:.0f} s")


def time_bootstrap(outputs: ExitOutputs, draws: int) -> None:
    """Prints the seconds of bootstrap bands and of the loop."""
    start = time.perf_counter()
    bands = bootstrap_curve(outputs, draws=draws)
    seconds, count = time.perf_counter() - start, bands.threshold.shape[1]
    confidences = exit_confidences(outputs, "confidence")[0]
    start = time.perf_counter()
    loop_over_examples(outputs, confidences, float(bands.threshold[0, 0]))
    loop = (time.perf_counter() - start) * draws * count
    print(
        f"{draws} bootstrap draws of a curve at {count} thresholds: "
        f"{seconds:.2f} s, loop {loop:.0f} s, ratio {loop / seconds:.0f}"
    )


def time_bounds(outputs: ExitOutputs) -> None:
    """Prints the seconds of the oracles and the floor, and of one threshold for each exit."""
    start = time.perf_counter()
    single_exit_hull(outputs, 0)
    for kind in ORACLES:
        oracle(outputs, 0, kind)
    middle = time.perf_counter()
    best_thresholds(outputs, 0, exit_confidences(outputs, "confidence")[0])
    print(
        f"oracles and floor {middle - start:.2f} s, a threshold for each exit "
        f"{time.perf_counter() - middle:.2f} s"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
