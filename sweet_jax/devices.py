"""The check that JAX finds a device."""

import os

import jax

from sweet_jax.config import UserError
from sweet_jax.files import one_line


def check_devices() -> None:
    """Raises UserError if JAX finds no device of the platforms that it is configured to use."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        cause = f" ({one_line(error)})" if str(error) else ""  # JAX's assertions have no message
        chosen = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"JAX finds no device with JAX_PLATFORMS={chosen!r}{cause}: unset it, or name a "
            "platform that this machine has, such as JAX_PLATFORMS=cpu"
        ) from error
