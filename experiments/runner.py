"""Runs the missing cells of a script, records their metrics, and prints its tables.

The metrics of a finished cell are written to OUTPUT/scores.csv, runs.csv and study.json
(experiments.records), and its full outputs to --workdir (experiments.cells). When a command is run
again, it runs the missing cells, and a cell that was interrupted resumes from its checkpoint. A
cell that fails does not stop the others. WORKDIR/manifest.json has the state of every cell: done,
failed or missing.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cluster
from experiments.cells import Cell, identity, is_finished, outputs_folder, run_cell, time_left
from experiments.comparison import Record, Records
from experiments.options import chosen_tasks, default_output, make_parser, shared_arguments
from experiments.records import measure, read_study, write_study
from experiments.rendering import Section, add_provenance, section_markdown, write_figures
from sweet_jax.arguments import run_command
from sweet_jax.config import Config
from sweet_jax.data.tasks import GLUE
from sweet_jax.directories import lock_directory
from sweet_jax.distributed import PreemptedError
from sweet_jax.errors import UserError
from sweet_jax.files import write_json

Options = argparse.Namespace
_RESUMES = "run the same command to resume"


@dataclasses.dataclass(frozen=True)
class Script:
    """Describes a script: the cells it needs, and the tables and figures that it makes of them.

    Attributes:
      name: name of its module.
      doc: docstring of its module, which --help prints.
      cells: returns the cells for the options.
      sections: returns the tables and figures for the options and the finished cells' records.
      measurements: takes the same, computes what the records do not contain, and writes it to CSV
        files beside scores.csv.
      arguments: keyword arguments of argparse's add_argument for its own options, by flag.

    """

    name: str
    doc: str | None
    cells: Callable[[Options], list[Cell]]
    sections: Callable[[Options, Records], list[Section]]
    measurements: Callable[[Options, Records], None] | None = None
    arguments: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def main(script: Script, argv: Sequence[str] | None = None) -> int:
    """Runs the missing cells of a script and prints its tables; returns the exit status."""
    return run_resumable(lambda: _run_script(script, argv))


def run_resumable(command: Callable[[], bool]) -> int:
    """Runs a command that resumes when it is run again; returns its exit status.

    command: returns whether everything succeeded.

    The status is 0 if it did, 1 if something failed or the command was stopped, and 2 if the input
    is wrong; errors of the user or the disk are reported in one line.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout, force=True)

    def run() -> int:
        try:
            return 0 if command() else 1
        except PreemptedError as stop:
            print(f"{stop}; {_RESUMES}", file=sys.stderr)
            return 1

    return run_command(run, _RESUMES)


def _run_script(script: Script, argv: Sequence[str] | None) -> bool:
    parser = make_parser(script.doc, script.name)
    for flag, keywords in script.arguments.items():
        parser.add_argument(flag, **keywords)
    options = parser.parse_args(argv)
    options.output = options.output or default_output(options)
    # Each output has its own, since cells with other options have the same names.
    options.workdir = options.workdir or Path("runs/experiments") / options.output.name
    cells = script.cells(options)
    check_distinct_runs(cells)
    if options.list:
        _print_states(options, cells)
        return True
    # Records of another configuration are refused before hours of training, not after.
    load_records(options.output, script.cells(with_finished_tasks(options)))
    succeeded = options.render_only or run_cells(cells, options)
    shown = with_finished_tasks(options)
    records = load_records(options.output, script.cells(shown))
    if script.measurements and not options.render_only:
        script.measurements(shown, records)
    sections = add_provenance(script.sections(shown, records), shown, script.name, records)
    write_figures(options.output, sections)
    for section in sections:
        print(section_markdown(section))
    return succeeded


def check_distinct_runs(cells: Iterable[Cell]) -> None:
    """Raises UserError if two cells with different names have the same config.

    This happens if an option sets, for all cells, a key that the script varies between cells.
    """
    names: dict[str, str] = {}  # by config
    for cell in cells:
        first = names.setdefault(json.dumps(identity(cell.config), sort_keys=True), cell.name)
        if first != cell.name:
            raise UserError(
                f"with these options {cell.name} is the same run as {first}: remove the --set or "
                "--preset that sets a key which this script varies"
            )


def load_records(output: Path, cells: Iterable[Cell]) -> dict[str, Record]:
    """Returns the records of the finished cells among `cells`, by name.

    Raises UserError if a record has another configuration than its cell, or if records of one task
    have different rows.
    """
    study = read_study(output)[0]
    records = {cell.name: study[cell.name] for cell in cells if cell.name in study}
    for cell in cells:
        if cell.name in records:
            _check_config(output, cell, records[cell.name])
    _check_data(output, records)
    return records


def _check_config(output: Path, cell: Cell, record: Record) -> None:
    # An old record lacks newer keys, which had their defaults; pooling was always "first".
    recorded = identity(Config()) | {"pooling": "first"} | dict(record.config)
    expected = identity(cell.config)
    differing = [key for key in expected if recorded[key] != expected[key]]
    if differing:
        key = differing[0]
        raise UserError(
            f"{cell.name} in {str(output)!r} was made with {key} {recorded[key]!r}, "
            f"not {expected[key]!r}: use the same options, or another --output"
        )


def _check_data(output: Path, records: Records) -> None:
    digests: dict[str, tuple[str, str]] = {}  # by task, with the name of its first cell
    for name, record in records.items():
        if not record.data_sha256:  # an old record
            continue
        task = record.config["task"]
        digest, first = digests.setdefault(task, (record.data_sha256, name))
        if record.data_sha256 != digest:
            raise UserError(
                f"{name} in {str(output)!r} was made with other rows of {task} than {first}: use "
                "another --output for each --data_dir"
            )


def run_cells(cells: Sequence[Cell], options: Options) -> bool:
    """Runs the missing cells, the most expensive first; returns whether all cells are done.

    Raises:
      UserError: another process writes to the same output, or the cluster cannot be reached.
      PreemptedError: SIGTERM was received.

    """
    with (
        lock_directory(options.output, "--output"),
        lock_directory(options.workdir, "--workdir"),
    ):
        study = read_study(options.output)[0]
        _record(cells, study, options)  # of a command that was killed before it could
        states = _states(options, cells, study)
        manifest = options.workdir / "manifest.json"
        write_json(manifest, states)
        for cell in cells:
            if states[cell.name]["state"] == "failed":
                error = states[cell.name]["error"]
                print(
                    f"{cell.name} failed before: {error} (--retry runs it again)", file=sys.stderr
                )
        missing = [cell for cell in cells if states[cell.name]["state"] == "missing"]
        missing.sort(key=lambda cell: -cell.work)
        run = cluster.run if options.engine == "ray" and missing else _run_locally
        with contextlib.closing(run(missing, options)) as ended:
            for cell, state in ended:
                if state["state"] == "failed":
                    print(f"{cell.name} failed: {state['error']}", file=sys.stderr)
                    print(state.pop("traceback", ""), file=sys.stderr, end="")
                states[cell.name] = state
                _record([cell], study, options)
                write_json(manifest, states)
    return all(states[cell.name]["state"] == "done" for cell in cells)


def _run_locally(
    cells: Sequence[Cell], options: Options
) -> Generator[tuple[Cell, dict[str, Any]], None, None]:
    """Runs the cells one after the other in this process; yields each with its state."""
    began, total, worked = time.monotonic(), sum(c.work for c in cells), 0.0
    for number, cell in enumerate(cells, start=1):
        rest = time_left(time.monotonic() - began, worked, total)
        print(f"[{number}/{len(cells)}] {cell.name}{rest}", flush=True)
        yield cell, run_cell(cell, options.workdir)
        worked += cell.work


def _record(cells: Iterable[Cell], study: dict[str, Record], options: Options) -> None:
    """Adds the cells that are finished in --workdir to the study, and writes it if it changed."""
    new = [
        cell for cell in cells if cell.name not in study and is_finished(options.workdir, cell.name)
    ]
    for cell in new:
        record = measure(outputs_folder(options.workdir, cell.name))
        _check_config(options.workdir, cell, record)
        study[cell.name] = record
    if new:
        write_study(options.output, study, shared_arguments(options))


def with_finished_tasks(options: Options) -> Options:
    """Returns the options with the chosen tasks, then the others that --output has cells of.

    A figure replaces the previous one, so a command for one task must not lose the other tasks.
    """
    finished = {record.config["task"] for record in read_study(options.output)[0].values()}
    tasks = list(chosen_tasks(options))
    tasks += [task for task in GLUE if task in finished and task not in tasks]
    return argparse.Namespace(**{**vars(options), "tasks": ",".join(tasks)})


def study_options(output: Path) -> Options:
    """Returns the options of a study's cells, with the tasks that it has cells of."""
    records, arguments = read_study(output)
    finished = {record.config["task"] for record in records.values()}
    options = make_parser().parse_args(arguments)
    options.output = output
    options.tasks = ",".join(task for task in options.tasks.split(",") if task in finished)
    return with_finished_tasks(options)


def _states(
    options: Options, cells: Iterable[Cell], study: Mapping[str, Record]
) -> dict[str, dict[str, Any]]:
    """Returns the manifest, with the state of each of `cells` according to the records."""
    path = options.workdir / "manifest.json"
    states = json.loads(path.read_text()) if path.exists() else {}
    for cell in cells:
        known = states.get(cell.name, {"state": "missing"})
        failed = known["state"] == "failed" and not options.retry
        done = cell.name in study or is_finished(options.workdir, cell.name)
        state = "done" if done else "failed" if failed else "missing"
        states[cell.name] = known | {"state": state}
    return states


def _print_states(options: Options, cells: Sequence[Cell]) -> None:
    states = _states(options, cells, load_records(options.output, cells))
    for cell in cells:
        known = states[cell.name]
        error = known["error"] if known["state"] == "failed" else ""
        print(f"{known['state']:>8}  {cell.name}  {error}".rstrip())
