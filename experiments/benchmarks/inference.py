"""Milliseconds per text: the full model and adaptive inference here, torch and ONNX Runtime.

    pip install -e ".[torch]" onnx onnxruntime onnxscript
    python -m experiments.benchmarks.inference --model=runs/sst2/model --model=runs/mrpc/model \
        --data_dir=DIR                        # <task>/validation.parquet, as for training
    python -m experiments.benchmarks.inference --model=runs/sst2/model --data_dir=DIR \
        --shape=bert-base --rows=64           # the same texts, a random encoder of that shape
    python -m experiments.benchmarks.inference --model=runs/sst2/model --data_dir=DIR \
        --stream=100000                       # instead: memory while so many rows come

Real validation texts in their order, from strings to probabilities, tokenisation included. Every
side runs the same batches in turn, several rounds, of which the median counts; torch (transformers,
SDPA attention) and ONNX Runtime run the full model, padded to the longest text of a batch.
Thresholds are set so that the mean counted cost over these rows is as near as can be to 0.25, 0.5,
0.75. p50 and p95 are of a batch's time; the clock's cost is the share of the full model's
milliseconds here. In the rows "pooled" the texts share batches (throughput mode). On 2 cores the
first line takes some 15 minutes, the second 10.
"""

import argparse
import dataclasses
import itertools
import math
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import onnxruntime
import pyarrow.parquet
import torch
import transformers
from flax import nnx

from experiments.benchmarks.shapes import SHAPES
from sweet_jax import AdaptiveClassifier, ExitOutputs
from sweet_jax.exits.calibration import Calibrator
from sweet_jax.exits.operating_point import ThresholdResolver, make_resolver
from sweet_jax.exits.pareto import ParetoFront
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.exits.simulation import simulate
from sweet_jax.inference.engine_jax import JaxEngine
from sweet_jax.inference.network import Network
from sweet_jax.models.bert import Bert
from sweet_jax.models.checkpoint_folder import load_tokenizer, locate_checkpoint
from sweet_jax.models.early_exit import EarlyExit

BATCHES, COSTS = (1, 8, 64), (0.25, 0.5, 0.75)
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Side(NamedTuple):
    """One way to answer a batch of texts."""

    name: str
    answer: Callable[[list[Any]], Any]
    counted: float  # mean cost in layers


class Measured(NamedTuple):
    """Of one side: milliseconds per text, and the median and 95th percentile of a batch's."""

    mean: float
    p50: float
    p95: float


def random_classifier(
    like: AdaptiveClassifier, shape: str, texts: Sequence[Any]
) -> AdaptiveClassifier:
    """Returns a saved model's tokenizer and classes with a random encoder of another shape.

    Its thresholds are fitted on the texts, with the predictions of the last exit as their labels.
    """
    config, exits = SHAPES[shape]
    key = jax.random.key(0)
    graphdef, values = nnx.split(EarlyExit(Bert(config, key), exits, len(like.classes), key))
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(values))
    front = ParetoFront(*np.zeros((3, 1)), np.eye(1, len(exits)), np.ones(1), np.eye(1, len(exits)))
    resolver = ThresholdResolver(
        Calibrator.unfitted(len(exits)), 0.0, {"confidence": front}, None, {}
    )
    model = dataclasses.replace(
        like.model,
        policy="confidence",
        layers=exits,
        cost=np.asarray(exits) / exits[-1],
        resolver=resolver,
    )
    engine = JaxEngine([Network(exits, graphdef, params)], model.tokenizer.pad_token_id)
    made = AdaptiveClassifier(model, target={"threshold": 2.0}, engine=engine)
    own = make_resolver(outputs_of(made, texts), ("confidence",))
    return AdaptiveClassifier(dataclasses.replace(model, resolver=own), engine=engine)


def outputs_of(classifier: AdaptiveClassifier, texts: Sequence[Any]) -> ExitOutputs:
    """Returns the outputs of every exit; the texts' labels are the last one's predictions."""
    every = classifier.at(threshold=2.0)  # none exits early
    scheduler = every.make_scheduler(32, None)
    requests = every.encode(texts)
    for request in requests:
        scheduler.admit(request)
    scheduler.drain()
    logits = np.stack([request.logits for request in requests], axis=1)  # [E, N, C]
    model = classifier.model
    return ExitOutputs(logits, logits[-1].argmax(-1), np.asarray(model.layers), model.cost)


def at_costs(every: AdaptiveClassifier, texts: Sequence[Any]) -> dict[float, AdaptiveClassifier]:
    """The model at the thresholds whose mean cost over these texts is nearest to each of COSTS."""
    outputs = outputs_of(every, texts)
    scores = exit_confidences(outputs, every.policy, [every.calibrator])
    curve = simulate(outputs, lambda *_: scores)
    nearest = {c: int(np.abs(curve.cost[0] - c).argmin()) for c in COSTS}
    return {c: every.at(threshold=float(curve.threshold[0, place])) for c, place in nearest.items()}


def sides_of(every: AdaptiveClassifier, texts: Sequence[Any], batch: int) -> list[Side]:
    """All sides for one batch size."""
    model, full = every.model, every.at(threshold=math.inf)

    def here(classifier: AdaptiveClassifier) -> Callable[[list[Any]], Any]:
        return lambda part: classifier.predict(part, batch, "latency")

    found = [Side("full, here", here(full), 1.0)]
    for cost, classifier in at_costs(every, texts).items():
        counted = float(classifier.predict(texts, batch).cost.mean())
        found.append(Side(f"adaptive at {cost}", here(classifier), counted))
    torch_model, session = others(every)

    tokenizer = load_tokenizer(locate_checkpoint(str(model.folder)))

    def encode(part: list[Any], kind: str) -> Any:
        columns = zip(*part, strict=True) if isinstance(part[0], tuple) else [part]
        return tokenizer(
            *map(list, columns),
            padding=True,
            truncation=True,
            max_length=model.max_length,
            return_tensors=kind,
        )

    def in_torch(part: list[Any]) -> np.ndarray:
        with torch.inference_mode():
            return torch_model(**encode(part, "pt")).logits.softmax(-1).numpy()

    def in_onnx(part: list[Any]) -> np.ndarray:
        encoded = encode(part, "np")
        return session.run(None, {name: encoded[name] for name in INPUTS})[0]

    return [*found, Side("full, torch", in_torch, 1.0), Side("full, ONNX Runtime", in_onnx, 1.0)]


def others(classifier: AdaptiveClassifier) -> tuple[Any, onnxruntime.InferenceSession]:
    """The full model in torch, and the same exported to ONNX Runtime; weights do not matter."""
    settings = transformers.BertConfig(
        **_sizes(classifier), num_labels=len(classifier.classes), attn_implementation="sdpa"
    )
    network = transformers.BertForSequenceClassification(settings).eval()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, input_ids, attention_mask, token_type_ids):
            return self.network(input_ids, attention_mask, token_type_ids).logits

    rows = torch.ones(2, 8, dtype=torch.int64)
    dynamic = {0: torch.export.Dim("b"), 1: torch.export.Dim("l")}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        torch.onnx.export(
            Logits().eval(),
            (rows, rows, torch.zeros_like(rows)),
            path,
            input_names=INPUTS,
            output_names=["logits"],
            dynamic_shapes=[dynamic] * 3,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        return network, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def _sizes(classifier: AdaptiveClassifier) -> dict[str, Any]:
    assert isinstance(classifier.engine, JaxEngine)
    encoder = classifier.engine.networks[-1].params["encoder"]
    layer = encoder["layers"][0]
    hidden, inner = layer["intermediate"]["kernel"].shape
    return {
        "vocab_size": len(encoder["embeddings"]["word"]["embedding"]),
        "hidden_size": hidden,
        "num_hidden_layers": len(encoder["layers"]),
        "num_attention_heads": 12,  # of both shapes
        "intermediate_size": inner,
    }


def measure(sides: Sequence[Side], texts: Sequence[Any], batch: int, rounds: int) -> list[Measured]:
    """All sides in turn over the same batches, after a round that is not counted."""
    times: list[list[float]] = [[] for _ in sides]
    parts = [list(texts[i : i + batch]) for i in range(0, len(texts) - batch + 1, batch)]
    for count in range(rounds + 1):
        for side, seconds in zip(sides, times, strict=True):
            for part in parts:
                began = time.perf_counter()
                side.answer(part)
                if count:
                    seconds.append(1e3 * (time.perf_counter() - began))
    measured = []
    for t in times:
        # Of each part the median of the rounds: a neighbour on the machine disturbs one of them.
        mean = float(np.median(np.reshape(t, (rounds, -1)), axis=0).mean()) / batch
        measured.append(Measured(mean, *np.quantile(t, [0.5, 0.95]).tolist()))
    return measured


def pooled(every: AdaptiveClassifier, texts: Sequence[Any], batch: int, rounds: int) -> list[float]:
    """Milliseconds per text at cost 0.5 in latency and in throughput mode, taking turns."""
    classifier = at_costs(every, texts)[0.5]
    times: dict[str, list[float]] = {"latency": [], "throughput": []}
    for count in range(rounds + 1):
        for mode, seconds in times.items():
            began = time.perf_counter()
            classifier.predict(texts, batch, mode)
            if count:
                seconds.append(1e3 * (time.perf_counter() - began) / len(texts))
    return [float(np.median(seconds)) for seconds in times.values()]


def stream(every: AdaptiveClassifier, texts: Sequence[Any], rows: int, batch: int) -> None:
    """Prints this process's memory while `rows` rows come from an iterator, at cost 0.5."""
    classifier = at_costs(every, texts)[0.5]
    classifier.predict(texts, batch)
    endless = itertools.islice(itertools.cycle(texts), rows)
    began = time.perf_counter()
    for number, _ in enumerate(classifier.stream(endless, batch), start=1):
        if number % (rows // 10) == 0:
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            speed = number / (time.perf_counter() - began)
            print(f"{number} rows: at most {used:.0f} MiB, {speed:.0f} rows/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True, help="model/ of a run; repeats")
    parser.add_argument("--data_dir", required=True, help="<task>/validation.parquet")
    parser.add_argument(
        "--shape", choices=("tiny", "minilm", "bert-base"), help="instead of the model's own"
    )
    parser.add_argument("--rows", type=int, default=256, help="texts at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stream", type=int, help="instead: memory over so many rows")
    parser.add_argument("--batch", type=int, action="append", help="default 1, 8, 64")
    options = parser.parse_args()
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads; jax {jax.__version__}, torch "
        f"{torch.__version__}, onnxruntime {onnxruntime.__version__}, Python "
        f"{platform.python_version()}"
    )
    print("| model | task | batch | side | ms per text | p50 | p95 | counted | clock |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in options.model:
        every = AdaptiveClassifier.from_pretrained(name)
        model, task = every.model, every.model.task
        table = pyarrow.parquet.read_table(Path(options.data_dir) / task / "validation.parquet")
        columns = [table[column].to_pylist()[: options.rows] for column in model.text_columns]
        texts = list(zip(*columns, strict=True)) if len(columns) > 1 else columns[0]
        if options.shape:
            every = random_classifier(every, options.shape, texts)
        if options.stream:
            stream(every, texts, options.stream, 32)
            continue
        shape = options.shape or "minilm"
        for batch in options.batch or BATCHES:
            sides = sides_of(every, texts, batch)
            found = measure(sides, texts, batch, options.rounds)
            for side, m in zip(sides, found, strict=True):
                clock = m.mean / found[0].mean
                print(
                    f"| {shape} | {task} | {batch} | {side.name} | {m.mean:.2f} | {m.p50:.2f} | "
                    f"{m.p95:.2f} | {side.counted:.3f} | {clock:.3f} |",
                    flush=True,
                )
            if batch > 1:
                each, together = pooled(every, texts, batch, options.rounds)
                print(
                    f"| {shape} | {task} | {batch} | pooled at 0.5 | {together:.2f} | | | 0.5 | "
                    f"{together / found[0].mean:.3f}; {each / together:.2f} x latency mode |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
