"""Renders tables and figures of the experiments as Markdown and PNG."""

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.comparison import Records
from experiments.options import command_line, config_values, encoder_note
from sweet_jax.files import atomic_write

_NAMED = 4  # unfinished cells, at most, that a note names one by one


@dataclasses.dataclass(frozen=True)
class Section:
    """A table, a figure, or both, under one title. `name` is that of the figure's file."""

    name: str
    title: str
    note: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figure: Figure | None = None


def section_markdown(section: Section) -> str:
    """Returns a section as Markdown for OUTPUT/README.md."""
    lines = [f"## {section.title}", "", section.note, ""]
    if section.rows:
        lines += [*table_lines(section.header, section.rows), ""]
    if section.figure is not None:
        lines += [f"![{section.title}](figures/{section.name}.png)", ""]
    return "\n".join(lines)


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns a table as lines of Markdown."""
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def write_figures(output: Path, sections: Iterable[Section]) -> None:
    """Writes the figures of sections as OUTPUT/figures/NAME.png."""
    for section in sections:
        if section.figure is not None:
            with atomic_write(output / "figures" / f"{section.name}.png") as aside:
                section.figure.savefig(aside, dpi=130)


def add_provenance(
    sections: Sequence[Section], options: argparse.Namespace, script: str, records: Records
) -> list[Section]:
    """Returns the sections; the first says its command, training rows, rates, seeds, encoder."""
    if not sections:
        return []
    counts = sorted({r.n["train"] for r in records.values()})
    runs = [run for r in records.values() for run in r.runs]
    rates = sorted({run.learning_rate for run in runs})
    seeds = sorted({run.seed for run in runs})
    made = f" Made by {command_line(options, script)}"
    if runs:
        made += f" ({' or '.join(f'{n:,}' for n in counts)} training rows without those held out;"
        made += f" learning rates {', '.join(f'{r:g}' for r in rates)};"
        first = ", rates compared on the first" * (options.rate_search == "first_seed")
        made += f" seeds {', '.join(map(str, seeds))}{first})"
    config = config_values(options)
    about = encoder_note(config["checkpoint"], config["max_length"])
    note = f"{sections[0].note}{made}." + f" {about}" * bool(about)
    first = dataclasses.replace(sections[0], note=note)
    return [first, *sections[1:]]


def subplots(count: int, height: float = 3.2) -> tuple[Figure, list[Any]]:
    """Returns a figure with `count` axes, at most four in a row; an empty one for none."""
    columns = min(4, max(1, count))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(3.4 * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for one in axes[:count]:
        one.spines[["top", "right"]].set_visible(False)
    for one in axes[count:]:
        one.set_visible(False)
    return figure, axes[:count]


def add_legend(axes: Iterable[Any], size: int = 8) -> None:
    """Puts a legend in the first of the axes that has anything to name; none if none has."""
    for one in axes:
        if one.get_legend_handles_labels()[0]:
            one.legend(frameon=False, fontsize=size)
            return


def missing_note(wanted: Iterable[str], records: Records) -> str:
    """Returns a sentence on the cells that are not done, named if they are few; else empty."""
    absent = [name for name in wanted if name not in records]
    if len(absent) > _NAMED:
        tasks = ", ".join(dict.fromkeys(name.partition("-")[0] for name in absent))
        return f" Not done yet: {len(absent)} cells, of {tasks} (--list names them)."
    return f" Not done yet: {', '.join(absent)}." if absent else ""
