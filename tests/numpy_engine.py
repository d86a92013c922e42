"""An engine without JAX: layers of a dense tanh; every exit reads the mean over the tokens."""

import numpy as np

from sweet_jax.inference.engine import StageOutput, plan_stages

HIDDEN = 8


def load_engine(model, dtype="float32", cache_dir=None):
    """Weights drawn at random for a saved model's layers, classes and vocabulary."""
    return NumpyEngine(model.layers, len(model.classes), len(model.tokenizer))


class NumpyEngine:
    pad_id, description, compilations, threads = 0, "numpy", 0, 1

    def __init__(self, layers, classes, vocabulary):
        rng = np.random.default_rng(0)
        self.exits, self.vocabulary_size = layers, vocabulary
        self.embeddings = rng.normal(size=(vocabulary, HIDDEN))
        self.layers = rng.normal(size=(layers[-1], HIDDEN, HIDDEN))
        self.heads = rng.normal(size=(len(layers), HIDDEN, classes))
        self.shapes: set[tuple[int, int]] = set()

    def stages(self, *, full=False, exit_rates=()):
        return plan_stages([self.exits], first_only=False, full=full, exit_rates=exit_rates)

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
        for exit, layer in enumerate(self.exits):
            h = self.hidden(h, start, layer)
            found.append(self.logits(exit, h, np.asarray([len(ids)]))[0])
            start = layer + 1
        return np.stack(found)
