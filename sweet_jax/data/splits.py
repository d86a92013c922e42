"""Splits into training, validation, calibration and tuning rows.

Shape letters: N rows.
"""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from sweet_jax.config import Config
from sweet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    """Holds the rows of one split, in file order."""

    texts: list[tuple[str, ...]]  # [N], each with one text, or two for pairs
    labels: np.ndarray  # the objective's targets [N, ...]; for classes, their indices int32 [N]


def select_rows(rows: Split, indices: Sequence[int] | np.ndarray) -> Split:
    """Returns the rows with the given indices, in that order."""
    picked = np.asarray(indices, int)
    return Split([rows.texts[i] for i in picked], rows.labels[picked])


def stratified_split(
    labels: np.ndarray, fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows 0..N-1 at random, with every class in proportion (largest remainder method).

    At least one row of every class is kept.

    Args:
      labels: classes of the rows, int [N].
      fraction: fraction of the rows to hold out.
      rng: random generator.

    Returns:
      (kept rows, held-out rows), both ascending. round(fraction * N) rows are held out, or fewer
      if the classes have too few rows.

    """
    order = rng.permutation(len(labels))
    counts = np.bincount(labels)
    exact = counts * fraction
    quota = np.floor(exact).astype(int)
    missing = round(fraction * len(labels)) - quota.sum()
    by_remainder = np.argsort(-(exact - quota), kind="stable")
    while missing > 0 and (quota < counts - 1).any():
        spare = [c for c in by_remainder if quota[c] < counts[c] - 1][:missing]
        quota[spare] += 1
        missing -= len(spare)
    held = np.concatenate([order[labels[order] == c][:n] for c, n in enumerate(quota)])
    return np.setdiff1d(np.arange(len(labels)), held), np.sort(held)


def split_off_validation(
    rows: Split, strata: np.ndarray, fraction: float, seed: int
) -> list[Split]:
    """Splits rows into training and validation; drops training rows that repeat a held-out text.

    If this would leave a class without training rows, because its rows repeat the same text, none
    of its rows are held out.

    Args:
      rows: rows to split.
      strata: classes of the rows, or strata that replace them, int [N].
      fraction: fraction of the rows to hold out.
      seed: seed of the split.

    """
    kept, held = stratified_split(strata, fraction, np.random.default_rng(seed))
    distinct = _without_texts(rows.texts, kept, held)
    lost = np.setdiff1d(strata[kept], strata[distinct])
    if len(lost):
        held = held[~np.isin(strata[held], lost)]
        kept = np.setdiff1d(np.arange(len(rows.labels)), held)
        distinct = _without_texts(rows.texts, kept, held)
    return [select_rows(rows, distinct), select_rows(rows, held)]


def _without_texts(
    texts: Sequence[tuple[str, ...]], kept: np.ndarray, held: np.ndarray
) -> np.ndarray:
    """Returns the kept rows whose texts are not held out."""
    held_texts = {texts[i] for i in held}
    return np.asarray([i for i in kept if texts[i] not in held_texts], int)


def split_calibration_rows(
    labels: np.ndarray, config: Config, seed: int, targets: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the (training, calibration) rows of one seed, as ascending indices.

    Rows depend on the labels, the sizes and the seed but never on the method, so that methods are
    compared on the same rows. One row of each class is drawn, as far as train_size allows, and the
    others at random. There are no calibration rows unless `calibration` is "held_out".

    Args:
      labels: classes of the rows, or the strata of an objective without classes, int [N].
      config: resolved config.
      seed: seed of the replica.
      targets: targets of the rows [N, ...]; the labels by default.

    Raises:
      UserError: if there are too few rows to hold some out, or all of them have the same target.

    """
    size = min(config.train_size, len(labels))
    rng = np.random.default_rng([zlib.crc32(b"subset"), seed])
    if config.subset == "first":  # as in the paper's code, which discards its shuffled rows
        subset = np.arange(size)
    else:
        order = rng.permutation(len(labels))
        first = np.sort(np.unique(labels[order], return_index=True)[1])  # one row of each class
        others = np.setdiff1d(np.arange(len(order)), first)
        subset = np.sort(order[np.concatenate([first, others])[:size]])
    if config.calibration != "held_out":
        return subset, np.empty(0, int)
    kept, held = stratified_split(labels[subset], config.calibration_fraction, rng)
    drawn = (labels if targets is None else targets)[subset]
    if _is_constant(drawn):
        what = "are all of one class" if drawn.dtype.kind == "i" else "all have the same labels"
        what = f"all have the number {drawn[0]:g}" if drawn.dtype.kind == "f" else what
        raise UserError(
            f"the {size} training rows drawn {what}: raise train_size, or add training rows with "
            "other labels"
        )
    if not len(held):
        raise UserError(
            f"{size} training rows are too few to hold out a fraction of "
            f"{config.calibration_fraction} for calibration: add rows, or raise train_size or "
            "calibration_fraction"
        )
    return subset[kept], subset[held]


def _is_constant(targets: np.ndarray) -> bool:
    return bool((targets == targets[:1]).all())


def split_tuning_rows(
    labels: np.ndarray,
    rows: np.ndarray,
    fraction: float,
    seed: int,
    targets: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Splits training rows into (training rows, tuning rows), both ascending.

    Tuning rows choose the penalty of a probe, the learning rate and the state that is kept; they
    are never used to fit temperatures, thresholds or certificates.

    Args:
      labels: classes or strata of all rows, int [N].
      rows: training rows, ascending.
      fraction: fraction of `rows` to hold out, with every class in proportion.
      seed: seed of the replica.
      targets: targets of all rows [N, ...]; the labels by default.

    Raises:
      UserError: if there are too few rows.

    """
    rng = np.random.default_rng([zlib.crc32(b"tuning"), seed])
    kept, held = stratified_split(labels[rows], fraction, rng)
    if not len(held) or _is_constant((labels if targets is None else targets)[rows[kept]]):
        raise UserError(
            f"{len(rows)} training rows are too few to hold out a fraction of {fraction:g} for "
            "tuning: add rows, raise train_size or tuning_fraction, or set epochs to a number, "
            "head_init to random, head_refit to False and rate_search to full"
        )
    return rows[kept], rows[held]


def drop_duplicates(
    texts: Sequence[tuple[str, ...]],
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    strata: np.ndarray,
    seeds: Sequence[int],
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Drops training rows whose text is also a held-out text, since that text would be leaked.

    All replicas lose as many rows as the one with the most such rows: the others also lose random
    rows, with every class in proportion. All replicas thus have the same number of rows, and share
    a compiled program.

    Args:
      texts: texts of all rows.
      rows: (training, held-out) rows of each replica, ascending.
      strata: classes of all rows, or strata that replace them, int [N].
      seeds: seeds of the replicas.

    Returns:
      (remaining rows, number of training rows that each replica lost).

    """
    distinct = [_without_texts(texts, trained, held) for trained, held in rows]
    repeats = [
        len(trained) - len(unique) for (trained, _), unique in zip(rows, distinct, strict=True)
    ]
    most, remaining = max(repeats), []
    for unique, count, seed in zip(distinct, repeats, seeds, strict=True):
        if count < most and len(unique):
            rng = np.random.default_rng([zlib.crc32(b"repeats"), seed])
            unique = unique[stratified_split(strata[unique], (most - count) / len(unique), rng)[0]]
        remaining.append(unique)
    size = min(map(len, remaining))  # sizes differ if most classes have one row
    pairs = zip(remaining, rows, strict=True)
    return [(unique[:size], held) for unique, (_, held) in pairs], most
