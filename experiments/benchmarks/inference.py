"""Milliseconds per text, from string to answer: adaptive in each engine, and plain full models.

    pip install -e ".[onnx]"               # and ".[torch]": compares with torch and its graph
    python -m experiments.benchmarks.inference --model=runs/sst2/model --model=runs/mrpc/model \
        --data_dir=DIR                     # <task>/validation.parquet, as for training
    python -m experiments.benchmarks.inference … --shape=mpnet-base --rows=64
    python -m experiments.benchmarks.inference … --batch=1 --task=sst2 --engine=onnxruntime
    python -m experiments.benchmarks.inference … --stream=100000   # instead: memory of a stream

Real validation texts in their order, tokenized here by every side alike. "own" is the saved model,
another shape a random encoder of that shape with the tokenizer and the texts of the saved model.
Sides: the engines jax, onnxruntime and onnxruntime/int8, each with its full model and at the
thresholds whose mean counted cost over these texts is nearest to 0.25, 0.5 and 0.75 (found from
that engine's own outputs); and what `plain_inference.py` has, which computes every layer of every
text.

Every side answers the same batch before the next batch is taken, in an order that is turned round
each time, and of a batch the least time of all rounds counts: what else runs on the machine
disturbs all alike, and seldom every round. "counted" is the mean cost in layers, "by tokens" that
mean weighted by the tokens of each text (a text that continues may be longer than one that exits),
"clock" the share of the time of the same engine's full model. In rows "shared" the texts share
batches (throughput mode). The aims are read off the table at the end. All cores that the process
may use compute; with `taskset -c 0` before the command one does, and times are those of the
processor. On one core MiniLM with SST-2 and MRPC takes about 10 minutes, mpnet-base with --rows=32
about 15.
"""

import argparse
import dataclasses
import itertools
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import onnxruntime
import pyarrow.parquet
from flax import nnx

from experiments.benchmarks.plain_inference import Answer, plain_answers
from experiments.benchmarks.shapes import SHAPES, head_line, parser, row, table_head
from sweet_jax import AdaptiveClassifier, ExitOutputs
from sweet_jax.data.batches import encode
from sweet_jax.exits.operating_point import make_resolver
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.exits.simulation import exact_curve
from sweet_jax.inference.all_exits import compute_all_exits
from sweet_jax.inference.artifact import ModelArtifact, TrainedModel, open_model, save_model
from sweet_jax.inference.engine import Engine, load_engine
from sweet_jax.inference.engine_onnx import physical_cores
from sweet_jax.models.checkpoint_folder import load_tokenizer, locate_checkpoint

BATCHES, COSTS = (1, 8, 64), (0.25, 0.5, 0.75)
ENGINES = ("jax", "onnxruntime", "onnxruntime/int8")
PLAIN = {"onnxruntime": "plain onnxruntime", "onnxruntime/int8": "plain onnxruntime/int8"}


class Side(NamedTuple):
    """Describes one way to answer a batch of texts."""

    engine: str
    cost: float | None  # the operating point; None = the full model
    counted: float  # mean cost in layers
    by_tokens: float  # the same, weighted by the tokens of each text
    answer: Callable[[list[Any]], object]


class Measured(NamedTuple):
    """Holds milliseconds of one side: per text, and the quantiles of those of a batch."""

    mean: float
    p50: float
    p95: float


def random_model(like: ModelArtifact, shape: str, folder: Path) -> ModelArtifact:
    """Writes a saved model of another shape, random, with the tokenizer and classes of one."""
    config, exits = SHAPES[shape]
    family = SHAPES[shape].family
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(SHAPES[shape].model())[1]))
    rng, layers = np.random.default_rng(0), np.asarray(exits)
    rows = ExitOutputs(rng.normal(size=(len(exits), 50, 2)), rng.integers(0, 2, 50), layers)
    about = {"version": 5, "task": like.task, "classes": ["a", "b"], "pooling": "first"}
    about |= {"text_columns": list(like.text_columns), "max_length": like.max_length}
    about |= {"layers": list(exits), "cost": rows.cost.tolist(), "policy": "confidence"}
    about |= {"median_tokens": 24, "dials": make_resolver(rows, ("confidence",)).as_dict()}
    checkpoint: Any = SimpleNamespace(family=family, values=dataclasses.asdict(config))
    tokenizer = load_tokenizer(locate_checkpoint(str(like.folder)))
    save_model(folder, checkpoint, tokenizer, [TrainedModel(exits, params)], about, "")
    return open_model(folder)


def adaptive_sides(
    model: ModelArtifact, name: str, texts: Sequence[Any], engine: Engine, batch: int
) -> list[Side]:
    """Returns an engine's sides: the full model, and the thresholds nearest to COSTS.

    What the texts' own outputs say of how many exit where plans the stages, as after training.
    """
    logits, _ = compute_all_exits(model, engine, texts)  # [E, N, C]
    outputs = ExitOutputs(logits, logits[-1].argmax(-1), np.asarray(model.layers), model.cost)
    model = dataclasses.replace(
        model, policy="confidence", resolver=make_resolver(outputs, ("confidence",))
    )
    every = AdaptiveClassifier(model, target={"threshold": math.inf}, engine=engine)
    confidences = exit_confidences(outputs, "confidence", [every.calibrator])
    curve = exact_curve(outputs, confidences)

    rows = [text if isinstance(text, tuple) else (text,) for text in texts]
    tokens = [len(ids) for ids in encode(model.tokenizer, rows, model.max_length)[0]]

    def side(cost: float | None, threshold: float) -> Side:
        classifier = every.at(threshold=threshold)
        found = classifier.predict(texts, batch, "latency").cost  # [N]
        counted, by_tokens = float(found.mean()), float(np.average(found, weights=tokens))
        return Side(
            name, cost, counted, by_tokens, lambda part: classifier.predict(part, batch, "latency")
        )

    places = [int(np.abs(curve.cost[0] - cost).argmin()) for cost in COSTS]
    thresholds = [float(curve.threshold[0, place]) for place in places]
    points = [side(cost, each) for cost, each in zip(COSTS, thresholds, strict=True)]
    shared = every.at(threshold=thresholds[1])
    if batch > 1:  # all texts at once, see `measure`
        points.append(
            points[1]._replace(
                engine=f"{name}, shared", answer=lambda texts: shared.predict(texts, batch)
            )
        )
    return [side(None, math.inf), *points]


def plain_side(model: ModelArtifact, name: str, answer: Answer) -> Side:
    """Returns the side of a full model."""

    def run(part: list[Any]) -> object:
        rows = [text if isinstance(text, tuple) else (text,) for text in part]
        ids, types = encode(model.tokenizer, rows, model.max_length)
        sizes = [len(each) for each in ids]
        texts = np.full((2, len(ids), max(sizes)), model.tokenizer.pad_token_id, np.int32)
        texts[1] = 0
        for place, (own, kind) in enumerate(zip(ids, types, strict=True)):
            texts[:, place, : len(own)] = own, kind
        mask = np.arange(max(sizes)) < np.asarray(sizes)[:, None]  # [B, L]
        return answer(texts, mask.astype(np.int64))

    return Side(name, None, 1.0, 1.0, run)


def measure(sides: Sequence[Side], texts: Sequence[Any], batch: int, rounds: int) -> list[Measured]:
    """Times all sides in turn over the same batches; not the first round, which compiles."""
    last = max(len(texts) - batch + 1, 1)  # only whole batches, but for one that is all there is
    parts = [list(texts[i : i + batch]) for i in range(0, last, batch)]
    whole = [text for part in parts for text in part]
    shared = [side.engine.endswith("shared") for side in sides]
    # On one core the time of the processor, which other programs disturb less.
    clock = time.process_time if len(os.sched_getaffinity(0)) == 1 else time.perf_counter
    times = np.full((rounds, len(sides), len(parts)), np.inf)
    for count, place in itertools.product(range(-1, rounds), range(len(parts))):
        order = range(len(sides)) if (count + place) % 2 else range(len(sides))[::-1]
        for number in order:
            if shared[number] and place:
                continue
            began = clock()
            sides[number].answer(whole if shared[number] else parts[place])
            if count >= 0:
                times[count, number, place] = 1e3 * (clock() - began)
    found = []
    for number in range(len(sides)):
        each = times[:, number, :1] if shared[number] else times[:, number]  # [rounds, batches]
        size = len(whole) if shared[number] else len(parts[0])
        quantiles = np.quantile(each, [0.5, 0.95]).tolist()
        found.append(Measured(float(each.min(axis=0).mean()) / size, *quantiles))
    return found


def print_rows(head: str, sides: Sequence[Side], found: Sequence[Measured]) -> None:
    """Prints the table of one case."""
    full = {side.engine: m.mean for side, m in zip(sides, found, strict=True) if side.cost is None}
    for side, m in zip(sides, found, strict=True):
        clock = m.mean / full[side.engine.removesuffix(", shared")]
        name = "full" if side.cost is None else f"{side.cost:.2f}"
        numbers = [f"{value:.2f}" for value in m]
        numbers += [f"{share:.3f}" for share in (side.counted, side.by_tokens, clock)]
        print(row(head, side.engine, name, *numbers), flush=True)


def check_aims(head: str, batch: int, sides: Sequence[Side], found: Sequence[Measured]) -> None:
    """Prints whether each aim holds in one case: clock and counted cost, and plain full models."""
    times = {(side.engine, side.cost): m.mean for side, m in zip(sides, found, strict=True)}
    counted = {(side.engine, side.cost): side.counted for side in sides}

    def say(what: str, value: float, aim: float, *, most: bool) -> None:
        holds = value <= aim if most else value >= aim
        print(f"{'holds' if holds else 'FAILS'}: {head}: {what} {value:.2f}, aim {aim:.2f}")

    for engine, plain in PLAIN.items():
        if (engine, None) not in times:
            continue
        for cost in COSTS:
            clock = times[engine, cost] / times[engine, None]
            say(
                f"{engine} at {cost}, clock at most",
                clock,
                counted[engine, cost] + 0.05,
                most=True,
            )
        say(f"{engine} full to {plain}", times[engine, None] / times[plain, None], 1.05, most=True)
        if batch != 8:
            faster = times[plain, None] / times[engine, 0.5]
            say(f"{engine} at 0.5, times {plain}", faster, 1.8 if batch == 1 else 1.7, most=False)
        if batch == 1 and engine.endswith("int8"):
            faster = times[PLAIN["onnxruntime"], None] / times[engine, 0.5]
            say(f"{engine} at 0.5, times plain float32", faster, 3.5, most=False)


def stream(every: AdaptiveClassifier, texts: Sequence[Any], rows: int, batch: int) -> None:
    """Prints this process's memory while `rows` rows come from an iterator."""
    every.predict(texts, batch)
    endless = itertools.islice(itertools.cycle(texts), rows)
    began = time.perf_counter()
    for number, _ in enumerate(every.stream(endless, batch), start=1):
        if number % (rows // 10) == 0:
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            speed = number / (time.perf_counter() - began)
            print(f"{number} rows: at most {used:.0f} MiB, {speed:.0f} rows/s", flush=True)


def run_case(model: ModelArtifact, texts: Sequence[Any], name: str, options: Any) -> list[str]:
    """Measures one model and its texts at every batch size; returns the calls of the aims."""
    aims: list[Any] = []
    engines = {}
    for each in options.engine or ENGINES:
        engine, _, dtype = each.partition("/")
        engines[each] = load_engine(engine, model, dtype or "float32")
    with tempfile.TemporaryDirectory() as folder:
        plain = plain_answers(model, physical_cores(), Path(folder))
        for batch in options.batch or BATCHES:
            sides = [plain_side(model, *each) for each in plain.items()]
            for each, engine in engines.items():
                sides += adaptive_sides(model, each, texts, engine, batch)
            found = measure(sides, texts, batch, options.rounds)
            print_rows(f"{name} | {batch}", sides, found)
            # Without what answers, which holds the engines of this model.
            kept = [side._replace(answer=len) for side in sides]
            aims.append((f"{name.replace(' | ', ', ')}, batch {batch}", batch, kept, found))
    return aims


def main() -> None:
    line = parser(__doc__)
    line.add_argument("--model", action="append", required=True, help="model/ of a run; repeats")
    line.add_argument("--data_dir", default=os.environ.get("SWEET_GLUE_DIR"), help="of the texts")
    line.add_argument("--shape", action="append", help='"own" (default), or of shapes.py; repeats')
    line.add_argument("--task", action="append", help="of the models, these alone; repeats")
    line.add_argument("--engine", action="append", choices=ENGINES, help="default all; repeats")
    line.add_argument("--batch", type=int, action="append", help="default 1, 8, 64; repeats")
    line.add_argument("--rows", type=int, default=128, help="texts at most")
    line.add_argument("--rounds", type=int, default=4)
    line.add_argument("--stream", type=int, help="instead: memory over so many rows, at cost 0.5")
    options = line.parse_args()
    if options.data_dir is None:
        line.error("give --data_dir, or set SWEET_GLUE_DIR")
    measure_all(options)


def measure_all(options: argparse.Namespace) -> None:
    """Runs the cases that the options name."""
    threads = f"{physical_cores()} threads, onnxruntime {onnxruntime.__version__}"
    print(f"{head_line('numpy')}; {threads}")
    heads = ("model", "task", "batch", "side", "at", "ms per text", "p50", "p95")
    print(table_head(*heads, "counted", "by tokens", "clock"))
    aims = []
    for name, shape in itertools.product(options.model, options.shape or ("own",)):
        model = open_model(name)
        if options.task and model.task not in options.task:
            continue
        table = pyarrow.parquet.read_table(
            Path(options.data_dir) / model.task / "validation.parquet"
        )
        columns = [table[column].to_pylist()[: options.rows] for column in model.text_columns]
        texts = list(zip(*columns, strict=True)) if len(columns) > 1 else columns[0]
        with tempfile.TemporaryDirectory() as folder:
            if shape != "own":
                model = random_model(model, shape, Path(folder) / "model")
            if options.stream:
                stream(AdaptiveClassifier(model, target={"cost": 0.5}), texts, options.stream, 32)
            else:
                aims += run_case(model, texts, f"{shape} | {model.task}", options)
    print()
    for aim in aims:
        check_aims(*aim)


if __name__ == "__main__":
    main()
