"""Renders all tables and figures of finished cells, of every study.

  python -m experiments.render
  python -m experiments.render --output=experiments/results/minilm-l6

Trains and measures nothing, and needs no data sets: it reads what the scripts recorded as CSV files
in experiments/results/STUDY, or in each --output, and STUDY/note.md where there is one. Writes
STUDY/README.md and STUDY/figures/*.png, and, of all studies, the tables that README.md,
experiments/results/README.md and docs/**/*.md mark (experiments.summary).
Cost: seconds. Expected: the tables and figures of every script; what is not done yet is named.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import (
    ablation,
    conflict_tables,
    curves,
    individual,
    isolation,
    laplace_control,
    large_at_small_cost,
    learning_to_exit,
    panel,
    pcee_control,
    probes,
    rates,
    read_outs,
    recipe,
    sizes,
    summary,
    two_sizes,
)
from experiments.records import read_study
from experiments.rendering import Section, add_provenance, section_markdown, write_figures
from experiments.runner import Script, load_records, study_options
from sweet_jax.arguments import ArgumentParser
from sweet_jax.errors import UserError
from sweet_jax.files import write_text

RESULTS = Path("experiments/results")
NOTE = "note.md"  # of a study, where there is one: what its cells' configs do not say
# In the order of the page.
SCRIPTS: tuple[Script, ...] = (
    individual.SCRIPT,
    rates.SCRIPT,
    curves.SCRIPT,
    sizes.SCRIPT,
    ablation.SCRIPT,
    isolation.SCRIPT,
    read_outs.SCRIPT,
    learning_to_exit.SCRIPT,
    large_at_small_cost.SCRIPT,
    pcee_control.SCRIPT,
)


def render(output: Path) -> None:
    """Writes the README and the figures of one study; a section without a row is left out."""
    options = study_options(output)
    sections: list[Section] = []
    for script in SCRIPTS:
        own = argparse.Namespace(**vars(options))
        if script is sizes.SCRIPT:
            own.sizes = sizes.recorded(read_study(output)[0])
        records = load_records(output, script.cells(own))
        found = [s for s in script.sections(own, records) if s.rows]
        sections += add_provenance(found, own, script.name, records)
    sections += conflict_tables.sections(output)
    write_figures(output, sections)
    title = f"sweet_jax: experiments with {options.model}"
    lines = [f"# {title}", "", *(section_markdown(s) for s in sections)]
    if (output / NOTE).exists():
        lines.insert(2, (output / NOTE).read_text(encoding="utf-8"))
    write_text(output / "README.md", "\n".join(lines))


def documents() -> list[Path]:
    """Returns the Markdown files that may mark tables of `experiments.summary`."""
    return [Path("README.md"), RESULTS / "README.md", *sorted(Path("docs").rglob("*.md"))]


def run(argv: Sequence[str] | None = None) -> int:
    """Renders; returns the exit status: 0, or 2 where the input is wrong."""
    made = ArgumentParser("experiments.render", __doc__ or "")
    made.add_argument("--output", type=Path, action="append", help="default: all that are here")
    try:
        given = made.parse_args(argv).output
        outputs = given or sorted(path.parent for path in RESULTS.glob("*/study.json"))
        for output in outputs:
            if not output.is_dir():
                raise UserError(f"--output {str(output)!r} does not exist: run a script first")
            render(output)
            print(output / "README.md")
        if not given:
            for path in summary.update(documents(), RESULTS):
                print(path)
            others: dict[str, Any] = {"recipe": recipe, "panel": panel, "probes": probes}
            others |= {"two_sizes": two_sizes, "laplace_control": laplace_control}
            there = [study for name, study in others.items() if (RESULTS / name).is_dir()]
            return max((study.main(["--render_only"]) for study in there), default=0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
