"""Tokens, the rows a replica trains on, and batches of a handful of fixed lengths.

Shape letters: R replica, B batch, N examples, L length.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from sweet_jax.config import Config, UserError
from sweet_jax.data.load import Split, stratified_split

_LENGTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512)  # each one used costs a compilation

_AT_ONCE = 4096  # texts that a tokenizer is given
_GROUP = 50  # batches whose rows are sorted by length together
_SHUFFLE = zlib.crc32(b"groups")  # in the place of a seed: of the order of batches of one length

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One split, tokenised: rows of different lengths end to end."""

    input_ids: np.ndarray  # int32 [total]
    token_type_ids: np.ndarray  # int32 [total]
    starts: np.ndarray  # int64 [N + 1], row n is starts[n]:starts[n + 1]
    labels: np.ndarray  # int32 [N]
    pad_id: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every row, int64 [N]."""
        return np.diff(self.starts)


def encode(
    tokenizer, texts: Sequence[tuple[str, ...]], max_length: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(input_ids, token_type_ids) of every text (or pair), int32 [its tokens] each.

    Truncated to max_length tokens, longest text first.
    """
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
    return ids, [np.asarray(row, np.int32) for row in types]


def tokenize(tokenizer, rows: Split, max_length: int) -> Tokens:
    """Encodes every row once, see `encode`; some at a time: what a tokenizer gives is large."""
    ids, types = [], []
    for start in range(0, len(rows.texts), _AT_ONCE):
        found = encode(tokenizer, rows.texts[start : start + _AT_ONCE], max_length)
        ids += found[0]
        types += found[1]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    return Tokens(
        np.concatenate(ids), np.concatenate(types), starts, rows.labels, tokenizer.pad_token_id
    )


def bucket_lengths(max_length: int) -> tuple[int, ...]:
    """The lengths that batches are padded to, ascending; the last is max_length."""
    return (*(length for length in _LENGTHS if length < max_length), max_length)


def split_calibration_rows(
    labels: np.ndarray, config: Config, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, calibration rows) of one seed, as ascending indices.

    They depend on the labels, the sizes and the seed, never on the method, so that methods are
    compared on the same rows. Calibration rows are empty unless `calibration` is "held_out".
    """
    size = min(config.train_size, len(labels))
    rng = np.random.default_rng([zlib.crc32(b"subset"), seed])
    if config.subset == "first":  # the release shuffles, then drops the result of the shuffle
        subset = np.arange(size)
    else:
        subset = np.sort(rng.permutation(len(labels))[:size])
    if config.calibration != "held_out":
        return subset, np.empty(0, int)
    kept, held = stratified_split(labels[subset], config.calibration_fraction, rng)
    if not len(held) or len(np.unique(labels[subset[kept]])) < 2:
        raise UserError(
            f"{size} training rows are too few to hold out a fraction of "
            f"{config.calibration_fraction} for calibration: give more rows, or raise train_size "
            "or the fraction"
        )
    return subset[kept], subset[held]


def split_tuning_rows(
    labels: np.ndarray, rows: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits training rows into (training rows, tuning rows), both ascending.

    Tuning rows choose the penalty of a probe, the learning rate and the step that training ends at;
    they never fit temperatures, thresholds or certificates.

    Args:
      labels: of all rows, int [N].
      rows: the training rows, ascending.
      fraction: of `rows`, every class in proportion.
      seed: of the replica.

    Raises UserError where the rows are too few.

    """
    rng = np.random.default_rng([zlib.crc32(b"tuning"), seed])
    kept, held = stratified_split(labels[rows], fraction, rng)
    if not len(held) or len(np.unique(labels[rows[kept]])) < 2:
        raise UserError(
            f"{len(rows)} training rows are too few to hold out a fraction of {fraction:g} for "
            "tuning: give more rows (or a larger train_size or tuning_fraction), or set epochs to "
            "a number, head_init to random, head_refit to False and rate_search to full"
        )
    return rows[kept], rows[held]


def drop_duplicates(
    texts: Sequence[tuple[str, ...]], rows: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training rows, calibration rows) of every replica without training rows that repeat a
    calibration text: answers to what was learned by heart say nothing of new texts.

    All replicas keep equally many, the first of their rows.
    """
    found = []
    for trained, held in rows:
        known = {texts[i] for i in held}
        found.append((np.asarray([i for i in trained if texts[i] not in known], int), held))
    size = min(len(trained) for trained, _ in found)
    return [(trained[:size], held) for trained, held in found]


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Batches that visit every row once, the last one partial."""
    return -(-rows // batch_size)


@functools.lru_cache(maxsize=64)
def _epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([zlib.crc32(b"batches"), seed, epoch]).permutation(rows)


def random_batch_indices(
    rows: np.ndarray, seed: int, epoch: int, batch: int, size: int
) -> np.ndarray:
    """Row indices int [B] of one uniformly random batch; -1 fills the last one.

    A pure function of (seed, epoch, batch), so that a resumed run reads what it would have read.
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
    """Row indices int [R, B] of a step: `rows[r]` are replica r's rows, `seeds[r]` its seed.

    lengths: tokens of every row of the split, int [N], to put rows of similar length into one
      batch; None for uniformly random batches.
    """
    per_epoch = steps_per_epoch(len(rows[0]), size)
    epoch, batch = divmod(step, per_epoch)
    if lengths is not None:
        # The same shuffle of batches for all replicas, so that their lengths go together.
        batch = int(_epoch_order(_SHUFFLE, epoch, per_epoch)[batch])
    return np.stack(
        [
            random_batch_indices(r, seed, epoch, batch, size)
            if lengths is None
            else _grouped_batch_indices(r, seed, epoch, batch, size, lengths)
            for r, seed in zip(rows, seeds, strict=True)
        ]
    )


def _grouped_batch_indices(
    rows: np.ndarray, seed: int, epoch: int, batch: int, size: int, lengths: np.ndarray
) -> np.ndarray:
    """As `random_batch_indices`, of rows sorted by length within groups of _GROUP batches.

    As `group_by_length` of transformers' Trainer: which rows share a group is random, so that
    batches differ from epoch to epoch.
    """
    order = _epoch_order(seed, epoch, len(rows))
    start = batch // _GROUP * _GROUP * size
    group = order[start : start + _GROUP * size]
    group = group[np.argsort(lengths[rows[group]], kind="stable")]
    place = batch * size - start
    return _fill(rows[group[place : place + size]], size)


def evaluation_batch_indices(
    tokens: Tokens, rows: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every row once, in batches of similar length: (places in `rows`, row indices), int [R, B].

    rows is int [R, N]: the rows of each replica. -1 fills the last batch.
    """
    order = np.argsort(tokens.lengths[rows], axis=1, kind="stable")  # [R, N]
    for start in range(0, rows.shape[1], size):
        places = np.stack([_fill(o, size) for o in order[:, start : start + size]])  # [R, B]
        picked = np.take_along_axis(rows, np.maximum(places, 0), axis=1)
        yield places, np.where(places < 0, -1, picked)


def padded_length(tokens: Tokens, rows: np.ndarray, lengths: tuple[int, ...]) -> int:
    """The smallest of `lengths` that holds all rows, of which -1 is empty."""
    longest = np.where(rows < 0, 0, tokens.lengths[rows]).max()
    return next(length for length in lengths if length >= longest)


def pad_rows(tokens: Tokens, rows: np.ndarray, lengths: tuple[int, ...]) -> Batch:
    """Rows [..., B] as arrays padded to the smallest of `lengths` that holds them all.

    Returns input_ids, token_type_ids int32 [..., B, L], mask bool [..., B, L], labels int32
    [..., B] and row_mask bool [..., B]: False for a row of -1, which is padding.
    """
    sizes = np.where(rows < 0, 0, tokens.lengths[rows])
    length = padded_length(tokens, rows, lengths)
    position = np.arange(length)
    mask = position < sizes[..., None]  # [..., B, L]
    source = np.where(mask, tokens.starts[rows][..., None] + position, 0)
    return {
        "input_ids": np.where(mask, tokens.input_ids[source], tokens.pad_id).astype(np.int32),
        "token_type_ids": np.where(mask, tokens.token_type_ids[source], 0).astype(np.int32),
        "mask": mask,
        "labels": np.where(rows < 0, 0, tokens.labels[rows]).astype(np.int32),
        "row_mask": rows >= 0,
    }


def _fill(rows: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([rows, np.full(size - len(rows), -1, rows.dtype)])
