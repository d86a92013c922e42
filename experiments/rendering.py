"""Formats the tables and figures of the experiments as Markdown and PNG."""

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.comparison import Records
from experiments.encoders import encoder_note
from experiments.options import command_line, config_values
from sweet_jax.files import atomic_write

_MAX_NAMED = 4  # unfinished cells that a note names; of more, it gives the number


@dataclasses.dataclass(frozen=True)
class Section:
    """Holds a table, a figure, or both, with a title and a note.

    Attributes:
      name: name of the figure's file.
      title, note: heading, and the paragraph below it.
      header, rows: cells of the table, as Markdown.

    """

    name: str
    title: str
    note: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figure: Figure | None = None


def section_markdown(section: Section) -> str:
    """Returns a section as Markdown, for OUTPUT/README.md."""
    lines = [f"## {section.title}", "", section.note, ""]
    if section.rows:
        lines += [*table_lines(section.header, section.rows), ""]
    if section.figure is not None:
        lines += [f"![{section.title}](figures/{section.name}.png)", ""]
    return "\n".join(lines)


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table in Markdown."""
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def write_figures(output: Path, sections: Iterable[Section]) -> None:
    """Writes the figures of sections to OUTPUT/figures/NAME.png."""
    for section in sections:
        if section.figure is not None:
            with atomic_write(output / "figures" / f"{section.name}.png") as aside:
                section.figure.savefig(aside, dpi=130)


def add_provenance(
    sections: Sequence[Section], options: argparse.Namespace, script: str, records: Records
) -> list[Section]:
    """Returns the sections, with the origin of the numbers in the first one's note.

    The note names the command, the numbers of training rows, the learning rates, the seeds and,
    unless it is one of the paper's, the encoder.
    """
    if not sections:
        return []
    counts = sorted({r.n["train"] for r in records.values()})
    runs = [run for r in records.values() for run in r.runs]
    rates = sorted({run.learning_rate for run in runs})
    seeds = sorted({run.seed for run in runs})
    origin = f" Made by {command_line(options, script)}"
    if runs:
        origin += f" ({' or '.join(f'{n:,}' for n in counts)} training rows without those held out;"
        origin += f" learning rates {', '.join(f'{r:g}' for r in rates)};"
        search = ", rates compared on the first" * (options.rate_search == "first_seed")
        origin += f" seeds {', '.join(map(str, seeds))}{search})"
    config = config_values(options)
    about = encoder_note(config["checkpoint"], config["max_length"])
    note = f"{sections[0].note}{origin}." + f" {about}" * bool(about)
    first = dataclasses.replace(sections[0], note=note)
    return [first, *sections[1:]]


def subplots(count: int) -> tuple[Figure, list[Any]]:
    """Returns a figure and its `count` axes, up to four in a row."""
    columns = min(4, max(1, count))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(3.4 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for used in axes[:count]:
        used.spines[["top", "right"]].set_visible(False)
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def add_legend(axes: Iterable[Any]) -> None:
    """Adds a legend to the first of the axes that has labelled curves, if any has."""
    for each in axes:
        if each.get_legend_handles_labels()[0]:
            each.legend(frameon=False, fontsize=8)
            return


def missing_note(wanted: Iterable[str], records: Records) -> str:
    """Returns a sentence about the cells that are not done, with their names if they are few.

    wanted: names of all cells. Returns "" if all are done.
    """
    absent = [name for name in wanted if name not in records]
    if len(absent) > _MAX_NAMED:
        tasks = ", ".join(dict.fromkeys(name.partition("-")[0] for name in absent))
        return f" Not done yet: {len(absent)} cells, of {tasks} (--list names them)."
    return f" Not done yet: {', '.join(absent)}." if absent else ""
