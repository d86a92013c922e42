"""Four CPU devices, a tiny checkpoint with its tokenizer, and a small learnable data set."""

import csv
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

# Before jax is imported: children of the tests inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# Programs compiled once are shared by the tests and by the processes they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="sweet_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
# Tests compile far more than they compute: LLVM's optimisation of the kernels would take half of
# their time. What XLA itself does to a program (fusion, scheduling, memory) stays as it is.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from sweet_jax.models.bert import BertConfig, RobertaConfig
from sweet_jax.models.deberta import DebertaConfig
from sweet_jax.models.deberta_v2 import DebertaV2Config
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.encoder import EncoderConfig
from sweet_jax.models.names import hugging_face_tensors
from sweet_jax.models.pretrained import ENCODERS

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

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
}
GLUE_DIR = Path(os.environ.get("SWEET_GLUE_DIR", "../shared/data/glue"))


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
    import dataclasses

    folder.mkdir(parents=True, exist_ok=True)
    config = dataclasses.replace(
        TINIES[model_type],
        num_hidden_layers=layers,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    key = jax.random.key(seed)
    model = EarlyExit(ENCODERS[model_type][1](config, key), (config.num_hidden_layers,), 2, key)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(model)[1]))
    tensors = hugging_face_tensors(params, (config.num_hidden_layers,))
    tensors = {k: v for k, v in tensors.items() if not k.startswith("exits.")}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    values = {"pad_token_id": 0, **dataclasses.asdict(config), "model_type": model_type}
    for key in ("embedding_size", "attention_head_size"):
        if values.get(key) == 0:  # our word for "not given"
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


def write_unigrams(folder: Path) -> dict:
    """tokenizer.json of a unigram model, as transformers makes it of a SentencePiece file."""
    import transformers

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    pieces = [*special, *(f"▁{word}" for word in WORDS), "[MASK]"]
    vocabulary = [(piece, 0.0 if piece in special else -3.0) for piece in pieces]
    transformers.DebertaV2Tokenizer(vocab=vocabulary).save_pretrained(folder)
    return json.loads((folder / "tokenizer_config.json").read_text())


WRITERS = {
    "bert": write_words,
    "roberta": lambda folder: write_bytes(
        folder, "RobertaTokenizer", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    ),
    "deberta": lambda folder: write_bytes(
        folder, "DebertaTokenizer", ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    ),
    "deberta-v2": write_unigrams,
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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def with_dropout(tmp_path_factory) -> dict:
    """Config values of the same checkpoint with dropout, to add to the options."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny_dropout"
    return {"checkpoint": str(write_checkpoint(folder, dropout=0.1))}


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.csv", 160)


def fine_tune(checkpoint, folder: Path, **changes) -> tuple[Path, dict]:
    """(run directory, its config): a tiny encoder trained on learnable rows."""
    from sweet_jax.config import from_mapping
    from sweet_jax.pipeline import run

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
        **changes,
    }
    with pytest.MonkeyPatch.context() as patch:  # for one device, which compiles more quickly
        first = jax.devices()[:1]
        patch.setattr("sweet_jax.training.sharding.jax.devices", lambda: first)
        run(from_mapping(values), folder / "run")
    return folder / "run", values


@pytest.fixture(scope="session")
def fine_tuned(tmp_path_factory) -> tuple[Path, dict]:
    """(run directory, its config): exits 2, 3 and 4, with learning-to-exit."""
    folder = tmp_path_factory.mktemp("fine_tuned")
    deep = write_checkpoint(folder / "deep", layers=4)
    return fine_tune(deep, folder, exits=(2, 3, 4), learning_to_exit="joint")


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium, where there is one with its driver."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium with its driver on this machine")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    quiet += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    for argument in [*quiet, "--no-first-run", "--window-size=1200,1000"]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield session
    session.quit()


@pytest.fixture(scope="session")
def tiny_run(checkpoint, rows) -> dict:
    """Config values of a run that takes seconds."""
    return {
        "task": "tiny",
        "checkpoint": str(checkpoint),
        "data_files": str(rows),
        "text_columns": "text",
        "exits": (1, 2, 3),
        "learning_rates": (3e-3,),
        "train_size": 100,
        "batch_size": 8,
        "evaluation_batch_size": 16,
        "max_length": 32,
        "checkpoint_every": 100,
    }


@pytest.fixture
def options(tiny_run) -> dict:
    """The same, for a test to change."""
    return dict(tiny_run)


@pytest.fixture
def one_device(monkeypatch):
    """The program sees one device of the four."""
    first = jax.devices()[:1]
    monkeypatch.setattr("sweet_jax.training.sharding.jax.devices", lambda: first)


@pytest.fixture(scope="session")
def glue_dir() -> Path:
    if not GLUE_DIR.is_dir():
        pytest.skip(f"no GLUE rows at {GLUE_DIR} (SWEET_GLUE_DIR)")
    return GLUE_DIR
