"""Makes the golden files of BERT from random tiny Hugging Face models. Needs torch.

    pip install -e ".[torch]" && python tests/golden/make_bert.py

Each folder holds the checkpoint and golden.npz: inputs, every hidden state, and the gradient of
sum_l <hidden_l, cotangent_l> with respect to every parameter (`grad/<name>`).
"""

from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
CONFIGS = {
    # Odd sizes show transposed axes; the long activation range shows the wrong GELU.
    "bert_small": {
        "vocab_size": 67,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 31,
        "initializer_range": 0.4,
    },
    "bert_wide": {
        "vocab_size": 53,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "intermediate_size": 72,
        "max_position_embeddings": 40,
        "type_vocab_size": 3,
        "initializer_range": 0.25,
        "hidden_act": "gelu_new",
    },
}


def make(name: str, options: dict, seed: int) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    config = transformers.BertConfig(**options, attn_implementation="eager")
    model = transformers.BertModel(config).eval()
    with torch.no_grad():  # biases and norms are born constant, which would hide mistakes
        for key, value in model.named_parameters():
            if key.endswith("bias") or "LayerNorm" in key:
                value.add_(0.3 * torch.randn_like(value))
    batch, length = 4, 17
    ids = rng.integers(1, config.vocab_size, (batch, length))
    types = rng.integers(0, config.type_vocab_size, (batch, length))
    mask = (np.arange(length) < np.array([17, 9, 1, 13])[:, None]).astype(np.int64)
    ids *= mask  # id 0 is padding, as a tokenizer pads
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    outputs = model(
        **{k: torch.from_numpy(v) for k, v in inputs.items()}, output_hidden_states=True
    )
    hidden = torch.stack(outputs.hidden_states)
    # No loss reads padding; and torch holds the padding row of its table fixed, by padding_idx.
    cotangent = rng.standard_normal(tuple(hidden.shape)) * mask[..., None]
    cotangent = torch.from_numpy(cotangent.astype(np.float32))
    (hidden * cotangent).sum().backward()
    grads = {
        f"grad/{key}": value.grad.numpy()
        for key, value in model.named_parameters()
        if value.grad is not None
    }
    folder = HERE / name
    model.save_pretrained(folder)
    np.savez_compressed(
        folder / "golden.npz",
        **inputs,
        hidden=hidden.detach().numpy(),
        cotangent=cotangent.numpy(),
        **grads,
    )


if __name__ == "__main__":
    for number, (name, options) in enumerate(CONFIGS.items()):
        make(name, options, seed=number)
