"""The interface of engines: one in NumPy below the same scheduler, and no JAX above it."""

import importlib
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy_engine import NumpyEngine
from numpy_engine import load_engine as load_numpy

from sweet_jax import AdaptiveClassifier, ExitOutputs
from sweet_jax.data.batches import encode
from sweet_jax.errors import UserError
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.engine import load_engine, padded_lengths, plan_stages
from sweet_jax.inference.engine_table import ENGINES, EngineEntry
from sweet_jax.inference.predictions import InvalidRow
from sweet_jax.models.checkpoint_folder import load_tokenizer
from sweet_jax.models.pretrained import open_checkpoint
from sweet_jax.objectives import SINGLE_LABEL
from sweet_jax.objectives.objective import softmax

ROOT = Path(__file__).parents[1]
LAYERS, CLASSES, VOCABULARY = (1, 3, 4), 3, 50


@pytest.fixture
def engine() -> NumpyEngine:
    return NumpyEngine(LAYERS, CLASSES, VOCABULARY)


@pytest.fixture
def model(checkpoint) -> ModelArtifact:
    rng = np.random.default_rng(1)
    calibration = ExitOutputs(
        rng.normal(size=(len(LAYERS), 40, CLASSES)),
        rng.integers(0, CLASSES, 40),
        np.asarray(LAYERS),
    )
    return ModelArtifact(
        folder=checkpoint,
        tokenizer=load_tokenizer(open_checkpoint(str(checkpoint))),
        task="fake",
        metric="accuracy",
        policy="raw_confidence",
        pooling="mean",
        text_columns=("text",),
        classes=("a", "b", "c"),
        layers=LAYERS,
        cost=calibration.cost,
        max_length=32,
        median_tokens=10,
        resolver=make_resolver(calibration, ("raw_confidence",)),
        networks=(),
        objective=SINGLE_LABEL,
    )


@pytest.fixture
def texts() -> list[str]:
    rng = np.random.default_rng(2)
    return [
        " ".join(f"word{i}" for i in rng.integers(0, 40, rng.integers(1, 40))) for _ in range(60)
    ]


@pytest.mark.parametrize("mode", ["throughput", "latency"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_predictions_of_numpy_engine_equal_its_one_pass_outputs(
    engine, model, texts, batch_size, mode
):
    ids, _ = encode(model.tokenizer, [(text,) for text in texts], model.max_length)
    logits = np.stack([engine.one_pass(row) for row in ids])  # [N, E, C]
    probabilities = softmax(logits.astype(np.float64))
    confidence = probabilities.max(axis=-1)  # [N, E]
    threshold = float(np.median(confidence)) + 1e-6
    leaves = confidence >= threshold
    leaves[:, -1] = True
    exits = leaves.argmax(axis=1)
    assert set(exits) == {0, 1, 2}
    classifier = AdaptiveClassifier(model, target={"threshold": threshold}, engine=engine)
    predictions = classifier.predict(texts, batch_size, mode)
    assert predictions.exits.tolist() == np.asarray(LAYERS)[exits].tolist()
    exit_logits = logits[np.arange(len(texts)), exits]
    assert predictions.labels.tolist() == [model.classes[c] for c in exit_logits.argmax(axis=1)]
    temperatures = classifier.calibrator.temperatures.reshape(-1, 1)[exits]  # [N, 1]
    expected = softmax(exit_logits / temperatures)
    np.testing.assert_allclose(predictions.probabilities, expected, atol=1e-6)
    np.testing.assert_allclose(predictions.cost, model.cost[exits])
    sizes, lengths = (set(values) for values in zip(*engine.shapes, strict=True))
    assert max(sizes) <= batch_size
    assert lengths <= set(padded_lengths(model.max_length))


def test_full_model_of_numpy_engine_is_one_stage(engine, model, texts):
    classifier = AdaptiveClassifier(model, target={"threshold": float("inf")}, engine=engine)
    assert [(s.start, s.end) for s in classifier.make_scheduler(4).stages] == [(1, LAYERS[-1])]
    assert classifier.warm_up(4) == 0
    ids, _ = encode(model.tokenizer, [(text,) for text in texts], model.max_length)
    expected = [model.classes[engine.one_pass(row)[-1].argmax()] for row in ids]
    assert classifier.predict(texts, 4).labels.tolist() == expected


def test_invalid_rows_keep_their_position_in_stream(engine, model, texts):
    classifier = AdaptiveClassifier(model, target={"threshold": 0.5}, engine=engine)
    mixed = [*texts[:7], InvalidRow("empty"), *texts[7:20], InvalidRow("not text")]
    results = list(classifier.stream_rows(iter(mixed), 4))
    assert [i for i, row in enumerate(results) if isinstance(row, InvalidRow)] == [7, 21]
    labels = [row.label for row in results if not isinstance(row, InvalidRow)]
    assert labels == classifier.predict(texts[:20], 4).labels.tolist()


def test_stages_with_low_exit_rate_compute_whole_layer():
    def plan(*rates):
        stages = plan_stages([(1, 2, 4)], first_only=True, exit_rates=rates)
        return [(s.start, s.end, s.whole, s.writes_states) for s in stages]

    # A stage that resumes at layer 1 embeds again and needs no states.
    assert plan() == [(1, 1, False, False), (1, 2, False, True), (2, 4, False, False)]
    assert plan(0.1, 0.5, 1) == [(1, 1, True, True), (2, 2, False, True), (2, 4, False, False)]
    assert plan(0.5, 0.1, 1) == [(1, 1, False, False), (1, 2, True, True), (3, 4, False, False)]


def test_failing_import_is_not_reported_as_missing_package(model, monkeypatch):
    """Ctrl-C during an import may end it with an ImportError that names no package."""

    def fail(name):
        raise ImportError("initialization failed")

    monkeypatch.setattr("sweet_jax.inference.engine.import_module", fail)
    with pytest.raises(ImportError, match="initialization failed"):
        load_engine("jax", model)


def test_unknown_engine_is_refused(sweet, model):
    with pytest.raises(UserError, match="unknown engine 'jaxx': did you mean 'jax'"):
        load_engine("jaxx", model)
    with pytest.raises(UserError, match="unknown engine 'torch'"):
        AdaptiveClassifier.from_pretrained(sweet.classifier.model.folder, engine="torch")


def test_option_that_engine_lacks_is_refused(sweet, monkeypatch):
    monkeypatch.setitem(ENGINES, "numpy", EngineEntry("numpy_engine"))
    folder = sweet.classifier.model.folder
    with pytest.raises(UserError, match="the numpy engine has no option threads: leave threads"):
        AdaptiveClassifier.from_pretrained(folder, engine="numpy", threads=1)


def run_without_jax(program: str, *arguments: object) -> str:
    """Returns the output of a program that may import the tests; checks that it imports no JAX."""
    program = f"import sys\nsys.path.append({str(ROOT / 'tests')!r})\n{program}"
    program += "\nassert not {'jax', 'flax', 'datasets'} & sys.modules.keys()"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_saved_model_opens_and_classifies_without_jax(sweet):
    program = """
import sweet_jax
from numpy_engine import load_engine
from sweet_jax.inference.artifact import open_model
model = open_model(sys.argv[1])
engine = load_engine(model)
target = {"threshold": 0.6}
classifier = sweet_jax.AdaptiveClassifier(model, "raw_confidence", target, engine)
print(*classifier.predict(sys.argv[2:], 4).labels, sep="\\n")
"""
    model, texts = sweet.classifier.model, sweet.texts[:9]
    stdout = run_without_jax(program, model.folder, *texts)
    classifier = AdaptiveClassifier(model, "raw_confidence", {"threshold": 0.6}, load_numpy(model))
    assert stdout.splitlines() == classifier.predict(texts, 4).labels.tolist()


@pytest.mark.parametrize("engine", ["numpy", "onnxruntime"])
@pytest.mark.parametrize("command", ["predict", "serve"])
def test_commands_do_not_import_jax_for_other_engines(sweet, request, tmp_path, command, engine):
    folder = sweet.classifier.model.folder
    if engine == "onnxruntime":
        folder = request.getfixturevalue("onnx_model")
    program = """
from sweet_jax.inference.engine_table import ENGINES, EngineEntry
ENGINES["numpy"] = EngineEntry("numpy_engine")
"""
    if command == "serve":
        pytest.importorskip("uvicorn", reason='the server\'s packages: pip install -e ".[serve]"')
        program += """
import uvicorn
from sweet_jax import serve
uvicorn.Server.run = lambda *_, **__: print("running")
assert serve.main(sys.argv[1:]) == 0
"""
        options = ["--port=0", "--policy=raw_confidence", "--warm_up"]
        options += ["--audit=1", "--audit_agreement=0.9"]
        stdout = run_without_jax(program, f"--model={folder}", f"--engine={engine}", *options)
        assert stdout.splitlines()[-1] == "running"
        return
    program += "from sweet_jax import predict\nassert predict.main(sys.argv[1:]) == 0"
    (tmp_path / "in.txt").write_text("\n".join(sweet.texts))
    files = [f"--input={tmp_path / 'in.txt'}", f"--output={tmp_path / 'out.jsonl'}"]
    options = [f"--engine={engine}", "--policy=raw_confidence", "--threshold=0.6"]
    run_without_jax(program, f"--model={folder}", *files, *options)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(sweet.texts)
    measured = tmp_path / "model"
    shutil.copytree(folder, measured)
    stdout = run_without_jax(program, f"--model={measured}", f"--engine={engine}", "--measure")
    assert "milliseconds" in stdout
    assert f", {engine}" in stdout


@pytest.mark.parametrize("module", ["predict", "serve"])
def test_unknown_engine_option_lists_available_engines(module, capsys):
    main = importlib.import_module(f"sweet_jax.{module}").main
    assert main(["--model=x", "--engine=jaxx"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: argument --engine: invalid choice: 'jaxx' (choose from")
    assert "jax, onnxruntime)" in error.replace("'", "")
    assert error.count("\n") == 1


def test_modules_above_engine_do_not_import_jax():
    names = ["scheduler", "engine", "predictions", "prediction_file", "artifact", "classifier"]
    names = [f"inference.{name}" for name in [*names, "latency", "streaming", "encoding"]]
    if importlib.util.find_spec("starlette") and importlib.util.find_spec("prometheus_client"):
        names += ["server.worker", "server.app"]
    program = "import importlib\n"
    for name in [*names, "predict", "serve", "simulate"]:
        program += f"importlib.import_module('sweet_jax.{name}')\n"
        program += f"assert 'jax' not in sys.modules, '{name}'\n"
    run_without_jax(program)
