"""The engines and precisions that can run a saved model, and the choice of a default.

Whether an engine is installed is determined without importing it.
"""

import functools
import importlib.util
import logging
import platform
from typing import NamedTuple

from sweet_jax.errors import UserError
from sweet_jax.inference.artifact import INT8_FILE, ModelArtifact
from sweet_jax.inference.latency_table import LATENCY_FILE, LatencyTable, read_tables
from sweet_jax.inference.onnx_files import has_graphs

log = logging.getLogger(__name__)

# The precisions of each engine; engines not listed here have only float32.
PRECISIONS = {"jax": ("float32", "bfloat16"), "onnxruntime": ("float32", "int8")}


class EngineChoice(NamedTuple):
    """Names an engine and the precision it runs a model in."""

    engine: str  # a name of ENGINES
    precision: str


def available_engines(
    model: ModelArtifact, engine: str | None = None, precision: str | None = None
) -> list[EngineChoice]:
    """Returns the engines, each with a precision, that can run a model here.

    Without measured times, the first is the default.

    Args:
      model: the saved model.
      engine: engine to restrict the choices to, whether it is installed or not.
      precision: precision to restrict the choices to, whether the model has it or not.

    """
    installed = importlib.util.find_spec
    exported = has_graphs(model.folder)
    names = []
    if installed("jax") and not exported:  # an exported model lacks the weights that JAX reads
        names.append("jax")
    if installed("onnxruntime") and (exported or (installed("jax") and installed("onnx"))):
        names.append("onnxruntime")
    quantized = (model.folder / INT8_FILE).exists()
    choices = []
    for name in names if engine is None else [engine]:
        for candidate in PRECISIONS.get(name, ("float32",)):
            if candidate == precision or (precision is None and (candidate != "int8" or quantized)):
                choices.append(EngineChoice(name, candidate))
    return choices


def check_precision(engine: str, precision: str, model: ModelArtifact) -> None:
    """Raises UserError if an engine of PRECISIONS does not support a precision."""
    if precision in PRECISIONS[engine]:
        return
    exported = has_graphs(model.folder)
    supported = [
        f"{name} with {' or '.join(precisions)}"
        for name, precisions in PRECISIONS.items()
        if name != "jax" or not exported
    ]
    raise UserError(
        f"the {engine} engine does not support precision {precision!r}: choose engine "
        f"{', or '.join(supported)}"
    )


def default_engine(model: ModelArtifact, dtype: str = "float32") -> str:
    """Returns the engine to use when the caller does not name one.

    For int8, and for a model exported to ONNX, this is onnxruntime; for bfloat16, it is jax. For
    float32, it is the faster engine according to the times that `sweet-jax train FILE` or
    `predict --measure` measured on this machine, see `typical_milliseconds`; without such times, it
    is jax if that is installed.
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
        return "onnxruntime" if dtype == "int8" or has_graphs(model.folder) else "jax", ""
    if len(names) < 2:
        return names[0], ""
    times = _measured_times(model, dtype)
    if not times.keys() >= set(names):
        others = ", ".join(names[1:])
        return names[0], (
            f"{others} is installed too: run sweet-jax predict --measure to find the faster one"
        )
    name = min(names, key=times.__getitem__)
    measured = ", ".join(f"{engine} {times[engine]:.2f} ms" for engine in names)
    return name, f"the faster one according to {model.folder / LATENCY_FILE}: {measured}"


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
    return {
        table.engine: table
        for table in read_tables(model.folder)
        if table.precision == precision and table.machine.startswith(f"{platform.node()}, ")
    }


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
