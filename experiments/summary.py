"""Writes the tables of the README and the documentation from the records of the studies.

`python -m experiments.render` writes a table between two marks in a Markdown file:

  <!-- table: sst2-2000 -->
  ...
  <!-- /table -->

Values are in per cent, with the mean and the 95% interval over seeds; differences are paired by
seed, and bold if the interval excludes zero.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments import (
    isolation,
    panel_differences,
    panel_tables,
    paper,
    pcee_control,
    read_outs,
    sizes,
)
from experiments.comparison import Record, areas, exit_scores, exits_and_area, scores_at
from experiments.options import make_cell, make_parser
from experiments.panel_statistics import ScoresByCell, load_scores
from experiments.records import exact_costs, read_study
from experiments.rendering import table_lines
from experiments.studies import Row, Studies
from sweet_jax.errors import UserError
from sweet_jax.files import write_text

EXITS = (1, 2, 4, 6)
COSTS = exact_costs(EXITS)
_SMALL, _LARGE = "SST-2, 2,000 rows", "SST-2, 6,000 rows"
_COLA_MRPC = "minilm-l6-6000-1e-4"  # the study of CoLA and MRPC
_RELEASED = "-pooler-shared-clipping-global"
_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Table = tuple[Sequence[str], list[list[str]]]  # header, rows


def methods(studies: Studies, study: str) -> list[list[str]]:
    """Returns the scores of the exits on SST-2 by method, and the differences between methods."""
    alone = [Row(title, study, (f"sst2-{m}",)) for m, title in paper.NAMES.items()]
    return studies.lines([*alone, *_pairs(study)], exit_scores)


def _pairs(study: str, task: str = "sst2") -> list[Row]:
    """Returns the rows of the differences between methods."""
    return [
        Row(
            f"{paper.NAMES[first]} - {paper.NAMES[second]}",
            study,
            (f"{task}-{first}", f"{task}-{second}"),
        )
        for first, second in paper.PAIRS
    ]


def _exits(*more: str) -> list[str]:
    return [*(f"exit {e}" for e in EXITS), *more]


def both_sizes(studies: Studies) -> Table:
    """Returns the scores of the exits on SST-2, with 2,000 and 6,000 rows side by side."""
    columns = [methods(studies, study) for study in ("minilm-l6", "minilm-l6-6000")]
    header = ["SST-2", *(f"{e}, {n}" for n in ("2,000", "6,000") for e in _exits())]
    return header, [[*small, *large[1:]] for small, large in zip(*columns, strict=True)]


def cost_table(studies: Studies, study: str, title: str) -> Table:
    """Returns the differences between methods on SST-2 at the same cost, from exact curves."""
    rows = studies.lines(_pairs(study), functools.partial(scores_at, COSTS))
    return [title, *(f"cost {c:.2g}" for c in COSTS)], rows


def table(studies: Studies, title: str, rows: Iterable[Row]) -> Table:
    """Returns the scores of the exits and the areas of rows."""
    return [title, *_exits("area")], studies.lines(rows, exits_and_area)


def cola_mrpc() -> Iterable[Row]:
    """Yields Early-Exit, SWEET and their difference on both tasks."""
    for task, name in (("cola", "CoLA"), ("mrpc", "MRPC")):
        for method in ("early_exit", "sweet"):
            yield Row(f"{name}, {paper.NAMES[method]}", _COLA_MRPC, (f"{task}-{method}",))
        yield Row(
            f"{name}, SWEET - Early-Exit", _COLA_MRPC, (f"{task}-sweet", f"{task}-early_exit")
        )


def base_size(studies: Studies) -> Table:
    """Returns the scores of the exits and the areas of MPNet-base on CoLA, and the differences."""
    rows = [Row(title, "mpnet-base", (f"cola-{m}",)) for m, title in paper.NAMES.items()]
    rows += _pairs("mpnet-base", "cola")
    header = ["CoLA, MPNet-base", *(f"exit {e}" for e in (1, 4, 6, 12)), "area"]
    return header, studies.lines(rows, exits_and_area)


def ablation_rows(study: str, task: str, prefix: str = "") -> Iterable[Row]:
    """Yields the combinations of pooler and clipping, and the effect of the release's."""
    settings = {
        "pooler and norm per exit": "",
        "shared pooler": "-pooler-shared",
        "one norm": "-clipping-global",
        "both, as released": _RELEASED,
    }
    for method, title in (("early_exit", "Early-Exit"), ("sweet", "SWEET")):
        for label, setting in settings.items():
            yield Row(f"{prefix}{title}, {label}", study, (f"{task}-{method}{setting}",))
    gap = (f"{task}-sweet", f"{task}-early_exit")
    released = tuple(f"{name}{_RELEASED}" for name in gap)
    yield Row(f"{prefix}SWEET - Early-Exit, as released", study, released)
    yield Row(f"{prefix}SWEET - Early-Exit, per exit", study, gap)
    yield Row(f"{prefix}what the release adds", study, released + gap)
    yield Row(
        f"{prefix}SWEET, what a shared pooler costs", study, (f"{gap[0]}-pooler-shared", gap[0])
    )


def isolation_table(studies: Studies, study: str, tasks: Mapping[str, str], title: str) -> Table:
    """Returns every setting of isolation, and the differences of its area from the two ends.

    A row names its learning rate if it differs from the first row's.

    tasks: prefixes of the labels, by task.
    """
    options, rates, lines = make_parser().parse_args([]), [], []
    for (task, prefix), (label, method, changes) in itertools.product(
        tasks.items(), isolation.SETTINGS
    ):
        name = make_cell(options, task, method, **changes).name
        row = Row(f"{prefix}{label}", study, (name,))
        for record in studies.records(row):
            rates.append(record.learning_rate)
            at = f" (at {rates[-1]:g})" if rates[-1] != rates[0] else ""
            line = [row.label + at, *studies.values(row, exits_and_area)]
            for end in (f"{task}-early_exit", f"{task}-sweet"):
                gap = Row("", study, (name, end))
                line += [""] if name == end else studies.values(gap, _area_column)
            lines.append(line)
    return [title, *_exits("area", "area - Early-Exit's", "area - SWEET's")], lines


def _area_column(record: Record) -> np.ndarray:
    return areas(record)[:, None]  # [S, 1]


def size_exits(studies: Studies) -> Table:
    """Returns SWEET - Early-Exit at every exit on SST-2, by number of training rows."""
    rows = [
        Row(
            f"{size:,} rows",
            "minilm-l6-6000",
            (f"sst2-sweet-train_size-{size}", f"sst2-early_exit-train_size-{size}"),
        )
        for size in (500, 1500, 3000)
    ]
    return ["SWEET - Early-Exit", *_exits()], studies.lines(rows, exit_scores)


def size_areas(studies: Studies) -> Table:
    """Returns the areas by number of training rows, and SWEET's differences from the others."""
    output = studies.folder / "minilm-l6-6000"
    records, arguments = read_study(output)
    options = make_parser().parse_args([*arguments, "--tasks=sst2"])
    options.sizes = sizes.recorded(records)
    areas, _, gaps = sizes.sections(options, records)
    rows = [[row[1], *row[2:]] for row in areas.rows]
    rows += [[f"{row[0]}, {row[2]}", *row[3:]] for row in gaps.rows if row[0].startswith("SWEET")]
    return ["area", *areas.header[2:]], rows


def pcee_sst2(studies: Studies) -> Table:
    """Returns the rules' errors on SST-2 by method, and SWEET's signed errors and costs."""
    options = make_parser().parse_args([f"--output={studies.folder / 'minilm-l6'}"])
    section = pcee_control.sections(options, {})[0]
    columns = [f"{title}: error" for title in paper.NAMES.values()]
    columns += ["SWEET: achieved - target", "SWEET: cost"]
    places = [section.header.index(column) for column in columns]
    rows = [[row[1], *(row[i] for i in places)] for row in section.rows if row[0] == "sst2"]
    return ["SST-2, points", *columns], rows


def _panel(studies: Studies) -> ScoresByCell:
    return load_scores(studies.folder / "panel")[0]


TABLES: dict[str, Callable[[Studies], Table]] = {
    "sst2": both_sizes,
    "sst2-2000": lambda s: ([_SMALL, *_exits()], methods(s, "minilm-l6")),
    "sst2-2000-costs": lambda s: cost_table(s, "minilm-l6", _SMALL),
    "sst2-6000": lambda s: ([_LARGE, *_exits()], methods(s, "minilm-l6-6000")),
    "sst2-6000-costs": lambda s: cost_table(s, "minilm-l6-6000", _LARGE),
    "cola-mrpc": lambda s: table(s, "CoLA and MRPC, 1e-4", cola_mrpc()),
    "mpnet-cola": base_size,
    "mpnet-read-outs": lambda s: read_outs.scores_of(s.folder / "mpnet-base-gpu"),
    "sizes": size_areas,
    "sizes-exits": size_exits,
    "ablation-sst2-6000": lambda s: table(s, _LARGE, ablation_rows("minilm-l6-6000", "sst2")),
    "ablation-cola-mrpc": lambda s: table(
        s,
        "CoLA and MRPC, 1e-4",
        [
            *ablation_rows(_COLA_MRPC, "cola", "CoLA, "),
            *ablation_rows(_COLA_MRPC, "mrpc", "MRPC, "),
        ],
    ),
    "isolation-sst2-2000": lambda s: isolation_table(s, "minilm-l6", {"sst2": ""}, _SMALL),
    "isolation-sst2-6000": lambda s: isolation_table(s, "minilm-l6-6000", {"sst2": ""}, _LARGE),
    "isolation-cola-mrpc": lambda s: isolation_table(
        s, _COLA_MRPC, {"cola": "CoLA, ", "mrpc": "MRPC, "}, "CoLA and MRPC, 1e-4"
    ),
    "pcee-sst2": pcee_sst2,
    "panel-done": lambda s: panel_tables.progress_table(load_scores(s.folder / "panel")[1]),
    "panel-areas": lambda s: panel_tables.areas_table(_panel(s), most=8),
    "panel-goals": lambda s: panel_tables.goals_table(_panel(s), panel_tables.DEFAULT),
    "panel-gaps": lambda s: panel_differences.gaps_table(
        _panel(s), panel_differences.SHOWN_READOUTS
    ),
    "panel-setfit": lambda s: panel_differences.setfit_table(s.folder / "panel"),
    "panel-pairs": lambda s: panel_differences.pooling_table(_panel(s), "pair", ["recipe"]),
    "panel-aligned": lambda s: panel_differences.pooling_table(
        _panel(s), "aligned_pair", ["recipe"]
    ),
    "panel-decay": lambda s: panel_differences.decay_table(_panel(s)),
    "panel-training": lambda s: panel_differences.training_table(_panel(s)),
    "panel-scaling": lambda s: panel_differences.scaling_table(_panel(s)),
    "panel-changes": lambda s: panel_differences.changes_table(_panel(s)),
}


def update(paths: Iterable[Path], folder: Path) -> list[Path]:
    """Writes the tables that are marked in Markdown files, from the studies in `folder`.

    Returns the files that mark tables. Raises UserError for an unknown table.
    """
    studies, marked = Studies(folder), []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for _, name, _ in _BLOCK.findall(text):
            if name not in TABLES:
                raise UserError(
                    f"{str(path)!r} marks an unknown table {name!r}: use one of {', '.join(TABLES)}"
                )
        changed = _BLOCK.sub(lambda m: m[1] + _markdown(TABLES[m[2]](studies)) + m[3], text)
        if changed != text:
            write_text(path, changed)
        if _BLOCK.search(text):
            marked.append(path)
    return marked


def _markdown(table: Table) -> str:
    return "".join(f"{line}\n" for line in table_lines(*table))
