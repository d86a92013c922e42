"""The files of a Hugging Face checkpoint: its folder, found by name, config.json and tokenizer.

Imports no JAX, so that a saved model can be opened for an engine without it.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sweet_jax.config import UserError
from sweet_jax.files import discard_native_errors, one_line, read_json, resolve_path
from sweet_jax.models.tokenizer_json import with_steps_of_file

_ADAPTER = "adapter_config.json"
_SENTENCEPIECE = ("spm.model", "spiece.model", "sentencepiece.bpe.model")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", *_SENTENCEPIECE)
_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "merges.txt"]
_FILES += [*_VOCABULARIES, "special_tokens_map.json", "added_tokens.json", "exits.json"]
_FILES += ["int8.json", "onnx/graphs.json", "onnx/segment_*"]
_FILES += ["depth_*/config.json"]  # a saved Multi-Model's shallower models
_FILES += ["modules.json", "*_Pooling/config.json"]  # sentence-transformers' read-out
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
        """Returns the number of token ids; None where config.json does not say."""
        size = self.values.get("vocab_size")
        return size if isinstance(size, int) else None


def locate_checkpoint(name: str) -> CheckpointFiles:
    """Finds a checkpoint by hub id, local directory or `pkg://package/path`; reads config.json.

    Raises UserError when it is absent, an adapter alone, or its config.json is unreadable.
    """
    folder = resolve_path(name)
    if not os.path.isdir(folder):  # also False where permission is lacking
        if name.startswith(("pkg://", "/", ".", "~")):
            raise UserError(f"checkpoint {name!r} is not a directory")
        folder = _from_hub(name)
    folder = encoder_folder(folder)
    try:
        values = read_json(folder / "config.json")
        if not isinstance(values, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {name!r} has no readable config.json: {error}") from error
    return CheckpointFiles(folder, values)


def _from_hub(name: str) -> Path:
    import huggingface_hub  # heavy, and not needed for local files

    def fetch(patterns: list[str]) -> Path:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))

    try:
        folder = fetch(_FILES)
        # Pickles are large, and not wanted beside safetensors.
        return folder if [*folder.glob("*.safetensors")] else fetch([*_FILES, "pytorch_model*"])
    except Exception as error:  # the client raises many kinds; each means the same to a user
        raise UserError(
            f"checkpoint {name!r} is neither a local directory nor found on the hub "
            f"({one_line(error)}): check the name and the network"
        ) from error


def encoder_folder(folder: Path) -> Path:
    """Returns where the encoder's files are: the folder, or the first of sentence-transformers'.

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
            "it with peft's merge_and_unload and save that, or remove the adapter's files if it is"
        )
    return folder


def first_module(folder: Path) -> str:
    """Returns the path that modules.json gives the encoder; "" for the folder itself."""
    try:
        return str(read_json(folder / "modules.json")[0]["path"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""  # there is none; `declared_pooling` names what is wrong with one


def tokenizer_options(folder: Path, model_type: str) -> dict[str, str]:
    """Returns what AutoTokenizer has to be given where no file names a tokenizer's class."""
    for file, key in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
        try:
            if read_json(folder / file).get(key):
                return {}
        except (OSError, ValueError, AttributeError):
            continue
    return {"tokenizer_type": model_type}


def load_tokenizer(checkpoint: CheckpointFiles) -> Any:
    """Loads the checkpoint's own fast tokenizer. Raises UserError where there is none."""
    import transformers  # heavy, and not needed for the arithmetic

    where = repr(str(checkpoint.folder))
    # Without files transformers makes an empty tokenizer, in which every word is unknown.
    found = [name for name in _VOCABULARIES if (checkpoint.folder / name).exists()]
    if not found:
        raise UserError(f"no {' or '.join(_VOCABULARIES)} in {where}")
    if set(found) <= {*_SENTENCEPIECE} and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"the tokenizer in {where} is a SentencePiece model, {found[0]}: "
            'pip install -e ".[sentencepiece]" to read it'
        )
    try:
        options = tokenizer_options(checkpoint.folder, checkpoint.model_type)
        with discard_native_errors():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                checkpoint.folder, trust_remote_code=False, local_files_only=True, **options
            )
            tokenizer = with_steps_of_file(tokenizer, checkpoint.folder)
            tokenizer("a text")  # some damaged files only fail in use
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the tokenizer's Rust code is no Exception
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
    """Raises UserError for a tokenizer that has ids without a row in the checkpoint's table."""
    size = checkpoint.vocab_size
    if size is not None and max(vocabulary.values(), default=0) >= size:
        raise UserError(
            f"the tokenizer in {str(checkpoint.folder)!r} has more tokens than the checkpoint's "
            f"vocab_size, {size}"
        )


def separate_pairs_once(tokenizer: Any) -> None:
    """Sets a tokenizer to one [SEP] between the texts of a pair, as DeBERTa was pretrained on.

    transformers 5 puts two there. Raises UserError for a tokenizer without these tokens.
    """
    from tokenizers import processors  # heavy, and not needed for the arithmetic

    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise UserError(
            f"the tokenizer in {str(tokenizer.name_or_path)!r} has no cls_token or no sep_token, "
            "which DeBERTa's inputs need: name them in its tokenizer_config.json"
        )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[
            ("[CLS]", tokenizer.cls_token_id),
            ("[SEP]", tokenizer.sep_token_id),
        ],
    )


# By model_type: changes a loaded tokenizer, in place, to what the family was pretrained with.
# At every load, since a tokenizer.json that transformers 5 wrote has to be changed as well.
TOKENIZER_REPAIRS: dict[str, Callable[[Any], None]] = {"deberta": separate_pairs_once}
