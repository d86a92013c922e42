"""Whole runs on a tiny encoder: methods, replicas, devices, divergence, what is written."""

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
from tiny import FAMILIES, TINIES, write_checkpoint, write_rows

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
from sweet_jax.training import fit
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
    """The validation outputs of a run, without its report."""
    job = prepare(from_mapping(options | changes))
    workdir.mkdir(exist_ok=True)
    return train_and_evaluate(job, workdir).validation


@pytest.mark.parametrize(
    "method",
    ["sweet", *(pytest.param(m, marks=pytest.mark.slow) for m in ("early_exit", "multi_model"))],
)
def test_a_run_of_each_method(method, options, tmp_path, one_device, capsys, with_figures):
    results = run(from_mapping(options | {"method": method}), tmp_path)
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert written >= FILES
    assert not [name for name in written if ".part" in name]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    outputs = ExitOutputs.load(tmp_path / "exit_outputs" / "validation.npz")
    assert outputs.logits.shape == (1, 3, 32, 2)
    wanted = np.array([1, 3, 6]) / 3 if method == "multi_model" else np.array([1, 2, 3]) / 3
    np.testing.assert_allclose(outputs.cost, wanted)
    assert [row["layer"] for row in results["replicas"][0]["individual"]] == [1, 2, 3]
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    trained = 3 if method == "multi_model" else 1
    assert steps == list(range(2 * 12)) * trained  # 90 rows by 8, twice
    printed = capsys.readouterr().out
    assert " kept full accuracy on " in printed
    assert str(tmp_path / "report.html") in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("roberta", {"method": "early_exit"}),
        ("deberta", {"preset": "reference"}),
        ("deberta-v2", {"seeds": (0, 1)}),
        ("distilbert", {}),
        ("mpnet", {"preset": "reference"}),
        ("electra", {}),
        ("xlm-roberta", {}),
        ("modernbert", {"learning_to_exit": "joint"}),
        ("albert", {"method": "early_exit"}),
    ],
)
def test_a_run_of_each_model_type(kind, changes, options, tmp_path, one_device):
    folder = write_checkpoint(tmp_path / "checkpoint", kind)
    options = options | {"checkpoint": str(folder), "epochs": 1} | changes
    run(from_mapping(options), tmp_path / "run")
    saved = tmp_path / "run" / "model"
    job = prepare(from_mapping(options | {"checkpoint": str(saved)}))
    rows = pad_rows(job.validation, np.arange(3), (32,))
    hidden = load_encoder(str(saved))(rows["input_ids"], rows["mask"], rows["token_type_ids"])
    exits = json.loads((saved / "exits.json").read_text())
    best = [list(r) for r in from_mapping(options).replicas()].index(
        [exits["seed"], exits["learning_rate"]]
    )
    tensors = safetensors.numpy.load_file(saved / "model.safetensors")
    outputs = ExitOutputs.load(tmp_path / "run" / "exit_outputs" / "validation.npz")
    act = ACTIVATIONS[job.checkpoint.config.pooler_act]
    for e in (1, 2, 3):
        first = np.asarray(hidden[e][:, 0])
        if e < 3 and (scale := tensors.get(f"exits.{e}.norm.weight")) is not None:
            spread = np.sqrt(first.var(axis=1, keepdims=True) + 1e-5)
            first = scale * (first - first.mean(axis=1, keepdims=True)) / spread
        pooled = first @ tensors[f"exits.{e}.pooler.dense.weight"].T
        pooled = np.asarray(act(pooled + tensors[f"exits.{e}.pooler.dense.bias"]))
        logits = pooled @ tensors[f"exits.{e}.classifier.weight"].T
        logits += tensors[f"exits.{e}.classifier.bias"]
        np.testing.assert_allclose(logits, outputs.logits[best, e - 1, :3], atol=1e-5)
    # Last: what stands above needs no torch.
    torch = pytest.importorskip("torch")
    model = transformers.AutoModel.from_pretrained(saved, attn_implementation="eager").eval()
    names = {"input_ids": "input_ids", "mask": "attention_mask"}
    if getattr(model.config, "type_vocab_size", 0):  # DistilBERT has no token types
        names["token_type_ids"] = "token_type_ids"
    inputs = {theirs: torch.from_numpy(np.int64(rows[ours])) for ours, theirs in names.items()}
    with torch.no_grad():
        theirs = model(**inputs, output_hidden_states=True).hidden_states
    for ours, state in zip(hidden, theirs, strict=True):
        gap = np.abs(np.asarray(ours) - state.numpy())[rows["mask"]]
        assert gap.max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", TINIES)
def test_each_model_type_trains_on_rows_of_sst_2(kind, options, tmp_path, one_device, glue_dir):
    folder = write_checkpoint(tmp_path / "checkpoint", kind)
    names = ("task", "data_files", "text_columns", "train_size", "exits", "batch_size")
    values = {k: v for k, v in options.items() if k not in names} | {
        **{"task": "sst2", "data_dir": str(glue_dir), "train_size": 200, "exits": (1, 3)},
        **{"checkpoint": str(folder), "epochs": 1, "batch_size": 96, "pooling": ""},
        "method": "early_exit" if FAMILIES[kind].isolation_obstacle else "sweet",
    }
    job = prepare(from_mapping(values))
    assert job.config.pooling == "mean"
    outputs = train_and_evaluate(job, tmp_path).validation
    assert outputs.logits.shape == (1, 2, 872, 2)
    assert np.all(np.isfinite(outputs.logits))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
    (path,) = (tmp_path / "checkpoints").iterdir()
    trained = read_params(path)
    _, state = initial_state(job.config, job.checkpoint, model_specs(job.config)[0], 2)
    for part, before in state.params["encoder"].items():
        after = jax.tree.leaves(trained["encoder"][part])
        pairs = zip(jax.tree.leaves(before), after, strict=True)
        assert any(np.any(a[0] != b) for a, b in pairs), part


@pytest.mark.slow
def test_all_methods_learn_a_learnable_task(options, tmp_path, one_device):
    for method in ("sweet", "early_exit", "multi_model"):
        outputs = logits_of(options, tmp_path / method, method=method, epochs=12)
        right = (outputs.predictions == outputs.labels[:, None]).mean(axis=-1)[0]
        assert np.all(right > 0.8), (method, right)


@pytest.mark.slow
def test_sweet_s_first_exit_is_the_same_model_whatever_follows(options, tmp_path, one_device):
    wide = logits_of(options, tmp_path / "a", exits=(1, 2, 3))
    narrow = logits_of(options, tmp_path / "b", exits=(1, 3))
    alone = logits_of(options, tmp_path / "c", exits=(1, 3), method="multi_model")
    np.testing.assert_allclose(wide.logits[:, 0], narrow.logits[:, 0], atol=1e-5)
    np.testing.assert_allclose(wide.logits[:, 0], alone.logits[:, 0], atol=1e-5)
    together = logits_of(options, tmp_path / "d", exits=(1, 3), method="early_exit")
    assert np.abs(wide.logits[:, 0] - together.logits[:, 0]).max() > 1e-2


@pytest.mark.slow
def test_each_replica_equals_its_solo_run(options, with_dropout, tmp_path, one_device):
    options = options | with_dropout | {"depth": 2, "exits": (1, 2)}
    grid = {"seeds": (0, 5), "learning_rates": (1e-3, 3e-3)}
    stack = logits_of(options, tmp_path / "stack", **grid)
    assert stack.logits.shape[0] == 4
    for r in (0, 3):
        seed, rate = stack.identity.replicas[r]
        alone = {"seeds": (seed,), "learning_rates": (rate,)}
        solo = logits_of(options, tmp_path / f"solo{r}", **alone)
        np.testing.assert_allclose(stack.logits[r], solo.logits[0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"seeds": (0, 1), "method": "early_exit"}, marks=pytest.mark.slow)],
)
def test_several_devices_agree_with_one(options, with_dropout, tmp_path, request, changes):
    options = options | with_dropout | {"depth": 2, "exits": (1, 2)}
    many = logits_of(options, tmp_path / "many", **changes)
    request.getfixturevalue("one_device")
    one = logits_of(options, tmp_path / "one", **changes)
    np.testing.assert_allclose(many.logits, one.logits, atol=1e-5)


def test_calibration_rows_differ_by_seed_and_validation_rows_do_not(options, tmp_path, one_device):
    job = prepare(from_mapping(options | {"seeds": (0, 1)}))
    outcome = train_and_evaluate(job, tmp_path)
    assert outcome.calibration.logits.shape[2] == 10
    rows = zip(job.rows.training, job.rows.calibration, strict=True)
    for r, (trained, held_out) in enumerate(rows):
        assert not set(trained) & set(held_out)
        np.testing.assert_array_equal(outcome.calibration.labels[r], job.train.labels[held_out])
    assert set(job.rows.calibration[0]) != set(job.rows.calibration[1])
    np.testing.assert_array_equal(outcome.validation.labels[0], outcome.validation.labels[1])


def test_what_looks_wrong_in_the_data_is_warned_of(options, tmp_path, caplog):
    rows = [(f"word1 word2 {i}", ("pos", "neg", "Neg")[i % 3]) for i in range(60)]
    rows += [("word1 " * 40 + str(i), "pos") for i in range(20)] + [("word3", "rare")]
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    own = {"data_dir": "", "data_files": str(path), "text_columns": "text", "train_size": 1000}
    with caplog.at_level("INFO"):
        log_description(prepare(from_mapping(options | own | {"max_length": 16})))
    assert "4 classes (rows of each): 'pos' 40, 'Neg' 20, 'neg' 20, 'rare' 1" in caplog.messages
    assert any("'Neg' (20), 'neg' (20)" in line for line in caplog.messages)
    assert any("no calibration row has class 'rare'" in line for line in caplog.messages)
    (rows_line,) = [line for line in caplog.messages if line.startswith("rows: ")]
    assert "train_size" not in rows_line  # which leaves none out
    assert "validation: 20% of the file, drawn at random, each class in proportion" in rows_line
    (cut,) = [line for line in caplog.messages if "are longer than max_length" in line]
    assert re.fullmatch(
        r"\d+% of the training texts are longer than max_length, 16 tokens, and are truncated; "
        r"--config.max_length=\d\d keeps 95% of them whole",
        cut,
    )


def test_few_calibration_rows_are_told(options, caplog):
    for size, preset, said in ((30, "", True), (30, "paper", False)):
        caplog.clear()
        job = prepare(from_mapping(options | {"train_size": size, "preset": preset}))
        log_description(job)
        assert " (train_size 30 of " in describe_rows(job)
        assert ("only 3 calibration rows" in caplog.text) is said


def test_only_the_rows_that_are_drawn_are_tokenised(options):
    job = prepare(from_mapping(options | {"seeds": (0, 1), "train_size": 30}))
    assert 30 < len(job.train) <= 60 < len(job.dataset.train.labels)
    whole = tokenize(job.tokenizer, job.dataset.train, 32)
    for seed, *rows in zip((0, 1), job.rows.training, job.rows.calibration, strict=True):
        drawn = split_calibration_rows(job.dataset.train.labels, job.config, seed)
        for ours, theirs in zip(rows, drawn, strict=True):
            np.testing.assert_array_equal(job.train.labels[ours], whole.labels[theirs])
            for one, other in zip(ours, theirs, strict=True):
                a, b = slice(*job.train.starts[one : one + 2]), slice(*whole.starts[other:][:2])
                assert job.train.input_ids[a].tolist() == whole.input_ids[b].tolist()


@pytest.mark.parametrize("preset", ["paper", pytest.param("reference", marks=pytest.mark.slow)])
def test_presets_that_calibrate_on_validation_rows(
    options, with_dropout, tmp_path, one_device, preset
):
    results = run(from_mapping(options | with_dropout | {"preset": preset}), tmp_path)
    fitted, shown = (
        ExitOutputs.load(tmp_path / "exit_outputs" / f"{split}.npz")
        for split in ("calibration", "validation")
    )
    np.testing.assert_array_equal(fitted.labels, shown.labels)
    # The release leaves dropout on where it fits temperatures.
    assert np.array_equal(fitted.logits, shown.logits) == (preset == "paper")
    assert results["n"]["train"] == 100
    page = html.unescape((tmp_path / "report.html").read_text())
    assert "the preset's choice" in page


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_reported_and_the_others_go_on(
    options, tmp_path, one_device, caplog, request
):
    """Trains with two learning rates, one of which spoils all exits with its first update."""
    options = options | {"exits": (2, 3)}
    healthy = run(from_mapping(options), tmp_path / "healthy")
    rates = {"learning_rates": (3e-3, 1e30)}
    request.getfixturevalue("with_figures")  # of what is not finite too
    results = run(from_mapping(options | rates), tmp_path / "diverged")
    bad = [d for replica in results["replicas"] for d in replica["diverged"]]
    bad = [d for d in bad if d["what"] == "loss is not finite"]
    first = {}  # (replica, exit) → the first step of the log whose loss is not finite
    for step in read_metrics(tmp_path / "diverged"):
        for r, losses in enumerate(step["loss"]):
            for layer, loss in zip((2, 3), losses, strict=True):
                if loss is None:
                    first.setdefault((r, layer), step["step"])
    assert {(d["replica"], d["exit"]): d["step"] for d in bad} == first == {(1, 2): 1, (1, 3): 1}
    assert "diverged: replica 1 (seed 0, learning rate 1e+30), exit 2: loss is not " in caplog.text
    assert "exit 2: loss is not finite, since step 1" in caplog.text
    said = re.findall(
        r"replica 1, exit (\d) of exits_2_3: the loss is not finite at step 1", caplog.text
    )
    assert said == ["2", "3"]
    assert results["replicas"][1]["temperatures"] == [None, None]
    assert results["best_replica"] == 0
    ours, theirs = (r["replicas"][0]["individual"] for r in (results, healthy))
    assert [row["score"] for row in ours] == [row["score"] for row in theirs]


def test_a_collapsed_exit_is_reported_with_its_step(options, tmp_path, one_device, caplog):
    # A rate this small leaves every head at its random start, with one class for all rows.
    results = run(from_mapping(options | {"learning_rates": (1e-9,), "seeds": (3,)}), tmp_path)
    bad = results["replicas"][0]["diverged"]
    outputs = ExitOutputs.load(tmp_path / "exit_outputs" / "validation.npz")
    one_class = [len(np.unique(p)) == 1 for p in outputs.predictions[0]]
    assert [d["exit"] for d in bad] == [e + 1 for e, one in enumerate(one_class) if one]
    assert bad
    for row in bad:
        (given,) = set(outputs.predictions[0, row["exit"] - 1].tolist())
        assert row["what"] == f"collapsed to class 'class {given}'"
        since = None  # the first step since which every batch got that class only
        for step in reversed(read_metrics(tmp_path)):
            if step["predicted"][0][row["exit"] - 1] != given:
                break
            since = step["step"]
        assert row["step"] == since
        said = (
            f"collapsed: replica 0 (seed 3, learning rate 1e-09), exit {row['exit']} predicts "
            f"class 'class {given}' for every row"
            + ("" if since is None else f", since step {since}")
        )
        assert said in caplog.text
        assert said in html.unescape((tmp_path / "report.html").read_text())
    assert any(row["step"] is not None for row in bad)
    assert "diverged:" not in caplog.text


def test_the_saved_encoder_gives_the_trained_model_s_hidden_states(options, tmp_path, one_device):
    run(from_mapping(options | {"clip_norm": math.inf}), tmp_path)
    exits = json.loads((tmp_path / "model" / "exits.json").read_text())
    assert exits["text_columns"] == ["text"]
    assert exits["layers"] == [1, 2, 3]
    saved = ThresholdResolver.from_dict(exits["dials"])
    made = make_resolver(ExitOutputs.load(tmp_path / "exit_outputs" / "calibration.npz"))
    assert {"confidence", "pcee", "patience"} < {*saved.fronts}
    for policy in saved.fronts:
        assert saved.threshold(policy, cost=0.8)[0] == made.threshold(policy, cost=0.8)[0]
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
def test_multi_model_saves_every_depth(options, tmp_path, one_device):
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
def test_bfloat16_activations_train_float32_parameters(options, tmp_path, one_device):
    outputs = logits_of(options, tmp_path / "half", dtype="bfloat16", epochs=12)
    exact = logits_of(options, tmp_path / "whole", epochs=12)
    assert outputs.logits.dtype == np.float32
    right = (outputs.predictions == outputs.labels[:, None]).mean(axis=-1)[0]
    assert np.all(right > 0.75), right
    assert not np.array_equal(outputs.logits, exact.logits)


@pytest.mark.slow
def test_fused_attention_and_remat_are_the_same_training(
    options, with_dropout, tmp_path, one_device
):
    """Two steps in: before rounding, which Adam scales up, has grown."""
    options |= with_dropout | {"max_steps": 2}
    with pytest.raises(UserError, match=r"add --config.attention_dropout=off"):
        prepare(from_mapping(options | {"attention": "xla"}))
    options["attention_dropout"] = "off"
    plain = logits_of(options, tmp_path / "plain")
    fused = logits_of(options, tmp_path / "fused", attention="xla", remat=True)
    np.testing.assert_allclose(plain.logits, fused.logits, rtol=0, atol=1e-3)
    del options["attention_dropout"]
    dropped = logits_of(options, tmp_path / "dropped")
    assert np.abs(plain.logits - dropped.logits).max() > 1e-2


@pytest.mark.slow
def test_short_batches_are_padded_less_and_train_the_same(
    options, with_dropout, tmp_path, one_device, monkeypatch
):
    options |= with_dropout | {"max_steps": 3, "group_by_length": True}
    plain = logits_of(options, tmp_path / "plain")
    monkeypatch.setattr(padding, "_WORTH_COMPILING", 1)
    seen = []
    padded_length = fit.padded_length
    monkeypatch.setattr(fit, "padded_length", lambda *a: seen.append(padded_length(*a)) or seen[-1])
    short = logits_of(options, tmp_path / "short")
    assert len(seen) == 3
    assert min(seen) < 32, seen
    np.testing.assert_allclose(plain.logits, short.logits, rtol=0, atol=1e-5)


def test_a_workdir_of_another_configuration_is_refused(options, tmp_path, one_device):
    run(from_mapping(options), tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(UserError, match=r"belongs to another.*epochs is 2 there and 3 here"):
        run(from_mapping(options | {"epochs": 3}), tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before
    run(from_mapping(options | {"checkpoint_every": 7}), tmp_path)
    older = json.loads((tmp_path / "config.json").read_text())
    # As if an earlier version had not had them.
    for key in ("remat", "attention", "relative", "isolation"):
        del older[key]
    (tmp_path / "config.json").write_text(json.dumps(older))
    with pytest.raises(UserError, match="remat is False there and True here"):
        run(from_mapping(options | {"remat": True}), tmp_path)
    run(from_mapping(options), tmp_path)


def test_the_rows_of_a_resumed_run_may_lie_elsewhere(options, tmp_path, monkeypatch):
    def interrupt(job) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sweet_jax.pipeline.log_description", interrupt)
    (tmp_path / "new.csv").write_text("text\nword7 word8\n")
    files = {"data_files": options["data_files"], "unlabeled_files": str(tmp_path / "new.csv")}
    moved = {key: str(tmp_path / f"{key}.csv") for key in files}
    for key, path in files.items():
        shutil.copy(path, moved[key])
    for where in (files, moved):
        config = from_mapping(options | {"distillation_weight": 1.0} | where)
        with pytest.raises(KeyboardInterrupt):  # the workdir is this run's
            run(config, tmp_path / "run")
        kept = json.loads((tmp_path / "run" / "config.json").read_text())
        assert {key: kept[key] for key in files} == where  # where quantize and report look
    for key, row in (("data_files", "word1 word5,class 1\n"), ("unlabeled_files", "word9\n")):
        with open(files[key]) as file:
            (tmp_path / "other.csv").write_text(file.read() + row)
        other = dataclasses.replace(config, **{key: str(tmp_path / "other.csv")})
        with pytest.raises(
            UserError, match=r"another configuration: .*rows of the data have changed"
        ) as error:
            run(other, tmp_path / "run")
        assert f"{key} is {moved[key]!r} there and {getattr(other, key)!r} here" in str(error.value)


def test_a_directory_that_is_no_run_s_is_left_alone(options, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").write_text("mine")
    with pytest.raises(UserError, match="not empty and contains no run"):
        run(from_mapping(options), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "precious").read_text() == "mine"


def test_validation_classes_must_be_among_the_rows_drawn(options, tmp_path):
    rows = write_rows(tmp_path / "rows.csv", 400, classes=20)
    few = {"data_files": str(rows), "train_size": 10, "calibration": "validation"}
    with pytest.raises(UserError, match="in none of the 10 training rows drawn for seed 0"):
        prepare(from_mapping(options | few))
