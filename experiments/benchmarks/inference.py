r"""Times inference per text, from the string to the prediction: with early exits, and without.

    pip install -e ".[onnx]"               # with ".[torch]" also torch, and the graph it exports
    python -m experiments.benchmarks.inference --model=runs/sst2/model --model=runs/mrpc/model \
        --data_dir=DIR                     # with <task>/validation.parquet, as for training
    python -m experiments.benchmarks.inference --model=… --data_dir=DIR --shape=mpnet-base --rows=64
    python -m experiments.benchmarks.inference --model=… --data_dir=DIR --batch=1 \
        --engine=onnxruntime
    python -m experiments.benchmarks.inference --model=… --data_dir=DIR --stream=100000   # memory

Classifies the first validation texts, in their order; every side tokenizes them in the same way.
Sides: the engines jax, onnxruntime and onnxruntime/int8, each with its full model and with the
thresholds whose mean cost on these texts is nearest to 0.25, 0.5 and 0.75 (according to that
engine's own outputs); and the full models of `plain_inference`, which compute all layers for every
text. --shape=own is the saved model; another shape is a random encoder with the saved model's
tokenizer and texts.

All sides classify a batch before the next batch is taken, in an order that is reversed every time.
For each batch, the least time of all rounds counts, because other programs disturb all sides alike
and rarely every round. "counted" is the mean cost in layers, "by tokens" the same mean weighted by
the tokens of each text (a text that continues may be longer than one that exits), and "clock" the
share of the time of the same engine's full model. In the rows "shared", the texts share batches
(throughput mode). The last lines say which goals are met.

All cores that the process may use are used. With `taskset -c 0` before the command it is one, and
processor time is measured. MiniLM with SST-2 and MRPC takes about 10 minutes on one core, and
mpnet-base with --rows=32 about 15.
"""

import argparse
import itertools
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from experiments.benchmarks.inference_sides import (
    COSTS,
    Side,
    make_adaptive_sides,
    make_plain_side,
)
from experiments.benchmarks.plain_inference import load_full_models
from experiments.benchmarks.random_models import write_random_model
from experiments.benchmarks.shapes import SHAPES
from experiments.benchmarks.tables import describe_machine, table_head, table_row
from experiments.benchmarks.timing import choose_clock
from experiments.benchmarks.validation_texts import read_validation_texts
from sweet_jax import AdaptiveClassifier
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.errors import UserError, check_choice
from sweet_jax.inference.artifact import ModelArtifact, open_model
from sweet_jax.inference.engine import load_engine
from sweet_jax.inference.engine_onnx import physical_cores

_BATCHES = (1, 8, 64)
_ENGINES = ("jax", "onnxruntime", "onnxruntime/int8")
# The full model that each engine is compared with in the goals.
_PLAIN = {"onnxruntime": "plain onnxruntime", "onnxruntime/int8": "plain onnxruntime/int8"}
_OWN = "own"  # value of --shape for the saved model itself


class Times(NamedTuple):
    """Holds milliseconds of one side: per text, and quantiles over batches and rounds."""

    per_text: float
    p50: float  # of a batch
    p95: float  # of a batch


class Case(NamedTuple):
    """Holds the measurements of one model, task and batch size."""

    name: str
    batch: int
    sides: list[Side]
    times: list[Times]


def measure(sides: Sequence[Side], texts: Sequence[Any], batch: int, rounds: int) -> list[Times]:
    """Times all sides in turn on the same batches, after a round that compiles."""
    # Only whole batches, except that fewer texts than one batch are one batch.
    starts = range(0, max(len(texts) - batch + 1, 1), batch)
    batches = [list(texts[start : start + batch]) for start in starts]
    whole = [text for part in batches for text in part]
    clock = choose_clock()
    times = np.full((rounds, len(sides), len(batches)), np.inf)
    for count, index in itertools.product(range(-1, rounds), range(len(batches))):
        order = range(len(sides)) if (count + index) % 2 else range(len(sides))[::-1]
        for number in order:
            side = sides[number]
            if side.is_shared and index:
                continue
            start = clock()
            side.classify(whole if side.is_shared else batches[index])
            if count >= 0:
                times[count, number, index] = 1e3 * (clock() - start)
    results = []
    for number, side in enumerate(sides):
        own = times[:, number, :1] if side.is_shared else times[:, number]  # [rounds, batches]
        size = len(whole) if side.is_shared else len(batches[0])
        quantiles = np.quantile(own, [0.5, 0.95]).tolist()
        results.append(Times(float(own.min(axis=0).mean()) / size, *quantiles))
    return results


def print_rows(label: str, sides: Sequence[Side], times: Sequence[Times]) -> None:
    """Prints the rows of one case; label: its first cells."""
    full = {s.engine: t.per_text for s, t in zip(sides, times, strict=True) if s.cost is None}
    for side, own in zip(sides, times, strict=True):
        clock = own.per_text / full[side.engine.removesuffix(", shared")]
        cost = "full" if side.cost is None else f"{side.cost:.2f}"
        numbers = [f"{value:.2f}" for value in own]
        numbers += [f"{share:.3f}" for share in (side.counted, side.by_tokens, clock)]
        print(table_row(label, side.engine, cost, *numbers), flush=True)


def check_goals(case: Case) -> None:
    """Prints whether each goal is met: for the clock and the cost, and against full models."""
    sides = list(zip(case.sides, case.times, strict=True))
    times = {(side.engine, side.cost): own.per_text for side, own in sides}
    counted = {(side.engine, side.cost): side.counted for side in case.sides}

    def check(label: str, value: float, goal: float, *, at_most: bool) -> None:
        met = value <= goal if at_most else value >= goal
        bound = "at most" if at_most else "at least"
        verdict = "met" if met else "MISSED"
        print(f"{verdict}: {case.name}: {label}: {value:.2f}, {bound} {goal:.2f}")

    for engine, plain in _PLAIN.items():
        if (engine, None) not in times:
            continue
        for cost in COSTS:
            share, goal = times[engine, cost] / times[engine, None], counted[engine, cost] + 0.05
            check(f"{engine} at {cost}, share of the time", share, goal, at_most=True)
        ratio = times[engine, None] / times[plain, None]
        check(f"{engine} full, time as a multiple of {plain}", ratio, 1.05, at_most=True)
        if case.batch != 8:
            faster, goal = times[plain, None] / times[engine, 0.5], 1.8 if case.batch == 1 else 1.7
            check(f"{engine} at 0.5, times as fast as {plain}", faster, goal, at_most=False)
        if case.batch == 1 and engine.endswith("int8"):
            faster = times[_PLAIN["onnxruntime"], None] / times[engine, 0.5]
            check(f"{engine} at 0.5, times as fast as plain float32", faster, 3.5, at_most=False)


def print_memory(
    classifier: AdaptiveClassifier, texts: Sequence[Any], rows: int, batch: int
) -> None:
    """Prints the peak memory of this process ten times while `rows` rows are streamed."""
    classifier.predict(texts, batch)
    repeated = itertools.islice(itertools.cycle(texts), rows)
    start = time.perf_counter()
    for number, _ in enumerate(classifier.stream(repeated, batch), start=1):
        if number % max(1, rows // 10) == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            speed = number / (time.perf_counter() - start)
            print(f"{number} rows: at most {peak:.0f} MiB, {speed:.0f} rows/s", flush=True)


def run_cases(
    model: ModelArtifact, texts: Sequence[Any], label: str, options: argparse.Namespace
) -> list[Case]:
    """Measures one model and its texts at every batch size, and prints the rows."""
    cases, engines = [], {}
    for name in options.engine or _ENGINES:
        engine, _, precision = name.partition("/")
        engines[name] = load_engine(engine, model, precision or "float32")
    with tempfile.TemporaryDirectory() as folder:
        plain = load_full_models(model, physical_cores(), Path(folder))
        for batch in options.batch or _BATCHES:
            sides = [make_plain_side(model, *each) for each in plain.items()]
            for name, engine in engines.items():
                sides += make_adaptive_sides(model, name, texts, engine, batch)
            times = measure(sides, texts, batch, options.rounds)
            print_rows(f"{label} | {batch}", sides, times)
            # Without `classify`, which refers to the engines and so would keep them in memory.
            sides = [side._replace(classify=len) for side in sides]
            cases.append(Case(f"{label.replace(' | ', ', ')}, batch {batch}", batch, sides, times))
    return cases


def main(argv: list[str] | None = None) -> None:
    """Prints the table, and then the goals; with --stream, the memory instead."""
    options = _make_parser().parse_args(argv)
    if options.data_dir is None:
        raise UserError("pass --data_dir, the folder of the texts, or set SWEET_GLUE_DIR")
    shapes = options.shape or [_OWN]
    for shape in shapes:
        check_choice("shape", shape, (_OWN, *SHAPES))
    models = [open_model(name) for name in options.model]
    chosen = [model for model in models if not options.task or model.task in options.task]
    inputs = [(m, read_validation_texts(m, options.data_dir, options.rows)[0]) for m in chosen]
    threads = f"{physical_cores()} threads, onnxruntime {onnxruntime.__version__}"
    print(f"{describe_machine('numpy')}; {threads}")
    if not options.stream:
        columns = ("model", "task", "batch", "side", "at", "ms per text", "p50", "p95")
        print(table_head(*columns, "counted", "by tokens", "clock"))
    cases = []
    for (model, texts), shape in itertools.product(inputs, shapes):
        with tempfile.TemporaryDirectory() as folder:
            if shape != _OWN:
                model = write_random_model(Path(folder) / "model", SHAPES[shape], model)
            if options.stream:
                half = AdaptiveClassifier(model, target={"cost": 0.5})
                print_memory(half, texts, options.stream, 32)
            else:
                cases += run_cases(model, texts, f"{shape} | {model.task}", options)
    print()
    for case in cases:
        check_goals(case)


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser("experiments.benchmarks.inference", __doc__ or "")
    text = "model/ folder of a run; repeatable"
    parser.add_argument("--model", action="append", required=True, help=text)
    text = "folder with <task>/validation.parquet (default: the variable SWEET_GLUE_DIR)"
    parser.add_argument("--data_dir", default=os.environ.get("SWEET_GLUE_DIR"), help=text)
    text = f"{_OWN} (default), the saved model, or a random one: {', '.join(SHAPES)}; repeatable"
    parser.add_argument("--shape", action="append", help=text)
    text = "only the models of this task; repeatable (default all)"
    parser.add_argument("--task", action="append", help=text)
    text = "repeatable (default all)"
    parser.add_argument("--engine", action="append", choices=_ENGINES, help=text)
    text = "batch size; repeatable (default 1, 8, 64)"
    parser.add_argument("--batch", type=int, action="append", help=text)
    parser.add_argument("--rows", type=int, default=128, help="maximum of texts (default 128)")
    parser.add_argument("--rounds", type=int, default=4, help="timed rounds (default 4)")
    text = "print the memory while this many rows are streamed at cost 0.5, instead of times"
    parser.add_argument("--stream", type=int, help=text)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
