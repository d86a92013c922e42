"""The check that JAX finds a device."""

import os
from collections import Counter

import jax

from sweet_jax.errors import UserError, one_line


def check_devices() -> None:
    """Raises UserError if JAX finds no device of the platforms that it is configured to use.

    Raises it in all processes if they have different numbers of devices.
    """
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        cause = f" ({one_line(error)})" if str(error) else ""  # JAX's assertions have no message
        chosen = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"JAX finds no device with JAX_PLATFORMS={chosen!r}{cause}: unset it, or name a "
            "platform that this machine has, such as JAX_PLATFORMS=cpu"
        ) from error
    counts = Counter(device.process_index for device in devices).most_common()
    (most, many), (least, few) = counts[0], counts[-1]
    if many != few:
        raise UserError(
            f"process {most} has {many} devices, but process {least} has {few}: start all "
            "processes with the same number of devices"
        )
