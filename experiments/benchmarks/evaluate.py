"""One pass and exact curves against a pass of the model for every threshold.

    python -m experiments.benchmarks.evaluate                        # random MiniLM: 2 cores, 5 min
    python -m experiments.benchmarks.evaluate --model=runs/sst2/model --data_dir=DIR

All sides run this project's model, compiled, on the same rows (SST-2's validation rows, or 872
random ones of such lengths), so that the algorithm alone differs:

- one pass: what every exit says of every row, batches of 32 sorted by length, then the exact curve
  over every distinct threshold (`evaluate`, `simulate`);
- a pass for each of 11 thresholds, the same batches;
- the release's way: batch 1, padded to 256, the model run again for each of 11 thresholds, segment
  by segment, and stopped at the first exit that is sure. Measured on --slow_rows rows and scaled up
  to all; the exits taken must be those that the exact curve counts.

Thresholds: with --model evenly over (1/C, 1), the paper's; with random weights, which are never
sure, evenly among the distinct ones, so that rows leave replicated. Expected: 50 times the release.

Shape letters: E exit, B batch, N rows, L length, H hidden, C classes, T thresholds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow.parquet
from flax import nnx

from experiments.benchmarks.shapes import SHAPES, head_line, parser, row, table_head
from experiments.benchmarks.simulate import plain
from sweet_jax.config import Config
from sweet_jax.data.batches import Tokens, encode
from sweet_jax.data.padding import Batch, pad_rows
from sweet_jax.errors import UserError
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.exits.simulation import simulate
from sweet_jax.inference.artifact import open_model
from sweet_jax.inference.network import load_networks
from sweet_jax.training.evaluation import compile_evaluation, evaluate
from sweet_jax.training.sharding import make_mesh, replica_sharding

LENGTH, THRESHOLDS = 256, 11
_CLOSE = 1e-4  # of a score to a threshold: padded otherwise, it may fall on the other side


class Work(NamedTuple):
    """A model and the rows that it is run on."""

    graphdef: nnx.GraphDef
    params: Any
    exits: tuple[int, ...]
    tokens: Tokens


def random_work(shape: str, rows: int) -> Work:
    """Random weights and rows, as long as SST-2's: 4 to 56 tokens, 25 in the mean."""
    chosen, rng = SHAPES[shape], np.random.default_rng(0)
    lengths = np.clip(rng.normal(25, 11, rows).round().astype(int), 4, 56)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(1, chosen.config.vocab_size, starts[-1], dtype=np.int32)
    labels = rng.integers(0, 2, rows, dtype=np.int32)
    graphdef, values = nnx.split(chosen.model())
    tokens = Tokens(ids, np.zeros_like(ids), starts, labels, pad_id=0)
    return Work(graphdef, nnx.to_pure_dict(values), chosen.exits, tokens)


def saved_work(name: str, data_dir: str, rows: int) -> Work:
    """A saved model (of one network) and the first validation rows of its task."""
    model = open_model(name)
    path = Path(data_dir) / model.task / "validation.parquet"
    table = pyarrow.parquet.read_table(path)
    texts = list(zip(*(table[c].to_pylist()[:rows] for c in model.text_columns), strict=True))
    ids, kinds = encode(model.tokenizer, texts, LENGTH)
    starts = np.concatenate([[0], np.cumsum([len(i) for i in ids])])
    labels = np.asarray(table["label"].to_pylist()[:rows], np.int32)
    pad = model.tokenizer.pad_token_id
    tokens = Tokens(np.concatenate(ids), np.concatenate(kinds), starts, labels, pad)
    network = load_networks(model)[-1]
    return Work(network.graphdef, network.params, network.exits, tokens)


def one_pass(work: Work) -> Callable[[], ExitOutputs]:
    """A function that asks every exit about every row once."""
    config = Config(exits=work.exits, max_length=LENGTH).resolved()
    mesh = make_mesh(1, config.evaluation_batch_size)
    answer = compile_evaluation(config, work.graphdef, mesh)
    stacked = jax.tree.map(lambda x: np.asarray(x)[None], work.params)
    params = jax.device_put(stacked, replica_sharding(mesh))
    rows = np.arange(len(work.tokens))[None]

    def ask() -> ExitOutputs:
        logits = evaluate(config, answer, params, work.tokens, rows).logits
        return ExitOutputs(logits, work.tokens.labels, np.asarray(work.exits))

    return ask


def stopping(work: Work) -> Callable[[Batch, float], int]:
    """A function from one padded row and a threshold to the exit taken: the release's way."""
    on_device = jax.device_put(work.params)

    def stage(start: int, end: int) -> Callable:
        def run(params: Any, h: jax.Array | None, batch: Batch):
            model = nnx.merge(work.graphdef, params)
            h, answer = model.forward_from(start, end, h, batch, whole=True)
            return h, jax.nn.softmax(answer.logits).max()

        return jax.jit(run)

    starts = (1, *(e + 1 for e in work.exits[:-1]))
    stages = [stage(start, end) for start, end in zip(starts, work.exits, strict=True)]

    def answer(batch: Batch, threshold: float) -> int:
        h = None
        for number, run in enumerate(stages):
            h, confidence = run(on_device, h, batch)
            if float(confidence) >= threshold:
                return number
        return len(stages) - 1

    return answer


def seconds_stopping(
    work: Work, scores: np.ndarray, thresholds: np.ndarray, rows: int
) -> tuple[float, float]:
    """(seconds of a pass for each threshold over `rows` rows, mean share of layers they ran).

    Args:
      work: model and rows.
      scores: of the one pass, float [E, N]: which exits must be taken follows from them.
      thresholds: [T].
      rows: how many of N, evenly among them.

    """
    answer, picked = stopping(work), np.linspace(0, len(work.tokens) - 1, rows).astype(int)
    batches = [pad_rows(work.tokens, np.asarray([n]), (LENGTH,)) for n in picked]
    answer(batches[0], np.inf)  # compiles every stage
    began = time.perf_counter()
    taken = np.asarray([[answer(batch, t) for batch in batches] for t in thresholds])  # [T, rows]
    seconds = time.perf_counter() - began
    leaves = scores[:, picked] >= thresholds[:, None, None]  # [T, E, rows]
    leaves[:, -1] = True
    near = np.abs(scores[None, :, picked] - thresholds[:, None, None]).min(axis=1) < _CLOSE
    same = taken == leaves.argmax(axis=1)
    assert np.all(same | near), f"{(~same & ~near).sum()} rows left elsewhere than the curve says"
    layers = np.asarray(work.exits)
    return seconds, float((layers[taken] / layers[-1]).mean())


def compare(work: Work, options: argparse.Namespace) -> None:
    """Prints all sides."""
    ask, count = one_pass(work), len(work.tokens)
    outputs = ask()  # compiles
    scores, distinct = exit_confidences(outputs, "confidence")[0], simulate(outputs).threshold[0]
    thresholds = np.linspace(1 / outputs.logits.shape[-1], 1, THRESHOLDS)
    if not options.model:
        thresholds = distinct[np.linspace(0, len(distinct) - 1, THRESHOLDS).astype(int)]
    passes, exact, again = [], [], []
    for _ in range(options.rounds):
        began = time.perf_counter()
        outputs = ask()
        passes.append(time.perf_counter() - began)
        simulate(outputs)
        exact.append(time.perf_counter() - began)
        began = time.perf_counter()
        for threshold in thresholds:
            outputs = ask()
            plain(outputs, exit_confidences(outputs, "confidence"), threshold)
        again.append(time.perf_counter() - began)
    ours, fair = statistics.median(exact), statistics.median(again)
    rows = min(options.slow_rows, count)
    slow, share = seconds_stopping(work, scores, thresholds, rows)
    note = f"measured on {rows} rows and scaled up to {count}; {share:.2f} of the layers run"
    every = len(distinct) * statistics.median(passes)
    scaled = f"one pass times {len(distinct)}"
    print(table_head("side", "thresholds", "seconds", "x one pass", "how"))
    print(row("one pass, exact curve", len(distinct), f"{ours:.3f}", "1", "measured"))
    print(row("a batched pass each", THRESHOLDS, f"{fair:.3f}", f"{fair / ours:.1f}", "measured"))
    print(row("a batched pass each", len(distinct), f"{every:.1f}", f"{every / ours:.0f}", scaled))
    slow *= count / rows
    print(row("the release's way", THRESHOLDS, f"{slow:.1f}", f"{slow / ours:.0f}", note))


def main(argv: list[str] | None = None) -> None:
    """Prints a table of all sides."""
    options = parser(__doc__)
    options.add_argument("--shape", default="minilm", choices=SHAPES, help="of random weights")
    options.add_argument("--model", help="model/ of a run, instead")
    options.add_argument("--data_dir", help="with --model: <task>/validation.parquet")
    options.add_argument("--rows", type=int, default=872, help="at most")
    options.add_argument("--slow_rows", type=int, default=96, help="of the slow side")
    options.add_argument("--rounds", type=int, default=3)
    chosen = options.parse_args(argv)
    if chosen.model and not chosen.data_dir:
        options.error("--model needs --data_dir=DIR")
    try:
        work = (
            saved_work(chosen.model, chosen.data_dir, chosen.rows)
            if chosen.model
            else random_work(chosen.shape, chosen.rows)
        )
    except UserError as error:
        options.error(str(error))
    print(head_line())
    print(f"{chosen.model or chosen.shape}, {len(work.tokens)} rows, exits {work.exits}\n")
    compare(work, chosen)


if __name__ == "__main__":
    main()
