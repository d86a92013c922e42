"""The tables of experiments.panel."""

from pathlib import Path


def render(output: Path) -> None:
    """Writes the tables of what is done."""
