"""Turns texts into requests: tokenized, with one of few lengths to pad to."""

import copy
from collections.abc import Sequence

from sweet_jax.data.batches import UNLIMITED, encode_pairs
from sweet_jax.errors import UserError
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.engine import padded_length
from sweet_jax.inference.predictions import InvalidRow, Text, validate_text
from sweet_jax.inference.scheduler import ExitRule, Request


def encode_requests(
    model: ModelArtifact,
    texts: Sequence[Text | InvalidRow],
    rule: ExitRule,
    first: int = 0,
    *,
    same_length: bool = False,
    truncation: str | None = None,
) -> list[Request]:
    """Returns the requests of texts, numbered by position from `first`; skips each InvalidRow.

    Args:
      model: the saved model.
      texts: the texts, or pairs of texts, to tokenize.
      rule: rule by which the texts exit.
      first: number of the first text.
      same_length: whether to pad all texts to the same length.
      truncation: side on which a text of more than max_length tokens is truncated, "left" or
        "right"; "none" raises an error for such a text; None for the tokenizer's own side.

    Raises UserError for an item that is not a text (or not a pair, if the model takes pairs), and
    for a text that is too long with truncation "none".

    """
    pairs = len(model.text_columns) == 2
    valid = {
        number: validate_text(text, pairs, number)
        for number, text in enumerate(texts, start=first)
        if not isinstance(text, InvalidRow)
    }
    if not valid:
        return []
    tokenizer, limit = model.tokenizer, model.max_length
    if truncation == "none":
        limit = UNLIMITED
    elif truncation is not None:
        tokenizer = copy.copy(tokenizer)  # with the same vocabulary
        tokenizer.truncation_side = truncation
    ids, types, seconds = encode_pairs(tokenizer, list(valid.values()), limit)
    starts: Sequence[int | None] = seconds or [None] * len(ids)
    sizes = [len(row) for row in ids]
    for number, size in zip(valid, sizes, strict=True):
        if size > model.max_length:
            raise UserError(
                f"row {number + 1} has {size} tokens, but this model takes at most "
                f"{model.max_length}: shorten it, or allow truncation"
            )
    if same_length:
        sizes = [max(sizes)] * len(sizes)
    return [
        Request(number, i, t, padded_length(size, model.max_length), rule, start)
        for number, i, t, size, start in zip(valid, ids, types, sizes, starts, strict=True)
    ]
