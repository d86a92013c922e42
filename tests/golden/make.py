"""Makes the golden files of all encoders from random tiny Hugging Face models. Needs torch.

    pip install -e ".[torch]" && python tests/golden/make.py [NAME ...]

Each folder holds the checkpoint and golden.npz: inputs, every hidden state, and the gradient of
sum_l <hidden_l, cotangent_l> with respect to every parameter (`grad/<name>`). buckets.npz holds
DeBERTa v2's buckets of distances, under <position_buckets>_<max_relative_positions>, and MPNet's.
"""

import inspect
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

HERE = Path(__file__).parent
# Odd sizes show transposed axes; the long activation range shows the wrong GELU.
SMALL = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40}
RELATIVE = {"relative_attention": True, "position_biased_input": False, "initializer_range": 0.4}
TOKENS = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1}
TOKENS |= {"eos_token_id": 2}
LENGTH = 17  # longer than the relative positions of some
LENGTHS = {"mpnet_long": 150}
CONFIGS: dict[str, dict] = {
    "bert_small": {
        "model_type": "bert",
        "vocab_size": 67,
        "num_hidden_layers": 3,
        "max_position_embeddings": 31,
        "initializer_range": 0.4,
        **SMALL,
    },
    "bert_wide": {
        "model_type": "bert",
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
    "roberta_small": {
        "model_type": "roberta",
        "vocab_size": 61,
        "num_hidden_layers": 2,
        "max_position_embeddings": 20,
        "type_vocab_size": 1,
        "initializer_range": 0.4,
        "layer_norm_eps": 1e-5,
        **SMALL,
    },
    "deberta_base": {
        "model_type": "deberta",
        "vocab_size": 59,
        "num_hidden_layers": 3,
        "max_position_embeddings": 32,
        "pos_att_type": "c2p|p2c",
        **SMALL,
        **RELATIVE,
    },
    "deberta_p2c": {  # far positions share rows; absolute positions too; narrow tables
        "model_type": "deberta",
        "vocab_size": 41,
        "num_hidden_layers": 2,
        "max_position_embeddings": 19,
        "max_relative_positions": 7,
        "embedding_size": 15,
        "type_vocab_size": 2,
        "pos_att_type": ["p2c"],
        "hidden_act": "gelu_new",
        **SMALL,
        **RELATIVE,
        "position_biased_input": True,
    },
    "deberta_c2p": {
        "model_type": "deberta",
        "vocab_size": 41,
        "num_hidden_layers": 1,
        "max_position_embeddings": 21,
        "pos_att_type": "c2p",
        **SMALL,
        **RELATIVE,
    },
    "deberta_absolute": {  # scores are scaled as if there were relative positions
        "model_type": "deberta",
        "vocab_size": 41,
        "num_hidden_layers": 1,
        "max_position_embeddings": 17,
        "pos_att_type": "c2p|p2c",
        "initializer_range": 0.4,
        **SMALL,
    },
    "deberta_v3": {
        "model_type": "deberta-v2",
        "vocab_size": 59,
        "num_hidden_layers": 3,
        "max_position_embeddings": 16,
        "pos_att_type": "p2c|c2p",
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        **SMALL,
        **RELATIVE,
    },
    "deberta_v2_xlarge": {
        "model_type": "deberta-v2",
        "vocab_size": 47,
        "num_hidden_layers": 2,
        "max_position_embeddings": 24,
        "pos_att_type": "p2c|c2p",
        "position_buckets": 6,
        "norm_rel_ebd": "layer_norm",
        "attention_head_size": 8,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
        **SMALL,
        **RELATIVE,
    },
    "deberta_v2_grouped": {
        "model_type": "deberta-v2",
        "vocab_size": 47,
        "num_hidden_layers": 2,
        "max_position_embeddings": 24,
        "max_relative_positions": 9,
        "type_vocab_size": 3,
        "pos_att_type": ["c2p"],
        "conv_kernel_size": 5,
        "conv_groups": 2,
        **SMALL,
        **RELATIVE,
    },
    "distilbert_small": {
        "model_type": "distilbert",
        "vocab_size": 61,
        "n_layers": 3,
        "max_position_embeddings": 29,
        "dim": 24,
        "n_heads": 3,
        "hidden_dim": 40,
        "initializer_range": 0.25,
    },
    "distilbert_sinusoidal": {
        "model_type": "distilbert",
        "vocab_size": 43,
        "n_layers": 1,
        "max_position_embeddings": 23,
        "dim": 16,
        "n_heads": 2,
        "hidden_dim": 36,
        "activation": "relu",
        "sinusoidal_pos_embds": True,
        "initializer_range": 0.4,
    },
    "xlm_roberta_small": {
        "model_type": "xlm-roberta",
        "vocab_size": 59,
        "num_hidden_layers": 2,
        "max_position_embeddings": 20,
        "type_vocab_size": 1,
        "initializer_range": 0.25,
        "layer_norm_eps": 1e-5,
        **SMALL,
    },
    "camembert_small": {
        "model_type": "camembert",
        "vocab_size": 53,
        "num_hidden_layers": 2,
        "max_position_embeddings": 21,
        "type_vocab_size": 1,
        "initializer_range": 0.25,
        "layer_norm_eps": 1e-5,
        **SMALL,
    },
    "electra_small": {
        "model_type": "electra",
        "vocab_size": 61,
        "num_hidden_layers": 3,
        "max_position_embeddings": 23,
        "embedding_size": 15,
        "initializer_range": 0.25,
        **SMALL,
    },
    "electra_wide": {  # no projection
        "model_type": "electra",
        "vocab_size": 47,
        "num_hidden_layers": 1,
        "max_position_embeddings": 19,
        "type_vocab_size": 3,
        "embedding_size": 24,
        "initializer_range": 0.25,
        "hidden_act": "gelu_python",
        **SMALL,
    },
    "mpnet_small": {
        "model_type": "mpnet",
        "vocab_size": 61,
        "num_hidden_layers": 3,
        "max_position_embeddings": 20,
        "initializer_range": 0.25,
        **SMALL,
    },
    "mpnet_long": {  # distances in all buckets
        "model_type": "mpnet",
        "vocab_size": 41,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 9,
        "max_position_embeddings": 152,
        "initializer_range": 0.25,
        "hidden_act": "quick_gelu",
    },
    "modernbert_small": {  # a global layer, two local, a global
        "model_type": "modernbert",
        "vocab_size": 61,
        "num_hidden_layers": 4,
        "max_position_embeddings": 25,
        "local_attention": 8,
        "initializer_range": 0.25,
        **TOKENS,
        **SMALL,
    },
    "modernbert_biased": {  # layers of any type, other rotations, odd windows
        "model_type": "modernbert",
        "vocab_size": 47,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 37,
        "max_position_embeddings": 25,
        "local_attention": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 300.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
        "hidden_activation": "gelu_pytorch_tanh",
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "initializer_range": 0.25,
        **TOKENS,
    },
    "albert_small": {
        "model_type": "albert",
        "vocab_size": 61,
        "num_hidden_layers": 3,
        "max_position_embeddings": 23,
        "embedding_size": 15,
        "initializer_range": 0.25,
        **SMALL,
    },
    "albert_wide": {  # projected all the same
        "model_type": "albert",
        "vocab_size": 43,
        "num_hidden_layers": 2,
        "max_position_embeddings": 19,
        "embedding_size": 24,
        "hidden_act": "gelu_fast",
        "initializer_range": 0.25,
        **SMALL,
    },
}


def make(name: str, seed: int) -> None:
    """Writes one folder."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    options = dict(CONFIGS[name])
    config = transformers.AutoConfig.for_model(options.pop("model_type"), **options)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # biases and norms are born constant, which would hide mistakes
        for key, value in model.named_parameters():
            if key.endswith("bias") or "norm" in key.lower():
                value.add_(0.3 * torch.randn_like(value))
    length = LENGTHS.get(name, LENGTH)
    ids = rng.integers(config.pad_token_id + 1, config.vocab_size, (4, length))
    types = rng.integers(0, max(1, getattr(config, "type_vocab_size", 1)), (4, length))
    mask = (np.arange(length) < np.array([length, 9, 1, 13])[:, None]).astype(np.int64)
    ids = np.where(mask, ids, config.pad_token_id)  # as a tokenizer pads
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    taken = inspect.signature(model.forward).parameters
    given = {k: torch.from_numpy(v) for k, v in inputs.items() if k in taken or "kwargs" in taken}
    outputs = model(**given, output_hidden_states=True)
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


def make_buckets() -> None:
    """Writes buckets.npz; the first are those of DeBERTa v2 and v3 as published."""
    distances = torch.arange(-1100, 1101)
    buckets = {
        f"{size}_{reach}": make_log_bucket_position(distances, size, reach).to(torch.int16).numpy()
        for size, reach in ((256, 512), (32, 128), (7, 13), (2, 9))
    }
    buckets["mpnet"] = MPNetEncoder.relative_position_bucket(distances).to(torch.int16).numpy()
    np.savez_compressed(HERE / "buckets.npz", distances=distances.numpy(), **buckets)


if __name__ == "__main__":
    for number, name in enumerate(CONFIGS):
        if not sys.argv[1:] or name in sys.argv[1:]:
            make(name, seed=number)
    make_buckets()
