"""Seconds of attention, forward and backward: this project's own against JAX's fused ones.

    python -m experiments.benchmarks.attention                     # float32, what a CPU has
    python -m experiments.benchmarks.attention --dtype=bfloat16    # on a CUDA GPU: cudnn too

BERT-base's heads (12 of 64 numbers) at 16 x 128 and 32 x 256 tokens, rows of half the length and
up. The sides: "einsum", with the dropout of 0.1 on the weights that checkpoints are trained with
and without it, and jax.nn.dot_product_attention, which has none, as "xla" and as "cudnn". They take
turns in one process; the median and the bytes of temporaries of each are printed, and a side that
this machine cannot run says so. Before it is timed, each side without dropout is compared with the
first. A minute on 2 cores.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from sweet_jax.models.bert import BertAttention, BertConfig

SHAPES = ((16, 128), (32, 256))
SIDES = (("einsum", 0.1), ("einsum", 0.0), ("xla", 0.0), ("cudnn", 0.0))


def compiled(implementation: str, rate: float, dtype: str, inputs: tuple):
    """Compiles the gradient of one attention's context by q, k, v."""
    config = BertConfig(attention_probs_dropout_prob=rate)
    attention = nnx.eval_shape(lambda: BertAttention(config, dtype, nnx.Rngs(0)))
    attention.implementation = implementation

    def loss(q, k, v, mask):
        context = attention.context(q, k, v, mask, jax.random.key(0), None)
        present = mask[:, :, None, None]
        return jnp.where(present, jnp.sin(context.astype(jnp.float32)), 0).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*inputs).compile()


def compare(batch: int, length: int, dtype: str, rounds: int) -> None:
    """Prints a line for each side at one shape."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (batch, length, 12, 64), dtype) for key in keys)
    lengths = jnp.linspace(length // 2, length, batch).astype(int)
    inputs = (q, k, v, jnp.arange(length)[None] < lengths[:, None])
    programs, lines, reference = {}, {}, None
    for side in SIDES:
        if side[0] == "cudnn" and (jax.default_backend() != "gpu" or dtype != "bfloat16"):
            lines[side] = f"not available on {jax.default_backend()} with {dtype}"
            continue
        try:
            program = compiled(*side, dtype, inputs)
            found = jax.block_until_ready(program(*inputs))
        except (RuntimeError, ValueError) as error:  # this cuDNN may not have it, say
            lines[side] = f"failed: {str(error).splitlines()[0]}"
            continue
        programs[side] = program
        if side[1] == 0.0:
            wide = jax.tree.map(lambda x: x.astype(jnp.float32), found)
            reference = reference or wide
            apart = max(float(jnp.abs(a - b).max()) for a, b in zip(wide, reference, strict=True))
            lines[side] = f", gradients at most {apart:.1e} from einsum's"
    seconds: dict = {side: [] for side in programs}
    for _ in range(rounds):
        for side, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            seconds[side].append(time.perf_counter() - began)
    for side in SIDES:
        line = lines.get(side, "")
        if side in programs:
            space = programs[side].memory_analysis().temp_size_in_bytes / 2**20
            line = f"{1000 * statistics.median(seconds[side]):8.2f} ms, {space:6.0f} MiB{line}"
        print(f"{batch:>3} x {length}  {side[0]:>6}, dropout {side[1]}: {line}", flush=True)


def main() -> None:
    """Prints all sides at both shapes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(f"{options.dtype}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for batch, length in SHAPES:
        compare(batch, length, options.dtype, options.rounds)


if __name__ == "__main__":
    main()
