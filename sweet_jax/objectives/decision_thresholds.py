"""Decision thresholds of several labels: the logit from which on each label is given.

Shape letters: N rows, C labels.
"""

import numpy as np

_DRAWS = 30  # of the rows that decisions are fitted on
_PRIOR_ROWS = 4.0  # wrong ones, in the F1 of a label's decision
_LARGEST_SHIFT = 4.0  # of a decision: of logits, a probability from 0.018 to 0.982


def best_f1_shifts(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the logit of each label from which on it is given for the best F1, float [C].

    Of logits float [N, C] and targets bool [N, C]: the mean over rows drawn anew (bagging, Breiman
    1996), since the best of a few rows alone varies much. The same draws at every call.
    """
    rng, count = np.random.default_rng(0), len(logits)
    draws = [rng.integers(0, count, count) for _ in range(_DRAWS)]
    each = [
        [_best_f1_shift(own[rows], true[rows]) for rows in draws]
        for own, true in zip(logits.T.astype(np.float64), targets.T, strict=True)
    ]
    return np.mean(each, axis=1)


def _best_f1_shift(logits: np.ndarray, targets: np.ndarray) -> float:
    """Returns the logit from which on a label has the best F1, of logits [N] and bool [N].

    The F1 is shrunk as if by four more rows that are wrong, so that a label of few rows stays at 0;
    so does one that no other logit is better for. At most 4 from 0.
    """
    order = np.argsort(-logits, kind="stable")
    levels = logits[order]
    places = np.flatnonzero(levels[1:] < levels[:-1])  # between two rows
    middles = (levels[places] + levels[places + 1]) / 2
    allowed = np.abs(middles) <= _LARGEST_SHIFT
    places, middles = places[allowed], middles[allowed]
    given = np.append((logits > 0).sum(), places + 1)
    hits = np.append(targets[logits > 0].sum(), np.cumsum(targets[order])[places])
    best = int((2 * hits / (given + targets.sum() + _PRIOR_ROWS)).argmax())
    return 0.0 if best == 0 else float(middles[best - 1])
