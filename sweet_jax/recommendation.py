"""The operating point recommended at the end of a run on a file, with its time on this machine.

Shape letters: E exit, N examples.
"""

import dataclasses
import importlib.util
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sweet_jax.data.batches import encode
from sweet_jax.data.load import load_dataset
from sweet_jax.errors import UserError
from sweet_jax.exits.analysis import Analysis, load_analysis
from sweet_jax.exits.intervals import score_interval
from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.resolver import Resolution
from sweet_jax.exits.thresholds import format_threshold
from sweet_jax.files import read_json
from sweet_jax.inference.artifact import ModelArtifact, open_model
from sweet_jax.inference.engine import Engine, load_engine, padded_length
from sweet_jax.inference.engine_choice import available_engines, typical_milliseconds
from sweet_jax.inference.engine_table import ENGINES
from sweet_jax.inference.latency import measure_latency, read_latency
from sweet_jax.inference.latency_table import LatencyTable, write_tables
from sweet_jax.objectives.objective import ShownMetric
from sweet_jax.report.classes import describe_never_predicted
from sweet_jax.report.console import fitted_rows
from sweet_jax.report.shortfalls import describe_effects, worst_shortfalls
from sweet_jax.report.verdict import describe_spread, format_milliseconds
from sweet_jax.saved_config import read_saved_config

log = logging.getLogger(__name__)


def recommend(run: Path, target: Mapping[str, float]) -> str:
    """Chooses the operating point for a budget, and describes it in a few lines.

    Times the stages of each installed engine in float32, on a text of the median length and on one
    of the length that 95% of the training texts do not exceed, unless `predict --measure` has. The
    times are saved in the model's folder, where the target milliseconds and the choice of the
    engine read them.

    Args:
      run: directory of a finished run.
      target: milliseconds or cost; {} for the cheapest threshold that keeps the last exit's metric.

    """
    model = open_model(run / "model")
    tables = _measure(model)
    table = min(tables, key=lambda table: typical_milliseconds(table, model))
    analysis = load_analysis(run).as_saved()
    replica = analysis.best
    if not np.isfinite(analysis.area[replica]):
        return "training diverged: there is no operating point to recommend"
    clock = table.until_exit(model.median_tokens)  # [E]
    resolver = analysis.resolver(replica)
    resolution = resolver.resolve(analysis.policy, target, clock)
    lines, option = [], "".join(f" --{name}={value:g}" for name, value in target.items())
    if resolution.threshold is None and target:
        lines.append(_refusal(target, resolution.reachable))
        target, resolution, option = {}, resolver.resolve(analysis.policy), ""
    # If no threshold keeps the last exit's metric, all layers are used.
    threshold = np.inf if resolution.threshold is None else resolution.threshold
    lengths = _validation_lengths(run, model) if model.long_tokens else None
    exits = analysis.exits_taken(replica, threshold)
    times = np.broadcast_to(clock, (len(exits), len(clock)))  # [N, E]
    if lengths is not None:
        times = table.interpolate_until_exit(lengths)
    lines.append(_describe(analysis, threshold, times, own_lengths=lengths is not None))
    lines.append(_describe_choice(analysis, resolution, target))
    lines += _describe_effects(run, analysis, threshold)
    spread = None if lengths is None else describe_spread(times, exits, target)
    lines.append(_describe_times(model, table, spread))
    lines += _describe_engines(run, model, tables, target)
    if times[:, -1].mean() <= target.get("milliseconds", 0):
        lines.append(
            "  all layers meet the budget too: a larger encoder may be more accurate "
            "(--config.checkpoint, with its own --config.exits)"
        )
    folder = shlex.quote(str(model.folder))
    missing = importlib.util.find_spec("uvicorn") is None
    install = '  (after pip install -e ".[serve]")' if missing else ""
    warm = " --warm_up" if ENGINES[table.engine].compiles else ""
    lines.append(f"next: sweet-jax serve --model={folder}{option} --port=8000{warm}{install}")
    lines.append(f"next: sweet-jax predict --model={folder} --input=FILE --output=FILE{option}")
    return "\n".join(lines)


def _measure(model: ModelArtifact) -> list[LatencyTable]:
    """Returns times of every engine on single texts of two lengths; new measurements are saved.

    A table with these lengths that `predict --measure` saved is used instead of measuring again.
    """
    token_counts = (model.median_tokens, max(model.long_tokens, model.median_tokens))
    lengths = sorted({padded_length(tokens, model.max_length) for tokens in token_counts})
    choices = available_engines(model, precision="float32")
    log.info("measuring the time per text: %s", ", ".join(choice.engine for choice in choices))
    tables = []
    for choice in choices:
        try:
            engine = load_engine(choice.engine, model)
        except UserError as error:
            if len(choices) == 1:
                raise
            log.warning("%s is not measured: %s", choice.engine, error)
            continue
        table = _kept_table(model, engine, lengths)
        if table is None:
            table = measure_latency(engine, choice, tuple(lengths), (1,), lambda: None)
            write_tables(model.folder, [table])
        tables.append(table)
    return tables


def _kept_table(
    model: ModelArtifact, engine: Engine, lengths: Sequence[int]
) -> LatencyTable | None:
    """Returns these lengths of the table that `predict --measure` saved on this machine.

    Measuring only these lengths would replace that table, which has more of them. Returns None if
    there is no such table, so that the times are measured again.
    """
    try:
        table = read_latency(model, engine)
    except UserError:  # damaged, or from another machine
        return None
    if table is None or not set(lengths) < set(table.lengths):
        return None
    columns = [table.lengths.index(length) for length in lengths]
    return dataclasses.replace(
        table,
        batch_sizes=table.batch_sizes[:1],
        lengths=tuple(lengths),
        milliseconds=table.milliseconds[:1, columns],
    )


def padded_token_counts(model: ModelArtifact, texts: Sequence[tuple[str, ...]]) -> np.ndarray:
    """Returns the number of tokens that each text is padded to if it is alone, int [N]."""
    ids, _ = encode(model.tokenizer, texts, model.max_length)
    return np.asarray([padded_length(len(row), model.max_length) for row in ids])


def _validation_lengths(run: Path, model: ModelArtifact) -> np.ndarray | None:
    """Returns `padded_token_counts` of the validation texts; None if they cannot be read."""
    config, digest = read_saved_config(run, any_version=True)
    try:
        dataset = load_dataset(config)
    except UserError:
        return None
    if dataset.digest() != digest:
        return None
    return padded_token_counts(model, dataset.validation.texts)


def _refusal(target: Mapping[str, float], least: float) -> str:
    """Describes a budget that cannot be met, and what can be done.

    least: the smallest budget that can be met.
    """
    (name, value), *_ = target.items()
    unit, at = (
        (" ms", " at the median length") if name == "milliseconds" else (" of the layers", "")
    )
    return (
        f"no operating point meets the budget of {value:g}{unit}{at}; the smallest possible is "
        f"{least:.3g}{unit}: add an earlier exit, reduce max_length, or use a smaller encoder"
    )


def _describe(analysis: Analysis, threshold: float, times: np.ndarray, *, own_lengths: bool) -> str:
    """Describes a threshold on the validation rows, in comparison with all layers.

    times: milliseconds of each row until each exit, float64 [N, E].
    own_lengths: whether these are times at the rows' own lengths, or all at the median length.
    """
    replica = analysis.best
    rows = analysis.validation.replica(replica)
    exits = analysis.exits_taken(replica, threshold)  # [N]
    labels, classes, metric = rows.labels[0], rows.logits.shape[-1], rows.metric
    last, shown = np.full_like(exits, times.shape[1] - 1), ShownMetric.of(metric.name)
    parts = []
    for taken in (exits, last):
        given = rows.predictions[0][taken, np.arange(len(taken))]  # [N]
        low, high = shown.interval(score_interval(metric, given, labels, classes))
        value = shown.value(compute_metric(metric, given, labels, classes))
        parts.append(
            f"{shown.name} {value:.4f} [{low:.4f}, {high:.4f}], {rows.cost[taken].mean():.0%} of "
            f"the layers, {format_milliseconds(times[np.arange(len(taken)), taken].mean())} per "
            "text on average"
        )
    of = "these texts, each at its own length" if own_lengths else "texts of median length"
    return (
        f"recommended operating point: {parts[0]}\n"
        f"           through all layers: {parts[1]}\n"
        f"  on {len(labels)} validation rows, with 95% intervals{shown.better}; times are means "
        f"over {of}"
    )


def _describe_choice(analysis: Analysis, found: Resolution, target: Mapping[str, float]) -> str:
    """Describes the rule and the rows by which the threshold was chosen."""
    replica, metric = analysis.best, ShownMetric.of(analysis.validation.metric.name)
    name = metric.name
    rows = (
        f"{analysis.calibration.labels.shape[1]} "
        f"{fitted_rows({'fitted_on': analysis.calibration.identity.fitted_on})}"
    )
    full = analysis.resolver(replica).full
    if found.threshold is None:
        return f"  no threshold keeps the {name} of all layers on {rows}, so all layers are used"
    point = analysis.evaluate(replica, found).calibration
    assert point is not None, "budgets are not certified"
    shown = format_threshold(found.threshold, analysis.breakpoints(replica))
    rule = f"the cheapest that keeps the {name} of all layers"
    if target:
        (kind, limit), *_ = target.items()
        unit = " ms for a text of median length" if kind == "milliseconds" else " of the layers"
        rule = f"the best {name} within {limit:g}{unit}, or the cheapest of equally good ones"
    return (
        f"  threshold {shown}, chosen on {rows}: {rule} ({metric.value(point[1]):.4f} "
        f"there; all layers {metric.value(full):.4f})"
    )


def _describe_effects(run: Path, analysis: Analysis, threshold: float) -> list[str]:
    """Describes what is wrong at the operating point; [] if nothing is.

    This is how exits below a baseline affect it, except exits that no validation text takes there,
    and the classes that are never predicted.
    """
    results: Mapping[str, Any] = read_json(run / "results.json")
    exits = analysis.exits_taken(analysis.best, threshold)
    rows = analysis.validation.replica(analysis.best)
    effects = describe_effects(worst_shortfalls(results), rows, exits)
    taken = set(np.asarray(analysis.validation.layers)[exits].tolist())
    lines = [f"  exit {exit}: {effect.text}" for exit, effect in effects.items() if exit in taken]
    missing = describe_never_predicted(rows, exits)
    return [*lines, f"  {missing}"] if missing else lines


def _describe_times(model: ModelArtifact, table: LatencyTable, spread: str | None) -> str:
    """Describes what the milliseconds measure, and the time of slow texts."""
    tokens, longest = table.lengths[0], table.lengths[-1]
    where = (
        "at each text's own length"
        if spread and longest > tokens
        else f"at the median length, padded to {tokens} tokens"
    )
    last = [format_milliseconds(table.until_exit(length)[-1]) for length in (tokens, longest)]
    slow = f"all layers take {last[0]} at {tokens} tokens, the padded median length"
    if longest > tokens:
        slow += f", {last[1]} at {longest}, which 95% of the texts do not exceed"
    lines = [
        *([f"  {spread}"] if spread else []),
        f"  ({where}, in the model alone, on {table.machine}, without tokenization, about 0.1 ms, "
        f"and HTTP; {slow})",
    ]
    return "\n".join(lines)


def _describe_engines(
    run: Path, model: ModelArtifact, tables: Sequence[LatencyTable], target: Mapping[str, float]
) -> list[str]:
    """Describes the times of several engines, and suggests int8 if long texts exceed the budget."""
    times = {table.engine: typical_milliseconds(table, model) for table in tables}
    lines = []
    if len(times) > 1:
        each = ", ".join(f"{name} {format_milliseconds(value)}" for name, value in times.items())
        fastest = min(times, key=times.__getitem__)
        lines.append(
            f"  engines, all layers, mean over the lengths that were timed: {each}; the default "
            f"without --engine is {fastest}"
        )
    limit = target.get("milliseconds", np.inf)
    if any(table.until_exit(model.long_tokens)[-1] > limit for table in tables):
        folder = shlex.quote(str(run))
        engine = next(name for name, entry in ENGINES.items() if "int8" in entry.precisions)
        needs = "" if engine in times else f" (needs {ENGINES[engine].install})"
        lines.append(
            f"  int8 is faster on many CPUs: sweet-jax quantize --run={folder}{needs}, then "
            f"sweet-jax predict --model={shlex.quote(str(model.folder))} --measure"
        )
    return lines
