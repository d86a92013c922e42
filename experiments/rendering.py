"""Tables and figures of the experiments as Markdown, PNG, SVG and one page.

Shape letters: S seed, E exit.
"""

import argparse
import base64
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from sweet_jax.exits.scores import mean_interval
from sweet_jax.files import write_text, written_aside

Records = Mapping[str, Mapping[str, Any]]
_NAMED = 4  # unfinished cells, at most, that a note names one by one


@dataclasses.dataclass(frozen=True)
class Section:
    """A table, a figure, or both, under one title. `name` is that of its files."""

    name: str
    title: str
    note: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figure: Figure | None = None


def chosen(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The replicas of the learning rate with the largest area on the rows fitted on, by seed."""
    rate = record["learning_rate"]
    found = [r for r in record["replicas"] if r["learning_rate"] == rate]
    return sorted(found, key=lambda r: r["seed"])


def exit_scores(record: Mapping[str, Any]) -> np.ndarray:
    """Scores of the exits in per cent, float64 [S, E]."""
    return np.asarray([[100 * e["score"] for e in r["individual"]] for r in chosen(record)])


def areas(record: Mapping[str, Any]) -> np.ndarray:
    """Mean score over the cost range in per cent, float64 [S]: what is under the curve."""
    return np.asarray([100 * r["area"] for r in chosen(record)])


def exits_and_area(record: Mapping[str, Any]) -> np.ndarray:
    """Scores of the exits, then the area, in per cent: float64 [S, E + 1]."""
    return np.column_stack([exit_scores(record), areas(record)])


def rate(record: Mapping[str, Any]) -> str:
    """The learning rate that a cell's area chose, as text."""
    return f"{record['learning_rate']:g}"


def paired(
    one: Mapping[str, Any], other: Mapping[str, Any], of: Callable[[Mapping[str, Any]], np.ndarray]
) -> np.ndarray:
    """of(one) - of(other), seed by seed over the seeds that both have: float64 [S, ...]."""
    values = [dict(zip((r["seed"] for r in chosen(x)), of(x), strict=True)) for x in (one, other)]
    seeds = sorted(set(values[0]) & set(values[1]))
    return np.asarray([values[0][s] - values[1][s] for s in seeds])


def differences(
    title: str,
    pairs: Mapping[str, tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]],
    of: Callable[[Mapping[str, Any]], np.ndarray],
) -> list[list[str]]:
    """Table rows (title, task, values of one - other paired by seed), then the mean of the tasks.

    `pairs` holds by task the records to compare; a task that lacks one is left out. The mean over
    tasks is taken seed by seed, so that its interval is over seeds too.
    """
    rows, every = [], []
    for task, (one, other) in pairs.items():
        gaps = paired(one, other, of) if one and other else np.empty(0)  # [S, columns]
        if len(gaps):
            every.append(gaps)
            rows.append([title, task, *(interval(g, sign=True) for g in gaps.T)])
    if len(every) > 1 and len({len(gaps) for gaps in every}) == 1:
        mean = np.mean(every, axis=0)
        columns = [interval(g, sign=True) for g in mean.T]
        rows.append([title, f"mean of {len(every)} tasks", *columns])
    return rows


def interval(values: ArrayLike, sign: bool = False) -> str:
    """Mean and half of the 95% interval over seeds (Student) as text; in bold if 0 is outside."""
    mean, half = mean_interval(np.asarray(values, np.float64))
    text = f"{mean:+.1f}" if sign else f"{mean:.1f}"
    if half is None:
        return text
    text = f"{text} ± {half:.1f}"
    return f"**{text}**" if sign and abs(mean) > half else text


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation over seeds as text."""
    values = np.asarray(values, np.float64)
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def markdown(section: Section, figures: str = "figures") -> str:
    """A section as Markdown; its figure is looked for in the folder `figures`."""
    lines = [f"## {section.title}", "", section.note, ""]
    if section.rows:
        lines += [_row(section.header), _row(["---"] * len(section.header))]
        lines += [_row(row) for row in section.rows]
        lines.append("")
    if section.figure is not None:
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
                with stable, written_aside(path) as aside:
                    section.figure.savefig(aside, dpi=130, metadata=undated)
    text = "\n".join(markdown(section, "../figures") for section in sections)
    write_text(output / "tables" / f"{name}.md", text)
    print(text)


def write_page(output: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes OUTPUT/index.html, self-contained; the figures are read from OUTPUT/figures."""
    parts = []
    for section in sections:
        picture = ""
        if section.figure is not None:
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
    name: str, sections_of: Callable[[argparse.Namespace, Records], list[Section]]
) -> Callable[[argparse.Namespace, dict[str, dict[str, Any]]], None]:
    """The render argument of `grid.main`: writes the sections of one script."""

    def render(options: argparse.Namespace, records: Records) -> None:
        write_sections(options.output, name, sections_of(options, records))

    return render


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
