"""Entries of other packages and modules: named in the config, saved with a run, found again."""

import json
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
from extension import HALF, LEAD, LEVELS, WITHIN_ONE

import sweet_jax
from sweet_jax import registry
from sweet_jax.config import from_mapping
from sweet_jax.errors import UserError
from sweet_jax.exits.calibration import TEMPERATURE_RANGE, fit_temperature
from sweet_jax.exits.outputs import RunIdentity
from sweet_jax.exits.policies import grid_thresholds
from sweet_jax.methods import METHODS, loss_weights
from sweet_jax.objectives import OBJECTIVES
from sweet_jax.objectives.objective import log_softmax
from sweet_jax.run_report import render_report


@pytest.fixture
def no_extensions(monkeypatch):
    """As if no package had been asked for its entry points."""
    registry.import_extensions.cache_clear()
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    yield monkeypatch
    registry.import_extensions.cache_clear()


def test_a_run_of_a_module_s_method_objective_metric_and_policy(options, rows, tmp_path):
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
    preds = classifier.predict(table["text"].tolist()[:5])
    assert set(preds.labels) <= {"class 0", "class 1"}
    np.testing.assert_allclose(preds.probabilities.sum(axis=-1), 1, rtol=1e-5)
    curve = sweet_jax.simulate(run.outputs, policy="extension:LEAD")
    assert curve.score.min() == 1  # two levels are always within one
    render_report(tmp_path, {"cost": 0.5})


def test_the_temperature_of_logits_that_are_not_linear_minimises_the_objective_s_loss():
    rng = np.random.default_rng(0)
    outputs, targets = rng.normal(1, 1, (200, 3)), rng.integers(0, 3, 200)

    def loss(temperature):
        logs = log_softmax(LEVELS.categorical.logits(outputs / temperature))[:, 0]
        return -logs[np.arange(200), targets].mean()

    found = fit_temperature(outputs, targets, LEVELS)
    assert loss(found) <= min(map(loss, np.geomspace(*TEMPERATURE_RANGE, 1000))) + 1e-6
    assert loss(found) < loss(1.0)


def test_a_policy_s_range_is_that_of_its_object():
    np.testing.assert_allclose(grid_thresholds("extension:LEAD", 2, 4), np.linspace(0, 4, 11))
    assert LEAD.by_exits


def test_a_schedule_of_a_module():
    assert loss_weights("extension:rising", (1, 2)) == ((1.0, 0.5), (1.0, 1.0))


def test_installed_packages_are_asked_once_for_a_name_that_no_table_has(no_extensions):
    asked = []

    def load():
        asked.append("own")
        no_extensions.setitem(METHODS, "half", HALF)

    point = SimpleNamespace(name="own", value="own.module", load=load)
    no_extensions.setattr(registry, "entry_points", lambda group: [point])
    assert from_mapping({"method": "sweet"}).method == "sweet"
    assert not asked
    assert from_mapping({"method": "half"}).resolved().isolation == (0.5,)
    for _ in range(2):
        with pytest.raises(UserError, match="unknown method 'halv': did you mean 'half'"):
            from_mapping({"method": "halv"})
    assert asked == ["own"]


def test_an_extension_that_fails_is_named(no_extensions):
    def load():
        raise ImportError("no such thing")

    point = SimpleNamespace(name="own", value="own.module", load=load)
    no_extensions.setattr(registry, "entry_points", lambda group: [point])
    refusal = r"^the extension 'own' \(own.module\) cannot be imported: ImportError: no such thing$"
    with pytest.raises(UserError, match=refusal):
        from_mapping({"objective": "ordinal"})


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
        ({"confidence": "extension:HALF"}, "policy 'extension:HALF' is neither a function nor a "),
        ({"loss_weights": "extension:HALF"}, "loss_weights 'extension:HALF' is of type Method, "),
    ],
)
def test_a_reference_that_will_not_do_is_named(changes, words):
    with pytest.raises(UserError) as error:
        from_mapping(changes)
    assert str(error.value).startswith(words)
    assert "\n" not in str(error.value)


def test_a_metric_of_a_module_is_a_metric_of_every_objective():
    assert LEVELS.metric("extension:WITHIN_ONE").value is WITHIN_ONE.value
    assert LEVELS.metric("extension:WITHIN_ONE").name == "extension:WITHIN_ONE"


def test_the_outputs_of_a_module_s_objective_are_read_in_a_process_that_never_named_it():
    registry.import_entry.cache_clear()
    assert RunIdentity(objective="extension:LEVELS").objective == "extension:LEVELS"
    assert "extension:LEVELS" not in tuple(OBJECTIVES)
