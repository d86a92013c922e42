"""Compares the memory for temporaries of a training step of SWEET and of Early-Exit.

    python -m experiments.benchmarks.memory

Batches of 16 x 128 tokens, float32, with gradient clipping and AdamW. Both steps are compiled and
neither is run: the compiler reports the bytes that a step allocates in addition to parameters and
optimizer state. Takes about 2 minutes on 2 cores. Expected for BERT-base's shape: SWEET needs at
most half of what Early-Exit needs.
"""

import sys

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.benchmarks.shapes import LEARNING_RATE, SHAPES, program_memory
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.config import Config
from sweet_jax.training.parallel import compile_step
from sweet_jax.training.settings import step_settings
from sweet_jax.training.sharding import make_mesh, state_shardings
from sweet_jax.training.step import init_state


def count_temporaries(
    shape: str, method: str, batch: int, length: int, *, remat: bool = False
) -> int:
    """Returns the bytes of temporaries of a compiled training step."""
    exits = SHAPES[shape].exits
    graphdef, values = nnx.split(nnx.eval_shape(lambda: SHAPES[shape].model(remat=remat)))
    params = nnx.to_pure_dict(values)
    state = jax.eval_shape(lambda params: init_state(params, LEARNING_RATE, 0), params)
    config = Config(method=method, exits=exits, batch_size=batch, remat=remat).resolved()
    settings = step_settings(config, graphdef, exits, 1000)
    step = compile_step(settings, 1, state_shardings(make_mesh(1, 1), state, 1))
    inputs = {
        "input_ids": jax.ShapeDtypeStruct((batch, length), jnp.int32),
        "token_type_ids": jax.ShapeDtypeStruct((batch, length), jnp.int32),
        "mask": jax.ShapeDtypeStruct((batch, length), bool),
        "labels": jax.ShapeDtypeStruct((batch,), jnp.int32),
        "row_mask": jax.ShapeDtypeStruct((batch,), bool),
    }
    compiled = step.lower(state, inputs, settings.schedule).compile()
    return program_memory(compiled).temp_size_in_bytes


def main(argv: list[str] | None = None) -> None:
    """Prints a line with both methods and their ratio for each shape."""
    parser = ArgumentParser("experiments.benchmarks.memory", __doc__ or "")
    parser.add_argument(
        "--shape", action="append", choices=SHAPES, help="repeatable (default bert-base)"
    )
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch (default 16)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row (default 128)")
    parser.add_argument(
        "--remat", action="store_true", help="compute activations again in the backward pass"
    )
    options = parser.parse_args(argv)
    print(f"batch {options.batch} x {options.length}, {jax.default_backend()}, {jax.__version__}")
    for shape in options.shape or ["bert-base"]:
        sweet, early = (
            count_temporaries(shape, method, options.batch, options.length, remat=options.remat)
            for method in ("sweet", "early_exit")
        )
        print(
            f"{shape:>10}: SWEET {sweet / 2**20:.0f} MiB, Early-Exit {early / 2**20:.0f} MiB of "
            f"temporaries, ratio {sweet / early:.2f}"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
