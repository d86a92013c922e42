"""The tokens of rows, and the selection of the rows of each batch.

Shape letters: R replica, B batch, N rows, L length.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from sweet_jax.data.splits import Split

UNLIMITED = 1 << 30  # a max_length that truncates no text

_AT_ONCE = 4096  # number of texts tokenized in one call, since the tokenizer's output is large
_COUNTED = 1000  # maximum number of possibly truncated texts whose full length is counted
_GROUP = 50  # number of batches whose rows are sorted by length together
_SHUFFLE = zlib.crc32(b"groups")  # seed for the order of batches that are grouped by length


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Holds the tokens of a split as concatenated rows of different lengths."""

    input_ids: np.ndarray  # int32 [total]
    token_type_ids: np.ndarray  # int32 [total]
    starts: np.ndarray  # int64 [N + 1], row n is starts[n]:starts[n + 1]
    labels: np.ndarray  # the objective's targets [N, ...], as used in training
    pad_id: int
    labeled: np.ndarray | None = None  # bool [N], if some rows have no label
    second_starts: np.ndarray | None = None  # int32 [N], for pairs: see `second_start`

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each row, int64 [N]."""
        return np.diff(self.starts)


def encode(
    tokenizer, texts: Sequence[tuple[str, ...]], max_length: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the input_ids and the token_type_ids of each text or pair, int32 [length] each.

    Rows are truncated to max_length tokens. The longer text of a pair is truncated first.
    """
    ids, types, _ = encode_pairs(tokenizer, texts, max_length)
    return ids, types


def encode_pairs(
    tokenizer, texts: Sequence[tuple[str, ...]], max_length: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[int]]:
    """Returns what `encode` does, and the `second_start` of each pair; [] for single texts."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokenizer(
        *columns,
        truncation=True,
        max_length=max_length,
        return_token_type_ids=True,
        return_attention_mask=False,
    )
    ids = [np.asarray(row, np.int32) for row in encoded["input_ids"]]
    types = encoded.get("token_type_ids") or [np.zeros(len(row)) for row in ids]
    rows = encoded.encodings if len(columns) == 2 else ()
    starts = [second_start(row.sequence_ids) for row in rows]
    return ids, [np.asarray(row, np.int32) for row in types], starts


def second_start(sequence_ids: list[int | None]) -> int:
    """Returns the position of the first token of a pair's second text.

    If the second text is empty, this is the position of the last token of the row. Token types are
    not used because some tokenizers have none.

    Args:
      sequence_ids: sequence ids of a `tokenizers.Encoding`: for each token, 0 or 1 for the text it
        belongs to, or None for a special token.

    """
    return sequence_ids.index(1) if 1 in sequence_ids else max(len(sequence_ids) - 1, 0)


def tokenize(tokenizer, rows: Split, max_length: int) -> Tokens:
    """Returns the tokens of every row; see `encode`."""
    ids, types, seconds = [], [], []
    for start in range(0, len(rows.texts), _AT_ONCE):
        encoded = encode_pairs(tokenizer, rows.texts[start : start + _AT_ONCE], max_length)
        ids += encoded[0]
        types += encoded[1]
        seconds += encoded[2]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    return Tokens(
        np.concatenate(ids),
        np.concatenate(types),
        starts,
        rows.labels,
        tokenizer.pad_token_id,
        second_starts=np.asarray(seconds, np.int32) if seconds else None,
    )


def append_unlabeled(tokens: Tokens, others: Tokens) -> Tokens:
    """Returns the rows of `tokens` followed by those of `others`, which are marked as unlabeled."""
    starts = np.concatenate([tokens.starts, tokens.starts[-1] + others.starts[1:]])
    seconds = [each.second_starts for each in (tokens, others) if each.second_starts is not None]
    return Tokens(
        np.concatenate([tokens.input_ids, others.input_ids]),
        np.concatenate([tokens.token_type_ids, others.token_type_ids]),
        starts,
        np.concatenate([tokens.labels, others.labels]),
        tokens.pad_id,
        np.arange(len(starts) - 1) < len(tokens),
        np.concatenate(seconds) if seconds else None,
    )


def whole_lengths(tokenizer, texts: Sequence[tuple[str, ...]], tokens: Tokens) -> np.ndarray:
    """Returns the number of tokens of each row before truncation, int64 [N].

    If many rows may have been truncated, only a sample of 1,000, drawn with a fixed seed, is
    counted, and the lengths of the others are taken from it.

    Args:
      tokenizer: tokenizer of the rows.
      texts: texts of the rows [N].
      tokens: truncated tokens of the rows.

    """
    lengths = tokens.lengths.astype(np.int64)
    cut = np.flatnonzero(lengths == lengths.max())
    counted = np.random.default_rng(0).permutation(cut)[:_COUNTED]
    ids, _ = encode(tokenizer, [texts[i] for i in counted], UNLIMITED)
    whole = np.asarray([len(row) for row in ids])
    lengths[cut] = np.resize(whole, len(cut))
    lengths[counted] = whole
    return lengths


def longer_than(
    tokenizer, texts: Sequence[tuple[str, ...]], tokens: int, lengths: np.ndarray | None = None
) -> np.ndarray:
    """Returns whether each row has more than `tokens` tokens, bool [N].

    Args:
      tokenizer: tokenizer of the rows.
      texts: texts of the rows [N].
      tokens: number of tokens.
      lengths: lengths of the rows truncated to `tokens` tokens, int [N], if known.

    """
    longer = np.zeros(len(texts), bool)
    rows = np.arange(len(texts)) if lengths is None else np.flatnonzero(lengths >= tokens)
    if rows.size:
        ids, _ = encode(tokenizer, [texts[i] for i in rows.tolist()], tokens + 1)
        longer[rows] = [len(row) > tokens for row in ids]
    return longer


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Returns the number of batches in an epoch; the last one may be partial."""
    return -(-rows // batch_size)


@functools.lru_cache(maxsize=64)
def _epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([zlib.crc32(b"batches"), seed, epoch]).permutation(rows)


def random_batch_indices(
    rows: np.ndarray, seed: int, epoch: int, batch: int, size: int
) -> np.ndarray:
    """Returns the rows of one uniformly random batch, int [B]; a partial batch is filled with -1.

    This is a pure function of (seed, epoch, batch), so that a resumed run reads the same batches as
    an uninterrupted one.
    """
    order = _epoch_order(seed, epoch, len(rows))[batch * size : (batch + 1) * size]
    return _fill(rows[order], size)


def training_batch_indices(
    rows: Sequence[np.ndarray],
    seeds: Sequence[int],
    step: int,
    size: int,
    lengths: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the rows of a training step, int [R, B].

    Args:
      rows: training rows of each replica.
      seeds: seed of each replica.
      step: number of the step, from 0.
      size: batch size, B.
      lengths: number of tokens of each row of the split, int [N], to batch rows of similar length;
        None for uniformly random batches.

    """
    epoch, batch = _batch_of_step(len(rows[0]), step, size, grouped=lengths is not None)
    return np.stack(
        [
            random_batch_indices(r, seed, epoch, batch, size)
            if lengths is None
            else _grouped_batch_indices(r, seed, epoch, batch, size, lengths)
            for r, seed in zip(rows, seeds, strict=True)
        ]
    )


def rows_of_steps(rows: int, steps: int, size: int, *, grouped: bool) -> np.ndarray:
    """Returns the number of rows of a replica in each of the first steps, int64 [steps].

    It is less than `size` in the partial batch of an epoch.

    Args:
      rows: number of training rows of a replica.
      steps: number of steps.
      size: batch size, B.
      grouped: whether batches group rows of similar length, see `training_batch_indices`.

    """
    batches = (_batch_of_step(rows, step, size, grouped=grouped)[1] for step in range(steps))
    return np.fromiter((min(size, rows - batch * size) for batch in batches), np.int64, steps)


def _batch_of_step(rows: int, step: int, size: int, *, grouped: bool) -> tuple[int, int]:
    """Returns the epoch of a step, and the number of its batch among those of the epoch."""
    per_epoch = steps_per_epoch(rows, size)
    epoch, batch = divmod(step, per_epoch)
    if grouped:
        # All replicas use the same order of batches, so that their batches have similar lengths.
        batch = int(_epoch_order(_SHUFFLE, epoch, per_epoch)[batch])
    return epoch, batch


def _grouped_batch_indices(
    rows: np.ndarray, seed: int, epoch: int, batch: int, size: int, lengths: np.ndarray
) -> np.ndarray:
    """Returns a batch like `random_batch_indices`, with rows sorted by length in _GROUP batches.

    As with `group_by_length` in transformers' Trainer, groups are random, so that batches differ
    between epochs.
    """
    order = _epoch_order(seed, epoch, len(rows))
    start = batch // _GROUP * _GROUP * size
    group = order[start : start + _GROUP * size]
    group = group[np.argsort(lengths[rows[group]], kind="stable")]
    offset = batch * size - start
    return _fill(rows[group[offset : offset + size]], size)


def evaluation_batch_indices(
    tokens: Tokens, rows: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields every row once, in batches of similar length.

    Args:
      tokens: tokens of the split.
      rows: rows of each replica, int [R, N].
      size: batch size, B.

    Yields:
      (positions in `rows`, rows), int [R, B] each; the last batch is filled with -1.

    """
    order = np.argsort(tokens.lengths[rows], axis=1, kind="stable")  # [R, N]
    for start in range(0, rows.shape[1], size):
        positions = np.stack([_fill(o, size) for o in order[:, start : start + size]])  # [R, B]
        picked = np.take_along_axis(rows, np.maximum(positions, 0), axis=1)
        yield positions, np.where(positions < 0, -1, picked)


def _fill(rows: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([rows, np.full(size - len(rows), -1, rows.dtype)])
