"""Logistic regressions at the exits: what they minimise, and what is done with them."""

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


def problem(classes=3, rows=400, noise=1.0, seed=0, size=12):
    """Features of classes around random means, on scales that differ a thousandfold."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    centres = rng.normal(size=(classes, size))
    x = centres[labels] + noise * rng.normal(size=(rows, size))
    return (x * np.logspace(-2, 1, size) + 5).astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("newton", [True, False])
def test_the_penalised_likelihood_is_at_its_minimum(classes, newton, monkeypatch):
    """The gradient of mean cross-entropy + λ/2 |W|^2 on standardised features is zero."""
    monkeypatch.setattr(single_label, "_NEWTON", 10**6 if newton else 0)
    x, y = problem(classes)
    raw, held = x.astype(np.float64), x[:100].copy()
    kernel, bias, penalty = fit_classifier(x, y, held, y[:100], classes)
    logits = raw @ kernel + bias
    mean, scale = raw.mean(axis=0), raw.std(axis=0)
    weight = kernel * scale[:, None]  # on standardised features
    residual = softmax(logits, axis=1) - np.eye(classes)[y]
    standard = (raw - mean) / scale
    # scikit-learn penalises one vector of two classes, w, which stands as -w/2 and w/2 here.
    factor = 2 if classes == 2 else 1
    gradient = standard.T @ residual / len(y) + penalty * weight * factor
    assert np.abs(gradient).max() < 2e-4
    assert np.abs(residual.mean(axis=0)).max() < 2e-4  # the bias is not penalised
    np.testing.assert_allclose(x, standard, atol=1e-4)  # standardised in place


def test_held_out_rows_choose_the_penalty():
    clean, noisy = (fit_classifier(*halves(noise), 3)[2] for noise in (0.2, 8.0))
    assert clean < noisy
    assert clean in PENALTIES


def halves(noise):
    x, y = problem(3, rows=300, noise=noise)
    return x[:150].copy(), y[:150], x[150:].copy(), y[150:]


def test_of_all_penalties_the_best_on_held_out_rows():
    x, y, held, held_y = halves(3.0)
    losses = {}
    for penalty in PENALTIES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probe, "PENALTIES", (penalty,))
            kernel, bias, _ = fit_classifier(x.copy(), y, held.copy(), held_y, 3)
        logs = log_softmax(held @ kernel + bias, axis=1)
        losses[penalty] = -logs[np.arange(len(held_y)), held_y].mean()
    chosen = fit_classifier(x.copy(), y, held.copy(), held_y, 3)[2]
    assert chosen == min(losses, key=losses.get)


def test_a_class_without_rows_is_never_given_and_a_constant_feature_does_no_harm():
    x, y = problem(3)
    y = np.where(y == 1, 2, y)
    x[:, 4] = 7.0
    kernel, bias, _ = fit_classifier(x.copy(), y, x[:50].copy(), y[:50], 4)
    logits = x @ kernel + bias
    assert np.isfinite(logits).all()
    assert set(logits.argmax(axis=1)) == {0, 2}
    assert (logits.argmax(axis=1) == y).mean() > 0.9


def test_chunks_give_the_same(monkeypatch):
    x, y = problem(3)
    whole = fit_classifier(x.copy(), y, x[:99].copy(), y[:99], 3)
    monkeypatch.setattr(probe, "_CHUNK", 64)
    parts = fit_classifier(x.copy(), y, x[:99].copy(), y[:99], 3)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_every_replica_and_exit_has_its_own():
    (x, y), (z, _) = problem(3, seed=1), problem(3, seed=2)
    features = np.stack([x, z])[None]  # [1, E, U, H]
    rows = np.stack([np.arange(200), np.arange(200), np.arange(100, 300)])  # [R, N]
    tuning = np.tile(np.arange(300, 400), (3, 1))
    found = fit_classifiers(features, y[None], rows, tuning, 3)
    assert found.kernel.shape == (3, 2, 12, 3)
    for r, e in ((0, 0), (0, 1), (2, 0)):
        source = features[0, e]
        own, held = source[rows[r]], source[tuning[r]]
        kernel, bias, penalty = fit_classifier(own, y[rows[r]], held, y[tuning[r]], 3)
        np.testing.assert_allclose(found.kernel[r, e], kernel, rtol=1e-6)
        np.testing.assert_allclose(found.bias[r, e], bias, rtol=1e-6)
        assert found.penalty[r, e] == penalty
    np.testing.assert_array_equal(found.kernel[0], found.kernel[1])
    assert (found.kernel[0] != found.kernel[2]).any()
    np.testing.assert_array_equal(features[0], np.stack([x, z]))  # left as they were
    predictions = found.predictions(features)
    wanted = (x @ found.kernel[2, 0] + found.bias[2, 0]).argmax(axis=-1)
    np.testing.assert_array_equal(predictions[2, 0], wanted)
    params = {"heads": {str(e): {"classifier": None, "pooler": e} for e in (2, 4)}, "encoder": 1}
    new = with_classifiers(params, (4,), found, [1])
    assert new["heads"]["2"]["classifier"] is None
    np.testing.assert_array_equal(new["heads"]["4"]["classifier"]["kernel"], found.kernel[:, 1])
    assert (new["heads"]["4"]["pooler"], new["encoder"]) == (4, 1)


@pytest.mark.parametrize(("method", "streamed"), [("early_exit", True), ("multi_model", False)])
def test_without_epochs_the_probe_is_the_model(
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


def test_of_a_large_file_some_rows_are_fitted_on(
    options, tmp_path, one_device, monkeypatch, caplog
):
    caplog.set_level("INFO", logger="sweet_jax")
    monkeypatch.setattr("sweet_jax.head_fitting.ROWS", 20)
    job = prepare(from_mapping(options | {"head_init": "probe"}))
    assert (job.rows.training.shape, job.rows.tuning.shape) == ((1, 81), (1, 9))
    fit_probe(job, tmp_path)
    assert "features of 29 rows at 3 exits" in caplog.text  # tuning rows are fewer than 20


def test_a_probe_uses_all_devices_whatever_the_batch_size(options, tmp_path, monkeypatch):
    """One replica: two that differ only in their seed share the features."""
    used, compile_evaluation = [], head_fitting.compile_evaluation

    def compile_and_count(config, graphdef, mesh, **more):
        used.append(mesh.size)
        return compile_evaluation(config, graphdef, mesh, **more)

    monkeypatch.setattr(head_fitting, "compile_evaluation", compile_and_count)
    monkeypatch.setattr(head_fitting, "ROWS", 20)
    changes = {"seeds": (0, 1), "batch_size": 7, "evaluation_batch_size": 6, "head_init": "probe"}
    found = fit_probe(prepare(from_mapping(options | changes)), tmp_path)
    assert used == [4]
    assert np.isfinite(found.classifiers.kernel).all()
