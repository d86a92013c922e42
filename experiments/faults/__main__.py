r"""Kills, stalls and starves real runs of a tiny model, and compares what is resumed bit for bit.

    python -m experiments.faults kills --mode=single --kills=100
    python -m experiments.faults stalls | storage | elastic
    python -m experiments.faults report

kills: starts `python -m sweet_jax.main` (of --mode=ray `python -m experiments.grid --engine=ray`),
ends a process with SIGKILL at a random moment, starts the command again, until the run ends by
itself; then counts the bits in which it differs from a run that nobody disturbed. Modes: single;
two and four processes of this machine; ray; two-sigterm and four-sigterm, where the signal is
SIGTERM. Four tenths of the moments are any time of a run, the others lie in the phase that was hit
least so far.
One of several processes is killed, and the others must end by themselves; in a quarter of the kills
all are. Counts are kept in WORKDIR/MODE.SEED.jsonl: the same command resumes until there are
--kills of this seed. Seeds may run side by side, in one work directory.
stalls: one of several processes is stopped (SIGSTOP); the others must end.
storage: a workdir on a disk that becomes full, or read-only (as root, on Linux).
elastic: from 4 to 2 to 1 processes.
report: prints the counts of all kills, and writes them to OUTPUT/kills.json.
"""

import functools
import sys
from pathlib import Path

from experiments.faults.kills import MODES, run_kills
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.files import write_json


def main(argv: list[str] | None = None) -> int | None:
    made = ArgumentParser("experiments.faults", __doc__ or "")
    add = made.add_argument
    add("what", choices=("kills", "stalls", "storage", "elastic", "report"))
    add("--mode", choices=(*MODES, "ray"), help="default: single; of stalls, four")
    add("--kills", type=int, default=50, help="of this seed, with those counted before")
    add("--seed", type=int, default=0)
    add("--workdir", type=Path, default=Path("runs/faults"))
    add("--output", type=Path, default=Path("experiments/results/faults"))
    options = made.parse_args(argv)
    options.mode = options.mode or ("four" if options.what == "stalls" else "single")
    folder, output = options.workdir.resolve(), options.output
    if options.what == "report":
        from experiments.faults.summary import report

        report(folder, output)
    elif options.what == "stalls":
        from experiments.faults.stalls import run_stalls

        write_json(output / f"stalls-{options.mode}.json", run_stalls(folder, options.mode))
    elif options.what == "storage":
        from experiments.faults.storage import run_storage

        write_json(output / f"storage-{options.mode}.json", run_storage(folder, options.mode))
    elif options.what == "elastic":
        from experiments.faults.elastic import run_elastic

        write_json(output / "elastic.json", run_elastic(folder))
    elif options.mode == "ray":
        from experiments.faults import ray_kills

        with ray_kills.cluster(folder / "ray-cache") as where:
            one = functools.partial(ray_kills.run_round, where)
            run_kills("ray", options.kills, folder, options.seed, one)
    else:
        run_kills(options.mode, options.kills, folder, options.seed)
    return None


if __name__ == "__main__":
    sys.exit(run_command(main))
