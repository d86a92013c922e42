"""Prints tables in Markdown, and the machine and versions with which they were measured."""

import datetime
import os
import platform
from importlib.metadata import version
from typing import Any


def describe_machine(*packages: str) -> str:
    """Returns a line with the device, the number of cores, the versions, and the date.

    packages: names of distributions whose versions are listed after jax's.
    """
    import jax  # not at the top, so that a benchmark can set options of jax's start first

    device = jax.devices()[0]
    processor = platform.processor() or platform.machine()
    name = device.device_kind if jax.default_backend() != "cpu" else f"{processor}, CPU"
    versions = ", ".join(f"{package} {version(package)}" for package in ("jax", *packages))
    return (
        f"{name}, {os.cpu_count()} cores; {versions}, Python {platform.python_version()}; "
        f"{datetime.date.today()}"
    )


def table_row(*cells: Any) -> str:
    """Returns one row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table_head(*names: str) -> str:
    """Returns the first two lines of a Markdown table: the names of the columns, and a rule."""
    return f"{table_row(*names)}\n{table_row(*('---' for _ in names))}"
