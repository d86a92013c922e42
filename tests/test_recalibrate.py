"""Tests of `sweet-jax recalibrate`: thresholds fitted again on labelled rows or an audit log."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from sweet_jax import AdaptiveClassifier, ExitOutputs, cli
from sweet_jax.errors import UserError
from sweet_jax.exits.calibration import fit_calibrators, fit_temperature
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.exits.outputs import RunIdentity
from sweet_jax.exits.policies import UnlabeledOutputs, exit_confidences
from sweet_jax.exits.resolver import ThresholdResolver
from sweet_jax.inference.all_exits import compute_all_exits
from sweet_jax.inference.artifact import open_model
from sweet_jax.inference.audit_identity import describe_audited
from sweet_jax.inference.audit_log import AuditLog, AuditRow
from sweet_jax.inference.onnx_files import PROGRAMS
from sweet_jax.inference.recalibration import describe_changes, fit_by_agreement, updated_exits
from sweet_jax.objectives.multi_label import MULTI_LABEL
from sweet_jax.objectives.regression import REGRESSION
from sweet_jax.recalibrate import _write_copy


@pytest.fixture
def shifted(sweet):
    """Outputs on the validation rows, with another label for every fourth row."""
    labels = sweet.outputs.labels.copy()  # [1, N]
    labels[:, ::4] = (labels[:, ::4] + 1) % len(sweet.classifier.classes)
    return dataclasses.replace(sweet.outputs, labels=labels)


@pytest.fixture
def labelled_file(sweet, shifted, tmp_path):
    """A CSV of the validation texts with the labels of `shifted`."""
    labels, names = shifted.labels[0], sweet.classifier.classes
    write_labelled(tmp_path / "new.csv", sweet.texts, [names[label] for label in labels])
    return tmp_path / "new.csv"


def recalibrate(sweet, *arguments: str) -> int:
    return cli.main(["recalibrate", f"--model={sweet.classifier.model.folder}", *arguments])


@pytest.mark.slow
def test_outputs_of_all_exits_equal_those_of_the_evaluation(sweet):
    model, engine = sweet.classifier.model, sweet.classifier.engine
    logits, scores = compute_all_exits(model, engine, sweet.texts, 7)
    np.testing.assert_allclose(logits, sweet.outputs.logits[0], atol=1e-5)
    np.testing.assert_allclose(scores, sweet.outputs.exit_scores[0], atol=1e-5)


def test_recalibration_on_labels_writes_a_copy_with_new_thresholds(
    sweet, shifted, labelled_file, tmp_path, capsys
):
    folder, original = tmp_path / "again", sweet.classifier.model.folder
    assert recalibrate(sweet, f"--labelled={labelled_file}", f"--output={folder}") == 0
    stdout = capsys.readouterr().out
    assert "now: threshold " in stdout
    assert "before: threshold " in stdout
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (original / name).read_bytes()
    old, new = (json.loads((each / "exits.json").read_text()) for each in (original, folder))
    assert new["recalibrated_on"] == len(sweet.texts)
    expected = fit_calibrators(shifted)[0].temperatures
    np.testing.assert_allclose(new["temperatures"], expected, rtol=1e-3)
    assert {k for k in old if old[k] != new[k]} == {"temperatures", "dials"}
    predictions = AdaptiveClassifier.from_pretrained(folder, cost=0.7).predict(sweet.texts)
    assert predictions.cost.mean() <= 0.7 + 0.02
    assert recalibrate(sweet, f"--labelled={labelled_file}", f"--output={folder}") == 2
    assert "exists: choose another, or remove it" in capsys.readouterr().err
    changes = json.loads((folder / "recalibration.json").read_text())
    assert (changes["by"], changes["rows"]) == ("labels", len(sweet.texts))
    assert f"on these rows accuracy {changes['operating_points'][0]['now']['metric']:.4f}" in stdout


def write_labelled(path, texts, labels) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(zip(texts, labels, strict=True))


def test_recalibration_on_inverted_labels_warns_of_temperatures_at_their_bound(
    sweet, labelled_file, tmp_path, capsys
):
    """No temperature makes probabilities fit labels that the model contradicts."""
    assert recalibrate(sweet, f"--labelled={labelled_file}", f"--output={tmp_path / 'right'}") == 0
    assert "warning" not in capsys.readouterr().err
    names, predicted = sweet.classifier.classes, sweet.outputs.predictions[0, -1]  # [N]
    path, folder = tmp_path / "inverted.csv", tmp_path / "again"
    write_labelled(path, sweet.texts, [names[1 - label] for label in predicted])
    assert recalibrate(sweet, f"--labelled={path}", f"--output={folder}") == 0
    error = capsys.readouterr().err
    assert "warning: temperatures reached the bound of their range, " in error
    assert "100 at layer 4 (accuracy 0.0000)" in error
    assert json.loads((folder / "exits.json").read_text())["temperatures"][-1] == 100


def test_recalibrated_copy_leaves_out_exported_programs(tmp_path, capsys):
    old = tmp_path / "old"
    (old / "onnx").mkdir(parents=True)
    left_out = ["README.md", "int8.json", "run.py", "model.json", *PROGRAMS]
    for name in ("exits.json", "clock.json", "onnx/graphs.json", *left_out):
        (old / name).write_text("1")
    _write_copy(old, tmp_path / "new", {"exits.json": {"threshold": 2}})
    assert {str(p.relative_to(tmp_path / "new")) for p in (tmp_path / "new").rglob("*")} == {
        "clock.json", "exits.json", "onnx", "onnx/graphs.json"
    }  # fmt: skip
    assert json.loads((tmp_path / "new" / "exits.json").read_text()) == {"threshold": 2}
    assert "run.py, run.mjs and index.html use the former thresholds" in (capsys.readouterr().err)


def test_recalibration_on_an_audit_log_fits_agreement_with_the_last_exit(sweet, tmp_path, capsys):
    """The last exit, which has no reference of its own, keeps its temperature."""
    model, folder = sweet.classifier.model, tmp_path / "again"
    rng = np.random.default_rng(0)
    logits = sweet.outputs.logits[0].copy()  # [E, N, C]
    logits[0] += 3 * rng.normal(size=logits[0].shape)  # the first exit errs on these texts
    log = AuditLog(
        str(tmp_path / "audit.jsonl"), {"layers": list(model.layers), "classes": 2}, 1 << 20
    )
    predictions = logits.argmax(-1)
    for row in range(logits.shape[1]):
        agrees = predictions[:, row] == predictions[-1, row]
        scores = sweet.outputs.exit_scores[0][:, row]
        log.add(AuditRow(0.0, 0, agrees, np.zeros(3), logits[:, row], scores), model.layers)
    log.close()
    assert recalibrate(sweet, f"--audit_log={tmp_path / 'audit.jsonl'}", f"--output={folder}") == 0
    assert "agreement=0.9:" in capsys.readouterr().out
    old, new = (json.loads((each / "exits.json").read_text()) for each in (model.folder, folder))
    assert new["recalibrated_by"] == "agreement"
    assert new["temperatures"][-1] == old["temperatures"][-1]
    expected = [fit_temperature(each, predictions[-1]) for each in logits[:-1]]
    np.testing.assert_allclose(new["temperatures"][:-1], expected, rtol=1e-3)
    changes = json.loads((folder / "recalibration.json").read_text())
    np.testing.assert_allclose(
        [exit["metric"] for exit in changes["exits"]], (predictions == predictions[-1]).mean(axis=1)
    )
    classifier = AdaptiveClassifier(open_model(folder), engine=sweet.classifier.engine)
    assert classifier.threshold == changes["operating_points"][0]["now"]["threshold"]
    at_cost = classifier.at("raw_confidence", cost=0.7)
    leaving = exit_confidences(UnlabeledOutputs(logits[None], model.layers), "raw_confidence")[0]
    leaving = leaving >= at_cost.threshold
    leaving[-1] = True
    assert model.cost[leaving.argmax(axis=0)].mean() <= 0.7


@pytest.mark.parametrize("metric", ["micro_f1", "neg_hamming_loss"])
def test_multi_label_agreement_is_per_row_or_per_label_as_the_metric_is(sweet, metric):
    """Agreement with the last exit: of all labels of a row, or for Hamming loss of each label."""
    rng = np.random.default_rng(0)
    last = 2 * rng.normal(size=(120, 2))
    logits = np.stack([last + noise * rng.normal(size=(120, 2)) for noise in (2, 1, 0)])
    logits = logits.astype(np.float32)  # [E, N, C]
    identity = RunIdentity(objective="multi_label", metric=metric, policy="min_confidence")
    outputs = ExitOutputs(logits, rng.random((120, 2)) < 0.5, [2, 3, 4], identity=identity)
    resolver = make_resolver(outputs)
    model = dataclasses.replace(
        sweet.classifier.model,
        objective=MULTI_LABEL,
        metric=metric,
        policy="min_confidence",
        resolver=resolver,
    )
    recalibrated = fit_by_agreement(model, logits, None)
    agrees = (logits > 0) == (logits[-1] > 0)  # [E, N, C]
    by_label = metric == "neg_hamming_loss"
    expected = (agrees.mean(-1) - 1 if by_label else agrees.all(-1)).mean(axis=1)
    changes = describe_changes(model, recalibrated)
    np.testing.assert_allclose([exit["metric"] for exit in changes["exits"]], expected)
    assert changes["metric"] == ("neg_hamming_loss" if by_label else "agreement")
    losses = resolver.losses["min_confidence"]["agreement"]
    agreement = losses.share_kept(resolver.resolve("min_confidence").threshold)
    assert recalibrated.resolver.full == pytest.approx(agreement - by_label)
    dials = json.loads(json.dumps(updated_exits({}, recalibrated)))["dials"]
    loaded = ThresholdResolver.from_dict(dials)
    target = {"error": 0.1} if by_label else {"accuracy": 0.9}
    threshold, calibrator = loaded.threshold("min_confidence", **target)
    confidences = exit_confidences(recalibrated.outputs, "min_confidence", [calibrator])[0]
    confidences[-1] = np.inf  # the last exit takes the rest
    exits = (confidences >= threshold).argmax(axis=0)
    agreed = agrees[exits, np.arange(120)]
    assert (agreed.mean() if by_label else agreed.all(-1).mean()) >= 0.9
    assert (exits == 0).any()
    for fitted in (loaded.calibrator, loaded.half_calibrator):
        assert fitted.temperatures[-1] == resolver.calibrator.temperatures[-1] != 1


def test_recalibration_by_agreement_is_refused_for_a_regression(sweet):
    model = dataclasses.replace(sweet.classifier.model, objective=REGRESSION)
    with pytest.raises(UserError, match=r"is a regression, .*: pass --labelled"):
        fit_by_agreement(model, np.zeros((3, 40, 1), np.float32), None)


def test_audit_log_of_another_precision_is_refused(sweet, tmp_path, capsys):
    path, audited = tmp_path / "audit.jsonl", describe_audited(sweet.classifier.model, "int8")
    AuditLog(str(path), audited, 1 << 20).close()
    assert recalibrate(sweet, f"--audit_log={path}", f"--output={tmp_path / 'again'}") == 2
    assert "precision is 'int8' there and 'float32' here" in capsys.readouterr().err


def test_empty_audit_log_is_refused(sweet, tmp_path, capsys):
    path = tmp_path / "audit.jsonl"
    AuditLog(str(path), {"layers": [2, 3, 4], "classes": 2}, 1 << 20).close()
    assert recalibrate(sweet, f"--audit_log={path}", f"--output={tmp_path / 'again'}") == 2
    assert "does not hold any audited texts yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("text,label\nword1,other\n", "label 'other' is not one of the model's"),
        ("text,label\nword1,\n", "row 1 of"),
        ("text,label\n ,{label}\n", "column 'text' is empty"),
        ("text,label\n" + "word1,{label}\n" * 5, "has 5 labeled rows, but reliable"),
        ("text,label\n" + "word1,{label}\n" * 40, "need rows of different labels"),
        ("words,label\nword1,x\n", "unknown column 'text'"),
    ],
)
def test_invalid_labelled_rows_are_refused(sweet, tmp_path, capsys, content, words):
    path = tmp_path / "new.csv"
    path.write_text(content.replace("{label}", sweet.classifier.classes[0]))
    assert recalibrate(sweet, f"--labelled={path}", f"--output={tmp_path / 'again'}") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
