"""Tiny checkpoints of every kind with their tokenizers, learnable rows, and runs on both."""

import csv
import dataclasses
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from sweet_jax import AdaptiveClassifier, ExitOutputs
from sweet_jax.config import from_mapping
from sweet_jax.data.load import load_dataset
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.models.albert import AlbertConfig
from sweet_jax.models.bert import BertConfig
from sweet_jax.models.deberta import DebertaConfig
from sweet_jax.models.deberta_v2 import DebertaV2Config
from sweet_jax.models.distilbert import DistilBertConfig
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.electra import ElectraConfig
from sweet_jax.models.encoder_config import EncoderConfig
from sweet_jax.models.families import FAMILIES
from sweet_jax.models.modernbert import ModernBertConfig
from sweet_jax.models.mpnet import MPNetConfig
from sweet_jax.models.roberta import RobertaConfig, XlmRobertaConfig
from sweet_jax.models.tensor_names import hugging_face_tensors
from sweet_jax.objectives.objective import softmax
from sweet_jax.pipeline import run

WORDS = [f"word{i}" for i in range(40)]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
RELATIVE = {
    "position_biased_input": False,
    "relative_attention": True,
    "pos_att_type": ("c2p", "p2c"),
}
# Of those that have none by default.
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
TINY = BertConfig(vocab_size=50, **SIZES)
TINIES: dict[str, EncoderConfig] = {
    "bert": TINY,
    "roberta": RobertaConfig(vocab_size=330, type_vocab_size=1, **SIZES),
    "deberta": DebertaConfig(vocab_size=330, **SIZES, **RELATIVE),
    "deberta-v2": DebertaV2Config(
        vocab_size=60,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        conv_kernel_size=3,
        **SIZES,
        **RELATIVE,
    ),
    "distilbert": DistilBertConfig(vocab_size=50, **SIZES),
    "xlm-roberta": XlmRobertaConfig(vocab_size=60, type_vocab_size=1, **SIZES),
    "camembert": XlmRobertaConfig(vocab_size=60, type_vocab_size=1, **SIZES),
    "electra": ElectraConfig(vocab_size=50, embedding_size=12, **SIZES),
    "mpnet": MPNetConfig(vocab_size=60, **SIZES),
    "modernbert": ModernBertConfig(vocab_size=50, local_attention=4, **DROPOUT, **SIZES),
    "albert": AlbertConfig(vocab_size=60, embedding_size=12, **DROPOUT, **SIZES),
}
# Each encoder once: the other model types are RoBERTas.
ENCODERS = [kind for kind in TINIES if kind not in ("xlm-roberta", "camembert")]
ISOLATED = [kind for kind in ENCODERS if not FAMILIES[kind].isolation_obstacle]


def marked(kinds: list[str]) -> list:
    """The kinds as parameters of a test, those slow that add least to the others."""
    return [
        pytest.param(
            kind, marks=() if kind in ("bert", "deberta-v2", "modernbert") else pytest.mark.slow
        )
        for kind in kinds
    ]


def write_checkpoint(
    folder: Path,
    model_type: str = "bert",
    seed: int = 0,
    layers: int = TINY.num_hidden_layers,
    dropout: float = 0.0,
) -> Path:
    """A random tiny checkpoint with a tokenizer of its kind, as Hugging Face would save them.

    Without dropout, whose generator is a third of what compiling a step takes; tests that depend on
    its masks ask for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(
        TINIES[model_type],
        num_hidden_layers=layers,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    family, key = FAMILIES[model_type], jax.random.key(seed)
    model = EarlyExit(family.encoder(config, key), (config.num_hidden_layers,), 2, key)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(model)[1]))
    tensors = hugging_face_tensors(family.names, params, (config.num_hidden_layers,))
    tensors = {k: v for k, v in tensors.items() if not k.startswith("exits.")}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    values = {"pad_token_id": 0, **config.to_values(), "model_type": model_type}
    for key in ("embedding_size", "attention_head_size", "layer_types"):
        if values.get(key) in (0, ()):  # our words for "not given"
            del values[key]
    (folder / "config.json").write_text(json.dumps(values))
    about = {"model_max_length": 64, **WRITERS[model_type](folder)}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def write_words(folder: Path) -> dict:
    """tokenizer.json of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    names |= {"sep_token": "[SEP]", "mask_token": "[MASK]"}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **names}


def write_bytes(folder: Path, tokenizer_class: str, special: list[str]) -> dict:
    """vocab.json and merges.txt of a byte-level BPE."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    tokenizer.model.save(str(folder))
    return {"tokenizer_class": tokenizer_class}


def write_unigrams(folder: Path, tokenizer_class: str, special: str, mask: str = "<mask>") -> dict:
    """tokenizer.json of a unigram model, as transformers makes it of a SentencePiece file."""
    import transformers

    pieces = [*special.split(), *(f"▁{word}" for word in WORDS), mask]
    vocabulary = [(piece, 0.0 if piece in special.split() else -3.0) for piece in pieces]
    getattr(transformers, tokenizer_class)(vocab=vocabulary).save_pretrained(folder)
    return json.loads((folder / "tokenizer_config.json").read_text())


def write_word_pieces(folder: Path) -> dict:
    """tokenizer.json of MPNet's own tokenizer."""
    import transformers

    words = ["<s>", "<pad>", "</s>", "[UNK]", *WORDS, "<mask>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    transformers.MPNetTokenizer(vocab=vocabulary).save_pretrained(folder)
    return json.loads((folder / "tokenizer_config.json").read_text())


WRITERS = {
    "bert": write_words,
    "roberta": lambda folder: write_bytes(
        folder, "RobertaTokenizer", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    ),
    "deberta": lambda folder: write_bytes(
        folder, "DebertaTokenizer", ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    ),
    "deberta-v2": lambda folder: write_unigrams(
        folder, "DebertaV2Tokenizer", "[PAD] [CLS] [SEP] [UNK]", "[MASK]"
    ),
    "distilbert": write_words,
    "xlm-roberta": lambda folder: write_unigrams(
        folder, "XLMRobertaTokenizer", "<s> <pad> </s> <unk>"
    ),
    "camembert": lambda folder: write_unigrams(
        folder, "CamembertTokenizer", "<s> <pad> </s> <unk>"
    ),
    "electra": write_words,
    "mpnet": write_word_pieces,
    "modernbert": write_words,
    "albert": lambda folder: write_unigrams(
        folder, "AlbertTokenizer", "<pad> <unk> [CLS] [SEP]", "[MASK]"
    ),
}


def write_rows(path: Path, count: int, seed: int = 0, classes: int = 2) -> Path:
    """A CSV whose label is told by its first word; texts of 2 to 40 words."""
    rng = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(count):
            label = rng.randrange(classes)
            words = [WORDS[label], *rng.choices(WORDS[classes:], k=rng.randrange(1, 40))]
            writer.writerow([" ".join(words), f"class {label}"])
    return path


def fine_tune(checkpoint, folder: Path, **changes) -> tuple[Path, dict]:
    """(run directory, its config): a tiny encoder trained on learnable rows."""
    values = {
        "task": "tiny",
        "checkpoint": str(checkpoint),
        "data_files": str(write_rows(folder / "rows.csv", 160)),
        "text_columns": "text",
        "exits": (1, 2, 3),
        "learning_rates": (3e-3,),
        "train_size": 100,
        "epochs": 12,
        "calibration_fraction": 0.3,
        "batch_size": 8,
        "max_length": 32,
        "pooling": "first",
        "baselines": "none",
        **changes,
    }
    with pytest.MonkeyPatch.context() as patch:  # for one device, which compiles more quickly
        first = jax.devices()[:1]
        patch.setattr("sweet_jax.training.sharding.jax.devices", lambda: first)
        run(from_mapping(values), folder / "run")
    return folder / "run", values


def read_tuning(workdir: Path) -> list[dict]:
    """The evaluations on tuning rows in metrics.jsonl, in order."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "area" in row]


class Reference:
    """What the one-pass evaluation of a run says of its validation texts."""

    def __init__(self, folder: Path, values: dict):
        self.outputs = ExitOutputs.load(folder / "exit_outputs" / "validation.npz")
        self.texts = [texts[0] for texts in load_dataset(from_mapping(values)).validation.texts]
        self.classifier = AdaptiveClassifier.from_pretrained(folder / "model")

    def answers(self, classifier) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(index of the exit [N], probabilities [N, C], rows too close to call, bool [N])."""
        fitted = classifier.calibrator
        scores = exit_confidences(self.outputs, classifier.policy, [fitted])[0]  # [E, N]
        leaves = scores >= classifier.threshold
        leaves[-1] = True
        exits = leaves.argmax(axis=0)
        close = (np.abs(scores[:-1] - classifier.threshold) < 1e-5).any(axis=0)
        logits = self.outputs.logits[0, exits, np.arange(len(exits))]
        return exits, softmax(logits / fitted.temperatures[exits, None]), close
