"""Tests of the report's part on classes and single texts, compared with direct counts."""

import dataclasses
import json
import re

import numpy as np
import pytest

from sweet_jax.config import from_mapping
from sweet_jax.exits.analysis import analyse
from sweet_jax.exits.outputs import ExitOutputs, RunIdentity
from sweet_jax.report.classes import class_report, describe_never_predicted
from sweet_jax.report.details import ReportDetails
from sweet_jax.report.page import write_report
from sweet_jax.report.results import TrainingRecord, build_results

CONFIG = from_mapping({"exits": (1, 2, 4)}).resolved()
TEXTS = [(f"text {i} & <b>more</b>",) for i in range(240)]


def simulated_outputs(split: str, count: int, classes: int) -> ExitOutputs:
    rng = np.random.default_rng(len(split) + classes)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(1, 3, count, classes)).astype(np.float32)
    logits[:, :, np.arange(count), labels] += np.array([0.5, 1.0, 2.0])[:, None]
    return ExitOutputs(
        logits,
        labels,
        np.array([1, 2, 4]),
        np.array([0.25, 0.5, 1.0]),
        identity=RunIdentity(
            split=split,
            fitted_on="held_out",
            policy="confidence",
            classes=tuple(f"<class {i}>" for i in range(classes)),
            replicas=((0, 1e-4),),
        ),
    )


def simulated_splits(classes: int) -> tuple[ExitOutputs, ExitOutputs]:
    calibration = simulated_outputs("calibration", 150, classes)
    return calibration, simulated_outputs("validation", 240, classes)


def analysis_of(classes: int):
    return analyse(*simulated_splits(classes))


@pytest.fixture(scope="module")
def three_classes():
    return analysis_of(3)


def test_long_class_names_are_truncated():
    splits = [
        dataclasses.replace(
            outputs,
            identity=dataclasses.replace(outputs.identity, classes=("a" * 1000, "b" * 1000, "c")),
        )
        for outputs in simulated_splits(3)
    ]
    report = class_report(analyse(*splits), 0, 0.5, TEXTS)
    assert report["names"] == [letter * 60 + "…" for letter in "ab"] + ["c"]
    assert len(json.dumps(report)) < 60_000


def exits_and_predictions(analysis) -> tuple[np.ndarray, np.ndarray]:
    """Computes exits and predictions at the operating point, row by row: int64 [N] each."""
    threshold = analysis.operating_point(0).threshold
    logits, temperatures = analysis.validation.logits[0], analysis.temperatures[0]
    exits, predictions = [], []
    for row in range(logits.shape[1]):
        for e in range(3):
            scaled = logits[e, row].astype(float) / temperatures[e]
            p = np.exp(scaled - scaled.max())
            if (p / p.sum()).max() >= threshold or e == 2:
                exits.append(e)
                predictions.append(int(p.argmax()))
                break
    return np.asarray(exits), np.asarray(predictions)


def test_class_calibration_is_computed_from_the_probability_of_the_class(three_classes):
    validation = three_classes.validation
    scaled = validation.logits[0, -1].astype(float) / three_classes.temperatures[0, -1]
    p = np.exp(scaled) / np.exp(scaled).sum(axis=-1, keepdims=True)  # [N, C]
    calibration = class_report(three_classes, 0, 0.5)["calibration"]
    errors = [row["error"] for row in calibration]
    assert errors == sorted(errors, reverse=True)
    for row in calibration:
        c = validation.identity.classes.index(row["name"])
        is_class = validation.labels[0] == c
        bins = np.minimum((10 * p[:, c]).astype(int), 9)
        gaps = [abs((p[bins == b, c] - is_class[bins == b]).sum()) for b in range(10)]
        assert row["error"] == pytest.approx(sum(gaps) / len(is_class))
        assert (row["support"], row["share"]) == (is_class.sum(), is_class.mean())
        assert row["probability"] == pytest.approx(p[:, c].mean())
    results = build_results(CONFIG, three_classes, TrainingRecord(100))
    last_exit = results["replicas"][0]["quality"][-1]
    assert last_exit["after"]["classwise_ece"] == pytest.approx(np.mean(errors))


def test_never_predicted_classes_are_named(three_classes):
    rows = three_classes.validation.replica(0)
    assert describe_never_predicted(rows, np.full(240, 2)) is None
    logits = rows.logits.copy()
    logits[:, 1, :, 2] = -100  # at the second exit, class 2 is never predicted
    without_class_2 = dataclasses.replace(rows, logits=logits)
    assert describe_never_predicted(without_class_2, np.full(240, 2)) is None
    count = (rows.labels[0] == 2).sum()
    text = describe_never_predicted(without_class_2, np.full(240, 1))
    assert f"have it: '<class 2>' (in {count}); more training rows" in text


def test_page_lists_never_predicted_classes_apart_from_exits_below_a_baseline(tmp_path):
    splits = simulated_splits(3)
    for outputs in splits:
        outputs.logits[..., 2] = -100
    analysis = analyse(*splits)
    results = build_results(CONFIG, analysis, TrainingRecord(100))
    write_report(tmp_path / "report.html", analysis, results, [], {})
    page = (tmp_path / "report.html").read_text()
    start = page.index("<summary>Classes that are never predicted</summary>")
    assert "&lt;class 2&gt;" in page[start : page.index("</details>", start)]
    assert "below a baseline of" not in page


def test_class_metrics_equal_counts_at_the_operating_point(three_classes):
    exits, predictions = exits_and_predictions(three_classes)
    labels, cost = three_classes.validation.labels[0], np.array([0.25, 0.5, 1.0])
    assert 0 < exits.mean() < 2
    report = class_report(three_classes, 0, three_classes.operating_point(0).threshold)
    rows = {row["name"]: row for row in report["classes"]}
    for c in range(3):
        row, correct = rows[f"<class {c}>"], ((predictions == c) & (labels == c)).sum()
        assert row["support"] == (labels == c).sum()
        assert row["recall"] == pytest.approx(correct / (labels == c).sum())
        assert row["precision"] == pytest.approx(correct / (predictions == c).sum())
        assert np.dot(row["shares"], cost) == pytest.approx(cost[exits[labels == c]].mean())
    matrix, last_matrix = np.asarray(report["matrices"])
    np.testing.assert_array_equal(matrix.sum(axis=1), np.bincount(labels))
    np.testing.assert_array_equal(
        np.diag(matrix), [((predictions == c) & (labels == c)).sum() for c in range(3)]
    )
    last_predictions = three_classes.validation.predictions[0, -1]
    assert last_matrix[0, 1] == ((labels == 0) & (last_predictions == 1)).sum()
    recall = ((last_predictions == 2) & (labels == 2)).sum() / (labels == 2).sum()
    assert rows["<class 2>"]["last"]["recall"] == pytest.approx(recall)


def test_class_without_rows_has_dashes_and_comes_last(three_classes, tmp_path):
    """No row has the first class, which is nevertheless predicted."""
    rows = three_classes.validation
    labels = np.maximum(rows.labels, 1)
    analysis = analyse(three_classes.calibration, dataclasses.replace(rows, labels=labels))
    *others, last = class_report(analysis, 0, 0.5)["classes"]
    assert (last["name"], last["support"]) == ("<class 0>", 0)
    assert [last["f1"], last["recall"], last["last"]["f1"], last["shares"]] == [None] * 4
    assert all(row["f1"] > 0 for row in others)
    results = build_results(CONFIG, analysis, TrainingRecord(100))
    write_report(tmp_path / "report.html", analysis, results, [], {})
    (line,) = re.findall(
        r"<tr data-class=\"0\">.*?</tr>", (tmp_path / "report.html").read_text(), re.S
    )
    assert re.findall(r"<td[^>]*>(.*?)</td>", line) == ["0"] + ["\N{EN DASH}"] * 9


def test_mistakes_are_sorted_by_confidence_and_suspects_by_all_exits(three_classes):
    exits, predictions = exits_and_predictions(three_classes)
    validation = three_classes.validation
    labels, exit_predictions = validation.labels[0], validation.predictions[0]
    report = class_report(three_classes, 0, three_classes.operating_point(0).threshold, TEXTS)
    assert len(report["mistakes"]) == min(50, (predictions != labels).sum())
    probabilities = [row["probability"] for row in report["mistakes"]]
    assert probabilities == sorted(probabilities, reverse=True)
    row_of_text = {text: row for row, (text,) in enumerate(TEXTS)}
    for row in report["mistakes"]:
        n = row_of_text[row["text"]]
        assert row["label"] == f"<class {labels[n]}>"
        assert row["prediction"] == f"<class {predictions[n]}>"
        assert row["layer"] == (1, 2, 4)[exits[n]]
    unanimous = (exit_predictions == predictions).all(axis=0)
    always_wrong = set(np.flatnonzero(unanimous & (predictions != labels)).tolist())
    assert {row_of_text[row["text"]] for row in report["suspects"]} <= always_wrong
    assert len(report["suspects"]) == min(50, len(always_wrong))


@pytest.mark.parametrize("classes", [3, 77])
def test_class_tables_of_the_page_follow_the_slider(tmp_path, browser, classes):
    analysis = analysis_of(classes)
    results = build_results(CONFIG, analysis, TrainingRecord(100))
    write_report(tmp_path / "report.html", analysis, results, [], {})
    assert (tmp_path / "report.html").stat().st_size < 1_500_000
    browser.get((tmp_path / "report.html").as_uri())
    labels, exit_predictions = analysis.validation.labels[0], analysis.validation.predictions[0]
    for position in (5, 200):
        threshold = browser.execute_script(
            "const s = document.getElementById('threshold'); s.value = arguments[0];"
            "s.dispatchEvent(new Event('input'));"
            "return document.getElementById('at-threshold').textContent",
            position,
        )
        exits = analysis.exits_taken(0, float(threshold))
        predictions = exit_predictions[exits, np.arange(len(exits))]
        rows = browser.execute_script(
            "return [...document.querySelectorAll('tr[data-class]')].map("
            "r => [r.dataset.class, ...[...r.cells].map(c => c.textContent)])"
        )
        assert len(rows) == classes
        for number, _, support, precision, recall, f1, *rest in rows:
            of_class, predicted = labels == int(number), predictions == int(number)
            correct = (of_class & predicted).sum()
            assert int(support) == of_class.sum()
            values = correct / max(1, predicted.sum()), correct / max(1, of_class.sum())
            values += (2 * correct / max(1, predicted.sum() + of_class.sum()),)
            shown = precision, recall, f1
            if not of_class.any():
                assert {*shown, *rest} == {"\N{EN DASH}"}
            else:
                assert [float(v) for v in shown] == pytest.approx(values, abs=6e-4)
                shares = [100 * (exits[of_class] == e).mean() for e in range(3)]
                shown_shares = [float(text.rstrip("%")) for text in rest[3:]]
                assert shown_shares == pytest.approx(shares, abs=0.51)
        counts = browser.execute_script(
            "return [...document.querySelectorAll('#matrix tbody td')].map(c => +c.textContent)"
        )
        expected = [((labels == i) & (predictions == j)).sum() for i in range(3) for j in range(3)]
        assert counts == (expected if classes == 3 else [])
        pairs = browser.execute_script(
            "return [...document.querySelectorAll('#pairs tr[data-cell]')].map("
            "r => [+r.dataset.cell, +r.cells[2].textContent])"
        )
        assert len(pairs) == (0 if classes == 3 else 20)
        for cell, count in pairs:
            assert count == ((labels == cell // classes) & (predictions == cell % classes)).sum()


def test_headings_of_the_confusion_matrix_keep_words_whole(three_classes, browser, tmp_path):
    splits = [
        dataclasses.replace(
            rows,
            identity=dataclasses.replace(
                rows.identity, classes=("neutral", "appointment cancelled", "refund_not_showing_up")
            ),
        )
        for rows in (three_classes.calibration, three_classes.validation)
    ]
    analysis = analyse(*splits)
    results = build_results(CONFIG, analysis, TrainingRecord(100))
    write_report(tmp_path / "report.html", analysis, results, [], {})
    browser.get((tmp_path / "report.html").as_uri())
    lines = browser.execute_script(
        "return [...document.querySelectorAll('#matrix th')].flatMap(cell => {"
        "  const text = cell.firstChild, words = [...text.data.matchAll(/\\w+/g)];"
        "  return words.map(word => {"
        "    const range = document.createRange();"
        "    range.setStart(text, word.index);"
        "    range.setEnd(text, word.index + word[0].length);"
        "    return [word[0], range.getClientRects().length];"
        "  });"
        "})"
    )
    words = ["neutral", "appointment", "cancelled", "refund_not_showing_up"]
    assert lines == [[word, 1] for word in ("label", "predicted", *words, *words)]


def test_truncated_texts_are_counted_with_their_metric(three_classes, tmp_path):
    results = build_results(CONFIG, three_classes, TrainingRecord(100))
    truncated = np.arange(240) % 4 == 0
    _, predictions = exits_and_predictions(three_classes)
    correct = predictions == three_classes.validation.labels[0]
    details = ReportDetails(cut=truncated, max_length=16)
    write_report(tmp_path / "report.html", three_classes, results, [], {}, details)
    page = " ".join((tmp_path / "report.html").read_text().split())
    assert "60 of 240 validation texts (25%) are longer than 16 tokens" in page
    assert f"accuracy is {correct[truncated].mean():.4f} [" in page
    assert f"on the 60 truncated texts and {correct[~truncated].mean():.4f} [" in page


def test_many_classes_have_a_list_of_confusions_instead_of_a_matrix():
    analysis = analysis_of(77)
    report = class_report(analysis, 0, analysis.operating_point(0).threshold)
    assert report["matrices"] is None
    assert len(report["classes"]) == 77
    counts = [pair["count"] for pair in report["pairs"]]
    assert counts == sorted(counts, reverse=True)
    assert all(pair["label"] != pair["prediction"] for pair in report["pairs"])
    known = [row["f1"] for row in report["classes"] if row["support"]]
    assert known == sorted(known)
    assert [row["f1"] for row in report["classes"]] == known + [None] * (77 - len(known))


def test_multi_label_report_has_no_confusion_matrix(three_classes, tmp_path):
    """Each label is right or wrong by itself, so that labels are not confused with each other."""
    identity = {"objective": "multi_label", "metric": "micro_f1", "policy": "min_confidence"}
    splits = [
        ExitOutputs(
            rows.logits,
            np.eye(3, dtype=bool)[rows.labels[0]],
            rows.layers,
            identity=dataclasses.replace(rows.identity, **identity),
        )
        for rows in (three_classes.calibration, three_classes.validation)
    ]
    for analysis, headings in ((analyse(*splits), 0), (three_classes, 1)):
        results = build_results(CONFIG, analysis, TrainingRecord(100))
        write_report(tmp_path / "report.html", analysis, results, [], {})
        page = (tmp_path / "report.html").read_text()
        assert "<h2>Each class</h2>" in page
        assert page.count("<h2>Confusions</h2>") == headings


@pytest.mark.parametrize("classes", [3, 77])
def test_page_escapes_texts_and_contains_none_unless_given(tmp_path, classes):
    analysis = analysis_of(classes)
    results = build_results(CONFIG, analysis, TrainingRecord(100))
    pages = []
    for texts in (TEXTS, None):
        details = ReportDetails(texts=texts)
        write_report(tmp_path / "report.html", analysis, results, [], {}, details)
        pages.append((tmp_path / "report.html").read_text())
    assert "&amp; &lt;b&gt;more&lt;/b&gt;" in pages[0]
    assert "<b>more" not in pages[0]
    assert "&lt;class 0&gt;" in pages[1]
    assert "more&lt;/b&gt;" not in pages[1]
    assert "confident mistakes" not in pages[1]


def test_class_report_is_none_without_class_names(three_classes):
    unnamed = dataclasses.replace(
        three_classes.validation,
        identity=dataclasses.replace(three_classes.validation.identity, classes=()),
    )
    assert class_report(analyse(three_classes.calibration, unnamed), 0, np.inf) is None
