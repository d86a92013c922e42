"""Labels of files as targets: lists, a|b, numbers; and whole runs on them."""

import asyncio
import json

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_export import load_runner
from tiny import WORDS, fine_tune

from sweet_jax import AdaptiveClassifier, ExitOutputs, cli
from sweet_jax.config import Config, from_mapping
from sweet_jax.data.batches import encode
from sweet_jax.data.load import load_dataset
from sweet_jax.data.padding import pad_rows
from sweet_jax.data.splits import split_calibration_rows, split_tuning_rows
from sweet_jax.errors import UserError
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.inference import run_exported
from sweet_jax.inference.all_exits import compute_all_exits
from sweet_jax.objectives.multi_label import describe_labels
from sweet_jax.objectives.regression import quantile_strata
from sweet_jax.preparation import prepare
from sweet_jax.runs import Run

TEXTS = [f"text {i}" for i in range(40)]
SETS = [["b", "a"], ["a"], [], ["c"]] * 10


def load(path, **changes):
    values = {"task": "own", "data_files": str(path), "text_columns": "text"}
    return load_dataset(from_mapping(values | {"objective": "multi_label"} | changes))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_several_labels_are_lists_or_separated_by_bars(suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    frame = pd.DataFrame({"text": TEXTS, "label": SETS})
    if suffix == "csv":
        frame["label"] = [" | ".join(labels) for labels in SETS]
        frame.to_csv(path, index=False)
    elif suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    dataset = load(path)
    assert dataset.classes == ("a", "b", "c")
    known = dict(zip(TEXTS, SETS, strict=True))
    for split, rows in ((dataset.train, 32), (dataset.validation, 8)):
        assert split.labels.shape == (rows, 3)
        for (text,), own in zip(split.texts, split.labels, strict=True):
            assert {"abc"[c] for c in np.flatnonzero(own)} == set(known[text])
        # Each set of labels in proportion.
        assert split.labels.sum(axis=0).tolist() == [rows // 2, rows // 4, rows // 4]
    if suffix != "csv":
        with pytest.raises(UserError, match=r"require --config\.objective=multi_label"):
            load(path, objective="single_label")


@pytest.mark.parametrize(
    ("labels", "changes", "refusal"),
    [
        ([["a|b"]] * 40, {}, "rename it, since .* separates labels"),
        (["['a', 'b']", "['a']"] * 20, {}, r"label \"\['a', 'b'\]\" .* write it as a\|b"),
        (["a", "[]"] * 20, {}, r"label '\[\]' .* is a list that is written as text"),
        ([""] * 40, {}, "no row has a label in column 'label'"),
        (["a|b"] * 40, {}, "all training rows have the same labels"),
        (["1", "x"] * 20, {"objective": "regression"}, "label 'x' .* is not a finite number"),
        (["1_000", "2"] * 20, {"objective": "regression"}, "label '1_000' .* is not a finite"),
        (["١٢", "2"] * 20, {"objective": "regression"}, "label '١٢' .* is not a finite number"),
        (["1", "nan"] * 20, {"objective": "regression"}, "label 'nan' .* is not a finite number"),
        (["1e39", "2"] * 20, {"objective": "regression"}, "label '1e39' .* too large for float32"),
        (
            [str(1_700_000_000 + i) for i in range(40)],
            {"objective": "regression"},
            "from 1700000000 to 1700000039 differ by too little .*: subtract 1700000000",
        ),
        (["0.1"] * 40, {"objective": "regression"}, "all training rows have the same number, 0.1"),
        (["2.5"] * 40, {"objective": "regression"}, "all training rows have the same number, 2.5"),
        (["a", "b"] * 20, {"metric": "accuracy"}, "unknown metric 'accuracy'"),
        (["a", "b"] * 20, {"class_weights": "balanced"}, "applies only to objective=sing"),
        (
            ["1", "2"] * 20,
            {"objective": "regression", "confidence": "confidence"},
            "probabilities, which objective=regression does not have",
        ),
    ],
)
def test_targets_that_will_not_do_are_refused(labels, changes, refusal, tmp_path):
    rows = [{"text": t, "label": label} for t, label in zip(TEXTS, labels, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=refusal):
        load(tmp_path / "rows.jsonl", **changes)


def test_lists_of_a_fixed_size_are_labels_and_nan_in_one_is_none(tmp_path):
    sets = [["a", "b"], ["b", "c"]] * 20
    fixed = pa.table({"text": TEXTS, "label": pa.array(sets, pa.list_(pa.string(), 2))})
    pq.write_table(fixed, tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet").classes == ("a", "b", "c")
    with pytest.raises(UserError, match=r"require --config\.objective=multi_label"):
        load(tmp_path / "rows.parquet", objective="single_label")
    pq.write_table(pa.table({"text": TEXTS, "label": [[1.0, np.nan]] * 40}), tmp_path / "n.parquet")
    with pytest.raises(UserError, match="a list with nan in it, which is not a label"):
        load(tmp_path / "n.parquet")


def test_labels_that_are_separated_by_something_else_are_named():
    alone, several = np.asarray([[1, 0], [0, 1]] * 9, bool), np.ones((9, 2), bool)
    for name in ("a,b", "a; b"):
        _, (warning,) = describe_labels(alone, ("a", name))
        assert f"no row has several labels, and {name!r} is read as one label" in warning
        assert describe_labels(several, ("a", name))[1] == []
    assert describe_labels(alone, ("[a]", "a b"))[1] == []


def test_numbers_are_standardised_for_training_alone(options, tmp_path):
    numbers = np.random.default_rng(0).normal(50, 20, 40).round(2)
    pd.DataFrame({"text": TEXTS, "label": numbers}).to_csv(tmp_path / "rows.csv", index=False)
    changes = {"data_files": str(tmp_path / "rows.csv"), "objective": "regression"}
    job = prepare(from_mapping(options | changes))
    mean, deviation = job.scaler
    train = job.dataset.train.labels
    np.testing.assert_allclose([mean, deviation], [train.mean(), train.std()], rtol=1e-5)
    np.testing.assert_allclose(job.train.labels, (job.labels - mean) / deviation, atol=1e-6)
    batch = pad_rows(job.train, np.asarray([[2, -1]]), (32,))
    assert batch["labels"].tolist() == [[job.train.labels[2], 0]]
    # The validation rows are of different tenths of the targets.
    tenths = dict(zip(numbers.astype(np.float32), quantile_strata(numbers), strict=True))
    assert np.bincount(list(tenths.values())).min() >= 3
    assert len({tenths[number] for number in job.dataset.validation.labels}) == 8


def test_rows_of_numbers_that_are_mostly_the_smallest_are_split(options, tmp_path):
    numbers = np.where(np.arange(40) % 13 == 5, np.arange(40.0), 0)  # three are not zero
    assert quantile_strata(numbers).tolist() == (numbers > 0).tolist()
    pd.DataFrame({"text": TEXTS, "label": numbers}).to_csv(tmp_path / "rows.csv", index=False)
    changes = {"data_files": str(tmp_path / "rows.csv"), "objective": "regression"}
    job = prepare(from_mapping(options | changes | {"head_init": "probe"}))
    for rows in (job.rows.training, job.rows.calibration, job.rows.tuning):
        assert rows.size
    assert len(np.unique(job.labels[job.rows.training])) > 1


def test_targets_and_not_strata_decide_whether_there_is_something_to_learn():
    config = Config(objective="regression", confidence="stability", train_size=20).resolved()
    strata, numbers = np.zeros(40, int), np.linspace(0, 1, 40, dtype=np.float32)
    split_calibration_rows(strata, config, 0, numbers)
    split_tuning_rows(strata, np.arange(20), 0.1, 0, numbers)
    with pytest.raises(UserError, match=r"the 20 training rows drawn all have the number 0\.5: "):
        split_calibration_rows(strata, config, 0, np.full(40, 0.5, np.float32))
    with pytest.raises(UserError, match="the 20 training rows drawn all have the same labels"):
        split_calibration_rows(strata, config, 0, np.ones((40, 2), bool))


def test_the_loss_is_weighted_by_the_classes_of_the_training_rows(options):
    job = prepare(from_mapping(options | {"class_weights": "balanced"}))
    counts = np.bincount(job.train.labels[job.rows.training].ravel())
    logits, labels = np.zeros((2, 2), np.float32), np.arange(2)
    found = job.objective.row_loss(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(found, np.log(2) * counts.sum() / (2 * counts), rtol=1e-5)
    # Not of the file, of which few rows may be drawn: with a row of each class, however rare.
    assert len(job.dataset.train.labels) > counts.sum()
    with pytest.raises(UserError, match=r"one number for each of the 2 classes .*; got 3"):
        prepare(from_mapping(options | {"class_weights": "1,2,3"}))
    with pytest.raises(UserError, match="focal_gamma=2 cannot be combined with head_refit"):
        from_mapping(options | {"focal_gamma": 2.0, "head_refit": True})


def write_targets(path, objective):
    """Texts whose first words tell their labels, or a number that is their sum."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(240):
        present = np.flatnonzero(rng.random(3) < [0.6, 0.4, 0.2])
        words = [*(WORDS[c] for c in present), *rng.choice(WORDS[3:], rng.integers(1, 8))]
        label = [f"label {c}" for c in present]
        if objective == "regression":
            label = 100.0 + 10 * float((present + 1).sum())
        rows.append({"text": " ".join(words), "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ask_server(classifier, body) -> dict:
    """The response of the HTTP application, called without a server."""
    served = pytest.importorskip("sweet_jax.server.app", reason='pip install -e ".[serve]"')
    app, sent = served.make_app(classifier, 2, served.Limits()), []

    async def receive():
        return {"type": "http.request", "body": json.dumps(body).encode()}

    async def send(message):
        sent.append(message)

    async def call():
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)

    asyncio.run(call())
    assert sent[0]["status"] == 200, sent
    return json.loads(sent[1]["body"])


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["multi_label", "regression"])
def test_a_whole_run(objective, checkpoint, tmp_path, with_figures):
    several = objective == "multi_label"
    rows = write_targets(tmp_path / "rows.jsonl", objective)
    changes = {"objective": objective, "data_files": str(rows), "pooling": "mean", "epochs": 8}
    if several:
        refit = {"head_init": "probe", "head_refit": True, "baselines": "quick"}
        changes |= {"exits": (1, 2), "depth": 2, **refit}
    else:
        changes |= {"learning_to_exit": "joint", "exits": (1, 3)}
    folder, values = fine_tune(checkpoint, tmp_path, **changes)
    dataset = load_dataset(from_mapping(values))
    results = Run.load(folder).results
    if several:
        found = results.set_index("baseline")["micro_f1"]
        assert found.iloc[:2].max() > found["constant"] + 0.2
    else:
        numbers = dataset.validation.labels
        spread = np.abs(numbers - np.median(numbers)).mean()
        assert results["neg_mean_absolute_error"].max() > 2 - spread
    assert ("hamming loss" if several else "spearman") in (folder / "report.html").read_text()

    # The saved model gives the outputs that were evaluated, in the targets' own units.
    outputs = ExitOutputs.load(folder / "exit_outputs" / "validation.npz")
    texts = [text for (text,) in dataset.validation.texts]
    np.testing.assert_array_equal(outputs.labels[0], dataset.validation.labels)
    classifier = AdaptiveClassifier.from_pretrained(folder / "model", cost=0.8)
    logits, _ = compute_all_exits(classifier.model, classifier.engine, texts)
    np.testing.assert_allclose(logits, outputs.logits[0], rtol=1e-4, atol=1e-4)
    policy = "min_confidence" if several else "learning_to_exit"
    assert classifier.policy == policy
    confidences = exit_confidences(outputs, policy, [classifier.calibrator])[0]
    confidences[-1] = np.inf
    exits = (confidences >= classifier.threshold).argmax(axis=0)
    found = classifier.predict(texts, 16)
    assert found.exits.tolist() == [classifier.layers[e] for e in exits]
    answers = outputs.predictions[0][exits, np.arange(len(texts))]
    if several:
        names = np.asarray(dataset.classes)
        assert found.labels.tolist() == [names[given].tolist() for given in answers]
    else:
        np.testing.assert_allclose(found.labels, answers, rtol=1e-4)

    served = ask_server(classifier, {"texts": texts[:2], "detail": True})
    for answer, label in zip(served["answers"], found.labels[:2].tolist(), strict=True):
        assert answer["label"] == (label if several else pytest.approx(label, rel=1e-4))
        assert answer["exits"][-1]["label"] == answer["label"]
        assert ("probability" in answer) == several

    # Files of predictions, thresholds fitted anew, and programs.
    model, given = folder / "model", "--cost=0.8"
    for name in ("out.jsonl", "out.csv"):
        line = ["predict", f"--model={model}", f"--input={rows}", given]
        assert cli.main([*line, f"--output={tmp_path / name}"]) == 0
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert isinstance(first["label"], list if several else float)
    assert ("probability" in first) == several
    table = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)
    assert table["label"][0] == ("|".join(first["label"]) if several else first["label"])
    assert cli.main(["recalibrate", f"--model={model}", f"--labelled={rows}"]) == 0
    if not several:
        return  # compiling its programs takes seconds; the test below has what is done with them
    line = ["export", f"--model={model}", f"--output={tmp_path / 'exported'}"]
    assert cli.main([*line, f"--threshold={classifier.threshold!r}"]) == 0
    ids, _ = encode(classifier.model.tokenizer, [(text,) for text in texts], 32)
    tokens = np.asarray([len(row) for row in ids], np.int32)
    padded = np.zeros((2, len(ids), 32), np.int32)
    for place, row in enumerate(ids):
        padded[0, place, : len(row)] = row
    runner = load_runner(tmp_path / "exported")
    answers, probability, layers = runner.predict(tmp_path / "exported", *padded, tokens)
    assert layers.tolist() == found.exits.tolist()
    assert [names[given].tolist() for given in answers] == found.labels.tolist()
    sure = np.maximum(found.probabilities, 1 - found.probabilities).min(axis=1)
    np.testing.assert_allclose(probability, sure, atol=1e-5)


def test_an_exported_regression_leaves_where_its_exits_are_close():
    about, stage = {"objective": "regression", "policy": "stability"}, {"temperature": None}
    first, second = np.asarray([[1.0], [2.0]]), np.asarray([[1.5], [-2.0]])
    given, _, confidence = run_exported.read_outputs(about, stage, first, None)
    assert confidence.tolist() == [0, 0]
    given, probability, confidence = run_exported.read_outputs(about, stage, second, given)
    assert given.tolist() == [1.5, -2]
    assert np.isnan(probability).all()
    np.testing.assert_allclose(confidence, [1 / 1.5, 1 / 5])
