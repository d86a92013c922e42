"""The report's part on classes and single texts, against counting by hand."""

import dataclasses

import numpy as np
import pytest

from sweet_jax.config import from_mapping
from sweet_jax.exits.analysis import analyse
from sweet_jax.exits.outputs import ExitOutputs, RunIdentity
from sweet_jax.report.classes import class_report
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


@pytest.fixture(scope="module")
def few():
    return analysis_of(3)


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


def test_precision_recall_and_cost_are_those_of_the_operating_point(few):
    exits, given = taken(few)
    labels, cost = few.validation.labels[0], np.array([0.25, 0.5, 1.0])
    assert 0 < exits.mean() < 2
    found = {row["name"]: row for row in class_report(few, 0, None)["classes"]}
    for c in range(3):
        row, right = found[f"<class {c}>"], ((given == c) & (labels == c)).sum()
        assert row["support"] == (labels == c).sum()
        assert row["recall"] == pytest.approx(right / (labels == c).sum())
        assert row["precision"] == pytest.approx(right / (given == c).sum())
        assert row["cost"] == pytest.approx(cost[exits[labels == c]].mean())
    matrix = np.asarray(class_report(few, 0, None)["matrix"])
    np.testing.assert_array_equal(matrix.sum(axis=1), np.bincount(labels))
    np.testing.assert_array_equal(
        np.diag(matrix), [((given == c) & (labels == c)).sum() for c in range(3)]
    )


def test_mistakes_are_the_most_confident_first(few):
    exits, given = taken(few)
    labels, each = few.validation.labels[0], few.validation.predictions[0]
    found = class_report(few, 0, TEXTS)
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


def test_many_classes_are_listed_by_their_confusions():
    many = analysis_of(77)
    found = class_report(many, 0, None)
    assert found["matrix"] is None
    assert len(found["classes"]) == 77
    counts = [pair["count"] for pair in found["pairs"]]
    assert counts == sorted(counts, reverse=True)
    assert all(pair["label"] != pair["prediction"] for pair in found["pairs"])
    assert [row["f1"] for row in found["classes"]] == sorted(r["f1"] for r in found["classes"])


@pytest.mark.parametrize("classes", [3, 77])
def test_the_page_escapes_texts_and_holds_none_where_not_asked(tmp_path, classes):
    analysis = analysis_of(classes)
    config = from_mapping({"exits": (1, 2, 4)}).resolved()
    results = build_results(config, analysis, TrainingRecord(100))
    pages = []
    for texts in (TEXTS, None):
        write_report(tmp_path / "report.html", analysis, results, [], {}, texts)
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
    assert class_report(analyse(few.calibration, bare), 0, None) is None
