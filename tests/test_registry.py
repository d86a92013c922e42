"""Tests of registry entries of other packages and modules, named in the config."""

import json
from importlib.metadata import EntryPoint

import numpy as np
import pandas
import pytest
from extension import LEAD, LEVELS, WITHIN_ONE

import sweet_jax
from sweet_jax import registry
from sweet_jax.config import describe_keys, from_mapping
from sweet_jax.errors import UserError
from sweet_jax.exits.calibration import TEMPERATURE_RANGE, fit_temperature
from sweet_jax.exits.confidences import POLICIES
from sweet_jax.exits.outputs import RunIdentity
from sweet_jax.exits.policies import grid_thresholds
from sweet_jax.methods import METHODS, loss_weights
from sweet_jax.objectives import OBJECTIVES
from sweet_jax.objectives.objective import log_softmax
from sweet_jax.run_report import render_report


@pytest.fixture
def install_entry_points(monkeypatch):
    """Function (*(group, name, "module:OBJECT")) that replaces all installed entry points."""

    def install(*points):
        entries = [EntryPoint(name, value, group) for group, name, value in points]
        monkeypatch.setattr(
            registry, "entry_points", lambda group: [p for p in entries if p.group == group]
        )
        for table in (METHODS, POLICIES):
            monkeypatch.setattr(table, "_entries", dict(table._entries))
            vars(table).pop("_references", None)

    yield install
    for table in (METHODS, POLICIES):
        vars(table).pop("_references", None)


@pytest.mark.slow
def test_run_with_method_objective_metric_and_policy_of_a_module(options, rows, tmp_path):
    changes = {
        "method": "extension:HALF",
        "objective": "extension:LEVELS",
        "metric": "extension:WITHIN_ONE",
        "confidence": "extension:LEAD",
        "loss_weights": "extension:rising",
    }
    table = pandas.read_csv(rows)
    for name in ("task", "data_files", "text_columns"):
        del options[name]
    options |= {"max_steps": 2, "head_init": "random", "head_refit": False, "epochs": 1}
    run = sweet_jax.train(table, text="text", label="label", workdir=tmp_path, **options, **changes)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name: saved[name] for name in changes} == changes
    assert saved["isolation"] == [0.5]
    assert json.loads((tmp_path / "results.json").read_text())["metric"] == "extension:WITHIN_ONE"
    assert run.outputs.objective.predict is LEVELS.predict
    classifier = run.classifier(cost=0.7)
    assert classifier.policy == "extension:LEAD"
    predictions = classifier.predict(table["text"].tolist()[:5])
    assert set(predictions.labels) <= {"class 0", "class 1"}
    np.testing.assert_allclose(predictions.probabilities.sum(axis=-1), 1, rtol=1e-5)
    curve = sweet_jax.simulate(run.outputs, policy="extension:LEAD")
    assert curve.score.min() == 1  # two levels are always within one
    render_report(tmp_path, {"cost": 0.5})


def test_temperature_minimizes_the_loss_of_an_objective_with_nonlinear_logits():
    rng = np.random.default_rng(0)
    outputs, targets = rng.normal(1, 1, (200, 3)), rng.integers(0, 3, 200)

    def loss(temperature):
        log_probabilities = log_softmax(LEVELS.categorical.logits(outputs / temperature))[:, 0]
        return -log_probabilities[np.arange(200), targets].mean()

    fitted = fit_temperature(outputs, targets, LEVELS)
    assert loss(fitted) <= min(map(loss, np.geomspace(*TEMPERATURE_RANGE, 1000))) + 1e-6
    assert loss(fitted) < loss(1.0)
    outputs[0] = -1e200  # whose square is infinite
    assert np.isfinite(fit_temperature(outputs, targets, LEVELS))


def test_policy_of_a_module_defines_its_threshold_range():
    np.testing.assert_allclose(grid_thresholds("extension:LEAD", 2, 4), np.linspace(0, 4, 11))
    assert LEAD.by_exits


def test_loss_weights_of_a_module():
    assert loss_weights("extension:rising", (1, 2)) == ((1.0, 0.5), (1.0, 1.0))


def test_entry_points_of_an_installed_package_add_methods_and_policies(install_entry_points):
    install_entry_points(
        ("sweet_jax.methods", "half", "extension:HALF"),
        ("sweet_jax.methods", "broken", "absent:HALF"),
        ("sweet_jax.policies", "lead", "extension:LEAD"),
    )
    assert "half" in {key.name: key.allowed for key in describe_keys()}["method"].split(", ")
    config = from_mapping({"method": "half", "confidence": "lead"}).resolved()
    assert (config.method, config.isolation, config.policy) == ("half", (0.5,), "lead")
    assert METHODS["half"].name == "half"
    assert POLICIES["lead"] is LEAD
    with pytest.raises(UserError, match="unknown method 'halv': did you mean 'half'"):
        from_mapping({"method": "halv"})
    with pytest.raises(UserError, match=r"^method 'absent:HALF': ModuleNotFoundError: No module"):
        from_mapping({"method": "broken"})
    assert from_mapping({"method": "sweet"}).method == "sweet"
    assert METHODS.get("extension:HALF") is None


def test_segment_parallel_depends_on_the_values_of_a_module_s_method():
    assert from_mapping({"method": "extension:SAME", "segment_parallel": True}).segment_parallel
    with pytest.raises(UserError, match="which method='extension:HALF' rules out"):
        from_mapping({"method": "extension:HALF", "segment_parallel": True})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "absent:HALF"}, "method 'absent:HALF': ModuleNotFoundError: No module named"),
        ({"method": "extension:GONE"}, "method 'extension:GONE': AttributeError: "),
        (
            {"method": "extension:LEVELS"},
            "method 'extension:LEVELS' is of type Objective, not M",
        ),
        ({"objective": "extension:LEAD"}, "objective 'extension:LEAD' is of type Policy, not Obj"),
        ({"loss_weights": "extension:HALF"}, "loss_weights 'extension:HALF' is of type Method, "),
    ],
)
def test_invalid_module_reference_is_refused(changes, words):
    with pytest.raises(UserError) as error:
        from_mapping(changes)
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)


def test_objective_finds_a_metric_of_a_module():
    assert LEVELS.metric("extension:WITHIN_ONE").value is WITHIN_ONE.value
    assert LEVELS.metric("extension:WITHIN_ONE").name == "extension:WITHIN_ONE"


def test_run_identity_accepts_an_objective_that_was_not_yet_imported():
    registry.import_entry.cache_clear()
    assert RunIdentity(objective="extension:LEVELS").objective == "extension:LEVELS"
    assert "extension:LEVELS" not in tuple(OBJECTIVES)
