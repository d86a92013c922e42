"""Every threshold at once against a pass over the examples for each threshold.

    python -m experiments.benchmarks.simulate

40,000 examples, 4 exits, 3 classes, random logits, one replica. The plain side evaluates 200 of the
distinct thresholds with vectorised numpy, and is scaled up to all of them; its points must equal
the exact curve's. Seconds on one core.
"""

import argparse
import time

import numpy as np

from sweet_jax import ExitOutputs, simulate
from sweet_jax.exits.policies import exit_confidences


def plain(outputs: ExitOutputs, scores: np.ndarray, threshold: float) -> tuple[float, float]:
    """Returns (cost, accuracy) of one threshold."""
    leaves = scores[0] >= threshold  # [E, N]
    leaves[-1] = True
    taken = leaves.argmax(axis=0)  # [N]
    rows = np.arange(len(taken))
    right = outputs.predictions[0][taken, rows] == outputs.labels[0]
    return float(outputs.cost[taken].mean()), float(right.mean())


def main() -> None:
    """Prints both sides and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", type=int, default=40_000)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    n = options.examples
    outputs = ExitOutputs(rng.normal(size=(4, n, 3)), rng.integers(0, 3, n), [1, 2, 4, 6])
    began = time.perf_counter()
    curve = simulate(outputs)
    exact = time.perf_counter() - began
    began = time.perf_counter()
    simulate(outputs, metric="matthews")
    matthews = time.perf_counter() - began
    count = len(np.unique(curve.threshold))
    probes = curve.threshold[0][np.linspace(0, count - 1, 200).astype(int)]
    began = time.perf_counter()
    scores = exit_confidences(outputs, "confidence")
    points = np.asarray([plain(outputs, scores, t) for t in probes])
    each = (time.perf_counter() - began) / len(probes)
    read = simulate(outputs, thresholds=probes)
    assert np.allclose(points, np.stack([read.cost[0], read.score[0]], axis=-1))
    print(
        f"{n} examples, {count} thresholds: exact curve {exact:.2f} s (Matthews {matthews:.2f} s), "
        f"plain loop {each * count:.0f} s, ratio {each * count / exact:.0f}"
    )


if __name__ == "__main__":
    main()
