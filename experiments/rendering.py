"""Tables and figures of the experiments as Markdown, PNG, SVG and one page."""

import argparse
import base64
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from experiments.comparison import Records
from experiments.options import command, encoder_note, settings
from sweet_jax.files import atomic_write, write_json, write_text

_NAMED = 4  # unfinished cells, at most, that a note names one by one


@dataclasses.dataclass(frozen=True)
class Section:
    """A table, a figure, or both, under one title. `name` is that of its files.

    drawn: the figure's files are there already.
    """

    name: str
    title: str
    note: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figure: Figure | None = None
    drawn: bool = False

    @property
    def pictured(self) -> bool:
        """Whether it has a figure."""
        return self.drawn or self.figure is not None


def markdown(section: Section, figures: str = "figures") -> str:
    """A section as Markdown; its figure is looked for in the folder `figures`."""
    lines = [f"## {section.title}", "", section.note, ""]
    if section.rows:
        lines += [_row(section.header), _row(["---"] * len(section.header))]
        lines += [_row(row) for row in section.rows]
        lines.append("")
    if section.pictured:
        lines += [f"![{section.title}]({figures}/{section.name}.png)", ""]
    return "\n".join(lines)


def write_sections(output: Path, name: str, sections: Sequence[Section]) -> None:
    """Writes OUTPUT/tables/NAME.md and the figures as PNG and SVG, and prints the tables."""
    for section in sections:
        if section.figure is not None:
            for suffix in ("png", "svg"):
                # Ids and no date: the same numbers give the same file.
                stable = matplotlib.rc_context({"svg.hashsalt": section.name})
                undated = {"Date": None} if suffix == "svg" else {}
                path = output / "figures" / f"{section.name}.{suffix}"
                with stable, atomic_write(path) as aside:
                    section.figure.savefig(aside, dpi=130, metadata=undated)
    text = "\n".join(markdown(section, "../figures") for section in sections)
    write_text(output / "tables" / f"{name}.md", text)
    print(text)


def write_page(output: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes OUTPUT/index.html, self-contained; the figures are read from OUTPUT/figures."""
    parts = []
    for section in sections:
        picture = ""
        if section.pictured:
            svg = (output / "figures" / f"{section.name}.svg").read_bytes()
            picture = base64.b64encode(svg).decode()
        parts.append({"section": section, "picture": picture})
    loader = jinja2.PackageLoader("sweet_jax", "report")
    own = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=jinja2.ChoiceLoader([own, loader]), autoescape=True)
    templates.filters["cell"] = _bold
    page = templates.get_template("page.html").render(title=title, parts=parts)
    write_text(output / "index.html", page)


def renderer(
    name: str,
    sections_of: Callable[[argparse.Namespace, Records], list[Section]],
    *,
    keep: bool = False,
) -> Callable[[argparse.Namespace, dict[str, dict[str, Any]]], None]:
    """The render argument of `grid.main`: writes the sections of one script.

    keep: as OUTPUT/tables/NAME.json too, for the page to take over what is costly to make again.
    """

    def render(options: argparse.Namespace, records: Records) -> None:
        sections = signed(sections_of(options, records), options, name, records)
        write_sections(options.output, name, sections)
        if keep:
            write_json(_kept(options.output, name), [_as_values(s) for s in sections])

    return render


def kept_sections(output: Path, name: str) -> list[Section]:
    """What a script whose renderer keeps its sections left; nothing if it has not run."""
    path = _kept(output, name)
    return [Section(**values) for values in json.loads(path.read_text())] if path.exists() else []


def _kept(output: Path, name: str) -> Path:
    return output / "tables" / f"{name}.json"


def _as_values(section: Section) -> dict[str, Any]:
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    return values | {"figure": None, "drawn": section.pictured}


def signed(
    sections: Sequence[Section], options: argparse.Namespace, script: str, records: Records
) -> list[Section]:
    """The sections, the first with the command that makes them, on what its cells trained, and of
    which encoder.
    """
    counts = sorted({r["n"]["train"] for r in records.values()})
    replicas = [p for r in records.values() for p in r["replicas"]]
    rates = sorted({p["learning_rate"] for p in replicas})
    seeds = sorted({p["seed"] for p in replicas})
    made = f" Made by {command(options, script)}"
    if replicas:
        made += f" ({' or '.join(f'{n:,}' for n in counts)} training rows without those held out;"
        made += f" learning rates {', '.join(f'{r:g}' for r in rates)};"
        made += f" seeds {', '.join(map(str, seeds))})"
    config = settings(options)
    about = encoder_note(config["checkpoint"], config["max_length"])
    note = f"{sections[0].note}{made}." + f" {about}" * bool(about)
    first = dataclasses.replace(sections[0], note=note)
    return [first, *sections[1:]]


def panels(count: int, height: float = 3.2) -> tuple[Figure, list[Any]]:
    """A figure with `count` axes, at most four in a row; an empty one for none."""
    columns = min(4, max(1, count))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(3.4 * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for one in axes[:count]:
        one.spines[["top", "right"]].set_visible(False)
    for one in axes[count:]:
        one.set_visible(False)
    return figure, axes[:count]


def legend(axes: Iterable[Any], size: int = 8) -> None:
    """A legend in the first of the axes that has anything to name; none if none has."""
    for one in axes:
        if one.get_legend_handles_labels()[0]:
            one.legend(frameon=False, fontsize=size)
            return


def missing_note(wanted: Iterable[str], records: Records) -> str:
    """A sentence on the cells that are not done, all named if they are few; empty if all are."""
    absent = [name for name in wanted if name not in records]
    if len(absent) > _NAMED:
        tasks = ", ".join(dict.fromkeys(name.partition("-")[0] for name in absent))
        return f" Not done yet: {len(absent)} cells, of {tasks} (--list names them)."
    return f" Not done yet: {', '.join(absent)}." if absent else ""


def _row(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _bold(text: str) -> Any:
    """Markdown's bold as HTML, all else escaped."""
    import markupsafe

    if text.startswith("**") and text.endswith("**"):
        return markupsafe.Markup("<b>{}</b>").format(text.strip("*"))
    return text
