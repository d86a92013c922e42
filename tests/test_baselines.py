"""Baselines: TF-IDF, paired intervals, which exit is below which, and what the report says."""

import json
import tracemalloc
import warnings

import numpy as np
import pytest

from sweet_jax import ExitOutputs
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
from sweet_jax.report import baselines as module
from sweet_jax.report.baselines import (
    Baseline,
    baseline_title,
    constant_predictions,
    load_baselines,
    save_baselines,
    tfidf_predictions,
)
from sweet_jax.report.charts import curve_chart
from sweet_jax.report.console import exit_table
from sweet_jax.report.details import ReportDetails
from sweet_jax.report.figures import curve_figure as drawn_figure
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

NASTY = "<script>document.title='broken'</script>"
ROWS = 300


def counts(both: int, ours: int, theirs: int, neither: int) -> tuple[np.ndarray, ...]:
    """(ours, theirs, labels) of which so many are right in both, in one, in neither."""
    sizes = (both, ours, theirs, neither)
    first, second = np.repeat([1, 1, 0, 0], sizes), np.repeat([1, 0, 1, 0], sizes)
    return first, second, np.ones(sum(sizes), int)


def right_in(share: float, labels: np.ndarray) -> np.ndarray:
    """Predictions, right in the first `share` of every hundred rows: nested for two shares."""
    return np.where(np.arange(len(labels)) % 100 < 100 * share, labels, 1 - labels)


def outputs(shares: tuple[float, ...], rows: int = ROWS, metric: str = "accuracy") -> ExitOutputs:
    """Exits at layers 1, 2 and 4 that are right in these shares of the rows; two replicas."""
    labels = np.arange(rows) % 2
    given = np.stack([right_in(share, labels) for share in shares])  # [E, N]
    sure = 1 + np.random.default_rng(0).random(given.shape)
    logits = np.where(given == 1, sure, -sure)[None, ..., None] * np.asarray([-1.0, 1.0])
    identity = RunIdentity(task="t", metric=metric, replicas=((0, 1e-4), (1, 1e-4)))
    return ExitOutputs(np.tile(logits, (2, 1, 1, 1)), labels, [1, 2, 4], identity=identity)


def baseline(name: str, share: float, cost: float, rows: int = ROWS) -> Baseline:
    return Baseline(name, right_in(share, np.arange(rows) % 2), cost)


def sentences(rows: int, seed: int = 0) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """Texts of three words, of which the one in the middle tells the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, rows)
    common = rng.integers(0, 5, (rows, 2))
    return [
        (f"common{a} telling{label} common{b}",)
        for (a, b), label in zip(common, labels, strict=True)
    ], labels


def test_majority_is_the_most_frequent_class():
    assert constant_predictions(np.asarray([2, 1, 2, 0]), 3, 4).tolist() == [2, 2, 2]
    assert constant_predictions(np.asarray([1, 0]), 2, 2).tolist() == [0, 0]


def test_tfidf_finds_the_word_that_tells_the_class():
    texts, labels = sentences(200)
    new, truth = sentences(100, seed=1)
    given = tfidf_predictions(texts, labels, new)
    assert given.dtype == np.int64
    np.testing.assert_array_equal(given, truth)
    np.testing.assert_array_equal(
        tfidf_predictions(texts, labels, new, tuning=(new[:20], truth[:20])), truth
    )


def test_tfidf_keeps_the_columns_of_a_pair_apart():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    words = np.asarray(["the yes the", "the no the"])
    # Joined, all texts have the same words and pairs of words: only the column tells.
    pairs = list(zip(words[labels].tolist(), words[1 - labels].tolist(), strict=True))
    np.testing.assert_array_equal(
        tfidf_predictions(pairs[:100], labels[:100], pairs[100:]), labels[100:]
    )


def test_tfidf_leaves_out_a_column_without_words():
    labels = np.arange(40) % 2
    pairs = [("?", f"word{label} x") for label in labels]
    np.testing.assert_array_equal(tfidf_predictions(pairs, labels, pairs), labels)


@pytest.mark.parametrize("rows", [10, 1000])  # the second drops words of one row, at first
def test_tfidf_without_a_word_answers_the_constant_predictions(rows):
    labels = np.where(np.arange(rows) % 5 < 3, 1, 0)
    texts = [("a ! 7",)] * rows
    assert tfidf_predictions(texts, labels, [("a real text",), ("",)]).tolist() == [1, 1]


def test_tfidf_of_words_that_all_stand_once_is_still_a_baseline():
    labels = np.arange(1000) % 2
    texts = [(f"word{i}",) for i in range(1000)]
    np.testing.assert_array_equal(tfidf_predictions(texts, labels, texts), labels)


def test_tfidf_of_one_class_answers_it():
    texts = [("some words",), ("other words",)]
    assert tfidf_predictions(
        texts, np.asarray([2, 2]), texts, tuning=(texts, np.asarray([0, 1]))
    ).tolist() == [
        2,
        2,
    ]


def test_tfidf_tunes_c_on_the_tuning_rows(monkeypatch):
    texts, labels = sentences(60)
    none = (texts[:0], labels[:0])
    np.testing.assert_array_equal(
        tfidf_predictions(texts, labels, texts[:3], tuning=none),
        tfidf_predictions(texts, labels, texts[:3]),
    )
    # With 95 rows of class 0 to 5 of class 1, a strong penalty answers 0 everywhere.
    texts = [("bad",)] * 95 + [("good",)] * 5
    labels = np.repeat([0, 1], [95, 5])
    monkeypatch.setattr(module, "_INVERSE_PENALTIES", (1e-4, 100.0))
    given = tfidf_predictions(
        texts, labels, [("bad",), ("good",)], tuning=([("good",)], np.asarray([1]))
    )
    assert given.tolist() == [0, 1]
    given = tfidf_predictions(
        texts, labels, [("bad",), ("good",)], tuning=([("bad",)], np.asarray([0]))
    )
    assert given.tolist() == [0, 0]  # equally good on the tuning row: the smaller C


def test_tfidf_is_fitted_on_a_bounded_draw(monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 50)
    texts, labels = sentences(400)
    drawn = module._drawn(texts, 0)
    assert len(drawn) == 50
    assert (np.diff(drawn) > 0).all()
    assert not np.array_equal(drawn, module._drawn(texts, 1))
    given = tfidf_predictions(texts, labels, texts)
    np.testing.assert_array_equal(given, tfidf_predictions(texts, labels, texts))
    np.testing.assert_array_equal(given, labels)
    monkeypatch.setattr(module, "_CHARACTERS", 200)  # texts have 24 characters
    assert len(module._drawn(texts, 0)) == 8
    monkeypatch.setattr(module, "_CHARACTERS", 1)
    assert len(module._drawn(texts, 0)) == 1
    monkeypatch.setattr(module, "_WEIGHTS", 30)
    (fitted,) = module._fit_features(texts, 10)
    assert len(fitted.vocabulary_) == 3
    monkeypatch.setattr(module, "_LONGEST", 3)
    assert module._columns([("abcdef", "x")]) == [["abc"], ["x"]]


def test_tfidf_predicts_many_rows_in_parts(monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 7)
    texts, labels = sentences(100)
    np.testing.assert_array_equal(tfidf_predictions(texts, labels, texts), labels)


def test_tfidf_warns_of_nothing(monkeypatch):
    monkeypatch.setattr(module, "_WORK", 0)  # 20 iterations
    texts, labels = sentences(300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tfidf_predictions(texts, labels, texts)


@pytest.mark.parametrize("tuned", [True, False])
def test_tfidf_has_decision_thresholds_where_the_exits_have(tuned):
    """A label's word is more often in rows without the label, so that one half finds few."""
    rng = np.random.default_rng(0)
    labels = rng.random((900, 2)) < 0.1
    words = (labels | (rng.random(labels.shape) < 0.15)).tolist()
    texts = [(f"common{i % 7}" + " first" * a + " second" * b,) for i, (a, b) in enumerate(words)]
    options = {"objective": MULTI_LABEL, "tuning": (texts[300:600], labels[300:600])}
    if not tuned:
        del options["tuning"]
    given = texts[:300], labels[:300], texts[600:]
    half = tfidf_predictions(*given, **options)
    found = tfidf_predictions(*given, **options, fit_decisions=True)
    assert found.dtype == bool
    f1 = [compute_metric(MULTI_LABEL.metrics[0], each, labels[600:], 2) for each in (half, found)]
    assert f1[0] < 0.4
    assert f1[1] > 0.55


def test_a_label_of_one_fold_alone_is_not_predicted_there():
    labels = np.zeros((20, 2), bool)
    labels[3, 0], labels[::2, 1] = True, True
    features = labels + np.random.default_rng(0).random((20, 2))

    def fit(rows):
        return module._fit_model(
            MULTI_LABEL.linear.text_model(1.0, 100), features[rows], labels[rows]
        )

    logits = module._cross_validated(fit, features, labels)
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
def test_a_run_fits_both_decisions_or_none(key, value, fitted, checkpoint, tmp_path, monkeypatch):
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
    asked = []

    def fake(texts, labels, new, **options):
        asked.append(options["fit_decisions"])
        return np.zeros((len(new), 2), bool)

    monkeypatch.setattr("sweet_jax.baselines.tfidf_predictions", fake)
    _without_encoder(job)
    assert set(asked) == {fitted}
    assert job.fits_decisions == fitted


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe 1998, table II, method 10
        ((14, 5, 0, 22), 0.011, 0.226),  # Altman et al. 2000, Statistics with confidence, table 6.2
    ],
)
def test_paired_interval_equals_published_ones(table, low, high):
    gap, *interval = paired_difference("accuracy", *counts(*table), classes=2)
    assert gap == pytest.approx((table[1] - table[2]) / sum(table))
    places = 4 if low == 0.0569 else 3
    assert [round(v, places) for v in interval] == [low, high]


def test_paired_interval_without_correlation_is_the_sum_of_squares():
    # 25 of each: phi is 0, both shares 1/2, Wilson's half width of 50 in 100 is 0.0963. By hand:
    # z^2 / (1 + z^2 / n) ... = 1.96 sqrt(0.25 / 100 + 0.0096^2) / 1.0384 = 0.0962, times sqrt(2).
    gap, low, high = paired_difference("accuracy", *counts(25, 25, 25, 25), classes=2)
    assert gap == 0
    assert (low, high) == pytest.approx((-0.1361, 0.1361), abs=1e-4)


def test_paired_interval_holds_zero_where_it_should():
    def interval(*table):
        return paired_difference("accuracy", *counts(*table), classes=2)[1:]

    assert interval(200, 30, 10, 60)[0] > 0
    assert interval(200, 10, 30, 60)[1] < 0
    low, high = interval(200, 22, 18, 60)
    assert low < 0 < high
    for table in ((10, 0, 0, 5), (10, 0, 0, 0), (0, 0, 0, 9)):  # the same answers
        low, high = interval(*table)
        assert low < 0 < high
    # Unpaired, 240 of 300 against 215 of 300 could be chance's; row by row it is not.
    low, high = interval(215, 25, 0, 60)
    assert low > 0
    ours, theirs, labels = counts(215, 25, 0, 60)
    alone = [score_interval("accuracy", given, labels, 2) for given in (ours, theirs)]
    assert alone[0][0] < alone[1][1]


@pytest.mark.parametrize(
    ("metric", "draws", "least"), [("accuracy", 1000, 0.93), ("matthews", 100, 0.88)]
)
def test_paired_interval_covers_the_difference(metric, draws, least):
    rng, size = np.random.default_rng(0), 250
    wrong = rng.random((draws, 2, size)) < np.asarray([0.1, 0.15])[:, None]
    wrong |= rng.random((draws, 1, size)) < 0.1  # what both get wrong
    labels = rng.integers(0, 2, (draws, size))
    # Both classes are as frequent and as often missed: Matthews is 2 accuracy - 1.
    truth = (0.9 * 0.9 - 0.9 * 0.85) * (2 if metric == "matthews" else 1)
    found = [
        paired_difference(metric, np.where(w[0], 1 - y, y), np.where(w[1], 1 - y, y), y, 2)
        for w, y in zip(wrong, labels, strict=True)
    ]
    covered = np.mean([low <= truth <= high for _, low, high in found])
    assert least <= covered <= 0.99


@pytest.mark.parametrize("metric", ["matthews", "f1"])
def test_bootstrap_of_differences_is_the_one_over_rows(metric):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 200)
    ours, theirs = (np.where(rng.random(200) < e, 1 - labels, labels) for e in (0.15, 0.25))
    gap, low, high = paired_difference(metric, ours, theirs, labels, 2)
    assert gap == compute_metric(metric, ours, labels, 2) - compute_metric(
        metric, theirs, labels, 2
    )
    picks = rng.integers(0, 200, (2000, 200))
    plain = [
        compute_metric(metric, ours[i], labels[i], 2)
        - compute_metric(metric, theirs[i], labels[i], 2)
        for i in picks
    ]
    np.testing.assert_allclose([low, high], np.quantile(plain, [0.025, 0.975]), atol=0.02)
    assert (gap, low, high) == paired_difference(metric, ours, theirs, labels, 2)


def test_below_finds_exactly_the_exit_that_is():
    shown = outputs((0.60, 0.80, 0.90))
    found = find_shortfalls(
        shown,
        0,
        [
            baseline("majority", 0.5, 0),
            baseline("tfidf", 0.75, 0),
            baseline("probe_1", 0.70, 0.25),
            baseline("probe_2", 0.81, 0.5),  # better, but not beyond doubt
            baseline("fine_tuned", 0.99, 1.5),  # costs more than any exit
        ],
        "accuracy",
    )
    assert [(f.exit, f.baseline) for f in found] == [(1, "tfidf"), (1, "probe_1")]
    worst = found[0]
    assert (worst.score, worst.baseline_score, worst.n) == (0.6, 0.75, ROWS)
    assert worst.difference == pytest.approx(-0.15)
    assert worst.interval[0] < -0.15 < worst.interval[1] < 0


def test_below_compares_costs_with_rounding_and_the_probe_of_the_same_layer():
    shown = outputs((0.60, 0.80, 0.90))
    assert (
        find_shortfalls(shown, 0, [baseline("tfidf", 0.99, 0.25 + 1e-6)], "accuracy")[0].exit == 2
    )
    assert (
        find_shortfalls(shown, 0, [baseline("tfidf", 0.99, 0.25 + 1e-12)], "accuracy")[0].exit == 1
    )
    found = find_shortfalls(
        shown, 0, [baseline("probe_1", 0.7, 0.9)], "accuracy"
    )  # whatever it says it costs
    assert [f.exit for f in found] == [1]


@pytest.mark.parametrize("metric", ["matthews", "f1"])
def test_below_reads_the_metric(metric):
    found = find_shortfalls(outputs((0.6, 0.8, 0.9)), 0, [baseline("tfidf", 0.75, 0)], metric)
    assert [f.exit for f in found] == [1]
    assert found[0].interval[1] < 0


def test_below_reads_the_replica():
    shown = outputs((0.7, 0.8, 0.9))
    labels = shown.labels[0]
    each = Baseline("tfidf", np.stack([right_in(0.5, labels), right_in(0.85, labels)]), 0)
    assert find_shortfalls(shown, 0, [each], "accuracy") == []
    assert [f.exit for f in find_shortfalls(shown, 1, [each], "accuracy")] == [1, 2]


def test_baselines_of_other_rows_are_refused():
    shown = outputs((0.6, 0.8, 0.9))
    for given, message in (
        (np.zeros(ROWS + 1, int), "has predictions"),
        (np.zeros((3, ROWS), int), "has predictions"),
        (np.full(ROWS, 2), "predicts class 2, but there are only 2 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            shortfall_results(shown, 0, [Baseline("tfidf", given, 0)], "accuracy")
    with pytest.raises(ValueError, match="two baselines 'tfidf'"):
        shortfall_results(shown, 0, [baseline("tfidf", 0.5, 0)] * 2, "accuracy")
    for given in (np.zeros(3), np.asarray([0, -1]), np.zeros((1, 1, 2), int), np.zeros(0, int)):
        with pytest.raises(ValueError, match="must be class indices"):
            Baseline("tfidf", given, 0)
    with pytest.raises(ValueError, match="cost of 'tfidf' must be at least 0"):
        Baseline("tfidf", np.zeros(3, int), float("nan"))


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "exit_outputs" / "baselines.npz"
    each = np.random.default_rng(0).integers(0, 3, (2, 5))
    save_baselines(path, [Baseline("majority", np.ones(5, int), 0), Baseline("probe_2", each, 0.5)])
    first, second = load_baselines(path)
    assert (first.name, first.cost, second.name, second.cost) == ("majority", 0, "probe_2", 0.5)
    np.testing.assert_array_equal(first.predictions, np.ones((2, 5)))
    np.testing.assert_array_equal(second.predictions, each)
    np.testing.assert_array_equal(second.for_replica(1), each[1])
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
    np.savez(path, names=np.asarray([print]), cost=[0], predictions=[[[0]]])  # a pickle
    with pytest.raises(UserError, match="does not hold baselines"):
        load_baselines(path)


def test_a_finding_is_one_line():
    finding = find_shortfalls(
        outputs((0.6, 0.8, 0.9)), 0, [baseline("tfidf", 0.75, 0)], "accuracy"
    )[0]
    line = describe_shortfall(finding, RECORD)
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
    ("given", "name", "advice"),
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
def test_a_run_is_advised_what_it_has_not(given, name, advice):
    finding = Shortfall(1, 0.6, name, 0.75, -0.15, (-0.2, -0.1), 300)
    assert f"; {advice}" in describe_shortfall(finding, RECORD | given)


@pytest.fixture(scope="module")
def analysis():
    return analyse(outputs((0.6, 0.7, 0.9), rows=200), outputs((0.6, 0.7, 0.9)))


CONFIG = from_mapping({"task": "t", "exits": (1, 2, 4), "seeds": (0, 1)}).resolved()
BASELINES = [
    baseline("majority", 0.5, 0),
    baseline("tfidf", 0.8, 0),
    baseline("probe_1", 0.55, 0.25),
    baseline("probe_2", 0.65, 0.5),
    baseline("fine_tuned", 0.9, 1),
    baseline(NASTY, 0.9, 0),
]


def test_results_hold_the_baselines(analysis):
    results = build_results(CONFIG, analysis, TrainingRecord(900, baselines=BASELINES))
    results = json.loads(json.dumps(results, allow_nan=False))
    assert results["baselines"].keys() == {b.name for b in BASELINES}
    row = results["baselines"]["tfidf"]
    assert (row["score"], row["cost"], row["n"]) == (0.8, 0, ROWS)
    assert row["interval"] == list(score_interval("accuracy", *counts(240, 0, 0, 60)[::2], 2))
    keys = {"exit", "score", "baseline", "baseline_score", "difference", "interval", "n"}
    assert all(found.keys() == keys for found in results["below_baseline"])
    pairs = [(found["exit"], found["baseline"]) for found in results["below_baseline"]]
    assert pairs == [(1, NASTY), (1, "tfidf"), (2, NASTY), (2, "tfidf")]
    none = build_results(CONFIG, analysis, TrainingRecord(900))
    assert (none["baselines"], none["below_baseline"]) == ({}, [])
    assert shortfall_warning(none) is None
    assert "baseline" not in exit_table(none)


def test_the_terminal_names_the_worst_and_counts_the_others(analysis):
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


def test_the_figures_draw_the_baselines_from_cost_0_on(analysis):
    results = build_results(CONFIG, analysis, TrainingRecord(900, baselines=BASELINES))
    chart = curve_chart(results, None, None)
    drawn = {trace["name"]: trace for trace in chart["traces"]}
    assert drawn["frozen encoder + probe"]["x"] == [0.25, 0.5]
    assert drawn["TF-IDF + logistic regression"]["x"] == [0]
    assert chart["zero"]
    (axes,) = drawn_figure(analysis, results).axes
    assert axes.get_xlim()[0] == 0
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend.count("frozen encoder + probe") == 1
    assert "majority class" in legend


def test_the_page_has_the_table_and_a_line_for_each_exit(analysis, tmp_path):
    """Red where the recommended operating point is below that baseline too."""
    results = build_results(CONFIG, analysis, TrainingRecord(900, baselines=BASELINES))

    def body(target: dict[str, float]) -> str:
        details = ReportDetails(target=target)
        write_report(tmp_path / "report.html", analysis, results, [], {}, details)
        page = (tmp_path / "report.html").read_text()
        return page[page.index("<body>") : page.index('<script id="data"')]

    shown = "&lt;script&gt;document.title=&#39;broken&#39;&lt;/script&gt;"
    start = f"exit 1 alone (accuracy 0.600) is below the baseline {shown}"
    red = body({"cost": 0.25}).split('<p class="warning">')[1:]
    assert len(red) == 2
    assert red[0].startswith(start)
    assert "100% of the texts leave there at the recommended threshold" in red[0]
    page = body({"threshold": 2.0})  # all texts reach the last exit, whose accuracy is 0.9
    assert '<p class="warning">' not in page
    assert "2 exits alone are below a baseline; the recommended operating point is not" in page
    grey = page.split(start)[1]
    assert "0% of the texts leave there at the recommended threshold" in grey
    assert '<td class="name">frozen encoder + probe at layer 2</td><td>0.500</td>' in page
    assert NASTY not in (tmp_path / "report.html").read_text()


def test_results_of_before_there_were_baselines_still_make_a_page(analysis, tmp_path):
    results = build_results(CONFIG, analysis, TrainingRecord(900))
    del results["baselines"], results["below_baseline"]
    write_report(tmp_path / "report.html", analysis, results, [], {})
    assert "Baselines on the same rows" not in (tmp_path / "report.html").read_text()
    assert "baseline" not in exit_table(results)
    assert not curve_chart(results, None, None)["zero"]


def test_a_large_paired_bootstrap_is_small():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200_000)
    ours, theirs = (np.where(rng.random(200_000) < 0.2, 1 - labels, labels) for _ in range(2))
    tracemalloc.start()
    paired_difference("matthews", ours, theirs, labels, 2)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 50e6  # 1,000 draws of the rows would be 1.6 GB


def test_what_is_far_below_all_exits_does_not_flatten_the_curve():
    rows = {"majority": 0.2, "tfidf": 0.8, "probe_1": 0.1, "probe_2": 0.9}
    results = {
        "baselines": {name: {"cost": 0.0, "score": value} for name, value in rows.items()},
        "replicas": [{"individual": [{"score": 0.85}, {"score": 0.9}]}],
        "best_replica": 0,
    }
    far = {trace.name: trace.far for trace in baseline_traces(results)}
    assert far == {
        "majority class": True,
        "TF-IDF + logistic regression": False,
        "frozen encoder + probe": False,
    }
