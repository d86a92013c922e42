"""The operating point that a run on a file recommends at its end, with its time on this machine.

Shape letters: E exit, N examples.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sweet_jax.exits.analysis import Analysis, load_analysis
from sweet_jax.exits.intervals import score_interval
from sweet_jax.exits.metrics import compute_metric
from sweet_jax.inference.artifact import open_model
from sweet_jax.inference.engine import load_engine, padded_length
from sweet_jax.inference.engine_choice import EngineChoice, default_engine
from sweet_jax.inference.latency import measure_latency
from sweet_jax.inference.latency_table import LatencyTable, write_tables


def recommend(run: Path, target: Mapping[str, float]) -> str:
    """Chooses the operating point for a budget, and says in a few lines what it does.

    Times the stages on one text of the median length, and keeps the times beside the model, where
    the target milliseconds reads them.

    Args:
      run: directory of a finished run.
      target: milliseconds or cost; {} for the cheapest threshold that keeps the last exit's metric.

    """
    model = open_model(run / "model")
    choice = EngineChoice(default_engine(model), "float32")
    engine = load_engine(choice.engine, model)
    length = padded_length(model.median_tokens, model.max_length)
    table = measure_latency(engine, choice, (length,), (1,), lambda: None)
    write_tables(model.folder, [table])
    analysis = load_analysis(run)
    replica = analysis.best
    if not np.isfinite(analysis.area[replica]):
        return "training diverged: there is no operating point to recommend"
    clock = table.until_exit(model.median_tokens)  # [E]
    resolver = analysis.resolver(replica)
    found = resolver.resolve(analysis.policy, target, clock)
    lines, option = [], "".join(f" --{name}={value:g}" for name, value in target.items())
    if found.threshold is None and target:
        lines.append(_refusal(target, found.reachable))
        found, option = resolver.resolve(analysis.policy), ""
    # Where no threshold keeps the last exit's metric, all layers do.
    threshold = np.inf if found.threshold is None else found.threshold
    lines.append(_describe(analysis, threshold, table, clock))
    folder = shlex.quote(str(model.folder))
    lines.append(f"next: sweet-jax predict --model={folder} --input=FILE --output=FILE{option}")
    return "\n".join(lines)


def _refusal(target: Mapping[str, float], least: float) -> str:
    """Says that a budget cannot be met, and what can be done."""
    (name, value), *_ = target.items()
    unit = " ms" if name == "milliseconds" else " of the layers"
    return (
        f"no operating point keeps within {value:g}{unit}: the least is {least:.3g}{unit}; add an "
        "earlier exit, shorten max_length, or take a smaller encoder"
    )


def _describe(analysis: Analysis, threshold: float, table: LatencyTable, clock: np.ndarray) -> str:
    """Says what a threshold gives on the validation rows, beside all layers."""
    replica = analysis.best
    rows = analysis.validation.replica(replica)
    exits = analysis.exits_taken(replica, threshold)  # [N]
    labels, classes, metric = rows.labels[0], rows.logits.shape[-1], rows.metric
    last = np.full_like(exits, len(clock) - 1)
    parts = []
    for taken in (exits, last):
        given = rows.predictions[0][taken, np.arange(len(taken))]  # [N]
        low, high = score_interval(metric, given, labels, classes)
        value = compute_metric(metric, given, labels, classes)
        parts.append(
            f"{metric.name} {value:.4f} [{low:.4f}, {high:.4f}], {rows.cost[taken].mean():.0%} of "
            f"the layers, {clock[taken].mean():.2f} ms"
        )
    return (
        f"recommended operating point: {parts[0]}\n"
        f"           through all layers: {parts[1]}\n"
        f"on {len(labels)} validation rows; time in the stages, one text of {table.lengths[0]} "
        f"tokens at a time, on {table.machine}"
    )
