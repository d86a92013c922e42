"""Texts as requests: tokenized, and padded to one of few lengths."""

from collections.abc import Sequence
from typing import Any

from sweet_jax.data.batches import encode
from sweet_jax.inference.engine import padded_lengths
from sweet_jax.inference.predictions import InvalidRow, Text, validate_text
from sweet_jax.inference.scheduler import ExitRule, Request


class RequestEncoder:
    """Makes requests of texts.

    Args:
      tokenizer: the model's.
      max_length: tokens at most; a longer text is cut.
      pairs: whether the model takes pairs of texts.

    Attributes:
      lengths: that requests are padded to, ascending.

    """

    def __init__(self, tokenizer: Any, max_length: int, *, pairs: bool):
        self.tokenizer, self.max_length, self.pairs = tokenizer, max_length, pairs
        self.lengths = padded_lengths(max_length)

    def __call__(
        self,
        texts: Sequence[Text | InvalidRow],
        rule: ExitRule,
        first: int = 0,
        *,
        same_length: bool = False,
    ) -> list[Request]:
        """Returns the requests of texts, numbered by their place from `first`; none of InvalidRow.

        With `same_length` all are padded to one length. Raises UserError for what is not a text,
        or not a pair where the model takes pairs.
        """
        valid = {
            number: validate_text(text, self.pairs, number)
            for number, text in enumerate(texts, start=first)
            if not isinstance(text, InvalidRow)
        }
        if not valid:
            return []
        ids, types = encode(self.tokenizer, list(valid.values()), self.max_length)
        longest = max(len(row) for row in ids)
        return [
            Request(number, i, t, self.padded_length(longest if same_length else len(i)), rule)
            for number, i, t in zip(valid, ids, types, strict=True)
        ]

    def padded_length(self, tokens: int) -> int:
        """Returns the smallest of `lengths` that holds so many tokens, the longest if none does."""
        return next((n for n in self.lengths if n >= tokens), self.lengths[-1])
