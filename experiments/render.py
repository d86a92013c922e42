"""All tables and figures from the cells that are done, in one page.

  python -m experiments.render --model=minilm-l6

Trains and measures nothing: what a script would run is named as not done yet, and the tables of
experiments.large_at_small_cost, experiments.pcee_control and experiments.conflict are what these
left. Writes OUTPUT/index.html (open it in a browser), OUTPUT/README.md, OUTPUT/tables/*.md,
OUTPUT/figures/*.png and *.svg. Cost: seconds. Expected: the tables and figures of every script.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from experiments import (
    ablation,
    conflict,
    curves,
    grid,
    individual,
    isolation,
    learning_to_exit,
    rates,
    sizes,
)
from experiments.cells import Cell
from experiments.options import method_cells
from experiments.rendering import (
    Section,
    kept_sections,
    markdown,
    signed,
    write_page,
    write_sections,
)
from sweet_jax.config import UserError
from sweet_jax.files import write_text

# What each script renders and which cells it wants, in the order of the page.
SCRIPTS = (
    (individual, method_cells),
    (rates, method_cells),
    (curves, method_cells),
    (sizes, sizes.cells),
    (ablation, ablation.cells),
    (isolation, isolation.cells),
    (learning_to_exit, learning_to_exit.cells),
)
# Scripts that measure for minutes.
KEPT = ("large_at_small_cost", "pcee_control")


def cells(options: argparse.Namespace) -> list[Cell]:
    """The cells that any script wants, once each."""
    return list({c.name: c for _, cells_of in SCRIPTS for c in cells_of(options)}.values())


def render(options: argparse.Namespace, records: dict[str, dict[str, Any]]) -> None:
    """Writes everything; a section without a row is left out.

    Raises UserError where there is no such output.
    """
    if not options.output.is_dir():
        raise UserError(f"--output {str(options.output)!r} does not exist: run a script first")
    sections: list[Section] = []
    for script, cells_of in SCRIPTS:
        name = script.__name__.rpartition(".")[2]
        wanted = {c.name: records[c.name] for c in cells_of(options) if c.name in records}
        found = [s for s in script.sections(options, records) if s.rows]
        if found:
            own = argparse.Namespace(**vars(options))
            if script is not sizes:
                del own.sizes
            found = signed(found, own, name, wanted)
            write_sections(options.output, name, found)
            sections += found
    sections += [s for name in KEPT for s in kept_sections(options.output, name) if s.rows]
    if found := conflict.sections(options.output / "conflict"):
        write_sections(options.output, "conflict", found)
        sections += found
    title = f"sweet_jax: experiments with {options.model}"
    write_page(options.output, title, sections)
    text = "\n".join([f"# {title}", "", *(markdown(s) for s in sections)])
    write_text(options.output / "README.md", text)
    print(f"page: {options.output / 'index.html'}")


def run(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    extra = {"--sizes": {"default": sizes.SIZES, "help": "see experiments.sizes"}}
    arguments = [*(sys.argv[1:] if argv is None else argv), "--render_only"]
    return grid.main(__doc__, cells, render, arguments, extra)


if __name__ == "__main__":
    sys.exit(run())
