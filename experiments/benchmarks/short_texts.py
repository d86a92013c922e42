"""Times training on short texts whose batches are also padded to shorter lengths than usual.

    python -m experiments.benchmarks.short_texts --data_dir=GLUE
    python -m experiments.benchmarks.short_texts --data_dir=GLUE --task=cola --shape=bert-base

The lengths of real training texts determine how many batches of an epoch are padded to which length
(`sweet_jax.data.padding`), for batches of texts of similar length, as in the recipe, and for random
batches. A step of Early-Exit on the mean of all tokens is timed at each length, in turns, with a
random encoder of a shape in float32. "shorter too" adds the lengths that are worth compiling in a
run of --epochs epochs; "saved in the run" does not include the time to compile them. Expected: 0.7
of the time per step for CoLA and SST-2, and hardly any change for MNLI. Takes about a minute on
one core.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet

from experiments.benchmarks.shapes import SHAPES, Size, make_training_step
from experiments.benchmarks.tables import describe_machine, table_head, table_row
from experiments.benchmarks.timing import time_in_turns
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.data.batches import Tokens, steps_per_epoch, tokenize, training_batch_indices
from sweet_jax.data.padding import bucket_lengths, longest_row, smallest_fit, with_short
from sweet_jax.data.splits import Split
from sweet_jax.data.tasks import GLUE
from sweet_jax.errors import UserError
from sweet_jax.models.checkpoint_folder import load_tokenizer
from sweet_jax.models.pretrained import open_checkpoint
from sweet_jax.recipe import OWN_DATA

_BATCH = 16


class Case(NamedTuple):
    """Holds the lengths of one task and kind of batch."""

    task: str
    grouped: bool  # whether a batch has texts of similar length
    longest: np.ndarray  # tokens of the longest row of each batch of an epoch, int
    lengths: tuple[int, ...]  # to which batches are padded, with the shorter ones


def read_tokens(folder: str, task: str, rows: int, max_length: int) -> Tokens:
    """Returns the tokens of the first training rows of a GLUE task.

    Raises UserError if FOLDER/TASK/train.parquet does not exist.
    """
    path = Path(folder) / task / "train.parquet"
    if not path.is_file():
        raise UserError(f"{str(path)!r} does not exist: set --data_dir to the folder of GLUE")
    table = pyarrow.parquet.read_table(path).slice(0, rows)
    columns = [table[name].to_pylist() for name in GLUE[task].text_columns]
    texts = list(zip(*columns, strict=True))
    tokenizer = load_tokenizer(open_checkpoint(OWN_DATA["checkpoint"]))
    return tokenize(tokenizer, Split(texts, np.zeros(len(texts), np.int32)), max_length)


def longest_rows(tokens: Tokens, *, grouped: bool) -> np.ndarray:
    """Returns the number of tokens of the longest row of each batch of an epoch, int [batches]."""
    rows, lengths = [np.arange(len(tokens))], tokens.lengths if grouped else None
    steps = range(steps_per_epoch(len(tokens), _BATCH))
    batches = (training_batch_indices(rows, [0], step, _BATCH, lengths) for step in steps)
    return np.asarray([longest_row(tokens, batch) for batch in batches])


def time_steps(shape: str, lengths: Sequence[int], rounds: int) -> dict[int, tuple[float, float]]:
    """Returns, by length, the least seconds of a step in all rounds, and the seconds to compile."""
    steps = []
    for length in lengths:
        size = Size(_BATCH, length)
        steps.append(make_training_step(SHAPES[shape], "early_exit", size, pooling="mean"))
        steps[-1].take()
    times = time_in_turns([step.take for step in steps], rounds)
    return {
        length: (min(seconds), step.compile_seconds)
        for length, seconds, step in zip(lengths, times, steps, strict=True)
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a row for each task and kind of batch."""
    parser = ArgumentParser("experiments.benchmarks.short_texts", __doc__ or "")
    parser.add_argument(
        "--data_dir", required=True, help="folder of GLUE, with <task>/train.parquet"
    )
    parser.add_argument(
        "--task", action="append", choices=GLUE, help="repeatable (default cola, sst2, mnli)"
    )
    parser.add_argument("--shape", default="minilm", choices=SHAPES, help="(default minilm)")
    parser.add_argument("--rows", type=int, default=2000, help="training rows (default 2000)")
    parser.add_argument("--epochs", type=int, default=8, help="of the run (default 8)")
    parser.add_argument("--max_length", type=int, default=64, help="tokens of a row (default 64)")
    parser.add_argument("--rounds", type=int, default=8, help="timed steps (default 8)")
    options = parser.parse_args(argv)
    usual, cases = bucket_lengths(options.max_length), []
    for task in options.task or ("cola", "sst2", "mnli"):
        tokens = read_tokens(options.data_dir, task, options.rows, options.max_length)
        for grouped in (True, False):
            longest = longest_rows(tokens, grouped=grouped)
            more = with_short(usual, longest, options.epochs * len(longest))
            cases.append(Case(task, grouped, longest, more))
    used = {
        length
        for case in cases
        for lengths in (usual, case.lengths)
        for length in smallest_fit(case.longest, lengths).tolist()
    }
    steps = time_steps(options.shape, sorted(used), options.rounds)
    print(describe_machine())
    print(f"{options.shape}, batches of {_BATCH}, {options.rows} rows, {options.epochs} epochs\n")
    columns: tuple[str, ...] = ("task", "batches", "lengths added", "usual lengths, s a step")
    columns += ("shorter too, s a step", "x shorter", "compile, s", "saved in the run, s")
    print(table_head(*columns))
    for case in cases:
        print(table_row(*_cells(case, usual, steps, options.epochs)))


def _cells(
    case: Case, usual: tuple[int, ...], steps: dict[int, tuple[float, float]], epochs: int
) -> list[str]:
    """Returns the cells of a row; `steps` is from `time_steps`."""
    before, after = (
        float(np.mean([steps[n][0] for n in smallest_fit(case.longest, lengths).tolist()]))
        for lengths in (usual, case.lengths)
    )
    added = [length for length in case.lengths if length not in usual]
    return [
        case.task,
        "similar lengths" if case.grouped else "random",
        ", ".join(map(str, added)) or "none",
        f"{before:.3f}",
        f"{after:.3f}",
        f"{before / after:.2f}",
        f"{sum(steps[length][1] for length in added):.0f}",
        f"{(before - after) * len(case.longest) * epochs:.0f}",
    ]


if __name__ == "__main__":
    sys.exit(run_command(main))
