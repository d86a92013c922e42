"""Baselines without an encoder: the best constant, and a linear model on TF-IDF features.

Shape letters: N examples, M training examples, F features, C classes.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sweet_jax.exits.metrics import compute_metric
from sweet_jax.objectives import SINGLE_LABEL, Objective

_INVERSE_PENALTIES = (1.0, 10.0, 100.0)  # C of the logistic regression, the inverse of its penalty
_USUAL_INVERSE_PENALTY = 10.0  # used without tuning rows
# Bounds on time and memory for large data sets; a few thousand rows stay below all of them.
_ROWS = 50_000  # maximum number of rows to fit or tune on
_CHARACTERS = 20_000_000  # maximum number of characters of these rows
_LONGEST = 5_000  # characters read per text; an encoder's 512 tokens are about 2,500
_FEATURES = 200_000  # maximum number of features of all columns
_WEIGHTS = 2_000_000  # maximum number of weights; L-BFGS keeps about 25 copies
_WORK = 20_000_000_000  # products of features and classes, which bounds L-BFGS's iterations
_AT_ONCE = 10_000  # number of rows to predict at once
_FOLDS = 5  # folds of the cross-validation on which decision thresholds are fitted


def constant_predictions(
    targets: np.ndarray, n: int, classes: int, objective: Objective = SINGLE_LABEL
) -> np.ndarray:
    """Returns the best prediction without features for targets [M, ...], repeated n times.

    For classes it is the most frequent class, the first among ties, int64 [n].
    """
    prediction = np.asarray(objective.linear.constant(targets, classes))
    return np.broadcast_to(prediction, (n, *prediction.shape)).copy()


def tfidf_predictions(
    train_texts: Sequence[tuple[str, ...]],
    train_labels: np.ndarray,
    texts: Sequence[tuple[str, ...]],
    *,
    tuning: tuple[Sequence[tuple[str, ...]], np.ndarray] | None = None,
    seed: int = 0,
    objective: Objective = SINGLE_LABEL,
    fit_decisions: bool = False,
) -> np.ndarray:
    """Predicts the classes of texts by logistic regression on TF-IDF features, int64 [N].

    For other objectives, predicts their targets [N, ...] with their linear model, see
    `LinearModel.text_model`.

    Features are words and pairs of adjacent words, with sublinear frequencies. The two texts of a
    pair have separate features, since a word of the hypothesis means something else than in the
    premise, and no pair of words spans both texts. C is the value of 1, 10 and 100 with the best
    accuracy (for other objectives, their first metric) on the tuning rows, the smallest among ties;
    10 without tuning rows.

    Time and memory are bounded for data of any size: the model is fitted on at most 50,000 rows,
    drawn with a fixed seed, and 20 million characters. It reads 5,000 characters per text and has
    at most 200,000 features, fewer with more than ten classes. This takes at most about 1 GB and
    two minutes on one core, and prediction takes time proportional to N.

    If the training rows have a single class or contain no words, predicts their majority class.
    Words are those of scikit-learn, two or more letters between boundaries, so this is a weak
    baseline for languages written without spaces.

    Args:
      train_texts: M tuples of one text each, or of two texts for pairs.
      train_labels: targets of the training rows; for single-label classification int [M].
      texts: N tuples with as many texts each as in the training rows.
      tuning: (texts, targets) of rows on which C is chosen, neither trained on nor reported.
      seed: random seed of the draw of training rows.
      objective: objective that defines the targets.
      fit_decisions: whether to fit the decision threshold of each label, as for the exits
        (`Objective.decision_shifts`), to the chosen model on the tuning rows. Without tuning rows,
        they are fitted by cross-validation on the training rows, if there are at least five, which
        takes about four times as long as one fit.

    """
    use = _drawn(train_texts, seed)
    rows = [train_texts[i] for i in use]
    labels = np.asarray(train_labels)[use]  # [M, ...], at most 50,000
    labels = labels.astype(np.int64) if labels.dtype.kind in "biu" else labels
    outputs = labels.shape[1] if objective.target_per_output else len(np.unique(labels))
    classes = 1 if objective.agrees is None else outputs  # weights of a feature
    vectorizers = _fit_vectorizers(rows, classes)
    if outputs == 1 or all(vectorizer is None for vectorizer in vectorizers):
        return constant_predictions(train_labels, len(texts), 1, objective)
    features = _features(vectorizers, rows)
    iterations = int(np.clip(_WORK // (features.nnz * classes + 1), 20, 1000))
    data = _TrainingData(features, labels, outputs, objective, iterations)
    if tuning is not None and len(tuning[0]):
        held_out = _drawn(tuning[0], seed)
        tuning_features = _features(vectorizers, [tuning[0][i] for i in held_out])
        targets = np.asarray(tuning[1])[held_out]
        model = _best_model(data, tuning_features, targets, fit_decisions)
    else:
        model = _usual_model(data, fit_decisions)
    parts = [texts[start : start + _AT_ONCE] for start in range(0, len(texts), _AT_ONCE)]
    return np.concatenate([model.predict(_features(vectorizers, part)) for part in parts])


class _TrainingData(NamedTuple):
    """Holds the rows that models are fitted on."""

    features: Any  # sparse matrix [M, F]
    labels: np.ndarray  # [M, ...]
    outputs: int  # number of classes, or of labels
    objective: Objective
    iterations: int  # maximum number of iterations of a fit

    def fit(self, inverse_penalty: float, rows: np.ndarray | None = None) -> "_TextModel":
        """Returns a model fitted on some rows, or on all."""
        estimator = self.objective.linear.text_model(inverse_penalty, self.iterations)
        features = self.features if rows is None else self.features[rows]
        labels = self.labels if rows is None else self.labels[rows]
        with warnings.catch_warnings():
            # Users cannot act on these. They concern convergence, although predictions near the
            # optimum are the same, and labels that no row has.
            warnings.simplefilter("ignore", UserWarning)
            return _TextModel(estimator.fit(features, labels), multi_label=labels.ndim > 1)


class _TextModel(NamedTuple):
    """Holds a fitted estimator and, for multi-label objectives, its decision thresholds."""

    estimator: Any
    multi_label: bool
    shifts: np.ndarray | None = None  # logits [C] above which a label is predicted; None means 0

    def logits(self, features: Any) -> np.ndarray:
        """Returns the logits of each label, [N, C]."""
        return self.estimator.decision_function(features)

    def predict(self, features: Any) -> np.ndarray:
        """Returns the predictions for features [N, F], [N, ...]."""
        if self.shifts is not None:
            return self.logits(features) > self.shifts
        predicted = self.estimator.predict(features)
        return predicted.astype(bool) if self.multi_label else predicted


def _best_model(
    data: _TrainingData, features: Any, targets: np.ndarray, fit_decisions: bool
) -> _TextModel:
    """Returns the model with the best C on tuning rows [N, F], its thresholds fitted there too."""
    metric, fit_shifts = data.objective.metrics[0], data.objective.decision_shifts

    def score(model: _TextModel) -> float:
        return compute_metric(metric, model.predict(features), targets, data.outputs)

    best = max(map(data.fit, _INVERSE_PENALTIES), key=score)  # the first among ties
    if not fit_decisions or fit_shifts is None:
        return best
    return best._replace(shifts=fit_shifts(best.logits(features), targets))


def _usual_model(data: _TrainingData, fit_decisions: bool) -> _TextModel:
    """Returns the model with the usual C, its thresholds fitted by cross-validation."""
    model, fit_shifts = data.fit(_USUAL_INVERSE_PENALTY), data.objective.decision_shifts
    if not fit_decisions or fit_shifts is None or len(data.labels) < _FOLDS:
        return model
    return model._replace(shifts=fit_shifts(_held_out_logits(data), data.labels.astype(bool)))


def _held_out_logits(data: _TrainingData) -> np.ndarray:
    """Returns the logits of each row by the model fitted on the other folds, float64 [M, C]."""
    folds = np.random.default_rng(0).permutation(len(data.labels)) % _FOLDS
    logits = np.empty(data.labels.shape)
    for fold in range(_FOLDS):
        own, others = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        known = data.labels[others].any(axis=0)  # a model cannot find a label it has not seen
        fitted = data.fit(_USUAL_INVERSE_PENALTY, others)
        logits[own] = np.where(known, fitted.logits(data.features[own]), -np.inf)
    return logits


def _drawn(texts: Sequence[tuple[str, ...]], seed: int) -> np.ndarray:
    """Returns the ascending indices of the rows to fit on: all, or a sample within the bounds."""
    order = np.random.default_rng(seed).permutation(len(texts))[:_ROWS]
    size = np.cumsum([sum(min(len(text), _LONGEST) for text in texts[i]) for i in order])
    return np.sort(order[: max(1, int((size <= _CHARACTERS).sum()))])


def _columns(texts: Iterable[tuple[str, ...]]) -> list[list[str]]:
    return [[text[:_LONGEST] for text in column] for column in zip(*texts, strict=True)]


def _fit_vectorizers(texts: Sequence[tuple[str, ...]], classes: int) -> list[Any]:
    """Fits a vectorizer for each text column; None for a column without words."""
    # Imported here because it takes a second, and reading a finished run does not need it.
    from sklearn.feature_extraction.text import TfidfVectorizer

    columns = _columns(texts)
    most = min(_FEATURES, _WEIGHTS // classes) // len(columns)
    fitted = []
    for column in columns:
        usable = None
        # With many rows, drop terms that occur in a single row, unless that drops all terms.
        for least in (2, 1) if len(texts) >= 1000 else (1,):
            vectorizer = TfidfVectorizer(
                ngram_range=(1, 2), sublinear_tf=True, min_df=least, max_features=most
            )
            try:
                usable = vectorizer.fit(column)
                break
            except ValueError:  # there are no words
                continue
        fitted.append(usable)
    return fitted


def _features(vectorizers: Sequence[Any], texts: Sequence[tuple[str, ...]]) -> Any:
    """Returns the TF-IDF features of texts, a sparse matrix [N, F]."""
    import scipy.sparse

    pairs = zip(vectorizers, _columns(texts), strict=True)
    return scipy.sparse.hstack([v.transform(c) for v, c in pairs if v is not None], format="csr")
