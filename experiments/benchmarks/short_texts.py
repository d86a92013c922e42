"""Times training on short texts: batches padded to the usual lengths, or to shorter ones too.

    python -m experiments.benchmarks.short_texts --data_dir=GLUE
    python -m experiments.benchmarks.short_texts --data_dir=GLUE --task=cola --shape=bert-base

The lengths of real training texts say how many batches of an epoch are padded to which length
(`sweet_jax.data.padding`), with batches of similar lengths, as in the recipe, and with random ones;
a random encoder of a shape, Early-Exit on the mean of all tokens, float32, is timed at each length,
all lengths taking turns. "shorter too" adds the lengths that are worth compiling for in a run of
--epochs epochs; "saved" is without what compiling them takes. Expected: for CoLA and SST-2 a step
takes 0.7 of the time, for MNLI as long as before. About a minute on one core.
"""

import time
from collections.abc import Sequence

import numpy as np
import pyarrow.parquet

from experiments.benchmarks.shapes import (
    SHAPES,
    Size,
    head_line,
    parser,
    row,
    table_head,
    training_steps,
)
from sweet_jax.data.batches import Tokens, steps_per_epoch, tokenize, training_batch_indices
from sweet_jax.data.padding import bucket_lengths, longest_row, smallest_fit, with_short
from sweet_jax.data.splits import Split
from sweet_jax.data.tasks import GLUE
from sweet_jax.models.checkpoint_folder import load_tokenizer
from sweet_jax.models.pretrained import open_checkpoint
from sweet_jax.recipe import OWN_DATA

BATCH = 16


def read_tokens(folder: str, task: str, rows: int, max_length: int) -> Tokens:
    """Returns the tokens of the first training rows of a GLUE task."""
    table = pyarrow.parquet.read_table(f"{folder}/{task}/train.parquet").slice(0, rows)
    columns = [table[name].to_pylist() for name in GLUE[task].text_columns]
    texts = list(zip(*columns, strict=True))
    tokenizer = load_tokenizer(open_checkpoint(OWN_DATA["checkpoint"]))
    return tokenize(tokenizer, Split(texts, np.zeros(len(texts), np.int32)), max_length)


def longest_rows(tokens: Tokens, *, grouped: bool) -> np.ndarray:
    """Returns the tokens of the longest row of each batch of an epoch, int [batches]."""
    rows, lengths = [np.arange(len(tokens))], tokens.lengths if grouped else None
    steps = range(steps_per_epoch(len(tokens), BATCH))
    drawn = (training_batch_indices(rows, [0], step, BATCH, lengths) for step in steps)
    return np.asarray([longest_row(tokens, each) for each in drawn])


def time_steps(shape: str, lengths: Sequence[int], rounds: int) -> dict[int, tuple[float, float]]:
    """Returns (seconds of a step, seconds to compile it) by length; the least of all rounds."""
    steps = {}
    for length in lengths:
        steps[length] = training_steps(
            SHAPES[shape], "early_exit", Size(BATCH, length), pooling="mean"
        )
        steps[length].take()
    least = dict.fromkeys(lengths, np.inf)
    for _ in range(rounds):
        for length in lengths:
            began = time.perf_counter()
            steps[length].take()
            least[length] = min(least[length], time.perf_counter() - began)
    return {length: (least[length], steps[length].compile_seconds) for length in lengths}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a row for each task and kind of batch."""
    asked = parser(__doc__)
    asked.add_argument("--data_dir", required=True, help="GLUE: <task>/train.parquet")
    asked.add_argument("--task", action="append", choices=GLUE, help="default: cola, sst2, mnli")
    asked.add_argument("--shape", default="minilm", choices=SHAPES)
    asked.add_argument("--rows", type=int, default=2000)
    asked.add_argument("--epochs", type=int, default=8)
    asked.add_argument("--max_length", type=int, default=64)
    asked.add_argument("--rounds", type=int, default=8)
    options = asked.parse_args(argv)
    usual = bucket_lengths(options.max_length)
    cases = []
    for task in options.task or ("cola", "sst2", "mnli"):
        tokens = read_tokens(options.data_dir, task, options.rows, options.max_length)
        for grouped in (True, False):
            longest = longest_rows(tokens, grouped=grouped)
            more = with_short(usual, longest, options.epochs * len(longest))
            cases.append((task, grouped, longest, more))
    used = {
        length
        for _, _, longest, more in cases
        for lengths in (usual, more)
        for length in smallest_fit(longest, lengths).tolist()
    }
    found = time_steps(options.shape, sorted(used), options.rounds)
    print(head_line())
    print(f"{options.shape}, batches of {BATCH}, {options.rows} rows, {options.epochs} epochs\n")
    columns = (
        "task",
        "batches",
        "lengths added",
        "usual lengths, s a step",
        "shorter too, s a step",
    )
    print(table_head(*columns, "x shorter", "compile, s", "saved in the run, s"))
    for task, grouped, longest, more in cases:
        before, after = (
            float(np.mean([found[length][0] for length in smallest_fit(longest, lengths).tolist()]))
            for lengths in (usual, more)
        )
        added = [length for length in more if length not in usual]
        print(
            row(
                *(task, "similar lengths" if grouped else "random"),
                ", ".join(map(str, added)) or "none",
                *(f"{before:.3f}", f"{after:.3f}", f"{before / after:.2f}"),
                f"{sum(found[length][1] for length in added):.0f}",
                f"{(before - after) * len(longest) * options.epochs:.0f}",
            )
        )


if __name__ == "__main__":
    main()
