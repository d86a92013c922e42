"""The outputs of every exit of a saved model, to fit thresholds on.

Shape letters: E exit, N texts, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.encoding import encode_requests
from sweet_jax.inference.engine import Engine
from sweet_jax.inference.scheduler import ExitRule, Scheduler


def compute_all_exits(
    model: ModelArtifact, engine: Engine, texts: Sequence[Any], batch_size: int = 32
) -> tuple[np.ndarray, np.ndarray | None]:
    """Computes every exit for every text; no text exits early.

    Args:
      model: the saved model.
      engine: an engine with its weights.
      texts: texts, or pairs of texts.
      batch_size: maximum number of texts computed at once.

    Returns:
      (logits float32 [E, N, C], learning-to-exit scores float32 [E, N] or None), in the order of
      the texts.

    """
    # No confidence is above 1, so every text reaches the last exit.
    objective = model.objective
    arguments = (2.0, model.resolver.calibrator, model.layers, objective)
    rule = ExitRule(objective.tuning_policy, *arguments)
    scheduler = Scheduler(engine, engine.stages(), batch_size)
    requests = encode_requests(model, texts, rule)
    for request in requests:
        scheduler.admit(request)
    scheduler.drain()
    logits = np.stack([np.stack(request.logits) for request in requests], axis=1)  # [E, N, C]
    learned = [request.exit_scores for request in requests]
    return logits, np.asarray(learned, np.float32).T if learned[0] else None
