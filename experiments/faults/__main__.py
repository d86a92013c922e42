r"""Tests that runs survive kills, stalls and full disks, and that they resume bit for bit.

    python -m experiments.faults kills --mode=single --kills=100
    python -m experiments.faults stalls
    python -m experiments.faults storage
    python -m experiments.faults elastic
    python -m experiments.faults report

All tests run the commands that users run, with a tiny model, and count the bits in which a resumed
run differs from an undisturbed one.

kills: starts `python -m sweet_jax.main` (with --mode=ray, `python -m experiments.grid
  --engine=ray`), kills a process at a random moment, starts the command again, and so on until the
  run ends by itself. Modes: single (one process); two and four processes on this machine; ray;
  two-sigterm and four-sigterm, which send SIGTERM instead of SIGKILL. Four tenths of the moments
  are at any time of a run, and the others in the phase that was hit least so far. If there are
  several processes, one is killed, and the others must end by themselves; in a quarter of the cases
  all are killed. The results are appended to WORKDIR/MODE.SEED.jsonl, and the same command
  continues until there are --kills kills. Several seeds can run at the same time in one work
  directory. A kill takes about 20 seconds.
stalls: stops one of several processes (SIGSTOP); the others must end. Writes
  OUTPUT/stalls-MODE.json.
storage: runs with a workdir on a disk that becomes full or read-only (needs root, on Linux). Writes
  OUTPUT/storage-MODE.json.
elastic: resumes a run of 4 processes with 2 and then with 1. Writes OUTPUT/elastic.json.
report: prints a table of all kills, and writes their counts to OUTPUT/kills.json.
"""

import functools
import sys
from pathlib import Path

from experiments.faults.kills import run_kills
from experiments.faults.reference import MODES
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.errors import UserError
from sweet_jax.files import write_json

_TESTS = ("kills", "stalls", "storage", "elastic", "report")


def main(argv: list[str] | None = None) -> None:
    """Runs one of the tests, or prints the report."""
    parser = ArgumentParser("experiments.faults", __doc__ or "")
    parser.add_argument("test", choices=_TESTS, help="what to run")
    text = "default single, for stalls four"
    parser.add_argument("--mode", choices=(*MODES, "ray"), help=text)
    text = "number of kills with this seed, including those of earlier commands (default 50)"
    parser.add_argument("--kills", type=int, default=50, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default 0)")
    text = "folder of the runs (default runs/faults)"
    parser.add_argument("--workdir", type=Path, default=Path("runs/faults"), help=text)
    text = "folder of the results (default experiments/results/faults)"
    parser.add_argument(
        "--output", type=Path, default=Path("experiments/results/faults"), help=text
    )
    options = parser.parse_args(argv)
    mode = options.mode or ("four" if options.test == "stalls" else "single")
    folder, output = options.workdir.resolve(), options.output
    if mode == "ray" and options.test in ("stalls", "storage"):
        raise UserError(f"{options.test} has no --mode=ray: choose one of {', '.join(MODES)}")
    if options.test == "stalls" and MODES[mode].processes == 1:
        raise UserError(f"stalls needs several processes: --mode={mode} has one")
    if options.test == "report":
        from experiments.faults.summary import report

        report(folder, output)
    elif options.test == "stalls":
        from experiments.faults.stalls import run_stalls

        write_json(output / f"stalls-{mode}.json", run_stalls(folder, mode))
    elif options.test == "storage":
        from experiments.faults.storage import run_storage

        write_json(output / f"storage-{mode}.json", run_storage(folder, mode))
    elif options.test == "elastic":
        from experiments.faults.elastic import run_elastic

        write_json(output / "elastic.json", run_elastic(folder))
    elif mode == "ray":
        from experiments.faults import ray_kills

        with ray_kills.start_cluster(folder / "ray-cache") as cluster:
            run_round = functools.partial(ray_kills.run_round, cluster)
            run_kills("ray", options.kills, folder, options.seed, run_round)
    else:
        run_kills(mode, options.kills, folder, options.seed)


if __name__ == "__main__":
    sys.exit(run_command(main))
