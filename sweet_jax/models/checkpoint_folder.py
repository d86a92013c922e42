"""The files of a Hugging Face checkpoint: its folder, located by name, its config and tokenizer.

This module does not import JAX, so that engines without JAX can open a saved model.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sweet_jax.errors import UserError, one_line
from sweet_jax.files import read_json
from sweet_jax.models.tokenizer_json import with_steps_of_file
from sweet_jax.paths import resolve_path
from sweet_jax.storage_errors import discard_native_errors

_ADAPTER = "adapter_config.json"
_SENTENCEPIECE = ("spm.model", "spiece.model", "sentencepiece.bpe.model")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", *_SENTENCEPIECE)
_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "merges.txt"]
_FILES += [*_VOCABULARIES, "special_tokens_map.json", "added_tokens.json", "exits.json"]
_FILES += ["int8.json", "onnx/graphs.json", "onnx/segment_*"]
_FILES += ["depth_*/config.json"]  # a saved Multi-Model's shallower models
_FILES += ["modules.json", "*_Pooling/config.json"]  # sentence-transformers' pooling
_FILES += [_ADAPTER, *(f"0_*/{name}" for name in _FILES)]  # sentence-transformers' first module


@dataclasses.dataclass(frozen=True, eq=False)
class CheckpointFiles:
    """Locates a checkpoint on disk; `values` are the contents of its config.json."""

    folder: Path
    values: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        """Returns the encoder family's name in config.json."""
        return str(self.values.get("model_type"))

    @property
    def vocab_size(self) -> int | None:
        """Returns the number of token ids, or None if config.json does not state it."""
        size = self.values.get("vocab_size")
        return size if isinstance(size, int) else None


def locate_checkpoint(name: str) -> CheckpointFiles:
    """Locates a checkpoint by hub id, local directory or `pkg://package/path`; reads config.json.

    Raises UserError if the checkpoint is missing, is only an adapter, has no readable config.json,
    or is the folder of a run.
    """
    folder = resolve_path(name)
    if not os.path.isdir(folder):  # also False if access is denied
        if name.startswith(("pkg://", "/", ".", "~")) or Path(name).is_absolute():
            raise UserError(f"checkpoint {name!r} is not a directory")
        folder = _from_hub(name)
    if not any(folder.glob("*.safetensors*")):  # a run may be inside the folder of its checkpoint
        refuse_run_folder(folder)
    folder = encoder_folder(folder)
    try:
        values = read_json(folder / "config.json")
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {name!r} has no readable config.json: {error}") from error
    return CheckpointFiles(folder, values)


def refuse_run_folder(folder: Path) -> None:
    """Raises UserError for the folder of a run, which names the saved model inside it."""
    if os.path.exists(folder / "model" / "exits.json"):  # also False if access is denied
        raise UserError(f"{str(folder)!r} is the folder of a run: pass {str(folder / 'model')!r}")


def _from_hub(name: str) -> Path:
    import huggingface_hub  # slow to import, and not needed for local files

    def fetch(patterns: list[str]) -> Path:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))

    try:
        folder = fetch(_FILES)
        # Pickles are large, and are not needed if there are safetensors.
        return folder if [*folder.glob("*.safetensors")] else fetch([*_FILES, "pytorch_model*"])
    except Exception as error:  # the client raises many kinds, which mean the same to a user
        raise UserError(
            f"checkpoint {name!r} is neither a local directory nor found on the hub "
            f"({one_line(error)}): check the name and the network connection"
        ) from error


def encoder_folder(folder: Path) -> Path:
    """Returns the folder with the encoder's files.

    This is the folder itself, or that of the first module in a sentence-transformers checkpoint.
    Raises UserError for a LoRA adapter that is not merged into its encoder.
    """
    inside = folder / first_module(folder)
    if (inside / "config.json").exists() and inside.resolve().is_relative_to(folder.resolve()):
        folder = inside
    if (folder / _ADAPTER).exists():
        try:
            base = read_json(folder / _ADAPTER)["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            base = "its encoder"
        raise UserError(
            f"{str(folder)!r} is a LoRA adapter of {base!r} that is not merged ({_ADAPTER}): merge "
            "it with peft's merge_and_unload and save the result, or remove the adapter's files if "
            "it is merged"
        )
    return folder


def first_module(folder: Path) -> str:
    """Returns the encoder's path according to modules.json; "" for the folder itself."""
    try:
        return str(read_json(folder / "modules.json")[0]["path"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""  # missing, or damaged, which `declared_pooling` reports


def tokenizer_options(folder: Path, model_type: str) -> dict[str, str]:
    """Returns the options that AutoTokenizer needs if no file names a tokenizer class."""
    for file, key in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
        try:
            if read_json(folder / file).get(key):
                return {}
        except (OSError, ValueError, AttributeError):
            continue
    return {"tokenizer_type": model_type}


def load_tokenizer(checkpoint: CheckpointFiles) -> Any:
    """Loads the checkpoint's fast tokenizer. Raises UserError if there is none."""
    import transformers  # slow to import, and not needed for the arithmetic

    where = repr(str(checkpoint.folder))
    # Without these files, transformers creates an empty tokenizer that knows no words.
    found = [name for name in _VOCABULARIES if (checkpoint.folder / name).exists()]
    if not found:
        raise UserError(f"no {' or '.join(_VOCABULARIES)} in {where}")
    if set(found) <= {*_SENTENCEPIECE} and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"the tokenizer in {where} is a SentencePiece model ({found[0]}): to read it, "
            'pip install -e ".[sentencepiece]"'
        )
    try:
        options = tokenizer_options(checkpoint.folder, checkpoint.model_type)
        with discard_native_errors():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                checkpoint.folder, trust_remote_code=False, local_files_only=True, **options
            )
            tokenizer = with_steps_of_file(tokenizer, checkpoint.folder)
            tokenizer("a text")  # some damaged files fail only when the tokenizer is used
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic in the tokenizer's Rust code is not an Exception
        raise UserError(f"no tokenizer in {where}: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{where} has no fast tokenizer (tokenizer.json)")
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer in {where} has no padding token")
    check_vocabulary(tokenizer.get_vocab(), checkpoint)
    if (repair := TOKENIZER_REPAIRS.get(checkpoint.model_type)) is not None:
        repair(tokenizer)
    return tokenizer


def check_vocabulary(vocabulary: Mapping[str, int], checkpoint: CheckpointFiles) -> None:
    """Raises UserError if the tokenizer has ids without a row in the checkpoint's table."""
    size = checkpoint.vocab_size
    if size is not None and max(vocabulary.values(), default=0) >= size:
        raise UserError(
            f"the tokenizer in {str(checkpoint.folder)!r} has token ids beyond the checkpoint's "
            f"vocab_size {size}: use the tokenizer that the checkpoint was trained with"
        )


def separate_pairs_once(tokenizer: Any) -> None:
    """Makes a tokenizer put one [SEP] between the texts of a pair, as in DeBERTa's pretraining.

    transformers 5 inserts two. Raises UserError if the tokenizer has no [CLS] or no [SEP] token.
    """
    from tokenizers import processors  # slow to import, and not needed for the arithmetic

    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise UserError(
            f"the tokenizer in {str(tokenizer.name_or_path)!r} has no cls_token or no sep_token, "
            "which DeBERTa's inputs require: set both in its tokenizer_config.json"
        )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[
            ("[CLS]", tokenizer.cls_token_id),
            ("[SEP]", tokenizer.sep_token_id),
        ],
    )


# By model_type: functions that change a loaded tokenizer in place to match the pretraining of the
# family. They run at every load, since a tokenizer.json that transformers 5 wrote needs them too.
TOKENIZER_REPAIRS: dict[str, Callable[[Any], None]] = {"deberta": separate_pairs_once}
