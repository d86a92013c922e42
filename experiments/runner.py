"""Runs the cells of a script that are missing, records what they measured, and renders.

What a finished cell measured goes into OUTPUT/scores.csv, runs.csv and study.json
(experiments.records); its full outputs stay in --workdir (experiments.cells). A second start runs
what is missing, a cell stopped in the middle resumes from its checkpoint, and one that failed does
not stop the others. WORKDIR/manifest.json has the state of every cell: done, failed or missing.
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
from sweet_jax.config import Config
from sweet_jax.data.tasks import GLUE
from sweet_jax.directories import lock_directory
from sweet_jax.distributed import PreemptedError
from sweet_jax.errors import UserError
from sweet_jax.files import write_json

Options = argparse.Namespace


@dataclasses.dataclass(frozen=True)
class Script:
    """Describes a table or figure: which cells it needs, and what it makes of them.

    Attributes:
      name: of its module.
      doc: its docstring, which --help prints.
      cells: from the options to the cells.
      sections: from the options and all finished cells to tables and figures.
      measurements: from the options and all finished cells: measures what the records of cells do
        not hold, and writes it as CSV files of its own beside scores.csv.
      arguments: its own options, as argparse's add_argument takes them.

    """

    name: str
    doc: str | None
    cells: Callable[[Options], list[Cell]]
    sections: Callable[[Options, Records], list[Section]]
    measurements: Callable[[Options, Records], None] | None = None
    arguments: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def main(script: Script, argv: Sequence[str] | None = None) -> int:
    """Runs the cells that a script needs and that are missing, and prints its tables.

    Returns the exit status: see `exit_status`.
    """
    return exit_status(lambda: _run_script(script, argv))


def exit_status(command: Callable[[], bool]) -> int:
    """Runs a command, and reports its errors in one line each.

    command: returns whether no cell failed.

    Returns 0 where it is done, 1 where a cell failed or it was stopped, 2 where the input is wrong.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout, force=True)
    try:
        sound = command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PreemptedError as stop:
        print(f"{stop}; run the same command to resume", file=sys.stderr)
        return 1
    return 0 if sound else 1


def _run_script(script: Script, argv: Sequence[str] | None) -> bool:
    made = make_parser(script.doc, script.name)
    for flag, how in script.arguments.items():
        made.add_argument(flag, **how)
    options = made.parse_args(argv)
    options.output = options.output or default_output(options)
    # Of an output its own: cells of other options have the same names.
    options.workdir = options.workdir or Path("runs/experiments") / options.output.name
    cells = script.cells(options)
    check_distinct_runs(cells)
    if options.list:
        _print_states(options, cells)
        return True
    load_records(options.output, script.cells(with_finished_tasks(options)))  # refuses before hours
    sound = options.render_only or run_cells(cells, options)
    whole = with_finished_tasks(options)
    records = load_records(options.output, script.cells(whole))
    if script.measurements and not options.render_only:
        script.measurements(whole, records)
    sections = add_provenance(script.sections(whole, records), whole, script.name, records)
    write_figures(options.output, sections)
    for section in sections:
        print(section_markdown(section))
    return sound


def check_distinct_runs(cells: Iterable[Cell]) -> None:
    """Raises UserError where two cells of different names are the same run.

    So it is where the options set for all what a script means to compare: a table of them would
    call the same numbers by two names.
    """
    seen: dict[str, str] = {}
    for one in cells:
        twin = seen.setdefault(json.dumps(identity(one.config), sort_keys=True), one.name)
        if twin != one.name:
            raise UserError(
                f"with these options {one.name} is the same run as {twin}: leave out the --set or "
                "--preset that sets for all what is compared here"
            )


def load_records(output: Path, cells: Iterable[Cell]) -> dict[str, Record]:
    """Returns the records of those of the cells that are finished, by name.

    Raises UserError for a record that was made with another configuration, or with other rows than
    those of another cell of its task.
    """
    records = read_study(output)[0]
    found = {one.name: records[one.name] for one in cells if one.name in records}
    for one in cells:
        if one.name in found:
            _check_config(output, one, found[one.name])
    _check_data(output, found)
    return found


def _check_config(output: Path, one: Cell, record: Record) -> None:
    # What a key was before there was one; pooling had no other value then.
    theirs = identity(Config()) | {"pooling": "first"} | dict(record.config)
    ours = identity(one.config)
    differing = [k for k in ours if theirs[k] != ours[k]]
    if differing:
        raise UserError(
            f"{one.name} in {str(output)!r} was made with {differing[0]} {theirs[differing[0]]!r}, "
            f"not {ours[differing[0]]!r}: give the same options, or another --output"
        )


def _check_data(output: Path, records: Records) -> None:
    data: dict[str, tuple[str, str]] = {}  # by task
    for name, record in records.items():
        if digest := record.data_sha256:  # an old record has none
            known, first = data.setdefault(record.config["task"], (digest, name))
            if known != digest:
                raise UserError(
                    f"{name} in {str(output)!r} was made with other rows of "
                    f"{record.config['task']} than {first}: give another --output for the cells "
                    "whose --data_dir was another"
                )


def run_cells(cells: Sequence[Cell], options: Options) -> bool:
    """Runs the cells that are missing, the longest first; returns whether none failed.

    Raises:
      UserError: another process writes to the same output, or there is no such cluster.
      PreemptedError: SIGTERM came.

    """
    with (
        lock_directory(options.output, "--output"),
        lock_directory(options.workdir, "--workdir"),
    ):
        study = read_study(options.output)[0]
        _record(cells, study, options)  # those whose command was killed before it could
        states = _states(options, cells, study)
        manifest = options.workdir / "manifest.json"
        write_json(manifest, states)
        for one in cells:
            if states[one.name]["state"] == "failed":
                why = states[one.name]["error"]
                print(f"{one.name} failed before: {why} (--retry runs it again)", file=sys.stderr)
        left = [c for c in cells if states[c.name]["state"] == "missing"]
        left.sort(key=lambda c: -c.work)
        engine = cluster.run if options.engine == "ray" and left else _run_here
        with contextlib.closing(engine(left, options)) as ended:
            for one, state in ended:
                if state["state"] == "failed":
                    print(f"{one.name} failed: {state['error']}", file=sys.stderr)
                    print(state.pop("traceback", ""), file=sys.stderr, end="")
                states[one.name] = state
                _record([one], study, options)
                write_json(manifest, states)
    return all(states[c.name]["state"] == "done" for c in cells)


def _run_here(
    cells: Sequence[Cell], options: Options
) -> Generator[tuple[Cell, dict[str, Any]], None, None]:
    """Runs the cells one after the other in this process; yields each with its state."""
    began, total, worked = time.monotonic(), sum(c.work for c in cells), 0.0
    for number, one in enumerate(cells, start=1):
        rest = time_left(time.monotonic() - began, worked, total)
        print(f"[{number}/{len(cells)}] {one.name}{rest}", flush=True)
        yield one, run_cell(one, options.workdir)
        worked += one.work


def _record(cells: Iterable[Cell], study: dict[str, Record], options: Options) -> None:
    """Adds to the study the cells that are finished in the workdir and not yet in it."""
    new = [c for c in cells if c.name not in study and is_finished(options.workdir, c.name)]
    for one in new:
        record = measure(outputs_folder(options.workdir, one.name))
        _check_config(options.workdir, one, record)
        study[one.name] = record
    if new:
        write_study(options.output, study, shared_arguments(options))


def with_finished_tasks(options: Options) -> Options:
    """Returns the options with every task that the output has a cell of, the chosen ones first.

    What is rendered replaces what stood there: a task run on its own must not take the others out.
    """
    done = {record.config["task"] for record in read_study(options.output)[0].values()}
    tasks = list(chosen_tasks(options))
    tasks += [task for task in GLUE if task in done and task not in tasks]
    return argparse.Namespace(**{**vars(options), "tasks": ",".join(tasks)})


def study_options(output: Path) -> Options:
    """Returns the options that a study's cells were made with, and the tasks it has cells of."""
    records, words = read_study(output)
    done = {record.config["task"] for record in records.values()}
    options = make_parser().parse_args(words)
    options.output = output
    options.tasks = ",".join(task for task in options.tasks.split(",") if task in done)
    return with_finished_tasks(options)


def _states(
    options: Options, cells: Iterable[Cell], study: Mapping[str, Record]
) -> dict[str, dict[str, Any]]:
    """Returns the manifest, with every cell of `cells`: the records say what is done."""
    path = options.workdir / "manifest.json"
    states = json.loads(path.read_text()) if path.exists() else {}
    for one in cells:
        known = states.get(one.name, {"state": "missing"})
        failed = known["state"] == "failed" and not options.retry
        done = one.name in study or is_finished(options.workdir, one.name)
        state = "done" if done else "failed" if failed else "missing"
        states[one.name] = known | {"state": state}
    return states


def _print_states(options: Options, cells: Sequence[Cell]) -> None:
    states = _states(options, cells, load_records(options.output, cells))
    for one in cells:
        known = states[one.name]
        why = known["error"] if known["state"] == "failed" else ""
        print(f"{known['state']:>8}  {one.name}  {why}".rstrip())
