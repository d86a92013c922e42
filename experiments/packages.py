"""Checks for packages that only some experiments need; this module imports no jax."""

from importlib.util import find_spec

from sweet_jax.errors import UserError


def check_torch() -> None:
    """Raises UserError if torch is not installed."""
    _check("torch", "torch")


def check_libtpu() -> None:
    """Raises UserError if libtpu, the compiler for TPUs, is not installed."""
    _check("libtpu", "tpu-aot")


def _check(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise UserError(f'{package} is not installed: pip install -e ".[{extra}]"')
