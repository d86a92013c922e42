"""Tests of multi-label and regression targets, in files and in runs."""

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
from sweet_jax.objectives import OBJECTIVES
from sweet_jax.objectives.multi_label import describe_labels
from sweet_jax.objectives.regression import quantile_strata
from sweet_jax.preparation import prepare
from sweet_jax.runs import Run

TEXTS = [f"text {i}" for i in range(40)]
LABEL_SETS = [["b", "a"], ["a"], [], ["c"]] * 10


def load(path, **changes):
    values = {"task": "own", "data_files": str(path), "text_columns": "text"}
    return load_dataset(from_mapping(values | {"objective": "multi_label"} | changes))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_multi_label_rows_are_read_from_lists_or_bar_separated_text(suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    frame = pd.DataFrame({"text": TEXTS, "label": LABEL_SETS})
    if suffix == "csv":
        frame["label"] = [" | ".join(labels) for labels in LABEL_SETS]
        frame.to_csv(path, index=False)
    elif suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    dataset = load(path)
    assert dataset.classes == ("a", "b", "c")
    labels_of = dict(zip(TEXTS, LABEL_SETS, strict=True))
    for split, rows in ((dataset.train, 32), (dataset.validation, 8)):
        assert split.labels.shape == (rows, 3)
        for (text,), row in zip(split.texts, split.labels, strict=True):
            assert {"abc"[c] for c in np.flatnonzero(row)} == set(labels_of[text])
        # The split is stratified by sets of labels.
        assert split.labels.sum(axis=0).tolist() == [rows // 2, rows // 4, rows // 4]
    if suffix != "csv":
        with pytest.raises(UserError, match=r"require --config\.objective=multi_label"):
            load(path, objective="single_label")


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
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
        (
            ["1,5", "2"] * 20,
            {"objective": "regression"},
            "label '1,5' .*: write numbers with a decimal point and no other separator",
        ),
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
def test_invalid_targets_are_refused(labels, changes, message, tmp_path):
    rows = [{"text": t, "label": label} for t, label in zip(TEXTS, labels, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "rows.jsonl", **changes)


@pytest.mark.parametrize("objective", ["single_label", "multi_label", "regression"])
def test_error_of_a_label_cuts_a_long_text_within_its_quotes(objective):
    """The message is also that of `recalibrate`, which has no objective to leave out."""
    with pytest.raises(UserError) as error:
        OBJECTIVES[objective].column.read(["x"], ("a",), [("word " * 20,)])
    assert f"the text '{'word ' * 7}wo…')" in str(error.value)
    assert "leave objective out" not in str(error.value)


def test_error_of_a_label_names_its_row_and_file(tmp_path):
    """The first file has a row less than its lines, which is skipped."""
    for name, labels in (("a", ["1", "", "2", "3"]), ("b", ["4", "1,5"])):
        lines = "".join(f'{name}{i},"{label}"\n' for i, label in enumerate(labels))
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{lines}")
    files = f"{tmp_path / 'a.csv'}+{tmp_path / 'b.csv'}"
    with pytest.raises(UserError) as error:
        load(files, objective="regression", skip_invalid=True)
    assert f"the data: row 2 of '{tmp_path / 'b.csv'}': label '1,5' (" in str(error.value)
    (tmp_path / "b.csv").unlink()
    (tmp_path / "a.csv").write_text("text,label\na,1\nb,\nc,x\n")
    with pytest.raises(UserError, match=r"row 3 of '.*a\.csv': label 'x'"):
        load(tmp_path / "a.csv", objective="regression", skip_invalid=True)


def test_fixed_size_lists_are_labels_and_nan_in_a_list_is_refused(tmp_path):
    sets = [["a", "b"], ["b", "c"]] * 20
    fixed = pa.table({"text": TEXTS, "label": pa.array(sets, pa.list_(pa.string(), 2))})
    pq.write_table(fixed, tmp_path / "rows.parquet")
    assert load(tmp_path / "rows.parquet").classes == ("a", "b", "c")
    with pytest.raises(UserError, match=r"require --config\.objective=multi_label"):
        load(tmp_path / "rows.parquet", objective="single_label")
    pq.write_table(pa.table({"text": TEXTS, "label": [[1.0, np.nan]] * 40}), tmp_path / "n.parquet")
    with pytest.raises(UserError, match="a list with nan in it, which is not a label"):
        load(tmp_path / "n.parquet")


def test_label_names_with_other_separators_are_warned_about():
    one_each, two_each = np.asarray([[1, 0], [0, 1]] * 9, bool), np.ones((9, 2), bool)
    for name in ("a,b", "a; b"):
        _, (warning,) = describe_labels(one_each, ("a", name))
        assert f"no row has several labels, and {name!r} is read as one label" in warning
        assert describe_labels(two_each, ("a", name))[1] == []
    assert describe_labels(one_each, ("[a]", "a b"))[1] == []


def test_regression_targets_are_standardised_for_training_only(options, tmp_path):
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
    # The split is stratified by tenths of the targets.
    tenths = dict(zip(numbers.astype(np.float32), quantile_strata(numbers), strict=True))
    assert np.bincount(list(tenths.values())).min() >= 3
    assert len({tenths[number] for number in job.dataset.validation.labels}) == 8


def test_split_works_when_most_targets_equal_the_minimum(options, tmp_path):
    numbers = np.where(np.arange(40) % 13 == 5, np.arange(40.0), 0)  # three of them differ from 0
    assert quantile_strata(numbers).tolist() == (numbers > 0).tolist()
    pd.DataFrame({"text": TEXTS, "label": numbers}).to_csv(tmp_path / "rows.csv", index=False)
    changes = {"data_files": str(tmp_path / "rows.csv"), "objective": "regression"}
    job = prepare(from_mapping(options | changes | {"head_init": "probe"}))
    for rows in (job.rows.training, job.rows.calibration, job.rows.tuning):
        assert rows.size
    assert len(np.unique(job.labels[job.rows.training])) > 1


def test_constant_targets_are_refused_but_constant_strata_are_not():
    config = Config(objective="regression", confidence="stability", train_size=20).resolved()
    strata, numbers = np.zeros(40, int), np.linspace(0, 1, 40, dtype=np.float32)
    split_calibration_rows(strata, config, 0, numbers)
    split_tuning_rows(strata, np.arange(20), 0.1, 0, numbers)
    with pytest.raises(UserError, match=r"the 20 training rows drawn all have the number 0\.5: "):
        split_calibration_rows(strata, config, 0, np.full(40, 0.5, np.float32))
    with pytest.raises(UserError, match="the 20 training rows drawn all have the same labels"):
        split_calibration_rows(strata, config, 0, np.ones((40, 2), bool))


def test_balanced_class_weights_are_those_of_drawn_training_rows(options):
    job = prepare(from_mapping(options | {"class_weights": "balanced"}))
    counts = np.bincount(job.train.labels[job.rows.training].ravel())
    logits, labels = np.zeros((2, 2), np.float32), np.arange(2)
    losses = job.objective.row_loss(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(losses, np.log(2) * counts.sum() / (2 * counts), rtol=1e-5)
    # The file has more rows than were drawn.
    assert len(job.dataset.train.labels) > counts.sum()
    with pytest.raises(UserError, match=r"one number for each of the 2 classes .*; got 3"):
        prepare(from_mapping(options | {"class_weights": "1,2,3"}))
    with pytest.raises(UserError, match="focal_gamma=2 cannot be combined with head_refit"):
        from_mapping(options | {"focal_gamma": 2.0, "head_refit": True})


def write_targets(path, objective):
    """Writes texts whose first words determine their labels, or a number as the target."""
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


def call_server(classifier, body) -> dict:
    """Returns the response of the server's application, called without a network."""
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


def check_metrics(folder, dataset, objective: str) -> None:
    """Asserts that a run did better than a constant prediction, and that its report has metrics."""
    results, report = Run.load(folder).results, (folder / "report.html").read_text()
    if objective == "multi_label":
        scores = results.set_index("baseline")["micro_f1"]
        assert scores.iloc[:2].max() > scores["constant"] + 0.2
        assert "hamming loss" in report
    else:
        numbers = dataset.validation.labels
        spread = np.abs(numbers - np.median(numbers)).mean()
        assert results["neg_mean_absolute_error"].max() > 2 - spread
        assert "spearman" in report


def check_classifier(classifier, dataset, outputs, objective: str):
    """Asserts that a saved model gives the outputs of its evaluation, in the targets' units.

    Returns its predictions for the validation texts.
    """
    texts = [text for (text,) in dataset.validation.texts]
    np.testing.assert_array_equal(outputs.labels[0], dataset.validation.labels)
    logits, _ = compute_all_exits(classifier.model, classifier.engine, texts)
    np.testing.assert_allclose(logits, outputs.logits[0], rtol=1e-4, atol=1e-4)
    policy = "min_confidence" if objective == "multi_label" else "learning_to_exit"
    assert classifier.policy == policy
    confidences = exit_confidences(outputs, policy, [classifier.calibrator])[0]
    confidences[-1] = np.inf
    exits = (confidences >= classifier.threshold).argmax(axis=0)
    predictions = classifier.predict(texts, 16)
    assert predictions.exits.tolist() == [classifier.layers[e] for e in exits]
    answers = outputs.predictions[0][exits, np.arange(len(texts))]
    if objective == "multi_label":
        assert predictions.labels.tolist() == label_names(dataset, answers)
    else:
        np.testing.assert_allclose(predictions.labels, answers, rtol=1e-4)
    return predictions


def label_names(dataset, answers) -> list[list[str]]:
    """Returns the names of the labels of each row, for answers bool [N, C]."""
    names = np.asarray(dataset.classes)
    return [names[present].tolist() for present in answers]


def check_server(classifier, texts, labels, objective: str) -> None:
    """Asserts that the server answers the texts with these labels."""
    several = objective == "multi_label"
    response = call_server(classifier, {"texts": texts, "detail": True})
    for answer, label in zip(response["answers"], labels, strict=True):
        assert answer["label"] == (label if several else pytest.approx(label, rel=1e-4))
        assert answer["exits"][-1]["label"] == answer["label"]
        assert ("probability" in answer) == several


def check_commands(model, rows, folder, objective: str) -> None:
    """Asserts that predict writes labels in both formats, and that recalibrate succeeds."""
    several = objective == "multi_label"
    for name in ("out.jsonl", "out.csv"):
        command = ["predict", f"--model={model}", f"--input={rows}", "--cost=0.8"]
        assert cli.main([*command, f"--output={folder / name}"]) == 0
    first = json.loads((folder / "out.jsonl").read_text().splitlines()[0])
    assert isinstance(first["label"], list if several else float)
    assert ("probability" in first) == several
    table = pd.read_csv(folder / "out.csv", keep_default_na=False)
    assert table["label"][0] == ("|".join(first["label"]) if several else first["label"])
    assert cli.main(["recalibrate", f"--model={model}", f"--labelled={rows}"]) == 0


def check_exported(classifier, dataset, predictions, folder) -> None:
    """Asserts that the exported program of a multi-label model gives these predictions."""
    command = ["export", f"--model={classifier.model.folder}", f"--output={folder}"]
    assert cli.main([*command, f"--threshold={classifier.threshold!r}"]) == 0
    ids, _ = encode(classifier.model.tokenizer, dataset.validation.texts, 32)
    tokens = np.asarray([len(row) for row in ids], np.int32)
    padded = np.zeros((2, len(ids), 32), np.int32)
    for number, row in enumerate(ids):
        padded[0, number, : len(row)] = row
    answers, probability, layers = load_runner(folder).predict(folder, *padded, tokens)
    assert layers.tolist() == predictions.exits.tolist()
    assert label_names(dataset, answers) == predictions.labels.tolist()
    least = np.maximum(predictions.probabilities, 1 - predictions.probabilities).min(axis=1)
    np.testing.assert_allclose(probability, least, atol=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param("multi_label", marks=pytest.mark.slow),
        pytest.param("regression", marks=pytest.mark.nightly),
    ],
)
def test_run_predict_serve_and_export_with_other_objectives(
    objective, checkpoint, tmp_path, with_figures
):
    rows = write_targets(tmp_path / "rows.jsonl", objective)
    changes = {"objective": objective, "data_files": str(rows), "pooling": "mean", "epochs": 8}
    if objective == "multi_label":
        refit = {"head_init": "probe", "head_refit": True, "baselines": "quick"}
        changes |= {"exits": (1, 2), "depth": 2, **refit}
    else:
        changes |= {"learning_to_exit": "joint", "exits": (1, 3)}
    folder, values = fine_tune(checkpoint, tmp_path, **changes)
    dataset = load_dataset(from_mapping(values))
    check_metrics(folder, dataset, objective)
    outputs = ExitOutputs.load(folder / "exit_outputs" / "validation.npz")
    classifier = AdaptiveClassifier.from_pretrained(folder / "model", cost=0.8)
    predictions = check_classifier(classifier, dataset, outputs, objective)
    texts = [text for (text,) in dataset.validation.texts[:2]]
    check_server(classifier, texts, predictions.labels[:2].tolist(), objective)
    check_commands(folder / "model", rows, tmp_path, objective)
    if objective == "multi_label":
        # Compiling the programs of a regression takes seconds; the next test reads its outputs.
        check_exported(classifier, dataset, predictions, tmp_path / "exported")


def test_exported_regression_is_confident_when_exits_agree():
    exported, stage = {"objective": "regression", "policy": "stability"}, {"temperature": None}
    first, second = np.asarray([[1.0], [2.0]]), np.asarray([[1.5], [-2.0]])
    answers, _, confidence = run_exported.read_outputs(exported, stage, first, None)
    assert confidence.tolist() == [0, 0]
    answers, probability, confidence = run_exported.read_outputs(exported, stage, second, answers)
    assert answers.tolist() == [1.5, -2]
    assert np.isnan(probability).all()
    np.testing.assert_allclose(confidence, [1 / 1.5, 1 / 5])
