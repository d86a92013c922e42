"""Decision thresholds for multi-label models: the logit above which each label is predicted.

Shape letters: N rows, C labels.
"""

import numpy as np

_DRAWS = 30  # bootstrap draws of the rows that the thresholds are fitted on
_PRIOR_ROWS = 4.0  # additional wrong rows in the F1 that a threshold maximizes
_LARGEST_SHIFT = 4.0  # largest absolute threshold: a probability between 0.018 and 0.982


def best_f1_shifts(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Returns the threshold on each label's logit that maximizes its F1, float [C].

    The best threshold on a small number of rows varies considerably, so thresholds are averaged
    over bootstrap draws of the rows (bagging, Breiman 1996). Every call uses the same draws.

    Args:
      logits: logits of the labels, float [N, C].
      targets: whether each row has each label, bool [N, C].

    """
    rng, count = np.random.default_rng(0), len(logits)
    draws = [rng.integers(0, count, count) for _ in range(_DRAWS)]
    each = [
        [_best_f1_shift(own[rows], true[rows]) for rows in draws]
        for own, true in zip(logits.T.astype(np.float64), targets.T, strict=True)
    ]
    return np.mean(each, axis=1)


def _best_f1_shift(logits: np.ndarray, targets: np.ndarray) -> float:
    """Returns the threshold, from -4 to 4, that maximizes the F1 of one label.

    The F1 is computed as if four additional rows were wrong, so that the threshold of a label with
    few rows stays at 0. It also stays at 0 if no other threshold has a larger F1.

    Args:
      logits: logits of the label, float [N].
      targets: whether each row has the label, bool [N].

    """
    order = np.argsort(-logits, kind="stable")
    levels = logits[order]
    places = np.flatnonzero(levels[1:] < levels[:-1])  # between two rows
    middles = (levels[places] + levels[places + 1]) / 2
    allowed = np.abs(middles) <= _LARGEST_SHIFT
    places, middles = places[allowed], middles[allowed]
    predicted = np.append((logits > 0).sum(), places + 1)
    hits = np.append(targets[logits > 0].sum(), np.cumsum(targets[order])[places])
    best = int((2 * hits / (predicted + targets.sum() + _PRIOR_ROWS)).argmax())
    return 0.0 if best == 0 else float(middles[best - 1])
