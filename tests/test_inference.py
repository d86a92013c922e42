"""Adaptive inference equals evaluation and simulation, whatever the batches."""

import dataclasses
import json
import pickle
import shutil

import datasets
import jax
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_engine import load_engine
from tiny import WORDS, write_checkpoint

from sweet_jax import AdaptiveClassifier, export, predict
from sweet_jax.errors import UserError
from sweet_jax.exits import confidences
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.inference import classifier as classifier_module
from sweet_jax.inference.engine_choice import default_engine
from sweet_jax.inference.engine_jax import JaxEngine, stage_parameters
from sweet_jax.inference.latency import read_latency
from sweet_jax.inference.latency_table import LatencyTable
from sweet_jax.inference.network import Network, load_networks
from sweet_jax.inference.target_warnings import target_warning
from sweet_jax.models.checkpoint_folder import load_tokenizer, locate_checkpoint
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.head import ExitConfig
from sweet_jax.models.pretrained import open_checkpoint
from sweet_jax.objectives.objective import softmax

POLICIES = ("confidence", "entropy", "patience", "voting", "learning_to_exit", "pcee_isotonic")


@pytest.mark.parametrize(
    ("policy", "target", "warns"),
    [
        ("pcee", {"accuracy": 0.7}, True),
        ("pcee", {"accuracy": 0.5}, False),
        ("pcee", {"cost": 0.9}, False),
        ("confidence", {"accuracy": 0.5}, False),
    ],
)
def test_accuracy_out_of_reach_is_warned_of_where_it_is_a_threshold(
    sweet, caplog, monkeypatch, policy, target, warns
):
    """Uses a model whose calibration rows reach an accuracy of 0.6."""
    model = sweet.classifier.model
    front = model.resolver.fronts[policy]
    front = dataclasses.replace(front, score=0.6 + front.score - front.score[-1])
    resolver = dataclasses.replace(model.resolver, fronts={policy: front})
    model = dataclasses.replace(model, resolver=resolver)
    monkeypatch.setattr(classifier_module, "open_model", lambda *_: model)
    monkeypatch.setattr(classifier_module, "load_engine", lambda *_: load_engine(model))
    loaded = AdaptiveClassifier.from_pretrained(model.folder, policy=policy, engine="jax", **target)
    if policy == "pcee" and "accuracy" in target:
        assert loaded.threshold == target["accuracy"]
    expected = (
        "accuracy=0.7 is out of reach: the calibration rows reach at most 0.6000, but under pcee "
        "it only sets the threshold, 0.7: set a value within reach"
    )
    assert caplog.messages == [expected] * warns


@pytest.mark.parametrize(
    ("policy", "threshold", "highest"),
    [
        ("confidence", 90, 1),
        ("confidence", 1, None),
        ("confidence", float("inf"), None),
        ("patience", 2, None),
        ("patience", 3, 2),
    ],
)
def test_threshold_that_no_early_exit_reaches_is_warned_of(sweet, policy, threshold, highest):
    model = sweet.classifier.model
    warning = target_warning(model, policy, {"threshold": threshold})
    if highest is None:
        assert warning is None
    else:
        assert warning.startswith(
            f"threshold={threshold} is above all values of the policy {policy} at an early exit "
            f"(at most {highest}), so no text exits early: set a lower one"
        )
        classifier = sweet.classifier.at(policy, threshold=threshold)
        predictions = classifier.predict(sweet.texts[:4], 4)
        assert predictions.exits.tolist() == [model.layers[-1]] * 4


@pytest.mark.parametrize(
    ("high", "warned"), [(1.0, "at most 1)"), (3.5, None), (2.25, "at most 2.25)"), (None, None)]
)
def test_threshold_is_compared_with_the_largest_value_that_a_policy_declares(
    sweet, monkeypatch, high, warned
):
    monkeypatch.setitem(
        confidences.POLICIES, "lead", confidences.Policy(lambda inputs: None, "", high=high)
    )
    warning = target_warning(sweet.classifier.model, "lead", {"threshold": 2.5})
    assert (warning is None) if warned is None else (warned in warning)


def test_threshold_of_a_users_function_may_have_any_value(sweet):
    assert target_warning(sweet.classifier.model, lambda *_: None, {"threshold": 90}) is None


def assert_equals_evaluation(reference, classifier, order, batch_size, mode):
    exits, probabilities, close = (x[order] for x in reference.answers(classifier))
    predictions = classifier.predict([reference.texts[i] for i in order], batch_size, mode)
    layers = np.asarray(classifier.layers)[exits]
    assert ((predictions.exits == layers) | close).all()
    same = predictions.exits == layers
    np.testing.assert_allclose(
        predictions.probabilities[same], probabilities[same], rtol=0, atol=1e-5
    )
    cost = reference.outputs.cost[exits]
    np.testing.assert_allclose(predictions.cost[same], cost[same])
    classes = np.asarray(classifier.classes)[predictions.probabilities.argmax(axis=1)]
    assert (predictions.labels == classes).all()


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_predictions_equal_one_pass_evaluation_for_every_policy(sweet, data):
    policy = data.draw(st.sampled_from(POLICIES))
    scores = exit_confidences(sweet.outputs, policy, [sweet.classifier.model.resolver.calibrator])
    threshold = data.draw(st.sampled_from(sorted(set(scores.ravel()))))
    order = data.draw(st.lists(st.integers(0, len(sweet.texts) - 1), min_size=1, max_size=40))
    batch_size = data.draw(st.sampled_from([1, 3]))
    mode = data.draw(st.sampled_from(["throughput", "latency"]))
    classifier = sweet.classifier.at(policy, threshold=threshold)
    assert_equals_evaluation(sweet, classifier, np.asarray(order), batch_size, mode)


@pytest.mark.parametrize(
    "target",
    [
        {"cost": 0.6},
        {"accuracy": 0.8},
        {"threshold": 0.9},
        {"risk": 0.4, "level": 0.6},
        {"agreement": 0.6, "level": 0.6},
    ],
    ids=lambda target: next(iter(target)),
)
def test_target_sets_threshold_and_predictions_equal_evaluation(sweet, target):
    classifier = sweet.classifier.at("confidence", **target)
    threshold, _ = sweet.classifier.model.resolver.threshold("confidence", **target)
    assert classifier.threshold == threshold
    assert_equals_evaluation(sweet, classifier, np.arange(len(sweet.texts)), 3, "throughput")


def test_infinite_threshold_runs_full_model_in_one_stage(sweet):
    classifier = sweet.classifier.at(threshold=float("inf"))
    assert_equals_evaluation(sweet, classifier, np.arange(len(sweet.texts)), 3, "latency")
    assert len(classifier.make_scheduler(8).stages) == 1


def test_multi_model_costs_one_when_only_deepest_model_runs(multi_model):
    predictions = multi_model.classifier.at(threshold=float("inf")).predict(
        multi_model.texts[:3], 3
    )
    assert predictions.cost.tolist() == [1, 1, 1]
    assert multi_model.classifier.at(threshold=2.0).predict(["word1"], 1).cost == [4 / 3]


def test_pickling_a_classifier_is_refused(sweet):
    with pytest.raises(TypeError, match=r"from_pretrained\('.*model'\) in each process"):
        pickle.dumps(sweet.classifier)


def test_interleaved_streams_of_one_classifier_are_independent(sweet):
    """The streams share programs, but each has its own states on the device."""
    classifier = sweet.classifier.at(threshold=0.8)
    expected = classifier.predict(sweet.texts, 3).probabilities
    backwards = iter(classifier.stream(sweet.texts[::-1], 3))
    for number, forward in enumerate(classifier.stream(sweet.texts, 3)):
        backward = next(backwards)
        if number % 7 == 0:
            classifier.predict(sweet.texts[:2], 3)
        np.testing.assert_allclose(forward.probabilities, expected[number], atol=1e-5)
        np.testing.assert_allclose(backward.probabilities, expected[-1 - number], atol=1e-5)


def run_scheduler(classifier, texts, batch_size):
    """Returns the requests of texts, once each has left at an exit."""
    scheduler = classifier.make_scheduler(batch_size)
    requests = classifier.encode(texts, same_length=True)
    for request in requests:
        scheduler.admit(request)
    scheduler.drain()
    return requests


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [
        pytest.param("roberta", "first", marks=pytest.mark.nightly),
        pytest.param("deberta", "first", marks=pytest.mark.slow),
        ("deberta-v2", "first"),
        pytest.param("roberta", "mean", marks=pytest.mark.slow),
        pytest.param("deberta", "mean", marks=pytest.mark.nightly),
        pytest.param("deberta-v2", "mean", marks=pytest.mark.slow),
        ("modernbert", "first"),
        pytest.param("modernbert", "mean", marks=pytest.mark.slow),
        pytest.param("mpnet", "first", marks=pytest.mark.slow),
        pytest.param("mpnet", "mean", marks=pytest.mark.nightly),
        pytest.param("electra", "first", marks=pytest.mark.slow),
        pytest.param("albert", "first", marks=pytest.mark.slow),
        pytest.param("camembert", "mean", marks=pytest.mark.slow),
    ],
)
def test_staged_logits_equal_one_pass_logits_for_each_encoder(kind, pooling, sweet, tmp_path):
    """Also checks padded rows, and that each stage can be exported."""
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / kind, kind)))
    key = jax.random.key(1)
    exits = (1, 2, 3)
    network = EarlyExit(checkpoint.encoder(key), exits, 2, key, ExitConfig(pooling))
    graphdef, values = nnx.split(network)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(values))
    model = dataclasses.replace(
        sweet.classifier.model,
        tokenizer=load_tokenizer(checkpoint),
        layers=exits,
    )
    network = Network(exits, graphdef, params, pooling)
    engine = JaxEngine([network], model.tokenizer.pad_token_id)
    classifier = AdaptiveClassifier(model, "raw_confidence", {"threshold": 2.0}, engine)
    assert [stage.whole for stage in classifier.make_scheduler(3).stages] == [True, True, False]
    texts = ["word1 word2", "word3", " ".join(WORDS[:9])]
    rows = run_scheduler(classifier, texts, 3)
    sizes = np.asarray([len(row.input_ids) for row in rows])
    mask = np.arange(rows[0].length) < sizes[:, None]
    ids = np.full(mask.shape, model.tokenizer.pad_token_id, np.int32)
    types = np.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : sizes[number]] = row.input_ids
        types[number, : sizes[number]] = row.token_type_ids
    batch = {"input_ids": ids, "token_type_ids": types, "mask": mask}
    expected = jax.jit(lambda p, b: nnx.merge(graphdef, p)(b))(params, batch)  # [E, B, C]
    actual = np.stack([row.logits for row in rows], axis=1)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    resuming = classifier.at(lambda outputs, _: np.zeros(outputs.logits.shape[:3]), threshold=1.0)
    # If an exit reads only the first token, the next stage computes the rest of its layer.
    assert any(stage.whole for stage in resuming.make_scheduler(3).stages) == (pooling == "mean")
    actual = np.stack([row.logits for row in run_scheduler(resuming, texts, 3)], axis=1)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    for stage in engine.stages()[1:]:
        stage_params = list(stage_parameters(stage, params).values())
        assert export.serialize_stage(network, stage, stage_params, 16)


@pytest.mark.parametrize("mode", ["latency", pytest.param("throughput", marks=pytest.mark.slow)])
def test_mean_pooled_exits_equal_evaluation_and_no_layer_runs_twice(mean_pooled, mode):
    confidence = exit_confidences(mean_pooled.outputs, "raw_confidence")[0, 0]
    threshold = float(np.median(confidence))
    classifier = mean_pooled.classifier.at("raw_confidence", threshold=threshold)
    stages = classifier.make_scheduler(4).stages
    assert [stage.whole for stage in stages] == [True, True, False]
    assert [stage.start for stage in stages] == [1, 2, 3]  # no layer is computed twice
    assert_equals_evaluation(mean_pooled, classifier, np.arange(len(mean_pooled.texts)), 4, mode)
    full_model = mean_pooled.classifier.at(threshold=float("inf")).predict(mean_pooled.texts[:5], 5)
    logits = mean_pooled.outputs.logits[0, -1, :5]
    temperatures = mean_pooled.classifier.model.resolver.calibrator.temperatures[-1]
    expected = softmax(logits / temperatures)
    np.testing.assert_allclose(full_model.probabilities, expected, atol=1e-5)


def test_multi_model_predictions_equal_evaluation(multi_model):
    confidence = exit_confidences(multi_model.outputs, "confidence")[0, 0]
    classifier = multi_model.classifier.at(threshold=float(np.median(confidence)))
    assert_equals_evaluation(
        multi_model, classifier, np.arange(len(multi_model.texts)), 8, "latency"
    )


def test_predictions_of_policy_function_equal_evaluation(sweet):
    def largest_logit(outputs, temperatures):
        return np.sort(outputs.logits, axis=-1)[..., -1].astype(float)

    classifier = sweet.classifier.at(largest_logit, threshold=1.0)
    assert_equals_evaluation(sweet, classifier, np.arange(len(sweet.texts)), 3, "latency")
    cheap, costly = (sweet.classifier.at(largest_logit, cost=cost) for cost in (0.5, 0.9))
    assert cheap.threshold <= costly.threshold


def test_no_program_is_compiled_after_warm_up(sweet):
    compiled: list[str] = []

    def listen(event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    classifier = sweet.classifier.at(threshold=0.8)
    short = [i for i, row in enumerate(classifier.encode(sweet.texts)) if row.length <= 24]
    assert classifier.warm_up(2, [3, 20]) == 3 * 2 * 2  # stages, sizes 1 2, lengths 16 24
    assert classifier.warm_up(2, [3, 20]) == 0
    before = len(compiled)
    assert before >= 12
    for mode in ("throughput", "latency"):
        assert_equals_evaluation(sweet, classifier, np.asarray(short), 2, mode)
        assert_equals_evaluation(sweet, classifier, np.asarray(short[:3]), 2, mode)
    assert len(compiled) == before


def test_second_classifier_reads_programs_from_compilation_cache(sweet):
    hits: list[str] = []

    def listen(event: str, **_) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    jax.config.update(name, 0.0)  # as enable_compilation_cache does
    try:
        model, target = sweet.classifier.model, {"threshold": 0.8}
        AdaptiveClassifier(model, target=target).warm_up(5, [30])
        jax.monitoring.register_event_listener(listen)
        assert AdaptiveClassifier(model, target=target).warm_up(5, [30]) == len(hits) > 0
    finally:
        jax.config.update(name, before)


def test_stream_of_endless_iterator_uses_constant_memory(sweet):
    classifier = sweet.classifier.at(threshold=0.8)
    read_count = 0

    def texts():
        nonlocal read_count
        while True:
            yield sweet.texts[read_count % len(sweet.texts)]
            read_count += 1

    def live_bytes() -> int:
        return sum(x.nbytes for x in jax.live_arrays())

    answers = classifier.stream(texts(), batch_size=3)
    pending_counts, sizes = [], []
    for answered, _ in zip(range(1500), answers, strict=False):
        pending_counts.append(read_count - answered)
        if answered in (500, 1000, 1499):
            sizes.append(live_bytes())
    # Each of three queues delays a row by at most 16 batches.
    assert max(pending_counts) <= 3 * 16 * 3 + 2 * 3
    # The states of a thousand rows would take two million bytes.
    assert max(sizes) - min(sizes) < 4096


def test_throughput_mode_runs_fewer_batches_than_latency_mode(sweet):
    """In throughput mode, requests that continue wait until they fill a batch."""
    runs = {}
    for mode, wait in (("throughput", 10**6), ("latency", None)):
        classifier = sweet.classifier.at(threshold=0.95)
        scheduler = classifier.make_scheduler(3, wait)
        requests = classifier.encode(sweet.texts * 4)
        for start in range(0, len(requests), 3):
            for request in requests[start : start + 3]:
                scheduler.admit(request)
            scheduler.run_ready() if mode == "throughput" else scheduler.drain()
        scheduler.drain()
        runs[mode] = scheduler.runs
    assert sum(runs["throughput"]) < 0.6 * sum(runs["latency"])


def test_bfloat16_probabilities_are_close_and_heads_stay_float32(sweet):
    folder = sweet.classifier.model.folder
    bfloat16 = AdaptiveClassifier.from_pretrained(folder, threshold=2.0, dtype="bfloat16")
    (network,) = load_networks(sweet.classifier.model, "bfloat16")
    dtypes = {
        part: {leaf.dtype.name for leaf in jax.tree.leaves(params)}
        for part, params in network.params.items()
    }
    # For regression, the bias of a head holds the mean: bfloat16 would round 2003 to 2000.
    assert dtypes == {"encoder": {"bfloat16"}, "heads": {"float32"}}
    texts = sweet.texts[:8]  # in one batch, so that there is one length to compile for
    expected = sweet.classifier.at(threshold=2.0).predict(texts, 3, "latency").probabilities
    assert 0 < np.abs(bfloat16.predict(texts, 8, "latency").probabilities - expected).max() < 0.05


def test_empty_list_gives_empty_predictions(sweet):
    predictions = sweet.classifier.predict([])
    assert predictions.probabilities.shape == (0, 2)
    assert predictions.labels.shape == predictions.exits.shape == (0,)


def test_folder_without_intact_saved_model_is_refused(sweet, checkpoint, tmp_path):
    with pytest.raises(UserError, match="an encoder without exits"):
        AdaptiveClassifier.from_pretrained(checkpoint)
    run = sweet.classifier.model.folder.parent
    with pytest.raises(UserError, match=r"is the folder of a run: pass '.*/model'"):
        AdaptiveClassifier.from_pretrained(run)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "parameters.npz").touch()
    with pytest.raises(UserError, match=r"exported' is a StableHLO export, .*: pass .* model/"):
        AdaptiveClassifier.from_pretrained(tmp_path / "exported")
    folder = tmp_path / "model"
    shutil.copytree(sweet.classifier.model.folder, folder)
    about = json.loads((folder / "exits.json").read_text())
    (folder / "exits.json").write_text(json.dumps(about), encoding="utf-8-sig")  # as Notepad may
    opened = AdaptiveClassifier.from_pretrained(folder)
    assert opened.classes == sweet.classifier.model.classes
    for change, message in (
        ({"version": 1}, "has version 1, but this release reads versions 4, 5, 6, 7"),
        ({"dials": {}}, "is damaged"),
        ({"classes": ["a", "b", "c"]}, "missing or have the wrong shape: exits.2.classifier"),
    ):
        (folder / "exits.json").write_text(json.dumps(about | change))
        with pytest.raises(UserError, match=message):
            AdaptiveClassifier.from_pretrained(folder)


def test_pairs_are_encoded_as_the_tokenizer_does_and_classified(sweet):
    model = sweet.classifier.model
    model = dataclasses.replace(model, text_columns=("a", "b"))
    classifier = AdaptiveClassifier(model, target={"threshold": 0.8})
    pairs = [("word1 word2", "word3"), ["word4", "word5 word6"]]
    tokenizer = load_tokenizer(locate_checkpoint(str(model.folder)))
    for row, (first, second) in zip(classifier.encode(pairs), pairs, strict=True):
        expected = tokenizer(first, second, return_token_type_ids=True)
        assert row.input_ids.tolist() == expected["input_ids"]
        assert row.token_type_ids.tolist() == expected["token_type_ids"]
        assert 1 in expected["token_type_ids"]
    assert classifier.predict(pairs, 2).probabilities.shape == (2, 2)
    with pytest.raises(UserError, match="row 1 must be a pair of texts"):
        classifier.predict(["one text"])


@pytest.mark.slow
def test_milliseconds_target_uses_measured_latency_table(sweet, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(sweet.classifier.model.folder, folder)
    with pytest.raises(UserError, match="milliseconds are not known for this model"):
        AdaptiveClassifier.from_pretrained(folder, milliseconds=5)
    monkeypatch.setattr("sweet_jax.inference.latency._SECONDS", 0.0)
    monkeypatch.setattr("sweet_jax.predict.measured_lengths", lambda model: (model.max_length,))
    assert predict.main([f"--model={folder}", "--measure", "--batch_size=1"]) == 0
    stdout = capsys.readouterr().out
    assert "to 2     to 3     to 4" in stdout
    assert " (the median of the training texts) through all layers: " in stdout
    assert "without --engine and --precision, predict and serve use engine: " in stdout
    model = dataclasses.replace(sweet.classifier.model, folder=folder)
    table = read_latency(model, sweet.classifier.engine)
    assert table.batch_sizes == (1,)
    assert (table.milliseconds > 0).all()
    # The times of this machine vary: known ones replace them.
    values = json.loads((folder / "clock.json").read_text())
    measured = [(row["engine"], row["precision"]) for row in values["rows"]]
    assert measured[:2] == [("jax", "float32"), ("jax", "bfloat16")]
    for row in values["rows"]:
        row["milliseconds"] = np.full(table.milliseconds.shape, 2.0).tolist()
    (folder / "clock.json").write_text(json.dumps(values))
    if ("onnxruntime", "float32") in measured:
        assert default_engine(model) == "jax"  # the first of equally fast engines
        values["rows"][0]["milliseconds"] = np.full(table.milliseconds.shape, 3.0).tolist()
        (folder / "clock.json").write_text(json.dumps(values))
        assert default_engine(model) == "onnxruntime"
        assert default_engine(model, "bfloat16") == "jax"
    for limit in (2.0, 3.5, 6.0):
        classifier = AdaptiveClassifier.from_pretrained(folder, milliseconds=limit)
        front = classifier.model.resolver.fronts[classifier.policy]
        point = list(front.threshold).index(classifier.threshold)
        milliseconds = front.shares @ [2.0, 4.0, 6.0]
        assert milliseconds[point] <= limit
        assert (milliseconds[point + 1 :] > limit).all()
    with pytest.raises(UserError, match=r"cannot be met: the best .* is 2.00; raise milliseconds"):
        AdaptiveClassifier.from_pretrained(folder, milliseconds=1.9)
    (folder / "clock.json").write_text("{}")
    with pytest.raises(UserError, match=r"clock.json' is damaged .*: measure again"):
        AdaptiveClassifier.from_pretrained(folder, milliseconds=5)


def test_latency_table_is_linear_between_measured_lengths():
    times = np.array([[[1.0, 1.0], [3.0, 2.0]]])  # [B, L, E]
    table = LatencyTable("jax", "float32", 1, "here", (1,), (16, 32), times)
    actual = table.interpolate_until_exit(np.array([16, 24, 32, 48]))
    np.testing.assert_allclose(actual, [[1, 2], [2, 3.5], [3, 5], [5, 8]])
    single_length = LatencyTable("jax", "float32", 1, "here", (1,), (16,), times[:, :1])
    np.testing.assert_allclose(
        single_length.interpolate_until_exit(np.array([16, 64])), [[1, 2], [1, 2]]
    )


def test_unknown_target_is_refused_before_model_is_read():
    with pytest.raises(UserError, match="unknown target 'treshold': did you mean 'threshold'"):
        AdaptiveClassifier.from_pretrained("nowhere", treshold=0.5)


def tables_of(texts: list[str]) -> dict:
    """Returns texts in the containers of common libraries, by name."""
    return {
        "DataFrame": pd.DataFrame({"id": range(len(texts)), " text": texts}),
        "Dataset": datasets.Dataset.from_dict({"n": range(len(texts)), "text": texts}),
        "Table": pa.table({"text": texts, "n": range(len(texts))}),
        "ChunkedArray": pa.chunked_array([texts], pa.string()),
        "Series": pd.Series(texts, index=range(5, 5 + len(texts))),
        "array": np.asarray(texts),
        "objects": np.asarray(texts, object),
        "generator": (text for text in texts),
    }


@pytest.mark.parametrize("kind", tables_of([]))
def test_tables_and_arrays_are_classified_like_a_list_of_texts(sweet, kind):
    texts = sweet.texts[:4]
    expected = sweet.classifier.predict(texts, 3)
    actual = sweet.classifier.predict(tables_of(texts)[kind], 3)
    np.testing.assert_array_equal(actual.labels, expected.labels)
    np.testing.assert_array_equal(actual.exits, expected.exits)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "must be a list of texts"),
        ([("a", "pair")], "row 1 must be a text; got"),
        (["\ud800"], "row 1 has an unpaired surrogate"),
        (["a", None], "row 2 must be a text; got "),
        ({"text": ["a"]}, "got a dict"),
        (b"word1", "got a single text"),
        (
            pd.DataFrame({"txt": ["a"]}),
            "the table has no column 'text', which the model was trained on",
        ),
        (pd.DataFrame({"text": ["a", None]}), "row 2 must be a text; got "),
        (pd.Series(["a", float("nan")]), "row 2 must be a text; got nan"),
        ([b"a"], "row 1 must be a text; got b'a'"),
    ],
)
def test_input_that_is_no_list_of_texts_is_refused_in_one_line(sweet, texts, message):
    with pytest.raises(UserError) as error:
        sweet.classifier.predict(texts)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
