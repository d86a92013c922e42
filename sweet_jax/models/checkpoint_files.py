"""Finds the encoder in a checkpoint's folder: sentence-transformers, adapters, a missing type.

No arrays are made here.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from sweet_jax.config import UserError
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.tensor_names import path_keys
from sweet_jax.models.tensors import tensor_names

log = logging.getLogger(__name__)

_ADAPTER = "adapter_config.json"


def encoder_folder(folder: Path) -> Path:
    """Returns where the encoder's files are: the folder, or the first of sentence-transformers'.

    Raises UserError for a LoRA adapter that is not merged into its encoder.
    """
    inside = folder / _first_module(folder)
    if (inside / "config.json").exists() and inside.resolve().is_relative_to(folder.resolve()):
        folder = inside
    if (folder / _ADAPTER).exists():
        try:
            base = json.loads((folder / _ADAPTER).read_text())["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            base = "its encoder"
        raise UserError(
            f"{str(folder)!r} is a LoRA adapter of {base!r} that is not merged ({_ADAPTER}): merge "
            "it with peft's merge_and_unload and save that, or remove the adapter's files if it is"
        )
    return folder


def _first_module(folder: Path) -> str:
    """Returns the path that modules.json gives the encoder; "" for the folder itself."""
    try:
        return str(json.loads((folder / "modules.json").read_text())[0]["path"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""  # there is none; `declared_pooling` names what is wrong with one


def tokenizer_options(folder: Path, model_type: str) -> dict[str, str]:
    """Returns what AutoTokenizer has to be given where no file names a tokenizer's class."""
    for file, key in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
        try:
            if json.loads((folder / file).read_text()).get(key):
                return {}
        except (OSError, ValueError, AttributeError):
            continue
    return {"tokenizer_type": model_type}


def guess_model_type(
    folder: Path, values: Mapping[str, Any], families: Iterable[EncoderFamily]
) -> str | None:
    """Returns the model_type of a config.json that names none, with a warning; None if unknown.

    Guessed from `architectures`, else from the names of tensors: a family whose tensors are all
    there, and of several the one that has most of them, or whose prefix stands before them.

    Raises UserError where the tensors are not readable.
    """
    families = list(families)
    named, how = _by_architecture(values, families), "architectures"
    if named is None:
        named, how = _by_tensors(folder, values, families), "the names of its tensors"
    if named is None:
        return None
    log.warning(
        "%s names no model_type; taken for %r by %s: add it to the file if that is wrong",
        str(folder / "config.json"),
        named,
        how,
    )
    return named


def _by_architecture(values: Mapping[str, Any], families: list[EncoderFamily]) -> str | None:
    found = values.get("architectures")
    for architecture in found if isinstance(found, list) else []:
        for family in families:
            stem = family.architecture.removesuffix("Model")
            rest = str(architecture).removeprefix(stem)
            if rest != architecture and rest.startswith(("Model", "For", "LMHead")):
                return family.model_type
    return None


def _by_tensors(
    folder: Path, values: Mapping[str, Any], families: list[EncoderFamily]
) -> str | None:
    found = tensor_names(folder)
    # BERT and RoBERTa differ in how they count positions, which no tensor tells.
    counted = values.get("pad_token_id") == 1
    fitting = []
    for family in families:
        try:
            config = family.config.from_values(values)
            present = set(family.names.normalized(found).values())
        except UserError:
            continue
        wanted = nnx.eval_shape(lambda f=family, c=config: f.encoder(c, jax.random.key(0)))
        leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.split(wanted)[1]))
        names = {family.names.name(path_keys(path)) for path, _ in leaves}
        inside = {
            n for n in present if family.names.is_inside(n) and not family.names.is_ignored(n)
        }
        if inside <= names <= present:
            prefixed = any(f"{family.names.prefix}." in name for name in found)
            rank = (len(names), prefixed, ("roberta" in family.model_type) == counted)
            fitting.append((rank, family.model_type))
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None
