"""Splits of rows: training, validation, calibration, tuning.

Shape letters: N rows.
"""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from sweet_jax.config import Config, UserError


@dataclasses.dataclass(frozen=True)
class Split:
    """Holds the rows of one split, in file order."""

    texts: list[tuple[str, ...]]  # [N] of one text, or of two for pairs
    labels: np.ndarray  # the objective's targets [N, ...]: of classes int32 [N], their indices


def select_rows(rows: Split, indices: Sequence[int] | np.ndarray) -> Split:
    """Returns the rows of the given indices, in the order of these."""
    picked = np.asarray(indices, int)
    return Split([rows.texts[i] for i in picked], rows.labels[picked])


def stratified_split(
    labels: np.ndarray, fraction: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows 0..N-1 at random, every class in proportion (largest remainders).

    A row at least of every class is kept.

    Args:
      labels: int [N].
      fraction: of the rows that are held out.
      rng: draws them.

    Returns:
      (kept, held out) rows, both ascending; round(fraction * N) rows are held out, fewer where
      classes of one row leave no others.

    """
    order = rng.permutation(len(labels))
    counts = np.bincount(labels)
    wanted = counts * fraction
    quota = np.floor(wanted).astype(int)
    missing = round(fraction * len(labels)) - quota.sum()
    by_remainder = np.argsort(-(wanted - quota), kind="stable")
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

    A class that would have no training row then, because its rows repeat one text, is not held out.
    strata: the classes int [N] of the rows, or what stands for them.
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
    """Returns those of the kept rows whose texts are not held out."""
    known = {texts[i] for i in held}
    return np.asarray([i for i in kept if texts[i] not in known], int)


def split_calibration_rows(
    labels: np.ndarray, config: Config, seed: int, targets: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the (training, calibration) rows of one seed, as ascending indices.

    They depend on the labels int [N], the sizes and the seed, never on the method, so that methods
    are compared on the same rows: a row of each class, as far as train_size allows, and others at
    random. There are no calibration rows unless `calibration` is "held_out". The labels are the
    strata of an objective without classes, whose targets [N, ...] are `targets`.
    Raises UserError if the rows are too few to hold some out, or there is nothing to learn.
    """
    size = min(config.train_size, len(labels))
    rng = np.random.default_rng([zlib.crc32(b"subset"), seed])
    if config.subset == "first":  # as in the paper's code, which discards what it shuffled
        subset = np.arange(size)
    else:
        order = rng.permutation(len(labels))
        first = np.sort(np.unique(labels[order], return_index=True)[1])  # place of each class
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
            f"the {size} training rows drawn {what}: raise train_size, or give training rows with "
            "other labels"
        )
    if not len(held):
        raise UserError(
            f"{size} training rows are too few to hold out a fraction of "
            f"{config.calibration_fraction} for calibration: give more rows, or raise train_size "
            "or the fraction"
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

    Tuning rows choose the penalty of a probe, the learning rate and the step that training stops
    at; they never fit temperatures, thresholds or certificates.

    Args:
      labels: of all rows, int [N], or their strata.
      rows: the training rows, ascending.
      fraction: of `rows`, every class in proportion.
      seed: of the replica.
      targets: of all rows [N, ...]; default the labels.

    Raises UserError if the rows are too few.

    """
    rng = np.random.default_rng([zlib.crc32(b"tuning"), seed])
    kept, held = stratified_split(labels[rows], fraction, rng)
    if not len(held) or _is_constant((labels if targets is None else targets)[rows[kept]]):
        raise UserError(
            f"{len(rows)} training rows are too few to hold out a fraction of {fraction:g} for "
            "tuning: give more rows (or a larger train_size or tuning_fraction), or set epochs to "
            "a number, head_init to random, head_refit to False and rate_search to full"
        )
    return rows[kept], rows[held]


def drop_duplicates(
    texts: Sequence[tuple[str, ...]],
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    strata: np.ndarray,
    seeds: Sequence[int],
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Removes training rows whose text is also a calibration text, which would be leaked.

    All replicas lose as many as the one with the most such rows, the others of them at random,
    every class in proportion: they stay equally many, for one program.

    Args:
      texts: of all rows.
      rows: (training, calibration) rows of each replica, ascending.
      strata: the classes int [N] of all rows, or what stands for them.
      seeds: of the replicas.

    Returns:
      (the rows that are left, how many training rows each replica lost).

    """
    distinct = [_without_texts(texts, trained, held) for trained, held in rows]
    repeats = [len(trained) - len(own) for (trained, _), own in zip(rows, distinct, strict=True)]
    most, found = max(repeats), []
    for own, count, seed in zip(distinct, repeats, seeds, strict=True):
        if count < most and len(own):
            rng = np.random.default_rng([zlib.crc32(b"repeats"), seed])
            own = own[stratified_split(strata[own], (most - count) / len(own), rng)[0]]
        found.append(own)
    size = min(map(len, found))  # differs where most classes have one row
    pairs = zip(found, rows, strict=True)
    return [(own[:size], held) for own, (_, held) in pairs], most
