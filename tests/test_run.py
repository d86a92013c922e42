"""Tests of complete runs with a tiny encoder: methods, replicas, devices, divergence, files."""

import dataclasses
import html
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers
from tiny import TINIES, write_checkpoint, write_rows

from sweet_jax import ExitOutputs, load_encoder
from sweet_jax.config import from_mapping
from sweet_jax.data import padding
from sweet_jax.data.batches import tokenize
from sweet_jax.data.padding import pad_rows
from sweet_jax.data.splits import split_calibration_rows
from sweet_jax.errors import UserError
from sweet_jax.exits.operating_point import ThresholdResolver, make_resolver
from sweet_jax.models.layers import ACTIVATIONS
from sweet_jax.pipeline import run, train_and_evaluate
from sweet_jax.preparation import prepare
from sweet_jax.run_description import describe_rows, log_description
from sweet_jax.training import input_pipeline
from sweet_jax.training.checkpoint import read_params
from sweet_jax.training.initialization import initial_state, model_specs
from sweet_jax.training.metrics import read_metrics

FILES = {
    "config.json",
    "metrics.jsonl",
    "results.json",
    "report.html",
    "exit_outputs/calibration.npz",
    "exit_outputs/validation.npz",
    "model/model.safetensors",
    "model/config.json",
    "model/tokenizer.json",
    "model/exits.json",
    *(
        f"figures/{n}.{s}"
        for n in ("curve", "exits", "reliability", "loss")
        for s in ("png", "svg")
    ),
}


def logits_of(options, workdir, **changes) -> ExitOutputs:
    """Returns the validation outputs of a run, which writes no report."""
    job = prepare(from_mapping(options | changes))
    workdir.mkdir(exist_ok=True)
    return train_and_evaluate(job, workdir).validation


@pytest.mark.parametrize(
    "method",
    ["sweet", *(pytest.param(m, marks=pytest.mark.slow) for m in ("early_exit", "multi_model"))],
)
def test_run_of_each_method_writes_every_file(
    method, options, tmp_path, one_device, capsys, with_figures
):
    results = run(from_mapping(options | {"method": method}), tmp_path)
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert written >= FILES
    assert not [name for name in written if ".part" in name]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    outputs = ExitOutputs.load(tmp_path / "exit_outputs" / "validation.npz")
    assert outputs.logits.shape == (1, 3, 32, 2)
    expected_cost = np.array([1, 3, 6]) / 3 if method == "multi_model" else np.array([1, 2, 3]) / 3
    np.testing.assert_allclose(outputs.cost, expected_cost)
    assert [row["layer"] for row in results["replicas"][0]["individual"]] == [1, 2, 3]
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    trainings = 3 if method == "multi_model" else 1
    assert steps == list(range(2 * 12)) * trainings  # 90 rows by 8, twice
    stdout = capsys.readouterr().out
    assert " kept full accuracy on " in stdout
    assert str(tmp_path / "report.html") in stdout


CHANGES_BY_TYPE = {
    "roberta": {"method": "early_exit"},
    "deberta": {"preset": "reference"},
    "deberta-v2": {"seeds": (0, 1)},
    "distilbert": {},
    "mpnet": {"preset": "reference"},
    "electra": {},
    "xlm-roberta": {},
    "modernbert": {"learning_to_exit": "joint"},
    "albert": {"method": "early_exit"},
    "camembert": {},
}


def test_runs_cover_every_model_type():
    """The other tests of this file train BERT."""
    assert {"bert", *CHANGES_BY_TYPE} == set(TINIES)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        # XLM-RoBERTa and ELECTRA have the layers of RoBERTa and BERT.
        pytest.param(
            kind,
            changes,
            marks=pytest.mark.nightly if kind in ("xlm-roberta", "electra") else pytest.mark.slow,
        )
        for kind, changes in CHANGES_BY_TYPE.items()
    ],
)
def test_run_of_each_model_type_trains_every_part_and_saved_model_reproduces_its_logits(
    kind, changes, options, tmp_path, one_device
):
    folder = write_checkpoint(tmp_path / "checkpoint", kind)
    options = options | {"checkpoint": str(folder), "epochs": 1} | changes
    run(from_mapping(options), tmp_path / "run")
    assert_every_part_of_encoder_is_trained(prepare(from_mapping(options)), tmp_path / "run")
    saved = tmp_path / "run" / "model"
    job = prepare(from_mapping(options | {"checkpoint": str(saved)}))
    rows = pad_rows(job.validation, np.arange(3), (32,))
    hidden = load_encoder(str(saved))(rows["input_ids"], rows["mask"], rows["token_type_ids"])
    exits = json.loads((saved / "exits.json").read_text())
    replica = [list(r) for r in from_mapping(options).replicas()].index(
        [exits["seed"], exits["learning_rate"]]
    )
    tensors = safetensors.numpy.load_file(saved / "model.safetensors")
    outputs = ExitOutputs.load(tmp_path / "run" / "exit_outputs" / "validation.npz")
    activation = ACTIVATIONS[job.checkpoint.config.pooler_act]
    for e in (1, 2, 3):
        features = np.asarray(hidden[e][:, 0])
        if e < 3 and (scale := tensors.get(f"exits.{e}.norm.weight")) is not None:
            spread = np.sqrt(features.var(axis=1, keepdims=True) + 1e-5)
            features = scale * (features - features.mean(axis=1, keepdims=True)) / spread
        pooled = features @ tensors[f"exits.{e}.pooler.dense.weight"].T
        pooled = np.asarray(activation(pooled + tensors[f"exits.{e}.pooler.dense.bias"]))
        logits = pooled @ tensors[f"exits.{e}.classifier.weight"].T
        logits += tensors[f"exits.{e}.classifier.bias"]
        np.testing.assert_allclose(logits, outputs.logits[replica, e - 1, :3], atol=1e-5)
    # Last, as the rest of the test needs no torch.
    torch = pytest.importorskip("torch")
    model = transformers.AutoModel.from_pretrained(saved, attn_implementation="eager").eval()
    input_names = {"input_ids": "input_ids", "mask": "attention_mask"}
    if getattr(model.config, "type_vocab_size", 0):  # DistilBERT has no token types
        input_names["token_type_ids"] = "token_type_ids"
    inputs = {name: torch.from_numpy(np.int64(rows[key])) for key, name in input_names.items()}
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states
    for actual, state in zip(hidden, expected, strict=True):
        difference = np.abs(np.asarray(actual) - state.numpy())[rows["mask"]]
        assert difference.max() <= 1e-5


@pytest.mark.slow
def test_training_on_sst_2_updates_every_part_of_the_encoder(
    options, tmp_path, one_device, glue_dir
):
    replaced = ("task", "data_files", "text_columns", "train_size", "exits", "batch_size")
    values = {k: v for k, v in options.items() if k not in replaced} | {
        **{"task": "sst2", "data_dir": str(glue_dir), "train_size": 200, "exits": (1, 3)},
        **{"epochs": 1, "batch_size": 96, "pooling": ""},
    }
    job = prepare(from_mapping(values))
    assert job.config.pooling == "mean"
    outputs = train_and_evaluate(job, tmp_path).validation
    assert outputs.logits.shape == (1, 2, 872, 2)
    assert np.all(np.isfinite(outputs.logits))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
    assert_every_part_of_encoder_is_trained(job, tmp_path)


def assert_every_part_of_encoder_is_trained(job, workdir):
    """Compares the last checkpoint of a run with its initial parameters, for each replica."""
    (path,) = (workdir / "checkpoints").iterdir()
    trained = read_params(path)
    _, state = initial_state(job.config, job.checkpoint, model_specs(job.config)[0], 2)
    for part, before in state.params["encoder"].items():
        leaves = zip(
            jax.tree.leaves(before), jax.tree.leaves(trained["encoder"][part]), strict=True
        )
        # A single replica is stored without the axis of replicas.
        pairs = [(x, np.reshape(y, np.shape(x))) for x, y in leaves]
        changed = [[np.any(a != b) for a, b in zip(x, y, strict=True)] for x, y in pairs]
        assert np.any(changed, axis=0).all(), part


@pytest.mark.slow
def test_every_method_learns_a_learnable_task(options, tmp_path, one_device):
    for method in ("sweet", "early_exit", "multi_model"):
        outputs = logits_of(options, tmp_path / method, method=method, epochs=12)
        accuracies = (outputs.predictions == outputs.labels[:, None]).mean(axis=-1)[0]
        assert np.all(accuracies > 0.8), (method, accuracies)


@pytest.mark.slow
def test_first_exit_of_sweet_does_not_depend_on_later_exits(options, tmp_path, one_device):
    three_exits = logits_of(options, tmp_path / "a", exits=(1, 2, 3))
    two_exits = logits_of(options, tmp_path / "b", exits=(1, 3))
    separate_model = logits_of(options, tmp_path / "c", exits=(1, 3), method="multi_model")
    np.testing.assert_allclose(three_exits.logits[:, 0], two_exits.logits[:, 0], atol=1e-5)
    np.testing.assert_allclose(three_exits.logits[:, 0], separate_model.logits[:, 0], atol=1e-5)
    joint = logits_of(options, tmp_path / "d", exits=(1, 3), method="early_exit")
    assert np.abs(three_exits.logits[:, 0] - joint.logits[:, 0]).max() > 1e-2


@pytest.mark.slow
def test_each_replica_equals_a_run_of_that_replica_only(
    options, with_dropout, tmp_path, one_device
):
    options = options | with_dropout | {"depth": 2, "exits": (1, 2)}
    grid = {"seeds": (0, 5), "learning_rates": (1e-3, 3e-3)}
    stacked = logits_of(options, tmp_path / "stack", **grid)
    assert stacked.logits.shape[0] == 4
    for r in (0, 3):
        seed, rate = stacked.identity.replicas[r]
        one_replica = {"seeds": (seed,), "learning_rates": (rate,)}
        solo = logits_of(options, tmp_path / f"solo{r}", **one_replica)
        np.testing.assert_allclose(stacked.logits[r], solo.logits[0], atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"seeds": (0, 1), "method": "early_exit"}, marks=pytest.mark.nightly),
    ],
)
def test_run_on_several_devices_equals_run_on_one(
    options, with_dropout, tmp_path, request, changes
):
    options = options | with_dropout | {"depth": 2, "exits": (1, 2)}
    four_devices = logits_of(options, tmp_path / "many", **changes)
    request.getfixturevalue("one_device")
    single_device = logits_of(options, tmp_path / "one", **changes)
    np.testing.assert_allclose(four_devices.logits, single_device.logits, atol=1e-5)


def test_calibration_rows_differ_by_seed_and_validation_rows_do_not(options, tmp_path, one_device):
    job = prepare(from_mapping(options | {"seeds": (0, 1)}))
    outcome = train_and_evaluate(job, tmp_path)
    assert outcome.calibration.logits.shape[2] == 10
    # The rows that fill the last batch of an epoch are not counted.
    assert job.rows.training.shape[1] % job.config.batch_size
    assert outcome.timing["train_examples"] == job.config.epochs * job.rows.training.size
    rows = zip(job.rows.training, job.rows.calibration, strict=True)
    for r, (trained, held_out) in enumerate(rows):
        assert not set(trained) & set(held_out)
        np.testing.assert_array_equal(outcome.calibration.labels[r], job.train.labels[held_out])
    assert set(job.rows.calibration[0]) != set(job.rows.calibration[1])
    np.testing.assert_array_equal(outcome.validation.labels[0], outcome.validation.labels[1])


def test_suspicious_data_is_warned_of(options, tmp_path, caplog):
    rows = [(f"word1 word2 {i}", ("pos", "neg", "Neg")[i % 3]) for i in range(60)]
    rows += [("word1 " * 40 + str(i), "pos") for i in range(20)] + [("word3", "rare")]
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    data = {"data_dir": "", "data_files": str(path), "text_columns": "text", "train_size": 1000}
    with caplog.at_level("INFO"):
        log_description(prepare(from_mapping(options | data | {"max_length": 16})))
    classes = "4 classes (rows of each): 'pos' 40, 'Neg' 20, 'neg' 20, 'rare' 1"
    assert f"81 rows for training and validation: {classes}" in caplog.messages
    assert any("'Neg' (20), 'neg' (20)" in line for line in caplog.messages)
    assert any("no calibration row has class 'rare'" in line for line in caplog.messages)
    (rows_message,) = [line for line in caplog.messages if line.startswith("rows: ")]
    assert "train_size" not in rows_message  # which is larger than the file
    assert "validation: 20% of the file, drawn at random, each class in proportion" in rows_message
    (truncation,) = [line for line in caplog.messages if "are longer than max_length" in line]
    assert re.fullmatch(
        r"\d+% of the training texts are longer than max_length, 16 tokens, and are truncated; "
        r"--config.max_length=\d\d keeps 95% of them whole",
        truncation,
    )


def test_few_calibration_rows_are_warned_of(options, caplog):
    for size, preset, warned in ((30, "", True), (30, "paper", False)):
        caplog.clear()
        job = prepare(from_mapping(options | {"train_size": size, "preset": preset}))
        log_description(job)
        assert " (train_size 30 of " in describe_rows(job)
        assert ("only 3 calibration rows" in caplog.text) is warned


def test_devices_of_a_run_are_logged_without_idle_ones(options, caplog):
    for size, devices in ((8, "4"), (6, "2 of 4")):
        with caplog.at_level("INFO"):
            log_description(prepare(from_mapping(options | {"batch_size": size})))
        assert caplog.messages[-1].endswith(f"1 learning rate, on {devices} cpu device(s)")


def test_tuning_fraction_of_a_run_without_tuning_rows_is_warned_of(options, caplog):
    for changes, warned in (({}, True), ({"epochs": "auto"}, False)):
        caplog.clear()
        values = options | {"tuning_fraction": 0.2} | changes
        log_description(prepare(from_mapping(values)))
        assert ("tuning_fraction=0.2 holds out no rows of this run" in caplog.text) is warned


def test_batch_larger_than_the_training_rows_is_warned_of(options, caplog):
    for size, warned in ((90, False), (91, True)):
        caplog.clear()
        log_description(prepare(from_mapping(options | {"batch_size": size})))
        line = f"batch_size={size} is larger than the 90 training rows: each step has all of them"
        assert (line in caplog.text) is warned


def test_only_drawn_rows_are_tokenized(options):
    job = prepare(from_mapping(options | {"seeds": (0, 1), "train_size": 30}))
    assert 30 < len(job.train) <= 60 < len(job.dataset.train.labels)
    all_tokens = tokenize(job.tokenizer, job.dataset.train, 32)
    for seed, *rows in zip((0, 1), job.rows.training, job.rows.calibration, strict=True):
        drawn = split_calibration_rows(job.dataset.train.labels, job.config, seed)
        for actual, expected in zip(rows, drawn, strict=True):
            np.testing.assert_array_equal(job.train.labels[actual], all_tokens.labels[expected])
            for i, j in zip(actual, expected, strict=True):
                a, b = slice(*job.train.starts[i : i + 2]), slice(*all_tokens.starts[j:][:2])
                assert job.train.input_ids[a].tolist() == all_tokens.input_ids[b].tolist()


@pytest.mark.parametrize("preset", ["paper", pytest.param("reference", marks=pytest.mark.nightly)])
def test_presets_calibrate_on_validation_rows(options, with_dropout, tmp_path, one_device, preset):
    results = run(from_mapping(options | with_dropout | {"preset": preset}), tmp_path)
    calibration, validation = (
        ExitOutputs.load(tmp_path / "exit_outputs" / f"{split}.npz")
        for split in ("calibration", "validation")
    )
    np.testing.assert_array_equal(calibration.labels, validation.labels)
    # The reference implementation fits temperatures with dropout on.
    assert np.array_equal(calibration.logits, validation.logits) == (preset == "paper")
    assert results["n"]["train"] == 100
    page = html.unescape((tmp_path / "report.html").read_text())
    assert "the preset's choice" in page


@pytest.mark.slow
def test_nonfinite_loss_is_reported_and_other_replicas_are_unaffected(
    options, tmp_path, one_device, caplog, request
):
    """Trains with two learning rates, one of which makes all exits diverge at its first update."""
    options = options | {"exits": (2, 3)}
    healthy = run(from_mapping(options), tmp_path / "healthy")
    rates = {"learning_rates": (3e-3, 1e30)}
    request.getfixturevalue("with_figures")  # which must be drawn without finite values too
    results = run(from_mapping(options | rates), tmp_path / "diverged")
    failures = [d for replica in results["replicas"] for d in replica["diverged"]]
    failures = [d for d in failures if d["what"] == "loss is not finite"]
    first_steps = {}  # (replica, exit) → the first step of the log whose loss is not finite
    for step in read_metrics(tmp_path / "diverged"):
        for r, losses in enumerate(step["loss"]):
            for layer, loss in zip((2, 3), losses, strict=True):
                if loss is None:
                    first_steps.setdefault((r, layer), step["step"])
    reported_steps = {(d["replica"], d["exit"]): d["step"] for d in failures}
    assert reported_steps == first_steps == {(1, 2): 1, (1, 3): 1}
    assert "diverged: replica 1 (seed 0, learning rate 1e+30), exit 2: loss is not " in caplog.text
    assert "exit 2: loss is not finite, since step 1" in caplog.text
    logged_exits = re.findall(
        r"replica 1, exit (\d) of exits_2_3: the loss is not finite at step 1", caplog.text
    )
    assert logged_exits == ["2", "3"]
    assert results["replicas"][1]["temperatures"] == [None, None]
    assert results["best_replica"] == 0
    actual, expected = (r["replicas"][0]["individual"] for r in (results, healthy))
    assert [row["score"] for row in actual] == [row["score"] for row in expected]


def test_collapsed_exit_is_reported_with_its_first_step(options, tmp_path, one_device, caplog):
    # A rate this small leaves every head as initialized; some predict one class for all rows.
    results = run(from_mapping(options | {"learning_rates": (1e-9,), "seeds": (3,)}), tmp_path)
    failures = results["replicas"][0]["diverged"]
    outputs = ExitOutputs.load(tmp_path / "exit_outputs" / "validation.npz")
    one_class = [len(np.unique(p)) == 1 for p in outputs.predictions[0]]
    collapsed_exits = [e + 1 for e, collapsed in enumerate(one_class) if collapsed]
    assert [failure["exit"] for failure in failures] == collapsed_exits
    assert failures
    for failure in failures:
        (predicted,) = set(outputs.predictions[0, failure["exit"] - 1].tolist())
        assert failure["what"] == f"collapsed to class 'class {predicted}'"
        since = None  # the first step from which on every batch got only that class
        for step in reversed(read_metrics(tmp_path)):
            if step["predicted"][0][failure["exit"] - 1] != predicted:
                break
            since = step["step"]
        assert failure["step"] == since
        message = (
            f"collapsed: replica 0 (seed 3, learning rate 1e-09), exit {failure['exit']} predicts "
            f"class 'class {predicted}' for every row"
            + ("" if since is None else f", since step {since}")
        )
        assert message in caplog.text
        assert message in html.unescape((tmp_path / "report.html").read_text())
    assert any(failure["step"] is not None for failure in failures)
    assert "diverged:" not in caplog.text


def test_saved_model_reproduces_thresholds_and_logits_of_the_run(options, tmp_path, one_device):
    run(from_mapping(options | {"clip_norm": math.inf}), tmp_path)
    exits = json.loads((tmp_path / "model" / "exits.json").read_text())
    assert exits["text_columns"] == ["text"]
    assert exits["layers"] == [1, 2, 3]
    saved = ThresholdResolver.from_dict(exits["dials"])
    refitted = make_resolver(ExitOutputs.load(tmp_path / "exit_outputs" / "calibration.npz"))
    assert {"confidence", "pcee", "patience"} < {*saved.fronts}
    for policy in saved.fronts:
        assert saved.threshold(policy, cost=0.8)[0] == refitted.threshold(policy, cost=0.8)[0]
    job = prepare(from_mapping(options))
    row = slice(*job.validation.starts[:2])
    hidden = load_encoder(str(tmp_path / "model"))(job.validation.input_ids[None, row])
    assert len(hidden) == 4
    tensors = safetensors.numpy.load_file(tmp_path / "model" / "model.safetensors")
    outputs = ExitOutputs.load(tmp_path / "exit_outputs" / "validation.npz")
    for e in (1, 2, 3):
        pooled = np.asarray(hidden[e][0, 0]) @ tensors[f"exits.{e}.pooler.dense.weight"].T
        pooled = np.tanh(pooled + tensors[f"exits.{e}.pooler.dense.bias"])
        logits = pooled @ tensors[f"exits.{e}.classifier.weight"].T
        logits += tensors[f"exits.{e}.classifier.bias"]
        np.testing.assert_allclose(logits, outputs.logits[0, e - 1, 0], atol=1e-5)


@pytest.mark.slow
def test_multi_model_saves_a_model_of_every_depth(options, tmp_path, one_device):
    run(from_mapping(options | {"method": "multi_model"}), tmp_path)
    models = json.loads((tmp_path / "model" / "exits.json").read_text())["models"]
    assert models == [
        {"folder": "depth_01", "exits": [1]},
        {"folder": "depth_02", "exits": [2]},
        {"folder": ".", "exits": [3]},
    ]
    for model in models:
        hidden = load_encoder(str(tmp_path / "model" / model["folder"]))(np.ones((1, 4), int))
        assert len(hidden) == model["exits"][0] + 1


@pytest.mark.slow
def test_bfloat16_run_learns_and_differs_from_float32(options, tmp_path, one_device):
    bfloat16 = logits_of(options, tmp_path / "half", dtype="bfloat16", epochs=12)
    float32 = logits_of(options, tmp_path / "whole", epochs=12)
    assert bfloat16.logits.dtype == np.float32
    accuracies = (bfloat16.predictions == bfloat16.labels[:, None]).mean(axis=-1)[0]
    assert np.all(accuracies > 0.75), accuracies
    assert not np.array_equal(bfloat16.logits, float32.logits)


@pytest.mark.nightly
def test_fused_attention_and_remat_do_not_change_training(
    options, with_dropout, tmp_path, one_device
):
    """Compares after two steps, before Adam has amplified rounding differences."""
    options |= with_dropout | {"max_steps": 2}
    with pytest.raises(UserError, match=r"add --config.attention_dropout=off"):
        prepare(from_mapping(options | {"attention": "xla"}))
    options["attention_dropout"] = "off"
    plain = logits_of(options, tmp_path / "plain")
    fused = logits_of(options, tmp_path / "fused", attention="xla", remat=True)
    np.testing.assert_allclose(plain.logits, fused.logits, rtol=0, atol=1e-3)
    del options["attention_dropout"]
    with_attention_dropout = logits_of(options, tmp_path / "dropped")
    assert np.abs(plain.logits - with_attention_dropout.logits).max() > 1e-2


@pytest.mark.slow
def test_grouping_by_length_pads_less_and_does_not_change_training(
    options, with_dropout, tmp_path, one_device, monkeypatch
):
    options |= with_dropout | {"max_steps": 3, "group_by_length": True}
    plain = logits_of(options, tmp_path / "plain")
    monkeypatch.setattr(padding, "_WORTH_COMPILING", 1)
    lengths = []
    padded_length = input_pipeline.padded_length

    def record_length(*arguments):
        lengths.append(padded_length(*arguments))
        return lengths[-1]

    monkeypatch.setattr(input_pipeline, "padded_length", record_length)
    short = logits_of(options, tmp_path / "short")
    assert len(lengths) == 3
    assert min(lengths) < 32, lengths
    np.testing.assert_allclose(plain.logits, short.logits, rtol=0, atol=1e-5)


def test_workdir_of_another_configuration_is_refused(options, tmp_path, one_device):
    run(from_mapping(options), tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(UserError, match=r"belongs to another.*epochs is 2 there and 3 here"):
        run(from_mapping(options | {"epochs": 3}), tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before
    run(from_mapping(options | {"checkpoint_every": 7}), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # As if an earlier version had written the file, without these keys.
    for key in ("remat", "attention", "relative", "isolation"):
        del config[key]
    config["distillation_weight"] = config.pop("distillation")  # the key's former name
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="remat is False there and True here"):
        run(from_mapping(options | {"remat": True}), tmp_path)
    run(from_mapping(options), tmp_path)


def test_resumed_run_accepts_moved_data_files_but_not_changed_rows(options, tmp_path, monkeypatch):
    def interrupt(job) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sweet_jax.pipeline.log_description", interrupt)
    (tmp_path / "new.csv").write_text("text\nword7 word8\n")
    files = {"data_files": options["data_files"], "unlabeled_files": str(tmp_path / "new.csv")}
    moved = {key: str(tmp_path / f"{key}.csv") for key in files}
    for key, path in files.items():
        shutil.copy(path, moved[key])
    for paths in (files, moved):
        config = from_mapping(options | {"distillation": 1.0} | paths)
        with pytest.raises(KeyboardInterrupt):  # after the workdir was accepted
            run(config, tmp_path / "run")
        saved = json.loads((tmp_path / "run" / "config.json").read_text())
        # The commands quantize and report read the rows at these paths.
        assert {key: saved[key] for key in files} == paths
    for key, row in (("data_files", "word1 word5,class 1\n"), ("unlabeled_files", "word9\n")):
        with open(files[key]) as file:
            (tmp_path / "other.csv").write_text(file.read() + row)
        changed = dataclasses.replace(config, **{key: str(tmp_path / "other.csv")})
        with pytest.raises(
            UserError, match=r"another configuration: .*rows of the data have changed"
        ) as error:
            run(changed, tmp_path / "run")
        assert f"{key} is {moved[key]!r} there and {getattr(changed, key)!r} here" in str(
            error.value
        )


def test_nonempty_directory_without_a_run_is_refused_and_unchanged(options, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").write_text("mine")
    with pytest.raises(UserError, match="not empty and contains no run"):
        run(from_mapping(options), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "precious").read_text() == "mine"


def test_validation_class_missing_from_drawn_training_rows_is_refused(options, tmp_path):
    rows = write_rows(tmp_path / "rows.csv", 400, classes=20)
    few = {"data_files": str(rows), "train_size": 10, "calibration": "validation"}
    with pytest.raises(UserError, match="in none of the 10 training rows drawn for seed 0"):
        prepare(from_mapping(options | few))
