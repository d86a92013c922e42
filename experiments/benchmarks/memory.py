"""Temporaries of a training step: SWEET against Early-Exit, as the compiler counts them.

    python -m experiments.benchmarks.memory

Batch 16 x 128, float32, gradient clipping and AdamW included. Nothing is run: both steps are
compiled, and the bytes they will allocate beside parameters and optimizer state are read off. About
2 minutes on 2 cores. Expected at the BERT-base shape: a ratio of at most 0.5.
"""

import argparse

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.benchmarks.shapes import RATE, SHAPES
from sweet_jax.config import Config
from sweet_jax.training.fit import step_settings
from sweet_jax.training.parallel import compile_step
from sweet_jax.training.sharding import make_mesh, state_shardings
from sweet_jax.training.step import init_state


def temporaries(shape: str, method: str, batch: int, length: int, *, remat: bool = False) -> int:
    """Bytes of temporaries of one compiled training step."""
    exits = SHAPES[shape].exits
    graphdef, values = nnx.split(nnx.eval_shape(lambda: SHAPES[shape].model(remat=remat)))
    state = jax.eval_shape(lambda params: init_state(params, RATE, 0), nnx.to_pure_dict(values))
    run = Config(method=method, exits=exits, batch_size=batch, remat=remat).resolved()
    settings = step_settings(run, graphdef, exits, 1000)
    step = compile_step(settings, 1, state_shardings(make_mesh(1, 1), state, 1))
    inputs = {
        "input_ids": jax.ShapeDtypeStruct((batch, length), jnp.int32),
        "token_type_ids": jax.ShapeDtypeStruct((batch, length), jnp.int32),
        "mask": jax.ShapeDtypeStruct((batch, length), bool),
        "labels": jax.ShapeDtypeStruct((batch,), jnp.int32),
        "row_mask": jax.ShapeDtypeStruct((batch,), bool),
    }
    compiled = step.lower(state, inputs, settings.schedule).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    """Prints both sides and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: bert-base")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--remat", action="store_true", help="activations are computed again")
    options = parser.parse_args()
    print(f"batch {options.batch} x {options.length}, {jax.default_backend()}, {jax.__version__}")
    for shape in options.shape or ["bert-base"]:
        sweet, early = (
            temporaries(shape, method, options.batch, options.length, remat=options.remat)
            for method in ("sweet", "early_exit")
        )
        print(
            f"{shape:>10}: SWEET {sweet / 2**20:.0f} MiB, Early-Exit {early / 2**20:.0f} MiB of "
            f"temporaries, ratio {sweet / early:.2f}"
        )


if __name__ == "__main__":
    main()
