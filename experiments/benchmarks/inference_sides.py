"""The sides that `inference` compares: engines with early exits, and full models without."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks.plain_inference import FullModel
from experiments.benchmarks.validation_texts import as_tuples
from sweet_jax import AdaptiveClassifier, ExitOutputs
from sweet_jax.data.batches import encode
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.exits.simulation import exact_curve
from sweet_jax.inference.all_exits import compute_all_exits
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.engine import Engine

COSTS = (0.25, 0.5, 0.75)


class Side(NamedTuple):
    """Describes one way to classify a batch of texts."""

    engine: str
    cost: float | None  # the cost that was asked for, None for the full model
    counted: float  # mean cost in layers
    by_tokens: float  # the same, weighted by the tokens of each text
    classify: Callable[[list[Any]], object]
    is_shared: bool = False  # whether all texts are classified in one call, in shared batches


def make_adaptive_sides(
    model: ModelArtifact, name: str, texts: Sequence[Any], engine: Engine, batch: int
) -> list[Side]:
    """Returns an engine's sides: the full model, and the thresholds nearest to the costs.

    As after training, the stages are planned from the shares of texts that leave at each exit, here
    those of these texts.
    """
    logits, _ = compute_all_exits(model, engine, texts)  # [E, N, C]
    outputs = ExitOutputs(logits, logits[-1].argmax(-1), np.asarray(model.layers), model.cost)
    resolver = make_resolver(outputs, ("confidence",))
    model = dataclasses.replace(model, policy="confidence", resolver=resolver)
    full = AdaptiveClassifier(model, target={"threshold": math.inf}, engine=engine)
    curve = exact_curve(outputs, exit_confidences(outputs, "confidence", [full.calibrator]))
    tokens = [len(ids) for ids in encode(model.tokenizer, as_tuples(texts), model.max_length)[0]]

    def make_side(cost: float | None, threshold: float) -> Side:
        classifier = full.at(threshold=threshold)
        costs = classifier.predict(texts, batch, "latency").cost  # [N]
        return Side(
            name,
            cost,
            float(costs.mean()),
            float(np.average(costs, weights=tokens)),
            lambda part: classifier.predict(part, batch, "latency"),
        )

    nearest = [int(np.abs(curve.cost[0] - cost).argmin()) for cost in COSTS]
    thresholds = [float(curve.threshold[0, index]) for index in nearest]
    sides = [make_side(cost, each) for cost, each in zip(COSTS, thresholds, strict=True)]
    if batch > 1:
        shared = full.at(threshold=thresholds[1])
        classify = functools.partial(shared.predict, batch_size=batch)
        sides.append(sides[1]._replace(engine=f"{name}, shared", classify=classify, is_shared=True))
    return [make_side(None, math.inf), *sides]


def make_plain_side(model: ModelArtifact, name: str, run: FullModel) -> Side:
    """Returns the side of a full model."""

    def classify(part: list[Any]) -> object:
        ids, types = encode(model.tokenizer, as_tuples(part), model.max_length)
        lengths = [len(each) for each in ids]
        texts = np.full((2, len(ids), max(lengths)), model.tokenizer.pad_token_id, np.int32)
        texts[1] = 0
        for row, (own_ids, own_types) in enumerate(zip(ids, types, strict=True)):
            texts[:, row, : len(own_ids)] = own_ids, own_types
        mask = np.arange(max(lengths)) < np.asarray(lengths)[:, None]  # [B, L]
        return run(texts, mask.astype(np.int64))

    return Side(name, None, 1.0, 1.0, classify)
