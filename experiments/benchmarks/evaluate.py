"""Compares one pass and exact curves with running the model again for every threshold.

    python -m experiments.benchmarks.evaluate                        # random MiniLM: 2 cores, 5 min
    python -m experiments.benchmarks.evaluate --model=runs/sst2/model --data_dir=DIR

All sides run this project's compiled model on the same rows (SST-2's validation rows, or 872 random
ones of similar lengths), so that only the algorithm differs:

- one pass that computes the outputs of every exit for every row, in batches of 32 sorted by length,
  and then the exact curve over all distinct thresholds (`evaluate`, `simulate`);
- a pass for each of 11 thresholds, with the same batches;
- the release's way: batches of 1, padded to 256 tokens; for each of 11 thresholds, the model runs
  again, segment by segment, and stops at the first confident exit. It is measured on --slow_rows
  rows and scaled up to all, and must leave at the exits that follow from the outputs of the pass.

The thresholds are spaced evenly over (1/C, 1) with --model, as in the paper. With random weights,
which are never confident, they are spaced evenly among the distinct ones, so that rows leave at all
exits. Expected: the release's way takes 50 times as long.

Shape letters: E exit, B batch, N rows, L length, H hidden, C classes, T thresholds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from experiments.benchmarks.shapes import SHAPES
from experiments.benchmarks.simulate import evaluate_threshold
from experiments.benchmarks.tables import describe_machine, table_head, table_row
from experiments.benchmarks.validation_texts import as_tuples, read_validation_texts
from sweet_jax.arguments import ArgumentParser, run_command
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

_LENGTH, _THRESHOLDS = 256, 11
# Confidences that are closer to a threshold may fall on either side of it, since padding differs.
_TOLERANCE = 1e-4


class Workload(NamedTuple):
    """Holds a model, and the rows that it is run on."""

    graphdef: nnx.GraphDef
    params: Any
    exits: tuple[int, ...]
    tokens: Tokens


def random_workload(shape: str, rows: int) -> Workload:
    """Returns random weights, and random rows as long as SST-2's: 4 to 56 tokens, 25 on average."""
    chosen, rng = SHAPES[shape], np.random.default_rng(0)
    lengths = np.clip(rng.normal(25, 11, rows).round().astype(int), 4, 56)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(1, chosen.config.vocab_size, starts[-1], dtype=np.int32)
    labels = rng.integers(0, 2, rows, dtype=np.int32)
    graphdef, values = nnx.split(chosen.model())
    tokens = Tokens(ids, np.zeros_like(ids), starts, labels, pad_id=0)
    return Workload(graphdef, nnx.to_pure_dict(values), chosen.exits, tokens)


def saved_workload(name: str, data_dir: str, rows: int) -> Workload:
    """Returns the deepest network of a saved model, and the first validation rows of its task."""
    model = open_model(name)
    texts, labels = read_validation_texts(model, data_dir, rows)
    ids, types = encode(model.tokenizer, as_tuples(texts), _LENGTH)
    starts = np.concatenate([[0], np.cumsum([len(i) for i in ids])])
    pad_id = model.tokenizer.pad_token_id
    tokens = Tokens(
        np.concatenate(ids), np.concatenate(types), starts, np.asarray(labels, np.int32), pad_id
    )
    network = load_networks(model)[-1]
    return Workload(network.graphdef, network.params, network.exits, tokens)


def compile_pass(work: Workload) -> Callable[[], ExitOutputs]:
    """Returns a function that computes the outputs of every exit for every row."""
    config = Config(exits=work.exits, max_length=_LENGTH).resolved()
    mesh = make_mesh(1, config.evaluation_batch_size)
    program = compile_evaluation(config, work.graphdef, mesh)
    stacked = jax.tree.map(lambda x: np.asarray(x)[None], work.params)
    params = jax.device_put(stacked, replica_sharding(mesh))
    rows = np.arange(len(work.tokens))[None]

    def run() -> ExitOutputs:
        logits = evaluate(config, program, params, work.tokens, rows).logits  # on the host
        return ExitOutputs(np.asarray(logits), work.tokens.labels, np.asarray(work.exits))

    return run


def compile_stages(work: Workload) -> Callable[[Batch, float], int]:
    """Returns a function that runs one padded row up to the first confident exit, as the release.

    Its arguments are the row and a threshold; it returns the number of the exit.
    """
    on_device = jax.device_put(work.params)

    def stage(start: int, end: int) -> Callable:
        def run(params: Any, h: jax.Array | None, batch: Batch):
            model = nnx.merge(work.graphdef, params)
            h, output = model.forward_from(start, end, h, batch, whole=True)
            return h, jax.nn.softmax(output.logits).max()

        return jax.jit(run)

    starts = (1, *(e + 1 for e in work.exits[:-1]))
    stages = [stage(start, end) for start, end in zip(starts, work.exits, strict=True)]

    def find_exit(batch: Batch, threshold: float) -> int:
        h = None
        for number, run in enumerate(stages):
            h, confidence = run(on_device, h, batch)
            if float(confidence) >= threshold:
                return number
        return len(stages) - 1

    return find_exit


def time_release(
    work: Workload, confidences: np.ndarray, thresholds: np.ndarray, rows: int
) -> tuple[float, float]:
    """Returns the seconds of the release's way for all thresholds, and the mean share of layers.

    Args:
      work: model and rows.
      confidences: confidences from the one pass, float [E, N].
      thresholds: thresholds [T].
      rows: number of rows to run, spaced evenly among the N.

    Raises AssertionError if a row leaves at another exit than its confidences say.

    """
    find_exit = compile_stages(work)
    numbers = np.linspace(0, len(work.tokens) - 1, rows).astype(int)
    batches = [pad_rows(work.tokens, np.asarray([n]), (_LENGTH,)) for n in numbers]
    find_exit(batches[0], np.inf)  # compiles every stage
    start = time.perf_counter()
    exits = np.asarray([[find_exit(b, t) for b in batches] for t in thresholds])  # [T, rows]
    seconds = time.perf_counter() - start
    margins = confidences[None, :, numbers] - thresholds[:, None, None]  # [T, E, rows]
    leaves = margins >= 0
    leaves[:, -1] = True
    close = np.abs(margins).min(axis=1) < _TOLERANCE
    wrong = (exits != leaves.argmax(axis=1)) & ~close
    assert not wrong.any(), f"{wrong.sum()} rows left elsewhere than their confidences say"
    layers = np.asarray(work.exits)
    return seconds, float((layers[exits] / layers[-1]).mean())


def compare(work: Workload, options: argparse.Namespace) -> None:
    """Prints a row for each side."""
    run_pass, count = compile_pass(work), len(work.tokens)
    outputs = run_pass()  # compiles
    confidences = exit_confidences(outputs, "confidence")[0]
    distinct = simulate(outputs).threshold[0]
    thresholds = np.linspace(1 / outputs.logits.shape[-1], 1, _THRESHOLDS)
    if not options.model:
        thresholds = distinct[np.linspace(0, len(distinct) - 1, _THRESHOLDS).astype(int)]
    one_pass, exact, batched = [], [], []
    for _ in range(options.rounds):
        start = time.perf_counter()
        outputs = run_pass()
        one_pass.append(time.perf_counter() - start)
        simulate(outputs)
        exact.append(time.perf_counter() - start)
        start = time.perf_counter()
        for threshold in thresholds:
            outputs = run_pass()
            evaluate_threshold(outputs, exit_confidences(outputs, "confidence"), threshold)
        batched.append(time.perf_counter() - start)
    rows = min(options.slow_rows, count)
    seconds, share = time_release(work, confidences, thresholds, rows)
    note = f"measured on {rows} rows and scaled up to {count}; {share:.2f} of the layers run"
    ours, every = statistics.median(exact), len(distinct) * statistics.median(one_pass)
    sides = [
        ("one pass, exact curve", len(distinct), ours, 3, "measured"),
        ("a batched pass each", _THRESHOLDS, statistics.median(batched), 3, "measured"),
        ("a batched pass each", len(distinct), every, 1, f"one pass times {len(distinct)}"),
        ("the release's way", _THRESHOLDS, seconds * count / rows, 1, note),
    ]
    print(table_head("side", "thresholds", "seconds", "x one pass", "how"))
    for side, number, took, digits, how in sides:
        ratio = f"{took / ours:.{0 if took / ours >= 100 else 1}f}"
        print(table_row(side, number, f"{took:.{digits}f}", ratio, how))


def main(argv: list[str] | None = None) -> None:
    """Prints a table of all sides."""
    parser = ArgumentParser("experiments.benchmarks.evaluate", __doc__ or "")
    text = "shape of the random model (default minilm)"
    parser.add_argument("--shape", default="minilm", choices=SHAPES, help=text)
    parser.add_argument("--model", help="model/ folder of a run, instead of a random model")
    text = "with --model: folder with <task>/validation.parquet, such as GLUE's"
    parser.add_argument("--data_dir", help=text)
    parser.add_argument("--rows", type=int, default=872, help="maximum of rows (default 872)")
    text = "rows of the release's way (default 96)"
    parser.add_argument("--slow_rows", type=int, default=96, help=text)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default 3)")
    options = parser.parse_args(argv)
    if options.model and not options.data_dir:
        raise UserError("--model needs --data_dir=DIR, the folder with <task>/validation.parquet")
    work = (
        saved_workload(options.model, options.data_dir, options.rows)
        if options.model
        else random_workload(options.shape, options.rows)
    )
    print(describe_machine())
    print(f"{options.model or options.shape}, {len(work.tokens)} rows, exits {work.exits}\n")
    compare(work, options)


if __name__ == "__main__":
    sys.exit(run_command(main))
