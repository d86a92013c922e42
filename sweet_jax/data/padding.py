"""Padding of batches to a few fixed lengths, since each length requires compilation.

Shape letters: B batch, L length.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from sweet_jax.data.batches import Tokens

_LENGTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512)
_SHORT = (16, 24)  # used only if a run has enough batches that are this short: see `with_short`
# Number of tokens per row, summed over the steps of a run, that another length must save. It is
# about the number of tokens that a run trains on in the time of one compilation. With 16 rows and
# one replica on one core, this is 27 steps of 32 tokens at MiniLM's shape, and 6 at MPNet-base's
# (experiments/benchmarks/short_texts.py); with more rows, it is fewer.
_WORTH_COMPILING = 1024
# On accelerators, a step takes milliseconds, but its compilation takes tens of seconds. This is the
# number of tokens, over all rows and replicas, that a run trains on in that time. Measured with
# BERT-base on an H100, it was 16 million with one replica and 24 million with 15
# (experiments/results/benchmarks/gpu.md).
TOKENS_WHILE_COMPILING = 1 << 24
_COARSE = (64, 128, 256, 512)  # for programs whose compilation takes longer than their execution

Batch = dict[str, np.ndarray]


def bucket_lengths(max_length: int) -> tuple[int, ...]:
    """Returns the lengths that batches are padded to, in ascending order up to max_length."""
    return (*(length for length in _LENGTHS if length < max_length), max_length)


def evaluation_lengths(max_length: int, rows: int) -> tuple[int, ...]:
    """Returns the lengths that evaluation batches are padded to on an accelerator, ascending.

    For many rows, these are the lengths of `bucket_lengths`. Fewer rows do not justify compiling
    for so many lengths: they get at most five, which are the same for all such splits, so that
    these share their compiled programs.
    """
    if rows * max_length > TOKENS_WHILE_COMPILING:
        return bucket_lengths(max_length)
    return (*(length for length in _COARSE if length < max_length), max_length)


def with_short(lengths: tuple[int, ...], longest: np.ndarray, steps: int) -> tuple[int, ...]:
    """Returns `lengths`, preceded by the shorter ones that are worth compiling a step for.

    Args:
      lengths: lengths that batches are padded to; see `bucket_lengths`.
      longest: numbers of tokens in the longest rows of some of the run's batches, int [batches].
      steps: number of steps of the run.

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
      lengths: lengths that batches can be padded to, ascending; the last, which fits every row, is
        always kept.
      longest: numbers of tokens in the longest rows of some of the run's batches, int [batches].
      rows: number of rows that the run trains on, counted again in each epoch and replica.

    """

    def tokens(subset: tuple[int, ...]) -> float:
        padded = smallest_fit(longest, (*subset, lengths[-1]))
        programs = len(np.unique(padded))
        return rows * float(padded.mean()) + TOKENS_WHILE_COMPILING * programs

    subsets = (itertools.combinations(lengths[:-1], n) for n in range(len(lengths)))
    return (*min(itertools.chain(*subsets), key=tokens), lengths[-1])


def smallest_fit(tokens: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """Returns the smallest of ascending `lengths` that fits each number of tokens, int [...]."""
    return np.asarray(lengths)[np.searchsorted(lengths, tokens)]


def longest_row(tokens: Tokens, rows: np.ndarray) -> int:
    """Returns the number of tokens in the longest of `rows`; a row of -1 is empty."""
    return int(np.where(rows < 0, 0, tokens.lengths[rows]).max())


def padded_length(tokens: Tokens, rows: np.ndarray, lengths: tuple[int, ...]) -> int:
    """Returns the smallest of `lengths` that fits all rows; a row of -1 is empty."""
    longest = longest_row(tokens, rows)
    return next(length for length in lengths if length >= longest)


def pad_rows(tokens: Tokens, rows: np.ndarray, lengths: tuple[int, ...]) -> Batch:
    """Pads rows [..., B] to the smallest of `lengths` that fits them all.

    Returns:
      A batch with input_ids and token_type_ids int32 [..., B, L]; mask bool [..., B, L]; labels
      [..., B, ...], which keep their dtype and are 0 for padding rows; and row_mask bool [..., B],
      False for padding rows, which are given as -1. If some rows of the split have no label, it
      also has labeled bool [..., B]; if the rows are pairs, second_start int32 [..., B] (see
      `Tokens`). A padding row has one token, or one in each text of a pair, so that no pooling
      reduces an empty set: the gradient of an infinite result would be NaN, even multiplied by a
      weight of 0.

    """
    pairs = tokens.second_starts is not None
    sizes = np.where(rows < 0, 1 + pairs, tokens.lengths[rows])
    length = padded_length(tokens, rows, lengths)
    position = np.arange(length)
    mask = position < sizes[..., None]  # [..., B, L]
    labels = tokens.labels[rows]  # [..., B, ...]
    absent = np.reshape(rows < 0, rows.shape + (1,) * (labels.ndim - rows.ndim))
    read = mask & (rows >= 0)[..., None]  # padding rows repeat the first token
    source = np.where(read, tokens.starts[rows][..., None] + position, 0)
    optional = {} if tokens.labeled is None else {"labeled": (rows >= 0) & tokens.labeled[rows]}
    if tokens.second_starts is not None:
        optional["second_start"] = np.where(rows < 0, 1, tokens.second_starts[rows])
    return optional | {
        "input_ids": np.where(mask, tokens.input_ids[source], tokens.pad_id).astype(np.int32),
        "token_type_ids": np.where(mask, tokens.token_type_ids[source], 0).astype(np.int32),
        "mask": mask,
        "labels": np.where(absent, 0, labels).astype(tokens.labels.dtype),
        "row_mask": rows >= 0,
    }
