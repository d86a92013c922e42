"""Times attention, forward and backward: this project's own against JAX's fused implementations.

    python -m experiments.benchmarks.attention                     # float32, as on a CPU
    python -m experiments.benchmarks.attention --dtype=bfloat16    # on a CUDA GPU, also cuDNN

BERT-base's heads (12 of size 64) at 16 x 128 and 32 x 256 tokens; the rows are between half and all
of that length. The sides are this project's attention ("einsum"), with the dropout of 0.1 that
checkpoints are trained with and without it, and `jax.nn.dot_product_attention`, which has no
dropout, as "xla" and as "cudnn". They are timed in turns in one process. Prints the median time and
the bytes of temporaries of each, and which ones this machine cannot run. Each side without dropout
is first compared with "einsum". Takes a minute on 2 cores.
"""

import functools
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.benchmarks.shapes import program_memory
from experiments.benchmarks.timing import time_in_turns
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.config import DTYPES
from sweet_jax.models.bert import BertAttention, BertConfig

SIZES = ((16, 128), (32, 256))  # rows of a batch, tokens of a row
SIDES = (("einsum", 0.1), ("einsum", 0.0), ("xla", 0.0), ("cudnn", 0.0))  # with dropout rates


def compile_gradient(
    implementation: str, rate: float, dtype: str, inputs: tuple
) -> jax.stages.Compiled:
    """Compiles the gradients of one attention's context with respect to q, k and v.

    inputs: q, k and v [B, L, heads, size], and the mask bool [B, L].
    """
    config = BertConfig(attention_probs_dropout_prob=rate)
    attention = nnx.eval_shape(lambda: BertAttention(config, dtype, nnx.Rngs(0)))
    attention.implementation = implementation

    def loss(q, k, v, mask):
        context = attention.context(q, k, v, mask, jax.random.key(0), None)
        present = mask[:, :, None, None]
        return jnp.where(present, jnp.sin(context.astype(jnp.float32)), 0).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*inputs).compile()


def compare(batch: int, length: int, dtype: str, rounds: int) -> None:
    """Prints a line for each side at one size."""
    inputs = _random_inputs(batch, length, dtype)
    runs, notes, reference = {}, {}, None
    programs: dict[Any, jax.stages.Compiled] = {}
    for side in SIDES:
        if side[0] == "cudnn" and (jax.default_backend() != "gpu" or dtype != "bfloat16"):
            notes[side] = f"not available on {jax.default_backend()} with {dtype}"
            continue
        try:
            program = compile_gradient(*side, dtype, inputs)
            gradients = jax.block_until_ready(program(*inputs))
        except (RuntimeError, ValueError) as error:  # such as an old cuDNN
            notes[side] = f"failed: {str(error).splitlines()[0]}"
            continue
        programs[side], runs[side] = program, functools.partial(_run, program, inputs)
        if side[1] == 0.0:
            gradients = jax.tree.map(lambda x: x.astype(jnp.float32), gradients)
            reference = reference or gradients
            differences = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), gradients, reference)
            notes[side] = f", gradients differ from einsum's by at most {max(differences):.1e}"
    seconds = dict(zip(runs, time_in_turns(list(runs.values()), rounds), strict=True))
    for side in SIDES:
        line = notes.get(side, "")
        if side in programs:
            space = program_memory(programs[side]).temp_size_in_bytes / 2**20
            line = f"{1000 * statistics.median(seconds[side]):8.2f} ms, {space:6.0f} MiB{line}"
        print(f"{batch:>3} x {length}  {side[0]:>6}, dropout {side[1]}: {line}", flush=True)


def _random_inputs(batch: int, length: int, dtype: str) -> tuple[jax.Array, ...]:
    """Returns random q, k and v [B, L, 12, 64], and the mask bool [B, L]."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (batch, length, 12, 64), dtype) for key in keys)
    lengths = jnp.linspace(length // 2, length, batch).astype(int)
    return q, k, v, jnp.arange(length)[None] < lengths[:, None]


def _run(program: jax.stages.Compiled, inputs: tuple) -> None:
    jax.block_until_ready(program(*inputs))


def main(argv: list[str] | None = None) -> None:
    """Prints all sides at both sizes."""
    parser = ArgumentParser("experiments.benchmarks.attention", __doc__ or "")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default float32)")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls (default 15)")
    options = parser.parse_args(argv)
    print(f"{options.dtype}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for batch, length in SIZES:
        compare(batch, length, options.dtype, options.rounds)


if __name__ == "__main__":
    sys.exit(run_command(main))
