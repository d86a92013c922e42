"""The report's part on classes and single texts, against counting by hand."""

import dataclasses
import json

import numpy as np
import pytest

from sweet_jax.config import from_mapping
from sweet_jax.exits.analysis import analyse
from sweet_jax.exits.outputs import ExitOutputs, RunIdentity
from sweet_jax.report.classes import class_report, describe_never_predicted
from sweet_jax.report.details import ReportDetails
from sweet_jax.report.page import write_report
from sweet_jax.report.results import TrainingRecord, build_results


def outputs(split: str, count: int, classes: int) -> ExitOutputs:
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


def analysis_of(classes: int):
    return analyse(outputs("calibration", 150, classes), outputs("validation", 240, classes))


def test_long_names_of_classes_are_cut():
    long = [
        dataclasses.replace(
            of, identity=dataclasses.replace(of.identity, classes=("a" * 1000, "b" * 1000, "c"))
        )
        for of in (outputs("calibration", 150, 3), outputs("validation", 240, 3))
    ]
    found = class_report(analyse(*long), 0, 0.5, TEXTS)
    assert found["names"] == [letter * 60 + "…" for letter in "ab"] + ["c"]
    assert len(json.dumps(found)) < 60_000


@pytest.fixture(scope="module")
def few():
    return analysis_of(3)


CONFIG = from_mapping({"exits": (1, 2, 4)}).resolved()
TEXTS = [(f"text {i} & <b>more</b>",) for i in range(240)]


def taken(analysis) -> tuple[np.ndarray, np.ndarray]:
    """The exits and predictions at the operating point, example by example."""
    threshold = analysis.operating_point(0).threshold
    logits, temperatures = analysis.validation.logits[0], analysis.temperatures[0]
    exits, given = [], []
    for row in range(logits.shape[1]):
        for e in range(3):
            scaled = logits[e, row].astype(float) / temperatures[e]
            p = np.exp(scaled - scaled.max())
            if (p / p.sum()).max() >= threshold or e == 2:
                exits.append(e)
                given.append(int(p.argmax()))
                break
    return np.asarray(exits), np.asarray(given)


def test_the_calibration_of_a_class_is_that_of_its_own_probability(few):
    scaled = few.validation.logits[0, -1].astype(float) / few.temperatures[0, -1]
    p = np.exp(scaled) / np.exp(scaled).sum(axis=-1, keepdims=True)  # [N, C]
    found = class_report(few, 0, 0.5)["calibration"]
    assert [row["error"] for row in found] == sorted((r["error"] for r in found), reverse=True)
    for row in found:
        c = few.validation.identity.classes.index(row["name"])
        has = few.validation.labels[0] == c
        bins = np.minimum((10 * p[:, c]).astype(int), 9)
        gaps = [abs((p[bins == b, c] - has[bins == b]).sum()) for b in range(10)]
        assert row["error"] == pytest.approx(sum(gaps) / len(has))
        assert (row["support"], row["share"]) == (has.sum(), has.mean())
        assert row["probability"] == pytest.approx(p[:, c].mean())
    quality = build_results(CONFIG, few, TrainingRecord(100))["replicas"][0]["quality"][-1]
    mean = np.mean([row["error"] for row in found])
    assert quality["after"]["classwise_ece"] == pytest.approx(mean)


def test_classes_that_are_never_predicted_are_named(few):
    rows = few.validation.replica(0)
    assert describe_never_predicted(rows, np.full(240, 2)) is None
    logits = rows.logits.copy()
    logits[:, 1, :, 2] = -100  # at the second exit, class 2 is never predicted
    without = dataclasses.replace(rows, logits=logits)
    assert describe_never_predicted(without, np.full(240, 2)) is None
    count = (rows.labels[0] == 2).sum()
    words = describe_never_predicted(without, np.full(240, 1))
    assert f"have it: '<class 2>' (in {count}); more training rows" in words


def test_precision_recall_and_cost_are_those_of_the_operating_point(few):
    exits, given = taken(few)
    labels, cost = few.validation.labels[0], np.array([0.25, 0.5, 1.0])
    assert 0 < exits.mean() < 2
    report = class_report(few, 0, few.operating_point(0).threshold)
    found = {row["name"]: row for row in report["classes"]}
    for c in range(3):
        row, right = found[f"<class {c}>"], ((given == c) & (labels == c)).sum()
        assert row["support"] == (labels == c).sum()
        assert row["recall"] == pytest.approx(right / (labels == c).sum())
        assert row["precision"] == pytest.approx(right / (given == c).sum())
        assert np.dot(row["shares"], cost) == pytest.approx(cost[exits[labels == c]].mean())
    matrix, last = np.asarray(report["matrices"])
    np.testing.assert_array_equal(matrix.sum(axis=1), np.bincount(labels))
    np.testing.assert_array_equal(
        np.diag(matrix), [((given == c) & (labels == c)).sum() for c in range(3)]
    )
    answers = few.validation.predictions[0, -1]
    assert last[0, 1] == ((labels == 0) & (answers == 1)).sum()
    recall = ((answers == 2) & (labels == 2)).sum() / (labels == 2).sum()
    assert found["<class 2>"]["last"]["recall"] == pytest.approx(recall)


def test_mistakes_are_the_most_confident_first(few):
    exits, given = taken(few)
    labels, each = few.validation.labels[0], few.validation.predictions[0]
    found = class_report(few, 0, few.operating_point(0).threshold, TEXTS)
    assert len(found["mistakes"]) == min(50, (given != labels).sum())
    probabilities = [row["probability"] for row in found["mistakes"]]
    assert probabilities == sorted(probabilities, reverse=True)
    number = {text: row for row, (text,) in enumerate(TEXTS)}
    for row in found["mistakes"]:
        at = number[row["text"]]
        assert row["label"] == f"<class {labels[at]}>"
        assert row["prediction"] == f"<class {given[at]}>"
        assert row["layer"] == (1, 2, 4)[exits[at]]
    always = {
        at for at in range(240) if (each[:, at] == given[at]).all() and given[at] != labels[at]
    }
    assert {number[row["text"]] for row in found["suspects"]} <= always
    assert len(found["suspects"]) == min(50, len(always))


@pytest.mark.parametrize("classes", [3, 77])
def test_the_tables_of_classes_follow_the_slider(tmp_path, browser, classes):
    analysis = analysis_of(classes)
    config = from_mapping({"exits": (1, 2, 4)}).resolved()
    results = build_results(config, analysis, TrainingRecord(100))
    write_report(tmp_path / "report.html", analysis, results, [], {})
    assert (tmp_path / "report.html").stat().st_size < 1_500_000
    browser.get((tmp_path / "report.html").as_uri())
    labels, each = analysis.validation.labels[0], analysis.validation.predictions[0]
    for position in (5, 200):
        threshold = browser.execute_script(
            "const s = document.getElementById('threshold'); s.value = arguments[0];"
            "s.dispatchEvent(new Event('input'));"
            "return document.getElementById('at-threshold').textContent",
            position,
        )
        exits = analysis.exits_taken(0, float(threshold))
        given = each[exits, np.arange(len(exits))]
        rows = browser.execute_script(
            "return [...document.querySelectorAll('tr[data-class]')].map("
            "r => [r.dataset.class, ...[...r.cells].map(c => c.textContent)])"
        )
        assert len(rows) == classes
        for number, _, support, precision, recall, f1, *rest in rows:
            own, named = labels == int(number), given == int(number)
            right = (own & named).sum()
            assert int(support) == own.sum()
            values = right / max(1, named.sum()), right / max(1, own.sum())
            values += (2 * right / max(1, named.sum() + own.sum()),)
            assert [float(v) for v in (precision, recall, f1)] == pytest.approx(values, abs=6e-4)
            if own.any():
                shares = [100 * (exits[own] == e).mean() for e in range(3)]
                found = [float(text.rstrip("%")) for text in rest[3:]]
                assert found == pytest.approx(shares, abs=0.51)
        counts = browser.execute_script(
            "return [...document.querySelectorAll('#matrix tbody td')].map(c => +c.textContent)"
        )
        expected = [((labels == i) & (given == j)).sum() for i in range(3) for j in range(3)]
        assert counts == (expected if classes == 3 else [])
        pairs = browser.execute_script(
            "return [...document.querySelectorAll('#pairs tr[data-cell]')].map("
            "r => [+r.dataset.cell, +r.cells[2].textContent])"
        )
        assert len(pairs) == (0 if classes == 3 else 20)
        for cell, count in pairs:
            assert count == ((labels == cell // classes) & (given == cell % classes)).sum()


def test_texts_that_were_cut_are_counted_with_their_metric(few, tmp_path):
    config = from_mapping({"exits": (1, 2, 4)}).resolved()
    results = build_results(config, few, TrainingRecord(100))
    cut = np.arange(240) % 4 == 0
    _, given = taken(few)
    right = given == few.validation.labels[0]
    details = ReportDetails(cut=cut, max_length=16)
    write_report(tmp_path / "report.html", few, results, [], {}, details)
    page = " ".join((tmp_path / "report.html").read_text().split())
    assert "60 of 240 validation texts (25%) are longer than 16 tokens" in page
    assert f"accuracy is {right[cut].mean():.4f} [" in page
    assert f"on the 60 truncated texts and {right[~cut].mean():.4f} [" in page


def test_many_classes_are_listed_by_their_confusions():
    many = analysis_of(77)
    found = class_report(many, 0, many.operating_point(0).threshold)
    assert found["matrices"] is None
    assert len(found["classes"]) == 77
    counts = [pair["count"] for pair in found["pairs"]]
    assert counts == sorted(counts, reverse=True)
    assert all(pair["label"] != pair["prediction"] for pair in found["pairs"])
    assert [row["f1"] for row in found["classes"]] == sorted(r["f1"] for r in found["classes"])


def test_labels_have_no_heading_of_confusions(few, tmp_path):
    """Each of several labels is right or wrong by itself: there is no matrix to show."""
    about = {"objective": "multi_label", "metric": "micro_f1", "policy": "min_confidence"}
    several = [
        ExitOutputs(
            rows.logits,
            np.eye(3, dtype=bool)[rows.labels[0]],
            rows.layers,
            identity=dataclasses.replace(rows.identity, **about),
        )
        for rows in (few.calibration, few.validation)
    ]
    for analysis, headings in ((analyse(*several), 0), (few, 1)):
        results = build_results(CONFIG, analysis, TrainingRecord(100))
        write_report(tmp_path / "report.html", analysis, results, [], {})
        page = (tmp_path / "report.html").read_text()
        assert "<h2>Each class</h2>" in page
        assert page.count("<h2>Confusions</h2>") == headings


@pytest.mark.parametrize("classes", [3, 77])
def test_the_page_escapes_texts_and_holds_none_where_not_asked(tmp_path, classes):
    analysis = analysis_of(classes)
    config = from_mapping({"exits": (1, 2, 4)}).resolved()
    results = build_results(config, analysis, TrainingRecord(100))
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


def test_outputs_without_names_of_classes_have_no_such_part(few):
    bare = dataclasses.replace(
        few.validation, identity=dataclasses.replace(few.validation.identity, classes=())
    )
    assert class_report(analyse(few.calibration, bare), 0, np.inf) is None
