"""Thresholds fitted anew on labelled rows: the weights stay, what reads them changes."""

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
    """The outputs on the validation rows, every fourth of which has another label now."""
    labels = sweet.outputs.labels.copy()  # [1, N]
    labels[:, ::4] = (labels[:, ::4] + 1) % len(sweet.classifier.classes)
    return dataclasses.replace(sweet.outputs, labels=labels)


@pytest.fixture
def labelled(sweet, shifted, tmp_path):
    """A file of the rows of `shifted`."""
    labels, names = shifted.labels[0], sweet.classifier.classes
    with (tmp_path / "new.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(
            (text, names[label]) for text, label in zip(sweet.texts, labels, strict=True)
        )
    return tmp_path / "new.csv"


def call(sweet, *arguments: str) -> int:
    return cli.main(["recalibrate", f"--model={sweet.classifier.model.folder}", *arguments])


@pytest.mark.slow
def test_every_exit_answers_as_it_was_evaluated(sweet):
    model, engine = sweet.classifier.model, sweet.classifier.engine
    logits, scores = compute_all_exits(model, engine, sweet.texts, 7)
    np.testing.assert_allclose(logits, sweet.outputs.logits[0], atol=1e-5)
    np.testing.assert_allclose(scores, sweet.outputs.exit_scores[0], atol=1e-5)


def test_a_copy_with_other_thresholds_is_written(sweet, shifted, labelled, tmp_path, capsys):
    folder, before = tmp_path / "again", sweet.classifier.model.folder
    assert call(sweet, f"--labelled={labelled}", f"--output={folder}") == 0
    printed = capsys.readouterr().out
    assert "now: threshold " in printed
    assert "before: threshold " in printed
    for name in ("model.safetensors", "config.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (before / name).read_bytes()
    old, new = (json.loads((each / "exits.json").read_text()) for each in (before, folder))
    assert new["recalibrated_on"] == len(sweet.texts)
    wanted = fit_calibrators(shifted)[0].temperatures
    np.testing.assert_allclose(new["temperatures"], wanted, rtol=1e-3)
    assert {k for k in old if old[k] != new[k]} == {"temperatures", "dials"}
    found = AdaptiveClassifier.from_pretrained(folder, cost=0.7).predict(sweet.texts)
    assert found.cost.mean() <= 0.7 + 0.02
    assert call(sweet, f"--labelled={labelled}", f"--output={folder}") == 2
    assert "exists: choose another, or remove it" in capsys.readouterr().err
    changes = json.loads((folder / "recalibration.json").read_text())
    assert (changes["by"], changes["rows"]) == ("labels", len(sweet.texts))
    assert (
        f"on these rows accuracy {changes['operating_points'][0]['now']['metric']:.4f}" in printed
    )


def test_the_programs_of_an_exported_folder_are_left_out_of_the_copy(tmp_path, capsys):
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


def test_an_audit_log_is_enough(sweet, tmp_path, capsys):
    """Exits are held to what the last one says; of it such rows say nothing."""
    model, folder = sweet.classifier.model, tmp_path / "again"
    rng = np.random.default_rng(0)
    logits = sweet.outputs.logits[0].copy()  # [E, N, C]
    logits[0] += 3 * rng.normal(size=logits[0].shape)  # the first exit errs on these texts
    log = AuditLog(
        str(tmp_path / "audit.jsonl"), {"layers": list(model.layers), "classes": 2}, 1 << 20
    )
    given = logits.argmax(-1)
    for n in range(logits.shape[1]):
        agrees = given[:, n] == given[-1, n]
        scores = sweet.outputs.exit_scores[0][:, n]
        log.add(AuditRow(0.0, 0, agrees, np.zeros(3), logits[:, n], scores), model.layers)
    log.close()
    assert call(sweet, f"--audit_log={tmp_path / 'audit.jsonl'}", f"--output={folder}") == 0
    assert "agreement=0.9:" in capsys.readouterr().out
    old, new = (json.loads((each / "exits.json").read_text()) for each in (model.folder, folder))
    assert new["recalibrated_by"] == "agreement"
    assert new["temperatures"][-1] == old["temperatures"][-1]
    wanted = [fit_temperature(each, given[-1]) for each in logits[:-1]]
    np.testing.assert_allclose(new["temperatures"][:-1], wanted, rtol=1e-3)
    changes = json.loads((folder / "recalibration.json").read_text())
    np.testing.assert_allclose(
        [exit["metric"] for exit in changes["exits"]], (given == given[-1]).mean(axis=1)
    )
    again = AdaptiveClassifier(open_model(folder), engine=sweet.classifier.engine)
    assert again.threshold == changes["operating_points"][0]["now"]["threshold"]
    found = again.at("raw_confidence", cost=0.7)
    leaves = exit_confidences(UnlabeledOutputs(logits[None], model.layers), "raw_confidence")[0]
    leaves = leaves >= found.threshold
    leaves[-1] = True
    assert model.cost[leaves.argmax(axis=0)].mean() <= 0.7


@pytest.mark.parametrize("metric", ["micro_f1", "neg_hamming_loss"])
def test_an_audit_log_of_several_labels_holds_exits_to_the_labels_of_the_last(sweet, metric):
    """To all of a row; where the metric is of the share of labels, to that share."""
    rng = np.random.default_rng(0)
    last = 2 * rng.normal(size=(120, 2))
    logits = np.stack([last + noise * rng.normal(size=(120, 2)) for noise in (2, 1, 0)])
    logits = logits.astype(np.float32)  # [E, N, C]
    about = RunIdentity(objective="multi_label", metric=metric, policy="min_confidence")
    outputs = ExitOutputs(logits, rng.random((120, 2)) < 0.5, [2, 3, 4], identity=about)
    resolver = make_resolver(outputs)
    model = dataclasses.replace(
        sweet.classifier.model,
        objective=MULTI_LABEL,
        metric=metric,
        policy="min_confidence",
        resolver=resolver,
    )
    found = fit_by_agreement(model, logits, None)
    same = (logits > 0) == (logits[-1] > 0)  # [E, N, C]
    by_label = metric == "neg_hamming_loss"
    wanted = (same.mean(-1) - 1 if by_label else same.all(-1)).mean(axis=1)
    changes = describe_changes(model, found)
    np.testing.assert_allclose([exit["metric"] for exit in changes["exits"]], wanted)
    assert changes["metric"] == ("neg_hamming_loss" if by_label else "agreement")
    losses = resolver.losses["min_confidence"]["agreement"]
    kept = losses.share_kept(resolver.resolve("min_confidence").threshold)
    assert found.resolver.full == pytest.approx(kept - by_label)
    dials = json.loads(json.dumps(updated_exits({}, found)))["dials"]
    again = ThresholdResolver.from_dict(dials)
    target = {"error": 0.1} if by_label else {"accuracy": 0.9}
    threshold, calibrator = again.threshold("min_confidence", **target)
    confidences = exit_confidences(found.outputs, "min_confidence", [calibrator])[0]
    confidences[-1] = np.inf  # which takes the rest
    exits = (confidences >= threshold).argmax(axis=0)
    answered = same[exits, np.arange(120)]
    assert (answered.mean() if by_label else answered.all(-1).mean()) >= 0.9
    assert (exits == 0).any()
    assert again.calibrator.temperatures[-1] == resolver.calibrator.temperatures[-1]


def test_numbers_are_not_recalibrated_by_agreement(sweet):
    model = dataclasses.replace(sweet.classifier.model, objective=REGRESSION)
    with pytest.raises(UserError, match=r"is a regression, .*: pass --labelled"):
        fit_by_agreement(model, np.zeros((3, 40, 1), np.float32), None)


def test_a_log_of_int8_is_refused(sweet, tmp_path, capsys):
    path, about = tmp_path / "audit.jsonl", describe_audited(sweet.classifier.model, "int8")
    AuditLog(str(path), about, 1 << 20).close()
    assert call(sweet, f"--audit_log={path}", f"--output={tmp_path / 'again'}") == 2
    assert "precision is 'int8' there and 'float32' here" in capsys.readouterr().err


def test_a_log_of_few_texts_is_refused(sweet, tmp_path, capsys):
    path = tmp_path / "audit.jsonl"
    AuditLog(str(path), {"layers": [2, 3, 4], "classes": 2}, 1 << 20).close()
    assert call(sweet, f"--audit_log={path}", f"--output={tmp_path / 'again'}") == 2
    assert "does not hold any audited texts yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("text,label\nword1,other\n", "label 'other' is not one of the model's"),
        ("text,label\nword1,\n", "row 1 of"),
        ("text,label\n ,{label}\n", "column 'text' is empty"),
        ("text,label\n" + "word1,{label}\n" * 5, "has 5 labeled rows, but reliable"),
        ("words,label\nword1,x\n", "unknown column 'text'"),
    ],
)
def test_rows_that_will_not_do_are_refused(sweet, tmp_path, capsys, content, words):
    path = tmp_path / "new.csv"
    path.write_text(content.replace("{label}", sweet.classifier.classes[0]))
    assert call(sweet, f"--labelled={path}", f"--output={tmp_path / 'again'}") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
