"""Tests of probes: logistic regressions fitted at the exits, and models that start from them."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from sweet_jax import head_fitting
from sweet_jax.config import from_mapping
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.head_fitting import fit_probe
from sweet_jax.objectives import single_label
from sweet_jax.pipeline import run
from sweet_jax.preparation import prepare
from sweet_jax.training import probe
from sweet_jax.training.probe import PENALTIES, fit_classifier, fit_classifiers, with_classifiers


def make_features(classes=3, rows=400, noise=1.0, seed=0, size=12):
    """Features of classes around random means, on scales that differ a thousandfold."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    centres = rng.normal(size=(classes, size))
    x = centres[labels] + noise * rng.normal(size=(rows, size))
    return (x * np.logspace(-2, 1, size) + 5).astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("newton", [True, False])
def test_gradient_of_the_penalized_likelihood_is_zero(classes, newton, monkeypatch):
    """The gradient of mean cross-entropy + λ/2 |W|^2 on standardized features is zero."""
    monkeypatch.setattr(single_label, "_NEWTON", 10**6 if newton else 0)
    x, y = make_features(classes)
    features, tuning = x.astype(np.float64), x[:100].copy()
    kernel, bias, penalty = fit_classifier(x, y, tuning, y[:100], classes)
    logits = features @ kernel + bias
    mean, scale = features.mean(axis=0), features.std(axis=0)
    weight = kernel * scale[:, None]  # on standardized features
    residual = softmax(logits, axis=1) - np.eye(classes)[y]
    standardized = (features - mean) / scale
    # scikit-learn penalizes one vector w for two classes; here the classes have -w/2 and w/2.
    factor = 2 if classes == 2 else 1
    gradient = standardized.T @ residual / len(y) + penalty * weight * factor
    assert np.abs(gradient).max() < 2e-4
    assert np.abs(residual.mean(axis=0)).max() < 2e-4  # the bias is not penalized
    np.testing.assert_allclose(x, standardized, atol=1e-4)  # standardized in place


def test_noisier_features_get_a_larger_penalty():
    clean, noisy = (fit_classifier(*training_and_tuning_rows(noise), 3)[2] for noise in (0.2, 8.0))
    assert clean < noisy
    assert clean in PENALTIES


def training_and_tuning_rows(noise):
    x, y = make_features(3, rows=300, noise=noise)
    return x[:150].copy(), y[:150], x[150:].copy(), y[150:]


def test_penalty_minimizes_the_loss_on_tuning_rows():
    x, y, tuning, tuning_y = training_and_tuning_rows(3.0)
    losses = {}
    for penalty in PENALTIES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probe, "PENALTIES", (penalty,))
            kernel, bias, _ = fit_classifier(x.copy(), y, tuning.copy(), tuning_y, 3)
        log_probabilities = log_softmax(tuning @ kernel + bias, axis=1)
        losses[penalty] = -log_probabilities[np.arange(len(tuning_y)), tuning_y].mean()
    chosen = fit_classifier(x.copy(), y, tuning.copy(), tuning_y, 3)[2]
    assert chosen == min(losses, key=losses.get)


def test_probe_handles_a_class_without_rows_and_a_constant_feature():
    x, y = make_features(3)
    y = np.where(y == 1, 2, y)
    x[:, 4] = 7.0
    kernel, bias, _ = fit_classifier(x.copy(), y, x[:50].copy(), y[:50], 4)
    logits = x @ kernel + bias
    assert np.isfinite(logits).all()
    assert set(logits.argmax(axis=1)) == {0, 2}
    assert (logits.argmax(axis=1) == y).mean() > 0.9


def test_probe_without_held_out_rows_is_refused():
    """It would silently keep the strongest penalty."""
    x, y = make_features(3)
    with pytest.raises(ValueError, match="no held-out rows to choose the penalty"):
        fit_classifier(x, y, x[:0], y[:0], 3)


def test_probe_fitted_in_chunks_equals_probe_fitted_at_once(monkeypatch):
    x, y = make_features(3)
    at_once = fit_classifier(x.copy(), y, x[:99].copy(), y[:99], 3)
    monkeypatch.setattr(probe, "_CHUNK", 64)
    in_chunks = fit_classifier(x.copy(), y, x[:99].copy(), y[:99], 3)
    for expected, actual in zip(at_once, in_chunks, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_each_replica_and_exit_has_its_own_probe():
    (x, y), (z, _) = make_features(3, seed=1), make_features(3, seed=2)
    features = np.stack([x, z])[None]  # [1, E, U, H]
    rows = np.stack([np.arange(200), np.arange(200), np.arange(100, 300)])  # [R, N]
    tuning = np.tile(np.arange(300, 400), (3, 1))
    probes = fit_classifiers(features, y[None], rows, tuning, 3)
    assert probes.kernel.shape == (3, 2, 12, 3)
    for r, e in ((0, 0), (0, 1), (2, 0)):
        exit_features = features[0, e]
        training, held_out = exit_features[rows[r]], exit_features[tuning[r]]
        kernel, bias, penalty = fit_classifier(training, y[rows[r]], held_out, y[tuning[r]], 3)
        np.testing.assert_allclose(probes.kernel[r, e], kernel, rtol=1e-6)
        np.testing.assert_allclose(probes.bias[r, e], bias, rtol=1e-6)
        assert probes.penalty[r, e] == penalty
    np.testing.assert_array_equal(probes.kernel[0], probes.kernel[1])
    assert (probes.kernel[0] != probes.kernel[2]).any()
    np.testing.assert_array_equal(features[0], np.stack([x, z]))  # not standardized in place
    predictions = probes.predictions(features)
    expected = (x @ probes.kernel[2, 0] + probes.bias[2, 0]).argmax(axis=-1)
    np.testing.assert_array_equal(predictions[2, 0], expected)
    params = {"heads": {str(e): {"classifier": None, "pooler": e} for e in (2, 4)}, "encoder": 1}
    replaced = with_classifiers(params, (4,), probes, [1])
    assert replaced["heads"]["2"]["classifier"] is None
    np.testing.assert_array_equal(
        replaced["heads"]["4"]["classifier"]["kernel"], probes.kernel[:, 1]
    )
    assert (replaced["heads"]["4"]["pooler"], replaced["encoder"]) == (4, 1)


@pytest.mark.parametrize(("method", "streamed"), [("early_exit", True), ("multi_model", False)])
def test_model_equals_its_probe_after_zero_epochs(
    method, streamed, options, tmp_path, one_device, monkeypatch, caplog
):
    caplog.set_level("INFO", logger="sweet_jax")
    if streamed:
        monkeypatch.setattr("sweet_jax.training.evaluation._IN_MEMORY", 1000)
    recipe = {"pooling": "mean", "head_init": "probe", "epochs": 0, "baselines": "quick"}
    config = from_mapping(options | recipe | {"method": method, "exits": (1, 3)})
    results = run(config, tmp_path)
    outputs = ExitOutputs.load(tmp_path / "exit_outputs" / "validation.npz")
    with np.load(tmp_path / "probe.npz") as arrays:
        predictions = arrays["predictions"]
    np.testing.assert_array_equal(outputs.predictions, predictions)
    for e, layer in enumerate((1, 3)):
        baseline = results["baselines"][f"probe_{layer}"]
        assert baseline["score"] == results["replicas"][0]["individual"][e]["score"]
    assert results["n"] == {"train": 81, "tuning": 9, "calibration": 10, "validation": 32}
    assert (tmp_path / "model" / "exits.json").exists()
    assert ("are kept in a file under" in caplog.text) == streamed


def test_probe_is_fitted_on_a_limited_number_of_rows(
    options, tmp_path, one_device, monkeypatch, caplog
):
    caplog.set_level("INFO", logger="sweet_jax")
    monkeypatch.setattr("sweet_jax.head_fitting.ROWS", 20)
    job = prepare(from_mapping(options | {"head_init": "probe"}))
    assert (job.rows.training.shape, job.rows.tuning.shape) == ((1, 81), (1, 9))
    fit_probe(job, tmp_path)
    assert "features of 29 rows at 3 exits" in caplog.text  # tuning rows are fewer than 20


def test_probe_uses_all_devices_with_any_batch_size(options, tmp_path, monkeypatch):
    """Two replicas that differ only in their seed share one set of features."""
    device_counts, compile_evaluation = [], head_fitting.compile_evaluation

    def compile_and_record(config, graphdef, mesh, **more):
        device_counts.append(mesh.size)
        return compile_evaluation(config, graphdef, mesh, **more)

    monkeypatch.setattr(head_fitting, "compile_evaluation", compile_and_record)
    monkeypatch.setattr(head_fitting, "ROWS", 20)
    changes = {"seeds": (0, 1), "batch_size": 7, "evaluation_batch_size": 6, "head_init": "probe"}
    fitted = fit_probe(prepare(from_mapping(options | changes)), tmp_path)
    assert device_counts == [4]
    assert np.isfinite(fitted.classifiers.kernel).all()
