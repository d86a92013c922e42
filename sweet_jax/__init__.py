"""Fine-tune a pretrained encoder so that it can stop early: SWEET, Early-Exit, Multi-Model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sweet_jax.exits.outputs import ExitOutputs
    from sweet_jax.exits.simulation import simulate
    from sweet_jax.inference.classifier import AdaptiveClassifier
    from sweet_jax.models.pretrained import load_encoder
    from sweet_jax.runs import Run, train

__version__ = "0.1.0"

# Looked up on first use: importing the package imports neither JAX nor SciPy.
_HOMES = {
    "AdaptiveClassifier": "sweet_jax.inference.classifier",
    "ExitOutputs": "sweet_jax.exits.outputs",
    "simulate": "sweet_jax.exits.simulation",
    "load_encoder": "sweet_jax.models.pretrained",
    "Run": "sweet_jax.runs",
    "train": "sweet_jax.runs",
}
__all__ = ["AdaptiveClassifier", "ExitOutputs", "Run", "load_encoder", "simulate", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sweet_jax' has no attribute {name!r}")
