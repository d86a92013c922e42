"""Policy functions of users, given as functions or by name, with every target."""

import dataclasses
import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy_engine import load_engine

from sweet_jax import AdaptiveClassifier, ExitOutputs, Run, simulate
from sweet_jax.config import from_mapping
from sweet_jax.errors import UserError
from sweet_jax.exits.analysis import analyse
from sweet_jax.exits.confidences import POLICIES, Policy
from sweet_jax.exits.policies import exit_confidences, load_policy, policy_reference
from sweet_jax.inference.artifact import open_model
from sweet_jax.inference.artifact_writer import describe_exits
from sweet_jax.objectives.objective import softmax
from sweet_jax.simulate import main as simulate_main

NAME = "test_own_policy:largest"
TARGETS = ({"cost": 0.6}, {"accuracy": 0.7}, {"agreement": 0.7}, {"risk": 0.3}, {})


def largest(outputs, temperatures):
    """Computes the same as the policy raw_confidence."""
    probabilities = softmax(outputs.logits.astype(np.float64)).max(axis=-1)
    return np.minimum(probabilities, np.nextafter(1.0, 0.0))


@pytest.fixture(scope="module")
def run(fine_tuned) -> Run:
    return Run.load(fine_tuned[0])


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("policy", [NAME, largest], ids=["name", "function"])
def test_every_target_equals_that_of_the_equivalent_built_in_policy(run, sweet, policy, target):
    expected = run.operating_point("raw_confidence", **target)
    actual = run.operating_point(policy, **target)
    assert actual.as_dict() == expected.as_dict()
    model = sweet.classifier.model
    engine = load_engine(model)
    served = AdaptiveClassifier(model, policy, target, engine)
    built_in = AdaptiveClassifier(model, "raw_confidence", target, engine)
    assert served.threshold == built_in.threshold == actual.threshold
    texts = sweet.texts[:8]
    assert served.predict(texts).exits.tolist() == built_in.predict(texts).exits.tolist()
    assert served.at(cost=0.7).threshold == built_in.at(cost=0.7).threshold


def test_policy_functions_of_the_same_name_are_distinguished(sweet):
    def scaled(factor):
        return lambda outputs, temperatures: factor * largest(outputs, temperatures)

    unscaled = AdaptiveClassifier(
        sweet.classifier.model, scaled(1), {"cost": 0.7}, load_engine(sweet.classifier.model)
    )
    for classifier in (unscaled, unscaled.at(cost=0.6)):
        scaled_up = classifier.at(scaled(10), cost=0.7)
        assert scaled_up.policy_name == unscaled.policy_name
        assert scaled_up.threshold == pytest.approx(10 * unscaled.threshold)
        assert scaled_up.at(cost=0.7).threshold == scaled_up.threshold


def test_milliseconds_target_equals_that_of_equivalent_built_in_policy(sweet, monkeypatch):
    clock = SimpleNamespace(until_exit=lambda tokens: np.asarray([1.0, 2.0, 4.0]))
    monkeypatch.setattr("sweet_jax.inference.classifier.read_latency", lambda *_: clock)
    model = sweet.classifier.model
    engine, target = load_engine(model), {"milliseconds": 2.5}
    actual, expected = (
        AdaptiveClassifier(model, policy, target, engine) for policy in (largest, "raw_confidence")
    )
    assert actual.threshold == expected.threshold


def test_simulate_command_takes_module_and_function_name(run, capsys):
    assert simulate_main([f"--run={run.directory}", f"--policy={NAME}", "--cost=0.6"]) == 0
    stdout = capsys.readouterr().out
    assert simulate_main([f"--run={run.directory}", "--policy=raw_confidence", "--cost=0.6"]) == 0
    assert stdout == capsys.readouterr().out
    assert simulate_main([f"--run={run.directory}", "--policy=nowhere:f", "--cost=0.6"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: policy 'nowhere:f': ModuleNotFoundError: No module named")
    assert error.count("\n") == 1


def test_saved_model_names_its_policy_and_predicts_with_it(sweet, fine_tuned, tmp_path):
    folder, values = fine_tuned
    shutil.copytree(folder / "model", tmp_path / "model")  # without the run's calibration rows
    config = from_mapping(values | {"confidence": NAME, "learning_to_exit": ""}).resolved()
    assert config.policy == NAME
    splits = [
        ExitOutputs.load(folder / f"exit_outputs/{split}.npz")
        for split in ("calibration", "validation")
    ]
    identity = dataclasses.replace(splits[0].identity, policy=NAME)
    analysis = analyse(*(dataclasses.replace(outputs, identity=identity) for outputs in splits))
    task = SimpleNamespace(text_columns=("text",), metric="accuracy")
    dataset = SimpleNamespace(classes=sweet.classifier.classes, task=task)
    path = tmp_path / "model" / "exits.json"
    written = json.loads(path.read_text()) | describe_exits(config, dataset, analysis, 10)
    path.write_text(json.dumps(written))
    model = open_model(tmp_path / "model")
    assert model.policy == NAME
    classifier = AdaptiveClassifier(model, target={"cost": 0.6}, engine=load_engine(model))
    assert classifier.policy_name == NAME
    assert classifier.threshold == Run.load(folder).operating_point(largest, cost=0.6).threshold


def test_reloaded_module_gives_its_new_policy_function(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # files of the same second and size
    path = tmp_path / "reloaded_policy.py"
    path.write_text("def one(outputs, temperatures): return 1")
    before = load_policy("reloaded_policy:one")
    path.write_text("def one(outputs, temperatures): return 2")
    module = importlib.reload(sys.modules["reloaded_policy"])
    assert load_policy("reloaded_policy:one") is module.one is not before
    assert policy_reference(module.one) == "reloaded_policy:one"


@pytest.mark.parametrize(
    ("policy", "reason"),
    [("lead", "which is unknown"), ("nowhere:LEAD", "which cannot be imported: ModuleNotFoundErr")],
)
def test_missing_policy_of_a_run_or_model_is_refused_unless_another_is_named(
    run, sweet, fine_tuned, tmp_path, policy, reason
):
    shutil.copytree(fine_tuned[0] / "model", tmp_path / "model")
    path = tmp_path / "model" / "exits.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"policy": policy}))
    model = open_model(tmp_path / "model")
    engine = load_engine(model)
    identity = dataclasses.replace(run.outputs.identity, policy=policy)
    splits = [dataclasses.replace(o, identity=identity) for o in (run.calibration, run.outputs)]
    unnamed = Run.load(run.directory)
    vars(unnamed).update(calibration=splits[0], outputs=splits[1])
    for owner, use in (
        (
            f"the model {str(tmp_path / 'model')!r}",
            lambda: AdaptiveClassifier(model, engine=engine),
        ),
        ("this run", lambda: analyse(*splits)),
        ("this run", unnamed.curve),
    ):
        message = f"{owner} needs the policy {policy!r}, {reason}"
        with pytest.raises(UserError, match=re.escape(message)) as error:
            use()
        assert "install or import the package that defines it, or pass another --policy" in str(
            error.value
        )
    with pytest.raises(UserError, match=rf"^(unknown )?policy '{policy}': "):
        AdaptiveClassifier(model, policy, engine=engine)
    named = AdaptiveClassifier(model, "confidence", {"cost": 0.6}, engine)
    expected = sweet.classifier.at("confidence", cost=0.6)
    assert named.threshold == expected.threshold
    np.testing.assert_array_equal(unnamed.curve("confidence").score, run.curve("confidence").score)
    assert analyse(*splits, "confidence").resolver(0).threshold("confidence", cost=0.6)


def write_outputs(outputs, temperatures):
    outputs.logits[:] = 0


def read_labels(outputs, temperatures):
    return outputs.labels


@pytest.mark.parametrize(
    ("policy", "reason"),
    [(write_outputs, "ValueError: .*read-only"), (read_labels, "AttributeError: .*labels")],
)
def test_policy_can_neither_write_outputs_nor_read_labels(sweet, policy, reason):
    before = sweet.outputs.logits.copy()
    name = rf"the policy 'test_own_policy:{policy.__name__}' failed \({reason}"
    with pytest.raises(UserError, match=name):
        simulate(sweet.outputs, policy)
    np.testing.assert_array_equal(sweet.outputs.logits, before)


def test_policies_of_the_guide_run(sweet, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs/guides/policies.md").read_text()
    sources = re.findall(r"```python\n# margins\.py\n(.*?)```", page, re.S)
    (tmp_path / "guide_margins.py").write_text("".join(sources))
    monkeypatch.syspath_prepend(tmp_path)
    top = np.sort(sweet.outputs.logits.astype(np.float64), axis=-1)
    gap = top[..., -1] - top[..., -2]
    for name, expected in (("squared_margin", gap**2), ("LEAD", gap)):
        confidences = exit_confidences(sweet.outputs, f"guide_margins:{name}")
        np.testing.assert_allclose(confidences, expected, rtol=1e-4)


def fail(inputs):
    return inputs.nothing


FAILING = Policy(fail, "reads a field that there is not")


@pytest.mark.parametrize("policy", ["test_own_policy:FAILING", "installed"])
def test_failing_policy_object_is_refused_in_one_line(sweet, monkeypatch, policy):
    monkeypatch.setitem(POLICIES, "installed", FAILING)
    message = rf"^the policy '{policy}' failed \(AttributeError: .*: it must take a PolicyInput and"
    with pytest.raises(UserError, match=message):
        simulate(sweet.outputs, policy)
    monkeypatch.setitem(POLICIES, "confidence", FAILING)
    with pytest.raises(AttributeError):  # a defect of this package is not the user's error
        simulate(sweet.outputs, "confidence")


def test_unusable_policies_and_missing_calibration_are_refused(sweet, fine_tuned, tmp_path):
    assert policy_reference(largest) == NAME
    with pytest.raises(UserError, match="AttributeError"):
        policy_reference(lambda outputs, temperatures: None)
    with pytest.raises(UserError, match="is neither a function nor a Policy"):
        load_policy("test_own_policy:NAME")
    with pytest.raises(UserError, match="unknown policy 'largest'"):
        exit_confidences(sweet.outputs, "largest")
    with pytest.raises(UserError, match=r"must return confidences \[R, E, N\] = .*got \(1,\)"):
        simulate(sweet.outputs, lambda outputs, temperatures: np.ones(1))
    shutil.copytree(fine_tuned[0] / "model", tmp_path / "model")
    model = open_model(tmp_path / "model")
    engine = load_engine(model)
    with pytest.raises(UserError, match=r"calibration\.npz', which .* does not exist: pass thr"):
        AdaptiveClassifier(model, largest, {"cost": 0.5}, engine)
    assert AdaptiveClassifier(model, largest, {"threshold": 0.5}, engine).threshold == 0.5
    changed = dataclasses.replace(
        sweet.classifier.model.resolver.calibrator, temperatures=np.full(3, 7.0)
    )
    resolver = dataclasses.replace(sweet.classifier.model.resolver, calibrator=changed)
    recalibrated = dataclasses.replace(sweet.classifier.model, resolver=resolver)
    with pytest.raises(UserError, match="do not fit this model, which was recalibrated"):
        AdaptiveClassifier(recalibrated, largest, {"cost": 0.5}, engine)
