"""The exported JAX program, the model card, and uploads to the hub."""

import ast
import dataclasses
import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sweet_jax import AdaptiveClassifier, export
from sweet_jax.data.batches import encode
from sweet_jax.errors import UserError
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.objectives import SINGLE_LABEL


def load_runner(folder: Path):
    """Returns run.py of an exported folder as a module; it needs nothing but jax and numpy."""
    spec = importlib.util.spec_from_file_location("exported_run", folder / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tree = ast.parse((folder / "run.py").read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported <= {"json", "sys", "pathlib", "jax.export", "numpy"}
    return module


def read_refusal(folder: Path, monkeypatch, capsys, *arguments) -> str:
    """Returns the error output of run.py of an exported folder for arguments that it refuses."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(folder / "run.py"), run_name="__main__")
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out) == (2, "")
    return captured.err


@pytest.mark.parametrize(
    "method",
    ["sweet", *(pytest.param(m, marks=pytest.mark.slow) for m in ("multi_model", "mean_pooled"))],
)
def test_exported_program_predicts_as_classifier_and_refuses_bad_input(
    method, request, tmp_path, monkeypatch, capsys
):
    reference = request.getfixturevalue(method)
    model = reference.classifier.model
    fitted = [model.resolver.calibrator]
    confidences = exit_confidences(reference.outputs, "confidence", fitted)[0]  # [E, N]
    threshold = float(np.median(confidences[0])) + 1e-3
    classifier = reference.classifier.at("confidence", threshold=threshold)
    expected = classifier.predict(reference.texts, 8, "latency")
    folder = tmp_path / "exported"
    arguments = [f"--model={model.folder}", f"--output={folder}", f"--threshold={threshold}"]
    assert export.main([*arguments, "--policy=confidence"]) == 0
    ids, _ = encode(model.tokenizer, [(t,) for t in reference.texts], 32)
    tokens = np.asarray([len(row) for row in ids], np.int32)
    padded = np.zeros((2, len(ids), 32), np.int32)
    for number, row in enumerate(ids):
        padded[0, number, : len(row)] = row
    classes, probability, layer = load_runner(folder).predict(folder, *padded, tokens)
    assert (layer == expected.exits).all()
    assert (np.asarray(model.classes)[classes] == expected.labels).all()
    np.testing.assert_allclose(probability, expected.probabilities.max(axis=1), atol=1e-5)
    np.savez(tmp_path / "tokens.npz", input_ids=padded[0], token_type_ids=padded[1], tokens=tokens)
    command = [sys.executable, "run.py", tmp_path / "tokens.npz"]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    answers = zip(classes, probability, layer, strict=True)
    lines = [f"{model.classes[c]} {p:.4f} {e}" for c, p, e in answers]
    assert process.stdout.splitlines() == lines
    assert "python run.py tokens.npz" in read_refusal(folder, monkeypatch, capsys)
    short = {"input_ids": padded[0][:, :-1], "token_type_ids": padded[1], "tokens": tokens}
    np.savez(tmp_path / "short.npz", **short)
    np.savez(tmp_path / "lacks.npz", input_ids=padded[0])
    (tmp_path / "junk.npz").write_text("junk")
    for name, message in (
        ("short.npz", "input_ids must have shape ["),
        ("lacks.npz", "the array token_type_ids is missing"),
        ("junk.npz", ""),
        ("absent.npz", "No such file"),
    ):
        stderr = read_refusal(folder, monkeypatch, capsys, tmp_path / name)
        assert stderr.startswith(f"error: {tmp_path / name}: ")
        assert message in stderr
        assert stderr.count("\n") == 1
    assert export.main([*arguments, "--policy=confidence"]) == 2  # the folder exists
    assert export.main([*arguments, "--policy=entropy"]) == 2
    assert "needs --policy=confidence or raw_confidence" in capsys.readouterr().err


def test_export_refuses_unknown_objective(sweet, tmp_path):
    ordinal = dataclasses.replace(SINGLE_LABEL, name="ordinal")
    model = dataclasses.replace(sweet.classifier.model, objective=ordinal)
    classifier = AdaptiveClassifier(
        model, target={"threshold": 0.5}, engine=sweet.classifier.engine
    )
    with pytest.raises(
        UserError, match="'ordinal', only single_label, multi_label, regression: us"
    ):
        export.export(classifier, classifier.engine, tmp_path / "exported", 16)


def test_model_card_has_metrics_of_run(sweet):
    folder = sweet.classifier.model.folder
    card = (folder / "README.md").read_text()
    results = json.loads((folder.parent / "results.json").read_text())
    assert card.startswith("---\nlibrary_name: sweet_jax")
    for row in results["replicas"][0]["individual"]:
        assert f"| {row['layer']} | {row['cost']:.3f} | {row['score']:.4f} |" in card
    reached = {k: v for k, v in results["replicas"][0]["at_cost"].items() if v is not None}
    assert reached
    assert all(f"| {cost} | {score:.4f} |" in card for cost, score in reached.items())
    assert "classes: class 0, class 1" in card


def test_push_to_hub_creates_repository_and_uploads_model(sweet, monkeypatch):
    """The calls of the client are recorded instead of sent."""
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **k: calls.append(k) or "there")
    assert sweet.classifier.push_to_hub("owner/name", private=True) == "there"
    assert calls[0] == (("owner/name",), {"private": True, "exist_ok": True})
    assert calls[1] == {"repo_id": "owner/name", "folder_path": sweet.classifier.model.folder}

    def refuse(*_, **__):
        raise RuntimeError("401\nnot allowed")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    with pytest.raises(UserError, match=r"could not push .* to 'owner/name': 401 not allowed"):
        sweet.classifier.push_to_hub("owner/name")
