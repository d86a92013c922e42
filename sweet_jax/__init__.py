"""Fine-tune a pretrained encoder so that it can stop early: SWEET, Early-Exit, Multi-Model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sweet_jax.models.pretrained import load_encoder

__version__ = "0.1.0"

# Looked up on first use: what needs no accelerator must not wait for one to be imported.
_HOMES = {"load_encoder": "sweet_jax.models.pretrained"}
__all__ = ["load_encoder"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sweet_jax' has no attribute {name!r}")
