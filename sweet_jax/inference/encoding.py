"""Texts as requests: tokenized, and padded to one of few lengths."""

from collections.abc import Sequence

from sweet_jax.data.batches import encode
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
) -> list[Request]:
    """Returns the requests of texts, numbered by their place from `first`; none of InvalidRow.

    A text is cut at the model's max_length. With `same_length` all are padded to one length. Raises
    UserError for what is not a text, or not a pair where the model takes pairs.
    """
    pairs = len(model.text_columns) == 2
    valid = {
        number: validate_text(text, pairs, number)
        for number, text in enumerate(texts, start=first)
        if not isinstance(text, InvalidRow)
    }
    if not valid:
        return []
    ids, types = encode(model.tokenizer, list(valid.values()), model.max_length)
    sizes = [len(row) for row in ids]
    if same_length:
        sizes = [max(sizes)] * len(sizes)
    return [
        Request(number, i, t, padded_length(size, model.max_length), rule)
        for number, i, t, size in zip(valid, ids, types, sizes, strict=True)
    ]
