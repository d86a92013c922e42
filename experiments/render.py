"""Writes all tables and figures of every study again, from the records of its finished cells.

  python -m experiments.render
  python -m experiments.render --output=experiments/results/minilm-l6

It trains nothing and needs no data sets: it reads the CSV files of experiments/results/STUDY, or of
each --output, and STUDY/note.md if it exists. It writes STUDY/README.md and STUDY/figures/*.png.
Without --output, it also writes the tables that are marked in README.md,
experiments/results/README.md and docs/**/*.md (experiments.summary).

Cost: 20 seconds. Expected: the tables and figures of every script, which name the cells that are
not done yet.
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
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.errors import UserError
from sweet_jax.files import write_text

RESULTS = Path("experiments/results")
NOTE = "note.md"  # facts about a study that are not in its cells' configs; need not exist
# In the order of their sections in a study's README.md.
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
# Scripts that write a README.md of their own, by folder in RESULTS.
SEPARATE: dict[str, Any] = {
    "recipe": recipe,
    "panel": panel,
    "probes": probes,
    "two_sizes": two_sizes,
    "laplace_control": laplace_control,
}


def render(output: Path) -> None:
    """Writes README.md and the figures of one study; omits sections without rows."""
    options = study_options(output)
    sections: list[Section] = []
    for script in SCRIPTS:
        own = argparse.Namespace(**vars(options))
        if script is sizes.SCRIPT:
            own.sizes = sizes.recorded(read_study(output)[0])
        records = load_records(output, script.cells(own))
        filled = [section for section in script.sections(own, records) if section.rows]
        sections += add_provenance(filled, own, script.name, records)
    sections += conflict_tables.sections(output)
    write_figures(output, sections)
    title = f"sweet_jax: experiments with {options.model}"
    lines = [f"# {title}", "", *(section_markdown(s) for s in sections)]
    if (output / NOTE).exists():
        lines.insert(2, (output / NOTE).read_text(encoding="utf-8"))
    write_text(output / "README.md", "\n".join(lines))


def documents() -> list[Path]:
    """Returns the Markdown files that may contain tables of `experiments.summary`."""
    return [Path("README.md"), RESULTS / "README.md", *sorted(Path("docs").rglob("*.md"))]


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser("experiments.render", __doc__ or "")
    parser.add_argument(
        "--output",
        type=Path,
        action="append",
        help="folder of a study, may be repeated; default: all studies in experiments/results, and "
        "the tables in the documentation",
    )
    outputs = parser.parse_args(argv).output
    for output in outputs or sorted(path.parent for path in RESULTS.glob("*/study.json")):
        if not output.is_dir():
            raise UserError(f"--output {str(output)!r} does not exist: run a script first")
        render(output)
        print(output / "README.md")
    if outputs:
        return 0
    for path in summary.update(documents(), RESULTS):
        print(path)
    scripts = [script for name, script in SEPARATE.items() if (RESULTS / name).is_dir()]
    return max((script.main(["--render_only"]) for script in scripts), default=0)


if __name__ == "__main__":
    sys.exit(run())
