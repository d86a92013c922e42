"""The check for torch, which only some experiments need; this module imports no jax."""

from importlib.util import find_spec

from sweet_jax.errors import UserError


def check_torch() -> None:
    """Raises UserError if torch is not installed."""
    if find_spec("torch") is None:
        raise UserError('torch is not installed: pip install -e ".[torch]"')
