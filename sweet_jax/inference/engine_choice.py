"""The engines and precisions that can run a saved model, and the choice of a default."""

import functools
import logging
import platform
from collections.abc import Sequence
from typing import NamedTuple

from sweet_jax.errors import UserError, check_choice
from sweet_jax.inference.artifact import INT8_FILE, ModelArtifact
from sweet_jax.inference.engine_table import ENGINES
from sweet_jax.inference.latency_table import LATENCY_FILE, LatencyTable, read_tables
from sweet_jax.inference.onnx_files import has_graphs

log = logging.getLogger(__name__)


class EngineChoice(NamedTuple):
    """Names an engine and the precision it runs a model in."""

    engine: str  # a name of ENGINES
    precision: str


def available_engines(
    model: ModelArtifact, engine: str | None = None, precision: str | None = None
) -> list[EngineChoice]:
    """Returns the engines, each with a precision, that can run a model here.

    Without measured times, the first is the default. An engine "module:OBJECT" is none of them,
    unless it is named: the file of the times must not make a process import code.

    Args:
      model: the saved model.
      engine: engine to restrict the choices to, whether it is installed or not.
      precision: precision to restrict the choices to, whether the model has it or not.

    Raises UserError for an unknown engine, or one of another package that cannot be imported.

    """
    quantized = (model.folder / INT8_FILE).exists()
    choices = []
    for name in ENGINES if engine is None else [engine]:
        for candidate in ENGINES[name].precisions:
            if candidate != precision and (
                precision is not None or (candidate == "int8" and not quantized)
            ):
                continue
            if engine is not None or ENGINES[name].why_not(model, candidate) is None:
                choices.append(EngineChoice(name, candidate))
    return choices


def check_precision(engine: str, precision: str, model: ModelArtifact) -> None:
    """Raises UserError if an engine is unknown or does not support a precision."""
    if precision in ENGINES[engine].precisions:
        return
    exported = has_graphs(model.folder)
    supported = [
        f"{name} with {' or '.join(entry.precisions)}"
        for name, entry in ENGINES.items()
        if entry.runs_exported or not exported
    ]
    raise UserError(
        f"the {engine} engine does not support precision {precision!r}: choose engine "
        f"{', or '.join(supported)}"
    )


def check_available(model: ModelArtifact, engine: str | None, precision: str | None) -> None:
    """Raises UserError, which says why, if `available_engines` has no choice."""
    if available_engines(model, engine, precision):
        return
    if precision is not None:
        if engine is not None:
            check_precision(engine, precision, model)
        known = (each for entry in ENGINES.values() for each in entry.precisions)
        check_choice("precision", precision, dict.fromkeys(known))
    reasons = []
    for name, entry in ENGINES.items():
        wanted = entry.precisions[0] if precision is None else precision
        missing = entry.why_not(model, wanted) or "needs int8.json: run sweet-jax quantize first"
        reasons.append(f"{name} {missing}")
    raise UserError(f"no engine can run {str(model.folder)!r} here: {'; '.join(reasons)}")


def default_engine(model: ModelArtifact, dtype: str = "float32") -> str:
    """Returns the engine to use when the caller does not name one.

    Of the engines that can run the model in the precision, this is the fastest according to the
    times that `sweet-jax train FILE` or `predict --measure` measured on this machine, see
    `typical_milliseconds`; without such times, it is the first in ENGINES: jax, if it is installed.
    """
    name, reason = _choose(model, dtype)
    if reason:
        _log_once(f"the engine is {name}: {reason}")
    return name


def describe_default(model: ModelArtifact, dtype: str = "float32") -> str:
    """Describes in one line which engine is the default for a model, and why."""
    name, reason = _choose(model, dtype)
    return f"engine: {name}, {dtype}" + (f" ({reason})" if reason else "")


def _choose(model: ModelArtifact, dtype: str) -> tuple[str, str]:
    """Returns the default engine and the reason; the reason is "" if there is no other engine."""
    names = [choice.engine for choice in available_engines(model, precision=dtype)]
    if not names:
        return _engine_to_install(model, dtype), ""
    if len(names) < 2:
        return names[0], ""
    times = _measured_times(model, dtype)
    timed = [name for name in names if name in times]
    if len(timed) < 2:  # nothing to compare
        return names[0], _advise_measuring(names[1:])
    name = min(timed, key=times.__getitem__)
    measured = ", ".join(f"{engine} {times[engine]:.2f} ms" for engine in timed)
    reason = f"the faster one according to {model.folder / LATENCY_FILE}: {measured}"
    untimed = [name for name in names if name not in times]
    return name, f"{reason}; {_advise_measuring(untimed)}" if untimed else reason


def _advise_measuring(names: Sequence[str]) -> str:
    others = ", ".join(names)
    return f"{others} is installed too: run sweet-jax predict --measure to find the faster one"


def _engine_to_install(model: ModelArtifact, precision: str) -> str:
    """Returns the engine that could run a model if its packages were installed.

    Loading the engine then says what it needs.
    """
    readers = [e for e in ENGINES if ENGINES[e].runs_exported or not has_graphs(model.folder)]
    return next((e for e in readers if precision in ENGINES[e].precisions), readers[0])


def typical_milliseconds(table: LatencyTable, model: ModelArtifact) -> float:
    """Returns the mean milliseconds through all exits over single texts of two lengths.

    The lengths are the median of the training texts and their 95% quantile, since engines that are
    equally fast on short texts may differ greatly on long ones.
    """
    lengths = (model.median_tokens, max(model.median_tokens, model.long_tokens))
    return sum(float(table.until_exit(tokens)[-1]) for tokens in lengths) / len(lengths)


def tables_of_this_machine(model: ModelArtifact, precision: str) -> dict[str, LatencyTable]:
    """Returns the latest times in a precision that were measured on this machine, by engine.

    Raises UserError if clock.json is damaged.
    """
    tables = _tables_of_this_machine(model)
    return {table.engine: table for table in tables if table.precision == precision}


def _tables_of_this_machine(model: ModelArtifact) -> list[LatencyTable]:
    here = f"{platform.node()}, "
    return [table for table in read_tables(model.folder) if table.machine.startswith(here)]


def _measured_times(model: ModelArtifact, precision: str) -> dict[str, float]:
    """Returns the `typical_milliseconds` measured on this machine, by engine."""
    try:
        tables = tables_of_this_machine(model, precision)
    except UserError:  # only a target in milliseconds needs the times
        return {}
    return {engine: typical_milliseconds(table, model) for engine, table in tables.items()}


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)
