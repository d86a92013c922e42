"""The table of inference engines: what each one needs, and which models it can run.

An engine is one entry of ENGINES. It is a module with a function `load_engine(model, dtype,
cache_dir)` that returns an `Engine` (`inference/engine.py`). Nothing here imports the module, nor
JAX or ONNX Runtime: whether an engine is installed is determined without importing it.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

from sweet_jax.errors import one_line
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.onnx_files import has_graphs
from sweet_jax.registry import Registry, import_object

# From a saved model and a precision to why the engine cannot run it here; None if it can.
Obstacle = Callable[[ModelArtifact, str], str | None]

_INSTALL_JAX, _INSTALL_ONNX = "pip install -e .", 'pip install -e ".[onnx]"'


@dataclasses.dataclass(frozen=True)
class EngineEntry:
    """Describes an engine.

    Attributes:
      module: name of the module with `load_engine`, imported when the engine is loaded.
      precisions: precisions that it supports; int8 is offered for models with int8.json.
      install: command that installs the packages it needs, for messages.
      compiles: whether it compiles programs, for which `--warm_up` is advised.
      runs_exported: whether it runs a model that was exported to ONNX, which has no other weights.
      obstacle: function, or its name "module:function", that returns why the engine cannot run a
        model in a precision on this machine, such as a package that is not installed; None if it
        can. Without the function, it can run every model.

    """

    module: str
    precisions: tuple[str, ...] = ("float32",)
    install: str = ""
    compiles: bool = False
    runs_exported: bool = False
    obstacle: Obstacle | str | None = None

    def why_not(self, model: ModelArtifact, precision: str) -> str | None:
        """Returns why the engine cannot run a model in a precision here, or None if it can."""
        if precision not in self.precisions:
            return f"does not support precision {precision!r}"
        if has_graphs(model.folder) and not self.runs_exported:
            return "needs the weights of the model, which its export to ONNX lacks"
        obstacle: Any = self.obstacle
        if isinstance(obstacle, str):
            obstacle = import_object("obstacle", obstacle)
        try:
            return obstacle and obstacle(model, precision)
        except Exception as error:  # a user's function can raise anything
            return f"cannot tell whether it runs here ({type(error).__name__}: {one_line(error)})"


def _jax_obstacle(model: ModelArtifact, precision: str) -> str | None:
    return _without(("jax",), _INSTALL_JAX)


def _onnx_obstacle(model: ModelArtifact, precision: str) -> str | None:
    """A model that is not exported is traced, which takes JAX and onnx."""
    needed = ("onnxruntime", *(() if has_graphs(model.folder) else ("jax", "onnx")))
    return _without(needed, _INSTALL_ONNX)


def _without(packages: tuple[str, ...], install: str) -> str | None:
    """Returns that a package is needed which is not installed; None if all of them are."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"needs {missing[0]} ({install})" if missing else None


_BUILT_IN = {
    "jax": EngineEntry(
        "sweet_jax.inference.engine_jax",
        ("float32", "bfloat16"),
        _INSTALL_JAX,
        compiles=True,
        obstacle=_jax_obstacle,
    ),
    "onnxruntime": EngineEntry(
        "sweet_jax.inference.engine_onnx",
        ("float32", "int8"),
        _INSTALL_ONNX,
        runs_exported=True,
        obstacle=_onnx_obstacle,
    ),
}
# The first that can run a model is its default until times are measured.
ENGINES = Registry("engine", EngineEntry, _BUILT_IN, "sweet_jax.engines")


def engine_name(engine: Any) -> str:
    """Returns the name of an engine of this package; for others, that of the object's class."""
    kind = type(engine)
    names = (name for name, entry in _BUILT_IN.items() if entry.module == kind.__module__)
    return next(names, kind.__name__)
