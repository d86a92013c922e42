"""The encoder family of a checkpoint whose config.json does not name one."""

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from sweet_jax.errors import UserError
from sweet_jax.models.family import EncoderFamily
from sweet_jax.models.tensor_names import path_keys
from sweet_jax.models.tensors import tensor_names

log = logging.getLogger(__name__)


def guess_model_type(
    folder: Path, values: Mapping[str, Any], families: Iterable[EncoderFamily]
) -> str | None:
    """Guesses the model_type for a config.json that names none; returns None if it is unknown.

    It is guessed from `architectures`, or else from the names of the tensors: all tensors of the
    family must be there. If several families match, the one with the most tensors is chosen; ties
    are resolved by the prefix of the tensor names and then by pad_token_id. A warning names the
    guess.

    Raises UserError if the tensors cannot be read.
    """
    families = list(families)
    named, how = _by_architecture(values, families), "architectures"
    if named is None:
        named, *others = _by_tensors(folder, values, families) or (None,)
        how = "the names of its tensors"
        if others:
            how += f", which fit {', '.join(map(repr, others))} as well"
    if named is None:
        return None
    log.warning(
        "%s has no model_type; taken for %r based on %s: if that is wrong, add the right one to "
        "the file",
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
) -> list[str]:
    """Returns the model_type that fits the tensors best, then those whose tensors fit as well."""
    found = tensor_names(folder)
    # BERT and RoBERTa differ in what positions are counted from, which no tensor shows: RoBERTa
    # counts from its padding id, so that fewer positions than rows of their table are left.
    counted = values.get("pad_token_id") == 1
    fitting = []
    for family in families:
        try:
            config = family.config.from_values(values)
            present = set(family.names.normalized(found).values())
        except UserError:
            continue
        # Only one layer is checked: a config without a type may have the wrong depth, too.
        shallow = dataclasses.replace(config, num_hidden_layers=1)
        wanted = nnx.eval_shape(lambda f=family, c=shallow: f.encoder(c, jax.random.key(0)))
        leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.split(wanted)[1]))
        names = {family.tensor_name(path_keys(path)) for path, _ in leaves}
        later = re.compile(rf"{re.escape(family.names.layers)}\.[1-9]")
        inside = {
            n
            for n in present
            if family.names.is_inside(n) and not family.names.is_ignored(n) and not later.match(n)
        }
        if inside <= names <= present:
            prefixed = any(f".{family.names.prefix}." in f".{name}" for name in found)
            fewer = config.positions != config.max_position_embeddings
            rank = (len(names), prefixed, fewer == counted)
            fitting.append((rank, family.model_type))
    if not fitting:
        return []
    best, named = max(fitting, key=lambda pair: pair[0])
    return [named, *(kind for rank, kind in fitting if rank[:2] == best[:2] and kind != named)]
