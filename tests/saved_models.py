"""Saved models with random weights, and what the one-pass JAX model answers."""

import functools

import jax
import numpy as np
from flax import nnx
from tiny import WORDS, write_checkpoint

from sweet_jax import AdaptiveClassifier, ExitOutputs
from sweet_jax.data.batches import encode_pairs
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.inference.artifact import open_model
from sweet_jax.inference.artifact_writer import TrainedModel, save_model
from sweet_jax.inference.engine import StageBatch, load_engine
from sweet_jax.models.checkpoint_folder import load_tokenizer
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.head import ExitConfig
from sweet_jax.models.pretrained import open_checkpoint
from sweet_jax.objectives.objective import softmax
from sweet_jax.poolings import POOLINGS

EXITS, CLASSES, LONGEST = (1, 2, 3), 3, 32


class Saved:
    """A saved model with random weights, and its one-pass logits of some texts, or of pairs."""

    def __init__(self, folder, kind, pooling="first", learned=False, multi=False, exits=EXITS):
        checkpoint = open_checkpoint(str(write_checkpoint(folder / "checkpoint", kind)))
        tokenizer = load_tokenizer(checkpoint)
        rng = np.random.default_rng(2)
        draw = lambda: " ".join(rng.choice(WORDS, rng.integers(1, 40)))
        self.texts = [draw() for _ in range(40)]
        self.pairs = POOLINGS[pooling].pairs
        rows = [(text,) for text in self.texts]
        if self.pairs:
            self.texts = rows = list(zip(self.texts, ["", *self.texts[:-1]], strict=True))
        ids, types, starts = encode_pairs(tokenizer, rows, LONGEST)
        batch = {"input_ids": np.full((40, LONGEST), tokenizer.pad_token_id, np.int32)}
        batch |= {"token_type_ids": np.zeros_like(batch["input_ids"])}
        batch |= {"mask": np.arange(LONGEST) < np.asarray([[len(row)] for row in ids])}
        if self.pairs:
            batch["second_start"] = np.asarray(starts, np.int32)
        for row, (own, own_types) in enumerate(zip(ids, types, strict=True)):
            batch["input_ids"][row, : len(own)] = own
            batch["token_type_ids"][row, : len(own)] = own_types
        models, outputs, self.forwards = [], [], []
        for part in [(exit,) for exit in exits] if multi else [exits]:
            key = jax.random.key(len(models))
            config = ExitConfig(pooling=pooling, learning_to_exit="joint" if learned else "")
            encoder = checkpoint.encoder(key, depth=part[-1])
            graphdef, values = nnx.split(EarlyExit(encoder, part, CLASSES, key, config))
            # Biases and norms that are not zero and one.
            shift = lambda x: np.asarray(x + 0.2 * rng.normal(size=x.shape), np.float32)
            params = jax.tree.map(shift, nnx.to_pure_dict(values))
            forward = jax.jit(lambda b, g=graphdef, p=params: nnx.merge(g, p).forward(b))
            self.forwards.append(forward)
            outputs.append(forward(batch))
            models.append(TrainedModel(part, params))
        self.logits = np.concatenate([each.logits for each in outputs])  # [E, N, C]
        scores = [each.exit_scores for each in outputs]
        self.scores = np.concatenate(scores) if learned else None  # [E, N]
        labels = self.logits[-1].argmax(-1)
        learning = self.scores[None] if learned else None
        fitted = ExitOutputs(self.logits, labels, np.asarray(exits), exit_scores=learning)
        policies = ("raw_confidence", *(["learning_to_exit"] if learned else []))
        about = {"version": 5, "task": "random", "classes": ["a", "b", "c"], "pooling": pooling}
        columns = ["text", "other"] if self.pairs else ["text"]
        about |= {"text_columns": columns, "max_length": LONGEST, "layers": list(exits)}
        about |= {"cost": fitted.cost.tolist(), "policy": "raw_confidence", "median_tokens": 10}
        about["dials"] = make_resolver(fitted, policies).as_dict()
        self.folder = folder / "model"
        save_model(self.folder, checkpoint, tokenizer, models, about, "")

    @functools.cached_property
    def onnx_engine(self):
        """Built once, whatever the sizes and rates that it is asked for."""
        return load_engine("onnxruntime", open_model(self.folder), threads=1)

    def answers(self, classifier, confidence) -> tuple[np.ndarray, np.ndarray]:
        """(exits by index, probabilities) of the one-pass logits, by a threshold."""
        leaves = confidence >= classifier.threshold
        leaves[-1] = True
        exits = leaves.argmax(axis=0)
        taken = self.logits[exits, np.arange(len(exits))]
        fitted = classifier.calibrator.temperatures[exits, None]
        return exits, softmax(taken / fitted)

    def confidence(self) -> np.ndarray:
        """raw_confidence, [E, N]."""
        return softmax(self.logits.astype(np.float64)).max(-1)


def middle(confidence) -> float:
    """A threshold that no row is near, at which about half of the rows leave at the first exit."""
    values = np.sort(confidence[0])[10:-10]
    place = int(np.diff(values).argmax())
    threshold = float(values[place : place + 2].mean())
    assert np.abs(confidence[:-1] - threshold).min() > 1e-5
    return threshold


MODES = ("throughput", "latency")


def check(
    saved, confidence, sizes=(1, 5), engine="onnxruntime", modes=MODES, full=True, **policy
) -> None:
    """Predictions through the engine are those of the one-pass logits."""
    threshold = middle(confidence)
    classifier = AdaptiveClassifier.from_pretrained(
        saved.folder, engine=engine, threshold=threshold, **policy
    )
    exits, probabilities = saved.answers(classifier, confidence)
    assert len(set(exits)) > 1
    for size in sizes:
        for mode in modes:
            found = classifier.predict(saved.texts, size, mode)
            assert found.exits.tolist() == np.asarray(classifier.layers)[exits].tolist()
            np.testing.assert_allclose(found.probabilities, probabilities, atol=1e-4)
    if not full:
        return
    last = classifier.at(threshold=float("inf"), **policy)
    exits, probabilities = saved.answers(last, confidence)
    assert set(exits) == {len(EXITS) - 1}
    np.testing.assert_allclose(last.predict(saved.texts, 4).probabilities, probabilities, atol=1e-4)


def check_logits(saved, pad_id, size, length, rates) -> None:
    """The logits of every exit, where none leaves: several rows, one of them without a token."""
    rng = np.random.default_rng(size)
    tokens = rng.integers(1, length + 1, size).astype(np.int32)
    tokens[:1] = length
    tokens[2:3] = 0
    mask = np.arange(length) < tokens[:, None]
    ids = np.where(mask, rng.integers(5, 44, mask.shape), pad_id).astype(np.int32)
    types = np.where(mask, rng.integers(0, 2, mask.shape), 0).astype(np.int32)
    batch = {"input_ids": ids, "token_type_ids": types, "mask": mask}
    known = batch
    if tokens.all():  # padded to the size that is compiled; a row without a token reads its padding
        room = ((0, len(saved.texts) - size), (0, LONGEST - length))
        fill = {"input_ids": pad_id, "token_type_ids": 0, "mask": False}
        known = {k: np.pad(v, room, constant_values=fill[k]) for k, v in batch.items()}
    logits = np.concatenate([forward(known).logits for forward in saved.forwards])
    wanted = logits[:, :size]
    states = saved.onnx_engine.new_states(size, length)
    for stage in saved.onnx_engine.stages(exit_rates=rates):
        texts = np.stack([ids, types]) if stage.embeds else None
        given = StageBatch(length, np.stack([np.arange(size, dtype=np.int32), tokens]), texts)
        found = saved.onnx_engine.run(stage, given, states if stage.uses_states else None)
        np.testing.assert_allclose(found.logits, wanted[stage.exit], atol=1e-5)
