"""Fine-tunes pretrained encoders with early exits: SWEET, Early-Exit and Multi-Model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sweet_jax.errors import UserError
    from sweet_jax.exits.outputs import ExitOutputs
    from sweet_jax.exits.simulation import Curve, simulate
    from sweet_jax.inference.classifier import AdaptiveClassifier
    from sweet_jax.inference.predictions import Prediction, Predictions
    from sweet_jax.models.pretrained import load_encoder
    from sweet_jax.runs import Run, train

__version__ = "0.1.0"

# Looked up on first use: importing the package imports neither JAX nor SciPy.
_HOMES = {
    "AdaptiveClassifier": "sweet_jax.inference.classifier",
    "Curve": "sweet_jax.exits.simulation",
    "ExitOutputs": "sweet_jax.exits.outputs",
    "Prediction": "sweet_jax.inference.predictions",
    "Predictions": "sweet_jax.inference.predictions",
    "Run": "sweet_jax.runs",
    "UserError": "sweet_jax.errors",
    "load_encoder": "sweet_jax.models.pretrained",
    "simulate": "sweet_jax.exits.simulation",
    "train": "sweet_jax.runs",
}
__all__ = [
    "AdaptiveClassifier",
    "Curve",
    "ExitOutputs",
    "Prediction",
    "Predictions",
    "Run",
    "UserError",
    "load_encoder",
    "simulate",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sweet_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
