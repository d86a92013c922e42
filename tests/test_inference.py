"""Adaptive inference says what evaluation and simulation say, whatever the batches."""

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
from tiny import WORDS, write_checkpoint

from sweet_jax import AdaptiveClassifier, export, predict
from sweet_jax.errors import UserError
from sweet_jax.exits.policies import exit_confidences
from sweet_jax.inference.engine_choice import default_engine
from sweet_jax.inference.engine_jax import JaxEngine, stage_parameters
from sweet_jax.inference.latency import read_latency
from sweet_jax.inference.latency_table import LatencyTable
from sweet_jax.inference.network import Network, load_networks
from sweet_jax.models.checkpoint_folder import load_tokenizer, locate_checkpoint
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.head import ExitConfig
from sweet_jax.models.pretrained import open_checkpoint
from sweet_jax.objectives.objective import softmax

POLICIES = ("confidence", "entropy", "patience", "voting", "learning_to_exit", "pcee_isotonic")


def assert_same(reference, classifier, order, batch_size, mode):
    exits, probabilities, close = (x[order] for x in reference.answers(classifier))
    found = classifier.predict([reference.texts[i] for i in order], batch_size, mode)
    layers = np.asarray(classifier.layers)[exits]
    assert ((found.exits == layers) | close).all()
    same = found.exits == layers
    np.testing.assert_allclose(found.probabilities[same], probabilities[same], rtol=0, atol=1e-5)
    cost = reference.outputs.cost[exits]
    np.testing.assert_allclose(found.cost[same], cost[same])
    given = np.asarray(classifier.classes)[found.probabilities.argmax(axis=1)]
    assert (found.labels == given).all()


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_answers_are_those_of_evaluation_and_simulation(sweet, data):
    policy = data.draw(st.sampled_from(POLICIES))
    scores = exit_confidences(sweet.outputs, policy, [sweet.classifier.model.resolver.calibrator])
    threshold = data.draw(st.sampled_from(sorted(set(scores.ravel()))))
    order = data.draw(st.lists(st.integers(0, len(sweet.texts) - 1), min_size=1, max_size=40))
    batch_size = data.draw(st.sampled_from([1, 3]))
    mode = data.draw(st.sampled_from(["throughput", "latency"]))
    classifier = sweet.classifier.at(policy, threshold=threshold)
    assert_same(sweet, classifier, np.asarray(order), batch_size, mode)


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
def test_targets(sweet, target):
    classifier = sweet.classifier.at("confidence", **target)
    wanted, _ = sweet.classifier.model.resolver.threshold("confidence", **target)
    assert classifier.threshold == wanted
    assert_same(sweet, classifier, np.arange(len(sweet.texts)), 3, "throughput")


def test_the_full_model_alone(sweet):
    classifier = sweet.classifier.at(threshold=float("inf"))
    assert_same(sweet, classifier, np.arange(len(sweet.texts)), 3, "latency")
    assert len(classifier.make_scheduler(8).stages) == 1


def test_the_deepest_of_multi_model_alone_costs_one(multi_model):
    found = multi_model.classifier.at(threshold=float("inf")).predict(multi_model.texts[:3], 3)
    assert found.cost.tolist() == [1, 1, 1]
    assert multi_model.classifier.at(threshold=2.0).predict(["word1"], 1).cost == [4 / 3]


def test_a_classifier_is_opened_in_each_process_and_not_pickled(sweet):
    with pytest.raises(TypeError, match=r"from_pretrained\('.*model'\) in each process"):
        pickle.dumps(sweet.classifier)


def test_streams_of_one_classifier_do_not_disturb_each_other(sweet):
    """Each has its own states on the device, though they share programs."""
    classifier = sweet.classifier.at(threshold=0.8)
    wanted = classifier.predict(sweet.texts, 3).probabilities
    backwards = iter(classifier.stream(sweet.texts[::-1], 3))
    for number, found in enumerate(classifier.stream(sweet.texts, 3)):
        other = next(backwards)
        if number % 7 == 0:
            classifier.predict(sweet.texts[:2], 3)
        np.testing.assert_allclose(found.probabilities, wanted[number], atol=1e-5)
        np.testing.assert_allclose(other.probabilities, wanted[-1 - number], atol=1e-5)


def answered(classifier, texts, batch_size):
    scheduler = classifier.make_scheduler(batch_size)
    requests = classifier.encode(texts, same_length=True)
    for request in requests:
        scheduler.admit(request)
    scheduler.drain()
    return requests


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [
        pytest.param("roberta", "first", marks=pytest.mark.slow),
        pytest.param("deberta", "first", marks=pytest.mark.slow),
        ("deberta-v2", "first"),
        pytest.param("roberta", "mean", marks=pytest.mark.slow),
        pytest.param("deberta", "mean", marks=pytest.mark.slow),
        pytest.param("deberta-v2", "mean", marks=pytest.mark.slow),
        ("modernbert", "first"),
        pytest.param("modernbert", "mean", marks=pytest.mark.slow),
        pytest.param("mpnet", "first", marks=pytest.mark.slow),
        pytest.param("mpnet", "mean", marks=pytest.mark.slow),
        pytest.param("electra", "first", marks=pytest.mark.slow),
        pytest.param("albert", "first", marks=pytest.mark.slow),
        pytest.param("camembert", "mean", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_encoder(kind, pooling, sweet, tmp_path):
    """Stages of a random model against its one pass, padded rows among them; and its export."""
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
    rows = answered(classifier, texts, 3)
    sizes = np.asarray([len(row.input_ids) for row in rows])
    mask = np.arange(rows[0].length) < sizes[:, None]
    ids = np.full(mask.shape, model.tokenizer.pad_token_id, np.int32)
    types = np.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : sizes[place]] = row.input_ids
        types[place, : sizes[place]] = row.token_type_ids
    batch = {"input_ids": ids, "token_type_ids": types, "mask": mask}
    wanted = jax.jit(lambda p, b: nnx.merge(graphdef, p)(b))(params, batch)  # [E, B, C]
    found = np.stack([row.logits for row in rows], axis=1)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    resuming = classifier.at(lambda outputs, _: np.zeros(outputs.logits.shape[:3]), threshold=1.0)
    # An exit that reads the first token alone leaves the rest of its layer to the next stage.
    assert any(stage.whole for stage in resuming.make_scheduler(3).stages) == (pooling == "mean")
    found = np.stack([row.logits for row in answered(resuming, texts, 3)], axis=1)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for stage in engine.stages()[1:]:
        own = list(stage_parameters(stage, params).values())
        assert export.serialize_stage(network, stage, own, 16)


@pytest.mark.parametrize("mode", ["latency", pytest.param("throughput", marks=pytest.mark.slow)])
def test_exits_that_read_the_mean_of_the_tokens(mean_pooled, mode):
    confidence = exit_confidences(mean_pooled.outputs, "raw_confidence")[0, 0]
    threshold = float(np.median(confidence))
    classifier = mean_pooled.classifier.at("raw_confidence", threshold=threshold)
    stages = classifier.make_scheduler(4).stages
    assert [stage.whole for stage in stages] == [True, True, False]
    assert [stage.start for stage in stages] == [1, 2, 3]  # no layer is computed twice
    assert_same(mean_pooled, classifier, np.arange(len(mean_pooled.texts)), 4, mode)
    alone = mean_pooled.classifier.at(threshold=float("inf")).predict(mean_pooled.texts[:5], 5)
    logits = mean_pooled.outputs.logits[0, -1, :5]
    temperatures = mean_pooled.classifier.model.resolver.calibrator.temperatures[-1]
    wanted = softmax(logits / temperatures)
    np.testing.assert_allclose(alone.probabilities, wanted, atol=1e-5)


def test_multi_model(multi_model):
    confidence = exit_confidences(multi_model.outputs, "confidence")[0, 0]
    classifier = multi_model.classifier.at(threshold=float(np.median(confidence)))
    assert_same(multi_model, classifier, np.arange(len(multi_model.texts)), 8, "latency")


def test_a_policy_of_ones_own(sweet):
    def sure(outputs, temperatures):
        return np.sort(outputs.logits, axis=-1)[..., -1].astype(float)

    classifier = sweet.classifier.at(sure, threshold=1.0)
    assert_same(sweet, classifier, np.arange(len(sweet.texts)), 3, "latency")
    cheap, dear = (sweet.classifier.at(sure, cost=cost) for cost in (0.5, 0.9))
    assert cheap.threshold <= dear.threshold


def test_nothing_is_compiled_after_warm_up(sweet):
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
        assert_same(sweet, classifier, np.asarray(short), 2, mode)
        assert_same(sweet, classifier, np.asarray(short[:3]), 2, mode)
    assert len(compiled) == before


def test_programs_are_read_from_disk_where_another_classifier_compiled_them(sweet):
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


def test_an_endless_iterator_needs_no_memory(sweet):
    classifier = sweet.classifier.at(threshold=0.8)
    read = 0

    def texts():
        nonlocal read
        while True:
            yield sweet.texts[read % len(sweet.texts)]
            read += 1

    def alive() -> int:
        return sum(x.nbytes for x in jax.live_arrays())

    answers = classifier.stream(texts(), batch_size=3)
    behind, sizes = [], []
    for given_, _ in zip(range(1500), answers, strict=False):
        behind.append(read - given_)
        if given_ in (500, 1000, 1499):
            sizes.append(alive())
    # Each of three queues holds a row back for 16 batches at most.
    assert max(behind) <= 3 * 16 * 3 + 2 * 3
    # The states of a thousand rows would be two million bytes.
    assert max(sizes) - min(sizes) < 4096


def test_deep_stages_run_full(sweet):
    """What throughput mode is for: requests that continue wait until there is a batch of them."""
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


def test_bfloat16_is_close(sweet):
    folder = sweet.classifier.model.folder
    coarse = AdaptiveClassifier.from_pretrained(folder, threshold=2.0, dtype="bfloat16")
    (network,) = load_networks(sweet.classifier.model, "bfloat16")
    types = {
        part: {leaf.dtype.name for leaf in jax.tree.leaves(params)}
        for part, params in network.params.items()
    }
    # A regression's mean is in a head's bias: bfloat16 has 2000 where it is 2003.
    assert types == {"encoder": {"bfloat16"}, "heads": {"float32"}}
    texts = sweet.texts[:8]  # in one batch, so that there is one length to compile for
    fine = sweet.classifier.at(threshold=2.0).predict(texts, 3, "latency").probabilities
    assert 0 < np.abs(coarse.predict(texts, 8, "latency").probabilities - fine).max() < 0.05


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "must be a list of texts"),
        ([("a", "pair")], "row 1 must be a text; got"),
        (["\ud800"], "row 1 has an unpaired surrogate"),
        (["a", None], "row 2 must be a text; got "),
    ],
)
def test_what_is_no_text(sweet, texts, message):
    with pytest.raises(UserError, match=message):
        sweet.classifier.predict(texts)


def test_no_texts(sweet):
    found = sweet.classifier.predict([])
    assert found.probabilities.shape == (0, 2)
    assert found.labels.shape == found.exits.shape == (0,)


def test_models_that_cannot_be_read(sweet, checkpoint, tmp_path):
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
    for change, message in (
        ({"version": 1}, "has version 1, but this release reads versions 4, 5, 6, 7"),
        ({"dials": {}}, "is damaged"),
        ({"classes": ["a", "b", "c"]}, "missing or have the wrong shape: exits.2.classifier"),
    ):
        (folder / "exits.json").write_text(json.dumps(about | change))
        with pytest.raises(UserError, match=message):
            AdaptiveClassifier.from_pretrained(folder)


def test_pairs(sweet):
    model = sweet.classifier.model
    model = dataclasses.replace(model, text_columns=("a", "b"))
    classifier = AdaptiveClassifier(model, target={"threshold": 0.8})
    pairs = [("word1 word2", "word3"), ["word4", "word5 word6"]]
    tokenizer = load_tokenizer(locate_checkpoint(str(model.folder)))
    for row, (first, second) in zip(classifier.encode(pairs), pairs, strict=True):
        wanted = tokenizer(first, second, return_token_type_ids=True)
        assert row.input_ids.tolist() == wanted["input_ids"]
        assert row.token_type_ids.tolist() == wanted["token_type_ids"]
        assert 1 in wanted["token_type_ids"]
    assert classifier.predict(pairs, 2).probabilities.shape == (2, 2)
    with pytest.raises(UserError, match="row 1 must be a pair of texts"):
        classifier.predict(["one text"])


@pytest.mark.slow
def test_the_latency_of_this_machine_as_a_target(sweet, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(sweet.classifier.model.folder, folder)
    with pytest.raises(UserError, match="milliseconds are not known for this model"):
        AdaptiveClassifier.from_pretrained(folder, milliseconds=5)
    monkeypatch.setattr("sweet_jax.inference.latency._SECONDS", 0.0)
    monkeypatch.setattr("sweet_jax.predict.measured_lengths", lambda model: (model.max_length,))
    assert predict.main([f"--model={folder}", "--measure", "--batch_size=1"]) == 0
    printed = capsys.readouterr().out
    assert "to 2     to 3     to 4" in printed
    assert " (the median of the training texts) through all layers: " in printed
    assert "without --engine and --precision, predict and serve use engine: " in printed
    model = dataclasses.replace(sweet.classifier.model, folder=folder)
    table = read_latency(model, sweet.classifier.engine)
    assert table.batch_sizes == (1,)
    assert (table.milliseconds > 0).all()
    # Times of this machine are not to be asserted: put known ones in their place.
    values = json.loads((folder / "clock.json").read_text())
    measured = [(row["engine"], row["precision"]) for row in values["rows"]]
    assert measured[:2] == [("jax", "float32"), ("jax", "bfloat16")]
    for row in values["rows"]:
        row["milliseconds"] = np.full(table.milliseconds.shape, 2.0).tolist()
    (folder / "clock.json").write_text(json.dumps(values))
    if ("onnxruntime", "float32") in measured:
        assert default_engine(model) == "jax"  # the first of equals
        values["rows"][0]["milliseconds"] = np.full(table.milliseconds.shape, 3.0).tolist()
        (folder / "clock.json").write_text(json.dumps(values))
        assert default_engine(model) == "onnxruntime"
        assert default_engine(model, "bfloat16") == "jax"
    for limit in (2.0, 3.5, 6.0):
        classifier = AdaptiveClassifier.from_pretrained(folder, milliseconds=limit)
        trade = classifier.model.resolver.fronts[classifier.policy]
        place = list(trade.threshold).index(classifier.threshold)
        times = trade.shares @ [2.0, 4.0, 6.0]
        assert times[place] <= limit
        assert (times[place + 1 :] > limit).all()
    with pytest.raises(UserError, match=r"infeasible: the best reachable .* is 2.00 milliseconds"):
        AdaptiveClassifier.from_pretrained(folder, milliseconds=1.9)
    (folder / "clock.json").write_text("{}")
    with pytest.raises(UserError, match=r"clock.json' is damaged .*: measure again"):
        AdaptiveClassifier.from_pretrained(folder, milliseconds=5)


def test_times_of_other_lengths_lie_on_lines_between_those_measured():
    times = np.array([[[1.0, 1.0], [3.0, 2.0]]])  # [B, L, E]
    table = LatencyTable("jax", "float32", 1, "here", (1,), (16, 32), times)
    found = table.interpolate_until_exit(np.array([16, 24, 32, 48]))
    np.testing.assert_allclose(found, [[1, 2], [2, 3.5], [3, 5], [5, 8]])
    one = LatencyTable("jax", "float32", 1, "here", (1,), (16,), times[:, :1])
    np.testing.assert_allclose(one.interpolate_until_exit(np.array([16, 64])), [[1, 2], [1, 2]])


def test_an_unknown_target_is_refused_before_the_model_is_read():
    with pytest.raises(UserError, match="unknown target 'treshold': did you mean 'threshold'"):
        AdaptiveClassifier.from_pretrained("nowhere", treshold=0.5)


def tables_of(texts: list[str]) -> dict:
    """Texts as the libraries of the field hold them."""
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
def test_tables_and_arrays_of_texts_are_classified_by_their_text_column(sweet, kind):
    texts = sweet.texts[:4]
    wanted = sweet.classifier.predict(texts, 3)
    found = sweet.classifier.predict(tables_of(texts)[kind], 3)
    np.testing.assert_array_equal(found.labels, wanted.labels)
    np.testing.assert_array_equal(found.exits, wanted.exits)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
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
def test_what_is_no_list_of_texts_is_one_line(sweet, texts, message):
    with pytest.raises(UserError) as error:
        sweet.classifier.predict(texts)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
