"""Studies of frozen encoders: Laplace's confidences, and the comparison of two sizes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from experiments import laplace_control, two_sizes
from experiments.laplace import laplace_confidences
from experiments.pcee_measurements import RULES, TARGETS, control
from sweet_jax import ExitOutputs

RESULTS = Path(__file__).parents[1] / "experiments" / "results"


def test_laplace_is_the_posterior_of_the_whole_matrix_where_kronecker_factors_are_exact():
    """Weights of zero give every row the same probabilities, for which the factors are exact."""
    rng = np.random.default_rng(0)
    x, rows = rng.normal(2, 3, (40, 3)), rng.normal(2, 3, (5, 3))
    bias, penalty = np.asarray([0.3, 0.0, -0.5]), 0.1
    found = laplace_confidences(x, np.zeros((3, 3)), bias, penalty, rows)

    def standardise(values):
        return np.column_stack([(values - x.mean(axis=0)) / x.std(axis=0), np.ones(len(values))])

    own, p = standardise(x), softmax(bias)
    curvature = np.diag(p) - np.outer(p, p)
    precision = np.kron(own.T @ own, curvature) + len(x) * penalty * np.eye(12)
    covariance = np.linalg.inv(precision)
    # Without what moves all logits of a row alike.
    centre = np.eye(3) - 1 / 3
    for row, confidence in zip(standardise(rows), found, strict=True):
        each = np.kron(row[None], centre)  # [C, 4 C]
        variance = np.diag(each @ covariance @ each.T)
        expected = softmax(bias / np.sqrt(1 + np.pi / 8 * variance)).max()
        np.testing.assert_allclose(confidence, expected, rtol=1e-9)


def test_laplace_is_less_sure_far_from_what_it_was_fitted_on():
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(50, 4)), np.asarray([[1.0, -1.0], [0, 0], [0, 0], [0, 0]])
    near, far = np.asarray([[1.0, 0, 0, 0]]), np.asarray([[1.0, 0, 0, 20.0]])
    sure, unsure = (laplace_confidences(x, kernel, np.zeros(2), 0.01, r)[0] for r in (near, far))
    assert softmax([1, -1]).max() > sure > unsure > 0.5


def outputs(rows: int = 200) -> ExitOutputs:
    """Returns outputs of one replica whose later exits are right more often, and surer."""
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, rows)
    signs = np.where(labels, 1, -1)
    logits = np.stack([signs * strength + rng.normal(size=rows) for strength in (0.3, 0.8, 1.5)])
    both = np.stack([-logits, logits], axis=-1)[None].astype(np.float32)  # [R, E, N, C]
    return ExitOutputs(both, labels, np.asarray([1, 2, 4]), np.asarray([0.25, 0.5, 1.0]))


def test_further_rules_read_the_target_and_the_oracle_comes_nearest():
    rows = outputs()
    right = (rows.predictions == rows.labels[:, None])[0].mean(axis=-1)
    targets = right[0] + TARGETS * (right[-1] - right[0])
    plain = softmax(rows.logits[0].astype(np.float64), axis=-1).max(axis=-1)  # [E, N]
    found = control(rows, targets, 4, 0, [plain], oracle=True)
    np.testing.assert_array_equal(found[: len(RULES)], control(rows, targets, 4))
    names = [policy for _, policy, _ in RULES]
    np.testing.assert_allclose(found[len(RULES)], found[names.index("raw_confidence")])
    errors = np.abs(found[..., 0] - targets[:, None]).mean(axis=(1, 2))
    chosen = [title for title, _, _ in RULES].index("confidence, threshold chosen")
    assert errors[-1] < 0.01
    assert errors[-1] < errors[chosen]


def test_costs_of_the_two_sizes():
    flops = two_sizes.small_share(np.asarray([20, 20]))[0]
    small, large = 24 * 384**2 + 4 * 384 * 20, 24 * 768**2 + 4 * 768 * 20
    np.testing.assert_allclose(flops, 6 * small / (12 * large))
    assert two_sizes.layer_flops(np.asarray([10, 30]), 8) == 24 * 64 + 4 * 8 * 1000 / 40


def rows_of(gain: float) -> two_sizes.Rows:
    """Returns rows of which the large model has `gain` more right."""
    rng = np.random.default_rng(0)
    small = rng.random((3, 400)) < 0.7
    better = small | (rng.random((3, 400)) < gain)
    adaptive = np.stack([small, better, better])
    return two_sizes.Rows(small, small, better, adaptive, np.full((3, 3), 0.9), np.full(3, 0.1))


def test_rows_are_read_as_written_and_a_clear_difference_is_bold(tmp_path):
    given = rows_of(0.5)
    two_sizes.write_rows(tmp_path, "sst2", given)
    found = two_sizes.read_rows(tmp_path, "sst2")
    for one, other in zip(found, given, strict=True):
        np.testing.assert_array_equal(one, other)
    assert two_sizes.main(["--render_only", f"--output={tmp_path}"]) == 0
    page = (tmp_path / "README.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| sst2 |"))
    assert ", +0.0 [+0.0, +0.0] (0.90) |" in row
    assert row.count("**") == 4
    assert "Not run: cola" in page


@pytest.mark.parametrize("script", [two_sizes, laplace_control])
def test_pages_are_rendered_from_the_committed_results(script, tmp_path):
    committed = RESULTS / script.__name__.rpartition(".")[2]
    shutil.copytree(committed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "README.md").unlink()
    assert script.main(["--render_only", f"--output={tmp_path}"]) == 0
    assert (tmp_path / "README.md").read_bytes() == (committed / "README.md").read_bytes()
