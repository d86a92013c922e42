"""The engine seam: a second engine, in NumPy, below the same scheduler; and no JAX above it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sweet_jax import AdaptiveClassifier, ExitOutputs
from sweet_jax.config import UserError
from sweet_jax.data.batches import encode
from sweet_jax.exits.calibration import softmax_with_temperature
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.engine import (
    StageOutput,
    batch_sizes,
    load_engine,
    padded_lengths,
    plan_stages,
)
from sweet_jax.inference.predictions import InvalidRow
from sweet_jax.models.pretrained import load_tokenizer, open_checkpoint

ROOT = Path(__file__).parents[1]
LAYERS, HIDDEN, CLASSES, VOCABULARY = (1, 3, 4), 8, 3, 50


class NumpyEngine:
    """Layers of a dense tanh; every exit reads the mean over the tokens."""

    pad_id, vocabulary_size, description, compilations = 0, VOCABULARY, "numpy", 0

    def __init__(self):
        rng = np.random.default_rng(0)
        self.embeddings = rng.normal(size=(VOCABULARY, HIDDEN))
        self.layers = rng.normal(size=(LAYERS[-1], HIDDEN, HIDDEN))
        self.heads = rng.normal(size=(len(LAYERS), HIDDEN, CLASSES))
        self.shapes: set[tuple[int, int]] = set()

    def stages(self, *, full=False, exit_rates=()):
        return plan_stages([LAYERS], first_only=False, full=full, exit_rates=exit_rates)

    def new_states(self, slots, length):
        return np.full((slots, length, HIDDEN), np.nan)  # to be seen if they are read unwritten

    def run(self, stage, batch, states):
        slots, tokens = batch.rows
        self.shapes.add((len(slots), batch.length))
        kept = tokens > 0
        h = np.zeros((len(slots), batch.length, HIDDEN))
        h[kept] = self.embeddings[batch.texts[0][kept]] if stage.embeds else states[slots[kept]]
        h = self.hidden(h, stage.start, stage.end)
        if stage.writes_states:
            states[slots[kept]] = h[kept]
        return StageOutput(self.logits(stage.exit, h, tokens), None, states)

    def compile(self, stage, batch_size, length, slots):
        pass

    def hidden(self, h, start, end):
        for weights in self.layers[start - 1 : end]:
            h = np.tanh(h @ weights)
        return h

    def logits(self, exit, h, tokens):
        mask = np.arange(h.shape[1]) < tokens[:, None]
        mean = (h * mask[..., None]).sum(axis=1) / np.maximum(tokens, 1)[:, None]
        return (mean @ self.heads[exit]).astype(np.float32)

    def one_pass(self, ids) -> np.ndarray:
        """The logits of every exit of one text, [E, C]."""
        h, found, start = self.embeddings[ids][None], [], 1
        for exit, layer in enumerate(LAYERS):
            h = self.hidden(h, start, layer)
            found.append(self.logits(exit, h, np.asarray([len(ids)]))[0])
            start = layer + 1
        return np.stack(found)


@pytest.fixture
def engine() -> NumpyEngine:
    return NumpyEngine()


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
    )


@pytest.fixture
def texts() -> list[str]:
    rng = np.random.default_rng(2)
    return [
        " ".join(f"word{i}" for i in rng.integers(0, 40, rng.integers(1, 40))) for _ in range(60)
    ]


@pytest.mark.parametrize("mode", ["throughput", "latency"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_second_engine_gives_the_predictions_of_its_one_pass(
    engine, model, texts, batch_size, mode
):
    ids, _ = encode(model.tokenizer, [(text,) for text in texts], model.max_length)
    logits = np.stack([engine.one_pass(row) for row in ids])  # [N, E, C]
    probabilities = softmax_with_temperature(logits, np.ones((len(texts), len(LAYERS), 1)))
    confidence = probabilities.max(axis=-1)  # [N, E]
    threshold = float(np.median(confidence)) + 1e-6
    takes = confidence >= threshold
    takes[:, -1] = True
    exits = takes.argmax(axis=1)
    assert set(exits) == {0, 1, 2}
    classifier = AdaptiveClassifier(model, target={"threshold": threshold}, engine=engine)
    found = classifier.predict(texts, batch_size, mode)
    assert found.exits.tolist() == np.asarray(LAYERS)[exits].tolist()
    taken = logits[np.arange(len(texts)), exits]
    assert found.labels.tolist() == [model.classes[c] for c in taken.argmax(axis=1)]
    temperatures = classifier.calibrator.temperatures.reshape(-1, 1)[exits]  # [N, 1]
    wanted = softmax_with_temperature(taken, temperatures)
    np.testing.assert_allclose(found.probabilities, wanted, atol=1e-6)
    np.testing.assert_allclose(found.cost, model.cost[exits])
    sizes, lengths = (set(values) for values in zip(*engine.shapes, strict=True))
    assert sizes <= set(batch_sizes(batch_size))
    assert lengths <= set(padded_lengths(model.max_length))


def test_the_full_model_of_a_second_engine_is_one_stage(engine, model, texts):
    classifier = AdaptiveClassifier(model, target={"threshold": float("inf")}, engine=engine)
    assert [(s.start, s.end) for s in classifier.make_scheduler(4).stages] == [(1, LAYERS[-1])]
    assert classifier.warm_up(4) == 0
    ids, _ = encode(model.tokenizer, [(text,) for text in texts], model.max_length)
    wanted = [model.classes[engine.one_pass(row)[-1].argmax()] for row in ids]
    assert classifier.predict(texts, 4).labels.tolist() == wanted


def test_rows_without_a_text_keep_their_place(engine, model, texts):
    classifier = AdaptiveClassifier(model, target={"threshold": 0.5}, engine=engine)
    mixed = [*texts[:7], InvalidRow("empty"), *texts[7:20], InvalidRow("not text")]
    found = list(classifier.stream_rows(iter(mixed), 4))
    assert [i for i, row in enumerate(found) if isinstance(row, InvalidRow)] == [7, 21]
    labels = [row.label for row in found if not isinstance(row, InvalidRow)]
    assert labels == classifier.predict(texts[:20], 4).labels.tolist()


def test_stages_of_low_exit_rate_compute_their_whole_layer():
    def plan(*rates):
        found = plan_stages([(1, 2, 4)], first_only=True, exit_rates=rates)
        return [(s.start, s.end, s.whole, s.writes_states) for s in found]

    # What resumes at layer 1 embeds again, and needs no states.
    assert plan() == [(1, 1, False, False), (1, 2, False, True), (2, 4, False, False)]
    assert plan(0.1, 0.5, 1) == [(1, 1, True, True), (2, 2, False, True), (2, 4, False, False)]
    assert plan(0.5, 0.1, 1) == [(1, 1, False, False), (1, 2, True, True), (3, 4, False, False)]


def test_an_unknown_engine_is_refused(sweet, model):
    with pytest.raises(UserError, match="unknown engine 'jaxx': did you mean 'jax'"):
        load_engine("jaxx", model)
    with pytest.raises(UserError, match="unknown engine 'torch'"):
        AdaptiveClassifier.from_pretrained(sweet.classifier.model.folder, engine="torch")


def modules_without_jax() -> list[str]:
    names = ["scheduler", "engine", "predictions", "prediction_file", "artifact", "classifier"]
    found = [f"inference.{name}" for name in [*names, "latency", "streaming", "encoding"]]
    if importlib.util.find_spec("starlette") and importlib.util.find_spec("prometheus_client"):
        found += ["server.worker", "server.app"]
    return found


def test_what_lies_above_the_engine_imports_no_jax():
    program = "import importlib, sys\n"
    for name in modules_without_jax():
        program += f"importlib.import_module('sweet_jax.{name}')\n"
        program += f"assert 'jax' not in sys.modules, '{name}'\n"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
