"""Studies of frozen encoders: Laplace's confidences, and the comparison of two sizes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from experiments import laplace_control, probes, two_sizes
from experiments.laplace import laplace_confidences
from experiments.pcee_measurements import RULES, TARGETS, control
from sweet_jax import ExitOutputs

RESULTS = Path(__file__).parents[1] / "experiments" / "results"


def test_laplace_confidences_equal_full_posterior_when_factors_are_exact():
    """Kronecker factors are exact if all rows have one probability, as with zero weights."""
    rng = np.random.default_rng(0)
    x, rows = rng.normal(2, 3, (40, 3)), rng.normal(2, 3, (5, 3))
    bias, penalty = np.asarray([0.3, 0.0, -0.5]), 0.1
    confidences = laplace_confidences(x, np.zeros((3, 3)), bias, penalty, rows)

    def standardise(values):
        return np.column_stack([(values - x.mean(axis=0)) / x.std(axis=0), np.ones(len(values))])

    features, probabilities = standardise(x), softmax(bias)
    curvature = np.diag(probabilities) - np.outer(probabilities, probabilities)
    precision = np.kron(features.T @ features, curvature) + len(x) * penalty * np.eye(12)
    covariance = np.linalg.inv(precision)
    # A shift common to all logits of a row does not count.
    centring = np.eye(3) - 1 / 3
    for row, confidence in zip(standardise(rows), confidences, strict=True):
        jacobian = np.kron(row[None], centring)  # [C, 4 C]
        variance = np.diag(jacobian @ covariance @ jacobian.T)
        expected = softmax(bias / np.sqrt(1 + np.pi / 8 * variance)).max()
        np.testing.assert_allclose(confidence, expected, rtol=1e-9)


def test_laplace_confidence_is_lower_far_from_training_features():
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(50, 4)), np.asarray([[1.0, -1.0], [0, 0], [0, 0], [0, 0]])
    near, far = np.asarray([[1.0, 0, 0, 0]]), np.asarray([[1.0, 0, 0, 20.0]])
    near_confidence, far_confidence = (
        laplace_confidences(x, kernel, np.zeros(2), 0.01, r)[0] for r in (near, far)
    )
    assert softmax([1, -1]).max() > near_confidence > far_confidence > 0.5


def outputs(rows: int = 200) -> ExitOutputs:
    """Returns outputs of one replica whose later exits are more accurate and more confident."""
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, rows)
    signs = np.where(labels, 1, -1)
    logits = np.stack([signs * strength + rng.normal(size=rows) for strength in (0.3, 0.8, 1.5)])
    pairs = np.stack([-logits, logits], axis=-1)[None].astype(np.float32)  # [R, E, N, C]
    return ExitOutputs(pairs, labels, np.asarray([1, 2, 4]), np.asarray([0.25, 0.5, 1.0]))


def test_control_appends_given_confidences_and_oracle_meets_targets():
    rows = outputs()
    accuracies = (rows.predictions == rows.labels[:, None])[0].mean(axis=-1)
    targets = accuracies[0] + TARGETS * (accuracies[-1] - accuracies[0])
    raw_confidences = softmax(rows.logits[0].astype(np.float64), axis=-1).max(axis=-1)  # [E, N]
    points = control(rows, targets, 4, 0, [raw_confidences], oracle=True)
    np.testing.assert_array_equal(points[: len(RULES)], control(rows, targets, 4))
    names = [policy for _, policy, _ in RULES]
    np.testing.assert_allclose(points[len(RULES)], points[names.index("raw_confidence")])
    errors = np.abs(points[..., 0] - targets[:, None]).mean(axis=(1, 2))
    chosen_rule = [title for title, _, _ in RULES].index("confidence, threshold chosen")
    assert errors[-1] < 0.01
    assert errors[-1] < errors[chosen_rule]


def test_small_model_cost_share_follows_layer_flops():
    share = two_sizes.small_share(np.asarray([20, 20]))[0]
    small, large = 24 * 384**2 + 4 * 384 * 20, 24 * 768**2 + 4 * 768 * 20
    np.testing.assert_allclose(share, 6 * small / (12 * large))
    assert two_sizes.layer_flops(np.asarray([10, 30]), 8) == 24 * 64 + 4 * 8 * 1000 / 40


def rows_with_gain(gain: float) -> two_sizes.Rows:
    """Returns rows; the large model is right on a share `gain` of those the small one misses."""
    rng = np.random.default_rng(0)
    small = rng.random((3, 400)) < 0.7
    better = small | (rng.random((3, 400)) < gain)
    adaptive = np.stack([small, better, better])
    return two_sizes.Rows(small, small, better, adaptive, np.full((3, 3), 0.9), np.full(3, 0.1))


def test_rows_are_read_as_written_and_page_marks_clear_difference_bold(tmp_path):
    written = rows_with_gain(0.5)
    two_sizes.write_rows(tmp_path, "sst2", written)
    read = two_sizes.read_rows(tmp_path, "sst2")
    for actual, expected in zip(read, written, strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert two_sizes.main(["--render_only", f"--output={tmp_path}"]) == 0
    page = (tmp_path / "README.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| sst2 |"))
    assert ", +0.0 [+0.0, +0.0] (0.90) |" in row
    assert row.count("**") == 4
    assert "Not run: cola" in page


@pytest.mark.parametrize("script", [two_sizes, laplace_control, probes])
def test_committed_page_equals_page_rendered_from_results(script, tmp_path):
    committed = RESULTS / script.__name__.rpartition(".")[2]
    shutil.copytree(committed, tmp_path, dirs_exist_ok=True)
    pages = {"README.md", "scores.csv"} & {path.name for path in committed.iterdir()}
    for name in pages:
        (tmp_path / name).unlink()
    assert script.main(["--render_only", f"--output={tmp_path}"]) == 0
    for name in pages:
        assert (tmp_path / name).read_bytes() == (committed / name).read_bytes()
