"""Adaptive inference says what evaluation and simulation say, whatever the batches."""

import ast
import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import WORDS, fine_tune, write_checkpoint
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sweet_jax import AdaptiveClassifier, ExitOutputs, export, predict
from sweet_jax.config import UserError, from_mapping
from sweet_jax.data.batches import encode
from sweet_jax.data.load import load_dataset
from sweet_jax.exits.calibration import tempered
from sweet_jax.exits.policies import exit_scores
from sweet_jax.models.early_exit import EarlyExit
from sweet_jax.models.pretrained import load_tokenizer, open_checkpoint
from sweet_jax.serving.clock import read_clock
from sweet_jax.serving.programs import needed, plan
from sweet_jax.serving.saved import Network

POLICIES = ("confidence", "entropy", "patience", "voting", "learning_to_exit", "pcee_isotonic")


class Reference:
    """What the one-pass evaluation of a run says of its validation texts."""

    def __init__(self, folder: Path, values: dict):
        self.outputs = ExitOutputs.load(folder / "exit_outputs" / "validation.npz")
        self.texts = [texts[0] for texts in load_dataset(from_mapping(values)).validation.texts]
        self.classifier = AdaptiveClassifier.from_pretrained(folder / "model")

    def answers(self, classifier) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(index of the exit [N], probabilities [N, C], rows too close to call, bool [N])."""
        fitted = classifier.fitted
        scores = exit_scores(self.outputs, classifier.policy, fitted)[0]  # [E, N]
        leaves = scores >= classifier.threshold
        leaves[-1] = True
        exits = leaves.argmax(axis=0)
        close = (np.abs(scores[:-1] - classifier.threshold) < 1e-5).any(axis=0)
        logits = self.outputs.logits[0, exits, np.arange(len(exits))]
        return exits, tempered(logits, fitted.temperatures[0, exits, None]), close


@pytest.fixture(scope="module")
def sweet(fine_tuned):
    return Reference(*fine_tuned)


@pytest.fixture(scope="module")
def multi_model(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("multi")
    return Reference(*fine_tune(checkpoint, folder, method="multi_model", exits=(1, 3)))


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
    scores = exit_scores(sweet.outputs, policy, sweet.classifier.model.dials.fitted)
    threshold = data.draw(st.sampled_from(sorted(set(scores.ravel()))))
    order = data.draw(st.lists(st.integers(0, len(sweet.texts) - 1), min_size=1, max_size=40))
    batch_size = data.draw(st.sampled_from([1, 3]))
    mode = data.draw(st.sampled_from(["throughput", "latency"]))
    classifier = sweet.classifier.at(policy, threshold=threshold)
    assert_same(sweet, classifier, np.asarray(order), batch_size, mode)


@pytest.mark.parametrize(
    "dial",
    [
        {"cost": 0.6},
        {"accuracy": 0.8},
        {"threshold": 0.9},
        {"risk": 0.4, "level": 0.6},
        {"agreement": 0.6, "level": 0.6},
    ],
    ids=lambda dial: next(iter(dial)),
)
def test_dials(sweet, dial):
    classifier = sweet.classifier.at("confidence", **dial)
    wanted, _ = sweet.classifier.model.dials.threshold("confidence", **dial)
    assert classifier.threshold == wanted
    assert_same(sweet, classifier, np.arange(len(sweet.texts)), 3, "throughput")


def test_the_full_model_alone(sweet):
    classifier = sweet.classifier.at(threshold=float("inf"))
    assert_same(sweet, classifier, np.arange(len(sweet.texts)), 3, "latency")
    assert len(classifier.flow(8).stages) == 1


def test_the_deepest_of_multi_model_alone_costs_one(multi_model):
    found = multi_model.classifier.at(threshold=float("inf")).predict(multi_model.texts[:3], 3)
    assert found.cost.tolist() == [1, 1, 1]
    assert multi_model.classifier.at(threshold=2.0).predict(["word1"], 1).cost == [4 / 3]


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
    flow = classifier.flow(batch_size)
    rows = classifier.encode(texts, alike=True)
    for row in rows:
        flow.admit(row)
    flow.finish()
    return rows


@pytest.mark.parametrize("kind", ["roberta", "deberta", "deberta-v2"])
def test_every_kind_of_encoder(kind, sweet, tmp_path):
    """Stages of a random model against its one pass, padded rows among them; and its export."""
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / kind, kind)))
    key = jax.random.key(1)
    exits = (1, 2, 3)
    network = EarlyExit(checkpoint.encoder(key), exits, 2, key)
    graphdef, values = nnx.split(network)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(values))
    model = dataclasses.replace(
        sweet.classifier.model,
        tokenizer=load_tokenizer(checkpoint),
        layers=exits,
        networks=(Network(exits, graphdef, params),),
    )
    classifier = AdaptiveClassifier(model, "raw_confidence", {"threshold": 2.0})
    assert [stage.whole for stage in classifier.flow(3).stages] == [True, True, False]
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
    assert not any(stage.whole for stage in resuming.flow(3).stages)
    found = np.stack([row.logits for row in answered(resuming, texts, 3)], axis=1)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for stage in plan(model.networks)[1:]:
        own = list(needed(stage, params).values())
        assert export._program(model, stage, own, 16)


def test_multi_model(multi_model):
    confidence = exit_scores(multi_model.outputs, "confidence")[0, 0]
    classifier = multi_model.classifier.at(threshold=float(np.median(confidence)))
    assert_same(multi_model, classifier, np.arange(len(multi_model.texts)), 8, "latency")


def test_a_policy_of_ones_own(sweet):
    def sure(outputs, temperatures):
        return np.sort(outputs.logits, axis=-1)[..., -1].astype(float)

    classifier = sweet.classifier.at(sure, threshold=1.0)
    assert_same(sweet, classifier, np.arange(len(sweet.texts)), 3, "latency")
    with pytest.raises(UserError, match="needs threshold="):
        sweet.classifier.at(sure, cost=0.5)


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
    jax.config.update(name, 0.0)  # as keep_programs does
    try:
        model, dial = sweet.classifier.model, {"threshold": 0.8}
        AdaptiveClassifier(model, dial=dial).warm_up(5, [30])
        jax.monitoring.register_event_listener(listen)
        assert AdaptiveClassifier(model, dial=dial).warm_up(5, [30]) == len(hits) > 0
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
    """What throughput mode is for: rows that go on wait until there is a batch of them."""
    runs = {}
    for mode, wait in (("throughput", 10**6), ("latency", None)):
        classifier = sweet.classifier.at(threshold=0.95)
        flow = classifier.flow(3, wait)
        rows = classifier.encode(sweet.texts * 4)
        for start in range(0, len(rows), 3):
            for row in rows[start : start + 3]:
                flow.admit(row)
            flow.advance() if mode == "throughput" else flow.finish()
        flow.finish()
        runs[mode] = flow.runs
    assert sum(runs["throughput"]) < 0.6 * sum(runs["latency"])


def test_bfloat16_is_close(sweet):
    folder = sweet.classifier.model.folder
    coarse = AdaptiveClassifier.from_pretrained(folder, threshold=2.0, dtype="bfloat16")
    texts = sweet.texts[:8]  # in one batch, so that there is one length to compile for
    fine = sweet.classifier.at(threshold=2.0).predict(texts, 3, "latency").probabilities
    assert 0 < np.abs(coarse.predict(texts, 8, "latency").probabilities - fine).max() < 0.05


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "must be a list of texts"),
        ([("a", "pair")], "row 1 must be a text; got"),
        (["\ud800"], "row 1 holds half a surrogate pair"),
        (["a", None], "row 2 must be a text; got None"),
    ],
)
def test_what_is_no_text(sweet, texts, message):
    with pytest.raises(UserError, match=message):
        sweet.classifier.predict(texts)


def test_no_texts(sweet):
    found = sweet.classifier.predict([])
    assert found.probabilities.shape == (0, 2)
    assert found.labels.shape == found.exits.shape == (0,)


# The command


@pytest.fixture
def command(sweet, tmp_path):
    """Runs the command on rows written as a file; returns its status and the output's objects."""

    def call(name: str, content: str, *more: str) -> tuple[int, list[dict]]:
        (tmp_path / name).write_text(content)
        output = tmp_path / "out.jsonl"
        status = predict.main(
            [
                f"--model={sweet.classifier.model.folder}",
                f"--input={tmp_path / name}",
                f"--output={output}",
                "--batch_size=1",
                *more,
            ]
        )
        lines = output.read_text().splitlines() if output.exists() else []
        return status, [json.loads(line) for line in lines]

    return call


def jsonl(texts) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_the_command_answers_every_row_in_order(sweet, command, capsys):
    wanted = sweet.classifier.at(threshold=0.8).predict(sweet.texts, 3)
    status, answers = command("in.jsonl", jsonl(sweet.texts), "--threshold=0.8")
    assert status == 0
    assert [a["label"] for a in answers] == wanted.labels.tolist()
    assert [a["exit"] for a in answers] == wanted.exits.tolist()
    np.testing.assert_allclose([a["cost"] for a in answers], wanted.cost)
    np.testing.assert_allclose(
        [a["probability"] for a in answers], wanted.probabilities.max(axis=1), atol=1e-5
    )
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"{len(answers)} rows (0 with an error)")
    assert f"mean cost {wanted.cost.mean():.4f}" in line


@pytest.mark.parametrize(
    ("name", "content", "errors"),
    [
        (
            "in.csv",
            'label,text\nx,word1\ny,\nz,"word2\nword3"\nz,too,many\nq,word4\n',
            {1: "column 'text' is empty", 3: "3 fields where the header has 2"},
        ),
        ("in.tsv", "text\tn\nword1\t2\n\t3\n", {1: "column 'text' is empty"}),
        ("in.txt", "word1\nword2 word3\n", {}),
        (
            "in.jsonl",
            '{"text": "word1"}\n{"text": 5}\nnonsense\n[1]\n{"other": 1}\n{"text": "word2"}\n',
            {
                1: "column 'text' is not text but 5",
                2: "not JSON",
                3: r"not an object but '\[1\]'",
                4: "column 'text' is empty",
            },
        ),
    ],
)
def test_rows_without_a_text_are_told_and_counted(command, capsys, name, content, errors):
    status, answers = command(name, content, "--threshold=0.8")
    assert status == 0
    for place, answer in enumerate(answers):
        if place in errors:
            assert list(answer) == ["error"]
            assert re.match(errors[place], answer["error"])
        else:
            assert list(answer) == ["label", "probability", "exit", "cost"]
    assert f"({len(errors)} with an error)" in capsys.readouterr().out


def test_a_command_cut_short_goes_on_where_the_output_ends(sweet, command, tmp_path, capsys):
    content = jsonl(sweet.texts * 2)
    _, whole = command("in.jsonl", content, "--threshold=0.8")
    output = tmp_path / "out.jsonl"
    lines = output.read_bytes().splitlines(keepends=True)
    for cut in (40, 0):
        output.write_bytes(b"".join(lines[:cut]) + lines[cut][:12])
        status, again = command("in.jsonl", content, "--threshold=0.8")
        assert status == 0
        assert [a["exit"] for a in again] == [a["exit"] for a in whole]
        assert output.read_bytes().splitlines(keepends=True)[:cut] == lines[:cut]
        assert f"{len(whole)} rows" in capsys.readouterr().out.splitlines()[-1]


def test_an_interrupted_command_knows_by_what_it_was_begun(
    sweet, command, tmp_path, capsys, monkeypatch
):
    content = jsonl(sweet.texts)
    add, count = predict._Tally.add, 0

    def interrupt(self, answer) -> None:
        nonlocal count
        count += 1
        if count == 9:
            raise KeyboardInterrupt
        add(self, answer)

    with monkeypatch.context() as patch:
        patch.setattr(predict._Tally, "add", interrupt)
        status, begun = command("in.jsonl", content, "--threshold=0.8")
    assert status == 1
    assert 0 < len(begun) < len(sweet.texts)
    assert "goes on where the output ends" in capsys.readouterr().err
    status, still = command("in.jsonl", content, "--threshold=0.81")
    assert (status, still) == (2, begun)
    assert "was begun with another threshold, '0.8'" in capsys.readouterr().err
    status, found = command("in.jsonl", content, "--threshold=0.8")
    assert (status, len(found)) == (0, len(sweet.texts))
    assert found[: len(begun)] == begun
    assert [p.name for p in tmp_path.iterdir() if "unfinished" in p.name] == []


@pytest.mark.parametrize("content", ["notes", "notes\n", '"error"\n', '{"a": 1}\n'])
def test_a_file_that_is_no_output_is_left_alone(sweet, tmp_path, capsys, content):
    (tmp_path / "out.jsonl").write_text(content)
    (tmp_path / "in.txt").write_text("word1\n")
    model = sweet.classifier.model.folder
    arguments = [f"--model={model}", f"--input={tmp_path / 'in.txt'}"]
    assert predict.main([*arguments, f"--output={tmp_path / 'out.jsonl'}"]) == 2
    assert "line 1 is no answer of this command" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == content


def test_an_output_of_another_dial_or_input_is_left_alone(sweet, command, tmp_path, capsys):
    command("in.jsonl", jsonl(sweet.texts), "--threshold=0.8")
    before = (tmp_path / "out.jsonl").read_bytes()
    status, _ = command("in.jsonl", jsonl(sweet.texts), "--threshold=2")
    assert status == 2
    assert "not made by this model, dial and input" in capsys.readouterr().err
    status, _ = command("in.jsonl", jsonl(sweet.texts[::-1]), "--threshold=0.8")
    assert status == 2
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content", "more", "message"),
    [
        ("in.csv", "txet,label\na,b\n", [], "unknown column 'text': did you mean 'txet'?"),
        ("in.jsonl", '{"txet": "a"}\n', [], "unknown column 'text'"),
        ("in.csv", "text\na\n", ["--text_columns=a,b"], "takes 1 text column(s)"),
        ("in.csv", "", [], "no first line with the names of its columns"),
        ("in.csv", "text\na\n", ["--input=."], "input '.' is not a file"),
        ("in.csv", "text\na\n", ["--measure"], "leave --input and --output out"),
        ("in.xls", "text\na\n", [], "must end in one of .csv"),
        ("in.csv", "text\na\n", ["--accuracy=1.2"], "--accuracy must be from 0 to 1; got 1.2"),
        ("in.csv", "text\na\n", ["--policy=sure"], "unknown policy 'sure'"),
        ("in.csv", "text\na\n", ["--cost=0.1"], "infeasible: the best reachable"),
        ("in.csv", "text\na\n", ["--batch_size=0"], "batch_size must be at least 1; got 0"),
        ("in.csv", "text\na\n", ["--dtype=int4"], "dtype must be one of float32, bfloat16"),
        ("in.csv", "text\na\n", ["--model=nowhere/model"], "neither a local directory nor"),
    ],
)
def test_bad_input_of_the_command(command, tmp_path, capsys, name, content, more, message):
    status, _ = command(name, content, *more)
    assert status == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out.jsonl").exists()


def test_models_that_cannot_be_read(sweet, checkpoint, tmp_path):
    with pytest.raises(UserError, match="an encoder without exits"):
        AdaptiveClassifier.from_pretrained(checkpoint)
    run = sweet.classifier.model.folder.parent
    with pytest.raises(UserError, match=r"is the folder of a run: give '.*/model'"):
        AdaptiveClassifier.from_pretrained(run)
    folder = tmp_path / "model"
    shutil.copytree(sweet.classifier.model.folder, folder)
    about = json.loads((folder / "exits.json").read_text())
    for change, message in (
        ({"version": 1}, "of version 1, this is for version"),
        ({"dials": {}}, "is damaged"),
        ({"classes": ["a", "b", "c"]}, "missing or misshapen: exits.2.classifier"),
    ):
        (folder / "exits.json").write_text(json.dumps(about | change))
        with pytest.raises(UserError, match=message):
            AdaptiveClassifier.from_pretrained(folder)


def test_pairs(sweet):
    model = sweet.classifier.model
    model = dataclasses.replace(model, about={**model.about, "text_columns": ["a", "b"]})
    classifier = AdaptiveClassifier(model, dial={"threshold": 0.8})
    pairs = [("word1 word2", "word3"), ["word4", "word5 word6"]]
    for row, (first, second) in zip(classifier.encode(pairs), pairs, strict=True):
        wanted = model.tokenizer(first, second, return_token_type_ids=True)
        assert row.input_ids.tolist() == wanted["input_ids"]
        assert row.token_type_ids.tolist() == wanted["token_type_ids"]
        assert 1 in wanted["token_type_ids"]
    assert classifier.predict(pairs, 2).probabilities.shape == (2, 2)
    with pytest.raises(UserError, match="row 1 must be a pair of texts"):
        classifier.predict(["one text"])


def test_the_clock_of_this_machine_and_its_dial(sweet, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(sweet.classifier.model.folder, folder)
    with pytest.raises(UserError, match="milliseconds are not known for this model"):
        AdaptiveClassifier.from_pretrained(folder, milliseconds=5)
    assert predict.main([f"--model={folder}", "--measure", "--batch_size=1"]) == 0
    assert "to 2     to 3     to 4" in capsys.readouterr().out
    clock = read_clock(dataclasses.replace(sweet.classifier.model, folder=folder))
    assert clock.batch_sizes == (1,)
    assert (clock.milliseconds > 0).all()
    # Times of this machine are not to be asserted: put known ones in their place.
    values = json.loads((folder / "clock.json").read_text())
    values["milliseconds"] = np.full(clock.milliseconds.shape, 2.0).tolist()
    (folder / "clock.json").write_text(json.dumps(values))
    for limit in (2.0, 3.5, 6.0):
        classifier = AdaptiveClassifier.from_pretrained(folder, milliseconds=limit)
        trade = classifier.model.dials.trades[classifier.policy]
        place = list(trade.threshold).index(classifier.threshold)
        times = trade.shares @ [2.0, 4.0, 6.0]
        assert times[place] <= limit
        assert (times[place + 1 :] > limit).all()
    with pytest.raises(UserError, match=r"infeasible: the best reachable .* is 2.00 milliseconds"):
        AdaptiveClassifier.from_pretrained(folder, milliseconds=1.9)
    (folder / "clock.json").write_text("{}")
    with pytest.raises(UserError, match=r"clock.json' is damaged .*: measure again"):
        AdaptiveClassifier.from_pretrained(folder, milliseconds=5)


# Export, and the folder itself


def load_runner(folder: Path):
    """run.py of an exported folder, which needs nothing but jax and numpy."""
    spec = importlib.util.spec_from_file_location("exported_run", folder / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tree = ast.parse((folder / "run.py").read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported <= {"json", "sys", "pathlib", "jax.export", "numpy"}
    return module


@pytest.mark.parametrize("method", ["sweet", "multi_model"])
def test_an_exported_model_gives_the_same_answers(method, request, tmp_path, capsys):
    reference = request.getfixturevalue(method)
    model = reference.classifier.model
    confidence = exit_scores(reference.outputs, "confidence", model.dials.fitted)[0, 0]
    threshold = float(np.median(confidence)) + 1e-3
    wanted = reference.classifier.at("confidence", threshold=threshold).predict(
        reference.texts, 8, "latency"
    )
    folder = tmp_path / "exported"
    arguments = [f"--model={model.folder}", f"--output={folder}", f"--threshold={threshold}"]
    assert export.main([*arguments, "--policy=confidence"]) == 0
    ids, _ = encode(model.tokenizer, [(t,) for t in reference.texts], 32)
    tokens = np.asarray([len(row) for row in ids], np.int32)
    padded = np.zeros((2, len(ids), 32), np.int32)
    for place, row in enumerate(ids):
        padded[0, place, : len(row)] = row
    given, probability, layer = load_runner(folder).predict(folder, *padded, tokens)
    assert (layer == wanted.exits).all()
    assert (np.asarray(model.classes)[given] == wanted.labels).all()
    np.testing.assert_allclose(probability, wanted.probabilities.max(axis=1), atol=1e-5)
    usage = subprocess.run([sys.executable, folder / "run.py"], capture_output=True, text=True)
    assert usage.returncode == 1
    assert "python run.py tokens.npz: input_ids" in usage.stderr
    assert export.main([*arguments, "--policy=confidence"]) == 2  # it exists
    assert export.main([*arguments, "--policy=entropy"]) == 2
    assert "only the policies confidence, raw_confidence" in capsys.readouterr().err


def test_the_model_card_has_the_run_s_numbers(sweet):
    folder = sweet.classifier.model.folder
    card = (folder / "README.md").read_text()
    results = json.loads((folder.parent / "results.json").read_text())
    assert card.startswith("---\nlibrary_name: sweet_jax")
    for row in results["replicas"][0]["individual"]:
        assert f"| {row['layer']} | {row['cost']:.3f} | {row['score']:.4f} |" in card
    reached = {k: v for k, v in results["replicas"][0]["at_cost"].items() if v is not None}
    assert reached
    assert all(f"| {cost} | {score:.4f} |" in card for cost, score in reached.items())
    assert "classes: class 0, class 1" in card


def test_pushing_to_the_hub(sweet, monkeypatch):
    """What the client is asked to do; no hub is at hand."""
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **k: calls.append(k) or "there")
    assert sweet.classifier.push_to_hub("owner/name", private=True) == "there"
    assert calls[0] == (("owner/name",), {"private": True, "exist_ok": True})
    assert calls[1] == {"repo_id": "owner/name", "folder_path": sweet.classifier.model.folder}

    def refuse(*_, **__):
        raise RuntimeError("401\nnot allowed")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    with pytest.raises(UserError, match=r"could not push .* to 'owner/name': 401 not allowed"):
        sweet.classifier.push_to_hub("owner/name")
