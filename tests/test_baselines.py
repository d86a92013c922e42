"""Baselines: TF-IDF, paired intervals, exits below a baseline, and their part of the report."""

import json
import tracemalloc
import warnings

import numpy as np
import pytest

from sweet_jax import ExitOutputs, text_baselines
from sweet_jax.baselines import _without_encoder
from sweet_jax.config import from_mapping
from sweet_jax.errors import UserError
from sweet_jax.exits.analysis import analyse
from sweet_jax.exits.intervals import paired_difference, score_interval
from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.outputs import RunIdentity
from sweet_jax.objectives.decision_thresholds import best_f1_shifts
from sweet_jax.objectives.multi_label import MULTI_LABEL
from sweet_jax.preparation import prepare
from sweet_jax.report.baselines import (
    Baseline,
    baseline_title,
    load_baselines,
    save_baselines,
)
from sweet_jax.report.charts import curve_chart
from sweet_jax.report.console import exit_table
from sweet_jax.report.details import ReportDetails
from sweet_jax.report.figures import curve_figure
from sweet_jax.report.page import write_report
from sweet_jax.report.results import TrainingRecord, build_results
from sweet_jax.report.shortfalls import (
    Shortfall,
    describe_shortfall,
    find_shortfalls,
    shortfall_results,
    shortfall_warning,
)
from sweet_jax.report.traces import baseline_traces
from sweet_jax.text_baselines import constant_predictions, tfidf_predictions

SCRIPT = "<script>document.title='broken'</script>"
ROWS = 300


def paired(both: int, first_only: int, second_only: int, neither: int) -> tuple[np.ndarray, ...]:
    """Returns (first, second, labels) with these numbers of rows right in both, one or neither."""
    sizes = (both, first_only, second_only, neither)
    first, second = np.repeat([1, 1, 0, 0], sizes), np.repeat([1, 0, 1, 0], sizes)
    return first, second, np.ones(sum(sizes), int)


def predict_share(share: float, labels: np.ndarray) -> np.ndarray:
    """Returns predictions that are right in the first `share` of every hundred rows."""
    return np.where(np.arange(len(labels)) % 100 < 100 * share, labels, 1 - labels)


def make_outputs(
    shares: tuple[float, ...], rows: int = ROWS, metric: str = "accuracy"
) -> ExitOutputs:
    """Makes outputs of two replicas whose exits 1, 2 and 4 are right in these shares of rows."""
    labels = np.arange(rows) % 2
    predicted = np.stack([predict_share(share, labels) for share in shares])  # [E, N]
    margins = 1 + np.random.default_rng(0).random(predicted.shape)
    logits = np.where(predicted == 1, margins, -margins)[None, ..., None] * np.asarray([-1.0, 1.0])
    identity = RunIdentity(task="t", metric=metric, replicas=((0, 1e-4), (1, 1e-4)))
    return ExitOutputs(np.tile(logits, (2, 1, 1, 1)), labels, [1, 2, 4], identity=identity)


def make_baseline(name: str, share: float, cost: float, rows: int = ROWS) -> Baseline:
    return Baseline(name, predict_share(share, np.arange(rows) % 2), cost)


def sentences(rows: int, seed: int = 0) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """Returns texts of three words, the second of which determines the class, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, rows)
    common = rng.integers(0, 5, (rows, 2))
    return [
        (f"common{a} telling{label} common{b}",)
        for (a, b), label in zip(common, labels, strict=True)
    ], labels


def test_constant_prediction_is_the_most_frequent_class():
    assert constant_predictions(np.asarray([2, 1, 2, 0]), 3, 4).tolist() == [2, 2, 2]
    assert constant_predictions(np.asarray([1, 0]), 2, 2).tolist() == [0, 0]


def test_tfidf_learns_the_word_that_determines_the_class():
    texts, labels = sentences(200)
    test_texts, test_labels = sentences(100, seed=1)
    predicted = tfidf_predictions(texts, labels, test_texts)
    assert predicted.dtype == np.int64
    np.testing.assert_array_equal(predicted, test_labels)
    np.testing.assert_array_equal(
        tfidf_predictions(texts, labels, test_texts, tuning=(test_texts[:20], test_labels[:20])),
        test_labels,
    )


def test_tfidf_distinguishes_the_columns_of_a_pair():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    words = np.asarray(["the yes the", "the no the"])
    # Joined, all texts have the same words and pairs of words: only the column differs.
    pairs = list(zip(words[labels].tolist(), words[1 - labels].tolist(), strict=True))
    np.testing.assert_array_equal(
        tfidf_predictions(pairs[:100], labels[:100], pairs[100:]), labels[100:]
    )


def test_tfidf_ignores_a_column_without_words():
    labels = np.arange(40) % 2
    pairs = [("?", f"word{label} x") for label in labels]
    np.testing.assert_array_equal(tfidf_predictions(pairs, labels, pairs), labels)


@pytest.mark.parametrize("rows", [10, 1000])  # of 1,000, words of one row are dropped first
def test_tfidf_predicts_the_majority_class_without_any_word(rows):
    labels = np.where(np.arange(rows) % 5 < 3, 1, 0)
    texts = [("a ! 7",)] * rows
    assert tfidf_predictions(texts, labels, [("a real text",), ("",)]).tolist() == [1, 1]


def test_tfidf_keeps_words_of_single_rows_when_none_repeats():
    labels = np.arange(1000) % 2
    texts = [(f"word{i}",) for i in range(1000)]
    np.testing.assert_array_equal(tfidf_predictions(texts, labels, texts), labels)


def test_tfidf_predicts_the_only_class_of_its_training_rows():
    texts = [("some words",), ("other words",)]
    tuning = (texts, np.asarray([0, 1]))
    assert tfidf_predictions(texts, np.asarray([2, 2]), texts, tuning=tuning).tolist() == [2, 2]


def test_tfidf_tunes_its_penalty_on_the_tuning_rows(monkeypatch):
    texts, labels = sentences(60)
    no_rows = (texts[:0], labels[:0])
    np.testing.assert_array_equal(
        tfidf_predictions(texts, labels, texts[:3], tuning=no_rows),
        tfidf_predictions(texts, labels, texts[:3]),
    )
    # With 95 rows of class 0 to 5 of class 1, a strong penalty answers 0 everywhere.
    texts = [("bad",)] * 95 + [("good",)] * 5
    labels = np.repeat([0, 1], [95, 5])
    monkeypatch.setattr(text_baselines, "_INVERSE_PENALTIES", (1e-4, 100.0))
    predicted = tfidf_predictions(
        texts, labels, [("bad",), ("good",)], tuning=([("good",)], np.asarray([1]))
    )
    assert predicted.tolist() == [0, 1]
    predicted = tfidf_predictions(
        texts, labels, [("bad",), ("good",)], tuning=([("bad",)], np.asarray([0]))
    )
    assert predicted.tolist() == [0, 0]  # equally good on the tuning row: the smaller C


def test_tfidf_is_fitted_on_a_bounded_sample(monkeypatch):
    monkeypatch.setattr(text_baselines, "_ROWS", 50)
    texts, labels = sentences(400)
    drawn = text_baselines._drawn(texts, 0)
    assert len(drawn) == 50
    assert (np.diff(drawn) > 0).all()
    assert not np.array_equal(drawn, text_baselines._drawn(texts, 1))
    predicted = tfidf_predictions(texts, labels, texts)
    np.testing.assert_array_equal(predicted, tfidf_predictions(texts, labels, texts))
    np.testing.assert_array_equal(predicted, labels)
    monkeypatch.setattr(text_baselines, "_CHARACTERS", 200)  # texts have 24 characters
    assert len(text_baselines._drawn(texts, 0)) == 8
    monkeypatch.setattr(text_baselines, "_CHARACTERS", 1)
    assert len(text_baselines._drawn(texts, 0)) == 1
    monkeypatch.setattr(text_baselines, "_WEIGHTS", 30)
    (fitted,) = text_baselines._fit_vectorizers(texts, 10)
    assert len(fitted.vocabulary_) == 3
    monkeypatch.setattr(text_baselines, "_LONGEST", 3)
    assert text_baselines._columns([("abcdef", "x")]) == [["abc"], ["x"]]


def test_tfidf_predicts_many_rows_in_batches(monkeypatch):
    monkeypatch.setattr(text_baselines, "_AT_ONCE", 7)
    texts, labels = sentences(100)
    np.testing.assert_array_equal(tfidf_predictions(texts, labels, texts), labels)


def test_tfidf_emits_no_warnings_when_iterations_run_out(monkeypatch):
    monkeypatch.setattr(text_baselines, "_WORK", 0)  # 20 iterations
    texts, labels = sentences(300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tfidf_predictions(texts, labels, texts)


@pytest.mark.parametrize("tuned", [True, False])
def test_tfidf_decision_thresholds_raise_f1_of_rare_labels(tuned):
    """A label's word is mostly in rows without the label, so a threshold of 0.5 finds few."""
    rng = np.random.default_rng(0)
    labels = rng.random((900, 2)) < 0.1
    words = (labels | (rng.random(labels.shape) < 0.15)).tolist()
    texts = [(f"common{i % 7}" + " first" * a + " second" * b,) for i, (a, b) in enumerate(words)]
    options = {"objective": MULTI_LABEL, "tuning": (texts[300:600], labels[300:600])}
    if not tuned:
        del options["tuning"]
    rows = texts[:300], labels[:300], texts[600:]
    at_half = tfidf_predictions(*rows, **options)
    at_fitted = tfidf_predictions(*rows, **options, fit_decisions=True)
    assert at_fitted.dtype == bool
    f1 = [
        compute_metric(MULTI_LABEL.metrics[0], predicted, labels[600:], 2)
        for predicted in (at_half, at_fitted)
    ]
    assert f1[0] < 0.4
    assert f1[1] > 0.55


def test_label_of_a_single_fold_is_not_predicted_in_that_fold():
    labels = np.zeros((20, 2), bool)
    labels[3, 0], labels[::2, 1] = True, True
    features = labels + np.random.default_rng(0).random((20, 2))
    data = text_baselines._TrainingData(features, labels, 2, MULTI_LABEL, 100)
    logits = text_baselines._held_out_logits(data)
    assert np.isneginf(logits[3]).tolist() == [True, False]
    assert np.isneginf(logits).sum() == 4  # its fold
    assert best_f1_shifts(logits, labels)[0] == 0


@pytest.mark.parametrize(
    ("key", "value", "fitted"),
    [
        ("metric", "micro_f1", True),
        ("metric", "subset_accuracy", False),
        ("decision_thresholds", "half", False),
    ],
)
def test_run_fits_decision_thresholds_of_tfidf_as_of_its_exits(
    key, value, fitted, checkpoint, tmp_path, monkeypatch
):
    rows = [{"text": f"word{i}", "label": ["a", "b"][: i % 3]} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {"task": "own", "data_files": str(tmp_path / "rows.jsonl"), "text_columns": "text"}
    values |= {
        "objective": "multi_label",
        "checkpoint": str(checkpoint),
        "exits": (1, 3),
        "max_length": 32,
    }
    job = prepare(from_mapping(values | {"train_size": 40, key: value}))
    requested = []

    def record_request(texts, labels, test_texts, **options):
        requested.append(options["fit_decisions"])
        return np.zeros((len(test_texts), 2), bool)

    monkeypatch.setattr("sweet_jax.baselines.tfidf_predictions", record_request)
    _without_encoder(job)
    assert set(requested) == {fitted}
    assert job.fits_decisions == fitted


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe 1998, table II, method 10
        ((14, 5, 0, 22), 0.011, 0.226),  # Altman et al. 2000, Statistics with confidence, table 6.2
    ],
)
def test_paired_interval_equals_published_values(table, low, high):
    difference, *interval = paired_difference("accuracy", *paired(*table), classes=2)
    assert difference == pytest.approx((table[1] - table[2]) / sum(table))
    digits = 4 if low == 0.0569 else 3
    assert [round(v, digits) for v in interval] == [low, high]


def test_paired_interval_adds_squared_widths_without_correlation():
    # 25 of each: phi is 0, both shares 1/2, Wilson's half width of 50 in 100 is 0.0963. By hand:
    # z^2 / (1 + z^2 / n) ... = 1.96 sqrt(0.25 / 100 + 0.0096^2) / 1.0384 = 0.0962, times sqrt(2).
    difference, low, high = paired_difference("accuracy", *paired(25, 25, 25, 25), classes=2)
    assert difference == 0
    assert (low, high) == pytest.approx((-0.1361, 0.1361), abs=1e-4)


def test_paired_interval_excludes_zero_only_if_significant():
    def interval(*table):
        return paired_difference("accuracy", *paired(*table), classes=2)[1:]

    assert interval(200, 30, 10, 60)[0] > 0
    assert interval(200, 10, 30, 60)[1] < 0
    low, high = interval(200, 22, 18, 60)
    assert low < 0 < high
    for table in ((10, 0, 0, 5), (10, 0, 0, 0), (0, 0, 0, 9)):  # equal predictions
        low, high = interval(*table)
        assert low < 0 < high
    # Unpaired, 240 against 215 of 300 is not significant; paired by row, it is.
    low, high = interval(215, 25, 0, 60)
    assert low > 0
    first, second, labels = paired(215, 25, 0, 60)
    unpaired = [score_interval("accuracy", predicted, labels, 2) for predicted in (first, second)]
    assert unpaired[0][0] < unpaired[1][1]


@pytest.mark.parametrize(
    ("metric", "draws", "least"), [("accuracy", 1000, 0.93), ("matthews", 100, 0.88)]
)
def test_paired_interval_covers_the_true_difference(metric, draws, least):
    rng, size = np.random.default_rng(0), 250
    wrong = rng.random((draws, 2, size)) < np.asarray([0.1, 0.15])[:, None]
    wrong |= rng.random((draws, 1, size)) < 0.1  # both are wrong
    labels = rng.integers(0, 2, (draws, size))
    # Both classes are equally frequent and equally often missed: Matthews is 2 accuracy - 1.
    true_difference = (0.9 * 0.9 - 0.9 * 0.85) * (2 if metric == "matthews" else 1)
    intervals = [
        paired_difference(metric, np.where(w[0], 1 - y, y), np.where(w[1], 1 - y, y), y, 2)
        for w, y in zip(wrong, labels, strict=True)
    ]
    covered = np.mean([low <= true_difference <= high for _, low, high in intervals])
    assert least <= covered <= 0.99


@pytest.mark.parametrize("metric", ["matthews", "f1"])
def test_bootstrap_of_differences_equals_resampling_of_rows(metric):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 200)
    first, second = (np.where(rng.random(200) < e, 1 - labels, labels) for e in (0.15, 0.25))
    difference, low, high = paired_difference(metric, first, second, labels, 2)
    assert difference == compute_metric(metric, first, labels, 2) - compute_metric(
        metric, second, labels, 2
    )
    samples = rng.integers(0, 200, (2000, 200))
    resampled = [
        compute_metric(metric, first[rows], labels[rows], 2)
        - compute_metric(metric, second[rows], labels[rows], 2)
        for rows in samples
    ]
    np.testing.assert_allclose([low, high], np.quantile(resampled, [0.025, 0.975]), atol=0.02)
    assert (difference, low, high) == paired_difference(metric, first, second, labels, 2)


def test_shortfalls_are_significant_and_against_cheaper_baselines():
    outputs = make_outputs((0.60, 0.80, 0.90))
    shortfalls = find_shortfalls(
        outputs,
        0,
        [
            make_baseline("majority", 0.5, 0),
            make_baseline("tfidf", 0.75, 0),
            make_baseline("probe_1", 0.70, 0.25),
            make_baseline("probe_2", 0.81, 0.5),  # better, but not significantly
            make_baseline("fine_tuned", 0.99, 1.5),  # costs more than any exit
        ],
        "accuracy",
    )
    assert [(s.exit, s.baseline) for s in shortfalls] == [(1, "tfidf"), (1, "probe_1")]
    worst = shortfalls[0]
    assert (worst.score, worst.baseline_score, worst.n) == (0.6, 0.75, ROWS)
    assert worst.difference == pytest.approx(-0.15)
    assert worst.interval[0] < -0.15 < worst.interval[1] < 0


def test_shortfall_costs_allow_rounding_and_probes_match_by_layer():
    outputs = make_outputs((0.60, 0.80, 0.90))
    for cost, first_exit in ((0.25 + 1e-6, 2), (0.25 + 1e-12, 1)):
        shortfalls = find_shortfalls(outputs, 0, [make_baseline("tfidf", 0.99, cost)], "accuracy")
        assert shortfalls[0].exit == first_exit
    # The probe of the same layer is compared at any cost.
    shortfalls = find_shortfalls(outputs, 0, [make_baseline("probe_1", 0.7, 0.9)], "accuracy")
    assert [s.exit for s in shortfalls] == [1]


@pytest.mark.parametrize("metric", ["matthews", "f1"])
def test_shortfalls_are_measured_by_the_given_metric(metric):
    outputs = make_outputs((0.6, 0.8, 0.9))
    shortfalls = find_shortfalls(outputs, 0, [make_baseline("tfidf", 0.75, 0)], metric)
    assert [s.exit for s in shortfalls] == [1]
    assert shortfalls[0].interval[1] < 0


def test_shortfalls_are_measured_for_the_given_replica():
    outputs = make_outputs((0.7, 0.8, 0.9))
    labels = outputs.labels[0]
    predictions = np.stack([predict_share(share, labels) for share in (0.5, 0.85)])
    baseline = Baseline("tfidf", predictions, 0)
    assert find_shortfalls(outputs, 0, [baseline], "accuracy") == []
    assert [s.exit for s in find_shortfalls(outputs, 1, [baseline], "accuracy")] == [1, 2]


def test_invalid_baselines_are_refused():
    outputs = make_outputs((0.6, 0.8, 0.9))
    for predictions, message in (
        (np.zeros(ROWS + 1, int), "has predictions"),
        (np.zeros((3, ROWS), int), "has predictions"),
        (np.full(ROWS, 2), "predicts class 2, but there are only 2 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            shortfall_results(outputs, 0, [Baseline("tfidf", predictions, 0)], "accuracy")
    with pytest.raises(ValueError, match="two baselines 'tfidf'"):
        shortfall_results(outputs, 0, [make_baseline("tfidf", 0.5, 0)] * 2, "accuracy")
    for predictions in (
        np.zeros(3),
        np.asarray([0, -1]),
        np.zeros((1, 1, 2), int),
        np.zeros(0, int),
    ):
        with pytest.raises(ValueError, match="must be class indices"):
            Baseline("tfidf", predictions, 0)
    with pytest.raises(ValueError, match="cost of 'tfidf' must be at least 0"):
        Baseline("tfidf", np.zeros(3, int), float("nan"))


def test_baselines_are_loaded_as_saved_and_damaged_files_refused(tmp_path):
    path = tmp_path / "exit_outputs" / "baselines.npz"
    predictions = np.random.default_rng(0).integers(0, 3, (2, 5))
    save_baselines(
        path, [Baseline("majority", np.ones(5, int), 0), Baseline("probe_2", predictions, 0.5)]
    )
    first, second = load_baselines(path)
    assert (first.name, first.cost, second.name, second.cost) == ("majority", 0, "probe_2", 0.5)
    np.testing.assert_array_equal(first.predictions, np.ones((2, 5)))
    np.testing.assert_array_equal(second.predictions, predictions)
    np.testing.assert_array_equal(second.for_replica(1), predictions[1])
    assert [p.name for p in path.parent.iterdir()] == ["baselines.npz"]
    with pytest.raises(UserError, match="there are no baselines at"):
        load_baselines(tmp_path / "none.npz")
    for content in (b"", b"no archive"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="does not hold baselines"):
            load_baselines(path)
    np.savez(path, names=np.asarray(["tfidf"]))
    with pytest.raises(UserError, match="does not hold baselines"):
        load_baselines(path)
    np.savez(path, names=np.asarray([print]), cost=[0], predictions=[[[0]]])  # pickled
    with pytest.raises(UserError, match="does not hold baselines"):
        load_baselines(path)


def test_shortfall_is_described_in_one_line():
    outputs = make_outputs((0.6, 0.8, 0.9))
    shortfall = find_shortfalls(outputs, 0, [make_baseline("tfidf", 0.75, 0)], "accuracy")[0]
    line = describe_shortfall(shortfall, RECORD)
    assert line.startswith(
        "exit 1 alone (accuracy 0.600) is below the baseline TF-IDF + logistic regression (0.750) "
        "on the same 300 rows: difference -0.150, 95% interval -0.19"
    )
    assert "\n" not in line
    assert baseline_title("probe_12") == "frozen encoder + probe at layer 12"
    assert baseline_title("majority") == "majority class"


RECORD = {"metric": "accuracy", "method": "sweet", "exits": [1, 2, 4], "best_replica": 0}
FITTED = {"head_init": "probe", "head_refit": True}
SEARCHED = {"best_steps": {"exits_1_2_4": [39]}, "rate_search": {"steps": 40}}


@pytest.mark.parametrize(
    ("recipe", "name", "advice"),
    [
        ({}, "tfidf", "train longer (epochs=auto), search the learning rate, use head_init=probe "),
        (FITTED, "tfidf", "word counts may be enough for this task"),
        (FITTED, "probe_1", "train longer (epochs=auto), search the learning rate, or lower iso"),
        (SEARCHED, "fine_tuned", "lower isolation"),
        (
            FITTED | SEARCHED | {"method": "early_exit"},
            "probe_1",
            "more labeled rows or a larger checkpoint may help, or leave the exit out (exits)",
        ),
        (
            FITTED | SEARCHED | {"best_steps": {"exits_1_2_4": [0]}},
            "probe_1",
            "the saved encoder is the pretrained one",
        ),
    ],
)
def test_advice_depends_on_the_training_recipe(recipe, name, advice):
    shortfall = Shortfall(1, 0.6, name, 0.75, -0.15, (-0.2, -0.1), 300)
    assert f"; {advice}" in describe_shortfall(shortfall, RECORD | recipe)


@pytest.fixture(scope="module")
def analysis():
    return analyse(make_outputs((0.6, 0.7, 0.9), rows=200), make_outputs((0.6, 0.7, 0.9)))


CONFIG = from_mapping({"task": "t", "exits": (1, 2, 4), "seeds": (0, 1)}).resolved()
BASELINES = [
    make_baseline("majority", 0.5, 0),
    make_baseline("tfidf", 0.8, 0),
    make_baseline("probe_1", 0.55, 0.25),
    make_baseline("probe_2", 0.65, 0.5),
    make_baseline("fine_tuned", 0.9, 1),
    make_baseline(SCRIPT, 0.9, 0),
]


def test_results_contain_baselines_and_shortfalls(analysis):
    results = build_results(CONFIG, analysis, TrainingRecord(900, baselines=BASELINES))
    results = json.loads(json.dumps(results, allow_nan=False))
    assert results["baselines"].keys() == {b.name for b in BASELINES}
    row = results["baselines"]["tfidf"]
    assert (row["score"], row["cost"], row["n"]) == (0.8, 0, ROWS)
    assert row["interval"] == list(score_interval("accuracy", *paired(240, 0, 0, 60)[::2], 2))
    keys = {"exit", "score", "baseline", "baseline_score", "difference", "interval", "n"}
    assert all(shortfall.keys() == keys for shortfall in results["below_baseline"])
    pairs = [(shortfall["exit"], shortfall["baseline"]) for shortfall in results["below_baseline"]]
    assert pairs == [(1, SCRIPT), (1, "tfidf"), (2, SCRIPT), (2, "tfidf")]
    without = build_results(CONFIG, analysis, TrainingRecord(900))
    assert (without["baselines"], without["below_baseline"]) == ({}, [])
    assert shortfall_warning(without) is None
    assert "baseline" not in exit_table(without)


def test_warning_names_the_worst_shortfall_and_counts_the_others(analysis):
    results = build_results(CONFIG, analysis, TrainingRecord(900, baselines=BASELINES[:5]))
    assert shortfall_warning(results).startswith(
        "exit 1 alone (accuracy 0.600) is below the baseline TF-IDF"
    )
    assert shortfall_warning(results).endswith("(1 other exit is below a baseline too)")
    results["below_baseline"] = results["below_baseline"][:1]
    assert "other" not in shortfall_warning(results)
    lines = exit_table(results).splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("baseline"))
    table = lines[start : start + 6]
    assert len({len(line) for line in table}) == 1
    assert table[2].startswith("TF-IDF + logistic regression ")
    assert "0.000    0.8000  [0.7511, 0.8413]   300" in table[2]


def test_figures_draw_baselines_from_cost_0(analysis):
    results = build_results(CONFIG, analysis, TrainingRecord(900, baselines=BASELINES))
    chart = curve_chart(results, None, None)
    traces = {trace["name"]: trace for trace in chart["traces"]}
    assert traces["frozen encoder + probe"]["x"] == [0.25, 0.5]
    assert traces["TF-IDF + logistic regression"]["x"] == [0]
    assert chart["zero"]
    (axes,) = curve_figure(analysis, results).axes
    assert axes.get_xlim()[0] == 0
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend.count("frozen encoder + probe") == 1
    assert "majority class" in legend


def test_report_page_lists_baselines_and_shortfalls(analysis, tmp_path):
    """A line is a warning only if the recommended operating point is below the baseline too."""
    results = build_results(CONFIG, analysis, TrainingRecord(900, baselines=BASELINES))

    def body(target: dict[str, float]) -> str:
        details = ReportDetails(target=target)
        write_report(tmp_path / "report.html", analysis, results, [], {}, details)
        page = (tmp_path / "report.html").read_text()
        return page[page.index("<body>") : page.index('<script id="data"')]

    escaped = "&lt;script&gt;document.title=&#39;broken&#39;&lt;/script&gt;"
    start = f"exit 1 alone (accuracy 0.600) is below the baseline {escaped}"
    warning_lines = body({"cost": 0.25}).split('<p class="warning">')[1:]
    assert len(warning_lines) == 2
    assert warning_lines[0].startswith(start)
    assert "100% of the texts leave there at the recommended threshold" in warning_lines[0]
    page = body({"threshold": 2.0})  # all texts reach the last exit, whose accuracy is 0.9
    assert '<p class="warning">' not in page
    assert "2 exits alone are below a baseline of the same or lower cost; the recommended" in page
    note = page.split(start)[1]
    assert "0% of the texts leave there at the recommended threshold" in note
    assert '<td class="name">frozen encoder + probe at layer 2</td><td>0.500</td>' in page
    assert SCRIPT not in (tmp_path / "report.html").read_text()


def test_report_page_is_written_for_results_without_baselines(analysis, tmp_path):
    results = build_results(CONFIG, analysis, TrainingRecord(900))
    del results["baselines"], results["below_baseline"]
    write_report(tmp_path / "report.html", analysis, results, [], {})
    assert "Baselines on the same rows" not in (tmp_path / "report.html").read_text()
    assert "baseline" not in exit_table(results)
    assert not curve_chart(results, None, None)["zero"]


def test_paired_bootstrap_memory_is_bounded():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200_000)
    first, second = (np.where(rng.random(200_000) < 0.2, 1 - labels, labels) for _ in range(2))
    tracemalloc.start()
    paired_difference("matthews", first, second, labels, 2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6  # 1,000 draws of the rows would be 1.6 GB


def test_traces_of_baselines_far_below_all_exits_are_marked():
    scores = {"majority": 0.2, "tfidf": 0.8, "probe_1": 0.1, "probe_2": 0.9}
    results = {
        "baselines": {name: {"cost": 0.0, "score": value} for name, value in scores.items()},
        "replicas": [{"individual": [{"score": 0.85}, {"score": 0.9}]}],
        "best_replica": 0,
    }
    far = {trace.name: trace.far for trace in baseline_traces(results)}
    assert far == {
        "majority class": True,
        "TF-IDF + logistic regression": False,
        "frozen encoder + probe": False,
    }
