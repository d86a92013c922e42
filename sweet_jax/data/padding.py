"""Batches padded to a few fixed lengths, since each length is compiled for.

Shape letters: B batch, L length.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from sweet_jax.data.batches import Tokens

_LENGTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512)  # each length used is compiled for
_SHORT = (16, 24)  # compiled for where enough batches of a run are as short, see `with_short`
# Tokens per row, summed over the steps of a run, that another length must save: as many as are
# trained on in the time that compiling for it takes, about. With 16 rows and one replica on one
# core that is 27 steps of 32 tokens at MiniLM's shape, 6 at MPNet-base's
# (experiments/benchmarks/short_texts.py); with more rows it is fewer.
_WORTH_COMPILING = 1024
# On accelerators compiling a step takes tens of seconds, and a step milliseconds: the tokens that
# are trained on meanwhile, of all rows and replicas. Measured with BERT-base on an H100: 16 million
# with one replica, 24 million with 15 (experiments/results/benchmarks/gpu.md).
TOKENS_WHILE_COMPILING = 1 << 24
_COARSE = (64, 128, 256, 512)  # for programs that compile for longer than they run

Batch = dict[str, np.ndarray]


def bucket_lengths(max_length: int) -> tuple[int, ...]:
    """Returns the lengths that batches are padded to, ascending; the last is max_length."""
    return (*(length for length in _LENGTHS if length < max_length), max_length)


def evaluation_lengths(max_length: int, rows: int) -> tuple[int, ...]:
    """Returns the lengths that an accelerator pads the batches of an evaluation to, ascending.

    Those of `bucket_lengths` for many rows; for fewer, which would not repay compiling, four at
    most, the same for all such splits, so that they share their programs.
    """
    if rows * max_length > TOKENS_WHILE_COMPILING:
        return bucket_lengths(max_length)
    return (*(length for length in _COARSE if length < max_length), max_length)


def with_short(lengths: tuple[int, ...], longest: np.ndarray, steps: int) -> tuple[int, ...]:
    """Returns `lengths`, and before them the shorter ones that are worth compiling a step for.

    Args:
      lengths: that batches are padded to, see `bucket_lengths`.
      longest: tokens of the longest row of some of the run's batches, int [batches].
      steps: of the run.

    """
    usual = smallest_fit(longest, lengths)

    def gain(short: tuple[int, ...]) -> float:
        saved = usual - smallest_fit(longest, (*short, *lengths))
        return steps * float(saved.mean()) - _WORTH_COMPILING * len(short)

    candidates = [length for length in _SHORT if length < lengths[0]]
    subsets = (itertools.combinations(candidates, n) for n in range(len(candidates) + 1))
    return (*max(itertools.chain(*subsets), key=gain), *lengths)


def worth_compiling(lengths: tuple[int, ...], longest: np.ndarray, rows: int) -> tuple[int, ...]:
    """Returns those of `lengths` that are worth compiling a step for on an accelerator.

    Args:
      lengths: that batches can be padded to, ascending; the last holds every row, and is kept.
      longest: tokens of the longest row of some of the run's batches, int [batches].
      rows: that the run trains on, counted anew in each epoch and replica.

    """

    def tokens(subset: tuple[int, ...]) -> float:
        padded = smallest_fit(longest, (*subset, lengths[-1]))
        programs = len(np.unique(padded))
        return rows * float(padded.mean()) + TOKENS_WHILE_COMPILING * programs

    subsets = (itertools.combinations(lengths[:-1], n) for n in range(len(lengths)))
    return (*min(itertools.chain(*subsets), key=tokens), lengths[-1])


def smallest_fit(tokens: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """Returns the smallest of ascending `lengths` that holds each number of tokens, int [...]."""
    return np.asarray(lengths)[np.searchsorted(lengths, tokens)]


def longest_row(tokens: Tokens, rows: np.ndarray) -> int:
    """Returns the number of tokens of the longest of some rows; a row of -1 is empty."""
    return int(np.where(rows < 0, 0, tokens.lengths[rows]).max())


def padded_length(tokens: Tokens, rows: np.ndarray, lengths: tuple[int, ...]) -> int:
    """Returns the smallest of `lengths` that fits all rows; a row of -1 is empty."""
    longest = longest_row(tokens, rows)
    return next(length for length in lengths if length >= longest)


def pad_rows(tokens: Tokens, rows: np.ndarray, lengths: tuple[int, ...]) -> Batch:
    """Pads rows [..., B] to the smallest of `lengths` that fits them all.

    Returns input_ids, token_type_ids int32 [..., B, L], mask bool [..., B, L], labels [..., B, ...]
    of their dtype, 0 where there is no row, and row_mask bool [..., B]: False for a row of -1,
    which is padding. Where some rows of the split have no label, also labeled bool [..., B]; where
    they are pairs, second_start int32 [..., B], see `Tokens`.
    """
    sizes = np.where(rows < 0, 0, tokens.lengths[rows])
    length = padded_length(tokens, rows, lengths)
    position = np.arange(length)
    mask = position < sizes[..., None]  # [..., B, L]
    labels = tokens.labels[rows]  # [..., B, ...]
    absent = np.reshape(rows < 0, rows.shape + (1,) * (labels.ndim - rows.ndim))
    source = np.where(mask, tokens.starts[rows][..., None] + position, 0)
    known = {} if tokens.labeled is None else {"labeled": (rows >= 0) & tokens.labeled[rows]}
    if tokens.second_starts is not None:
        known["second_start"] = np.where(rows < 0, 0, tokens.second_starts[rows])
    return known | {
        "input_ids": np.where(mask, tokens.input_ids[source], tokens.pad_id).astype(np.int32),
        "token_type_ids": np.where(mask, tokens.token_type_ids[source], 0).astype(np.int32),
        "mask": mask,
        "labels": np.where(absent, 0, labels).astype(tokens.labels.dtype),
        "row_mask": rows >= 0,
    }
