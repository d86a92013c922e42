"""Writes the inputs of the fault tests: a tiny random BERT, learnable rows, and a config file."""

import csv
import json
import random
from pathlib import Path
from typing import Any

WORDS = [f"word{i}" for i in range(40)]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_LAYERS = 3

# A run with this recipe has every phase: a probe, a search of the learning rate, training with
# dropout, checkpoints and the best state, a refit, baselines, and the report.
RECIPE: dict[str, Any] = {
    "task": "tiny",
    "exits": (1, 2, 3),
    "text_columns": "text",
    "pooling": "mean",
    "head_init": "probe",
    "head_refit": True,
    "head_learning_rate": 2.0,
    "epochs": "auto",
    "learning_rates": (1e-3, 3e-3),
    "rate_search": "short",
    "train_size": 120,
    "tuning_fraction": 0.2,
    "calibration_fraction": 0.2,
    "batch_size": 8,
    "evaluation_batch_size": 16,
    "max_length": 16,
    "checkpoint_every": 15,
}


def write_inputs(folder: Path, **changes: Any) -> Path:
    """Writes a checkpoint, rows and a config file to a folder; returns the path of the config file.

    changes: keys of the recipe that get other values.
    """
    config = folder / "config.py"
    paths = {"checkpoint": str(folder / "checkpoint"), "data_files": str(folder / "rows.csv")}
    values = {**RECIPE, **paths, **changes}
    if not (folder / "checkpoint" / "model.safetensors").exists():
        write_checkpoint(folder / "checkpoint")
        _write_rows(folder / "rows.csv")
    config.write_text(f"def get_config():\n    return {values!r}\n")
    return config


def write_checkpoint(folder: Path) -> None:
    """Writes a random BERT of three layers with dropout, and a tokenizer of whole words."""
    import jax
    import numpy as np
    import safetensors.numpy
    from flax import nnx
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from sweet_jax.models.bert import BertConfig
    from sweet_jax.models.early_exit import EarlyExit
    from sweet_jax.models.families import FAMILIES
    from sweet_jax.models.tensor_names import hugging_face_tensors

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{name[1:-1].lower()}_token": name for name in _SPECIAL}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 64,
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=_LAYERS,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    family, key = FAMILIES["bert"], jax.random.key(0)
    model = EarlyExit(family.encoder(config, key), (_LAYERS,), 2, key)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(model)[1]))
    tensors = hugging_face_tensors(family.names, params, (_LAYERS,))
    tensors = {k: v for k, v in tensors.items() if not k.startswith("exits.")}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    values = {"pad_token_id": 0, **config.to_values(), "model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(values))


def labelled_texts(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Returns texts of 2 to 12 words with their labels, which follow from the first word."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        label = rng.randrange(2)
        words = [WORDS[label], *rng.choices(WORDS[2:], k=rng.randrange(1, 12))]
        rows.append((" ".join(words), label))
    return rows


def _write_rows(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((text, f"class {label}") for text, label in labelled_texts(180))
