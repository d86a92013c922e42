"""A run grown by a deeper exit: the earlier exits answer as they did, to the last bit."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from tiny import write_checkpoint

from sweet_jax import AdaptiveClassifier, ExitOutputs
from sweet_jax.config import from_mapping
from sweet_jax.errors import UserError
from sweet_jax.pipeline import run
from sweet_jax.preparation import prepare

pytestmark = pytest.mark.usefixtures("one_device_in_module")

SPLITS = ("calibration", "validation")


@pytest.fixture(scope="module")
def base(tmp_path_factory, rows):
    """(directory of a run with exits 1 and 2 of four layers, its config values)."""
    folder = tmp_path_factory.mktemp("growth")
    values = {
        "task": "tiny",
        "checkpoint": str(write_checkpoint(folder / "deep", layers=4, dropout=0.1)),
        "data_files": str(rows),
        "text_columns": "text",
        "depth": 2,
        "exits": (1, 2),
        "seeds": (0, 1),
        "learning_rates": (3e-3,),
        "train_size": 100,
        "batch_size": 8,
        "evaluation_batch_size": 16,
        "max_length": 32,
        "pooling": "first",
        "baselines": "none",
        "weight_decay": 0.01,  # which moves what gets no gradient, if it is let
    }
    run(from_mapping(values), folder / "base")
    return folder / "base", values


def more(base, **changes):
    folder, values = base
    return from_mapping(
        values | {"grow_from": str(folder), "exits": (1, 2, 4), "depth": 0} | changes
    )


@pytest.mark.slow
def test_earlier_exits_answer_as_they_did_and_the_new_one_learns(base, tmp_path):
    before = tmp_path / "before"
    shutil.copytree(base[0], before)
    run(more(base, epochs=4), tmp_path / "grown")
    for split in SPLITS:
        ours, theirs = (
            ExitOutputs.load(folder / "exit_outputs" / f"{split}.npz")
            for folder in (tmp_path / "grown", before)
        )
        assert ours.logits.shape[:2] == (2, 3)
        np.testing.assert_array_equal(ours.logits[:, :2], theirs.logits)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
    lines = (tmp_path / "grown" / "metrics.jsonl").read_text().splitlines()
    losses = np.array([json.loads(line)["loss"] for line in lines])  # [steps, R, E]
    assert (losses[-5:, :, 2].mean(axis=0) < losses[:5, :, 2].mean(axis=0)).all()
    untouched = {p.relative_to(before) for p in before.rglob("*")}
    assert untouched == {p.relative_to(base[0]) for p in base[0].rglob("*")}


@pytest.mark.slow
def test_the_saved_model_holds_the_earlier_exits_as_they_were(base, tmp_path):
    one = base[1] | {"seeds": (0,)}
    run(from_mapping(one), tmp_path / "alone")
    run(more((tmp_path / "alone", one)), tmp_path / "grown")
    ours, theirs = (
        safetensors.numpy.load_file(tmp_path / name / "model" / "model.safetensors")
        for name in ("grown", "alone")
    )
    # The encoder's own pooler is the last exit's.
    theirs = {k: v for k, v in theirs.items() if not k.startswith("pooler.")}
    assert len(theirs) > 40
    for name, value in theirs.items():
        assert ours[name].tobytes() == value.tobytes(), name
    texts = ["word0 word5 word9", "word1 word30", "word0 word7 " * 5]
    first, second = (
        AdaptiveClassifier.from_pretrained(tmp_path / name / "model", threshold=0.0).predict(texts)
        for name in ("grown", "alone")
    )
    assert set(first.exits) == {1}
    np.testing.assert_array_equal(first.labels, second.labels)


@pytest.mark.slow
def test_groups_of_devices_grow_it_as_all_devices_do(base, tmp_path):
    logits = {}
    for parallel in (False, True):
        run(more(base, exits=(1, 2, 3, 4), segment_parallel=parallel), tmp_path / str(parallel))
        outputs = ExitOutputs.load(tmp_path / str(parallel) / "exit_outputs" / "validation.npz")
        logits[parallel] = outputs.logits
    before = ExitOutputs.load(base[0] / "exit_outputs" / "validation.npz").logits
    np.testing.assert_array_equal(logits[True][:, :2], before)
    np.testing.assert_allclose(logits[True], logits[False], rtol=0, atol=1e-5)
    assert np.abs(logits[True][:, 2:]).max() > 1e-2


@pytest.mark.slow
def test_a_grown_run_grows_again_and_goes_on_where_it_stopped(base, tmp_path):
    shutil.copytree(base[0], tmp_path / "base")
    run(more((tmp_path / "base", base[1]), exits=(1, 2, 3), depth=3), tmp_path / "first")
    shutil.rmtree(tmp_path / "base")  # no longer needed
    again = more((tmp_path / "first", base[1]), exits=(1, 2, 3, 4))
    run(again, tmp_path / "again")
    folders = (tmp_path / "first", tmp_path / "again")
    ours, theirs = (ExitOutputs.load(f / "exit_outputs" / "validation.npz") for f in folders)
    np.testing.assert_array_equal(theirs.logits[:, :3], ours.logits)
    run(again, tmp_path / "again")  # from its last checkpoint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits": (1, 3, 4)}, "exits must be these and deeper ones, such as 1,2,3; got 1,3,4"),
        ({"exits": (1, 2), "depth": 2}, "exits must be these and deeper ones"),
        ({"max_length": 16}, "has max_length=32, but the new run has 16"),
        ({"seeds": (0, 7)}, "has seeds 0,1, but not 7"),
        ({"method": "early_exit"}, "grow_from needs one model whose exits are trained independ"),
        ({"grow_from": "nowhere"}, "'nowhere' is not the directory of a run"),
        ({"grow_from": "~nobody.at.all/run"}, "~nobody.at.all/run: Could not determine home"),
        ({"depth": 3}, "exits must end with depth 3"),
        ({"depth": 9}, "depth=9 is more than"),
    ],
)
def test_what_cannot_grow_is_refused(base, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(more(base, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooler": "shared"}, "has pooler='shared', but the new run has 'per_exit'"),
        (
            {"unlabeled_files": "more.csv", "distillation_weight": 1.0},
            "was trained with unlabeled_files='more.csv': such a run cannot be grown",
        ),
        (
            {"layer_scaling": 0.5, "head_refit": True},
            "was trained with layer_scaling=0.5: such a run cannot be grown",
        ),
    ],
)
def test_a_base_that_was_trained_otherwise_is_refused(base, tmp_path, changes, message):
    other = tmp_path / "other"
    shutil.copytree(base[0], other)
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(UserError, match=message):
        prepare(more((other, base[1])))


def test_unfinished_and_damaged_runs_are_refused(base, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(base[0], broken)
    (newest,) = broken.glob("checkpoints/*/*.digest.json")
    shutil.copytree(newest.with_name("24"), newest.with_name("12"))
    shutil.copy(newest, newest.with_name("12.digest.json"))
    newest.write_text("{}")  # the one before has what training had not finished
    with pytest.raises(UserError, match="has no intact checkpoint"):
        run(more((broken, base[1])), tmp_path / "grown")
    shutil.rmtree(broken / "checkpoints")
    with pytest.raises(UserError, match="has no intact checkpoint"):
        run(more((broken, base[1])), tmp_path / "grown")
    (broken / "results.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        prepare(more((broken, base[1])))


@pytest.mark.slow
def test_what_a_search_a_probe_and_a_refit_left_grows_too(base, checkpoint, tmp_path, one_device):
    """The base has one replica of two seeds' and rates' four, its best state and refitted heads."""
    recipe = {
        **{"pooling": "mean", "head_init": "probe", "head_refit": True, "epochs": "auto"},
        **{"rate_search": "short", "learning_rates": (1e-3, 3e-3), "tuning_fraction": 0.2},
        **{"seeds": (1,), "checkpoint": str(checkpoint)},
    }
    values = base[1] | recipe
    run(from_mapping(values), tmp_path / "base")
    folder = (tmp_path / "base", values)
    run(more(folder, exits=(1, 2, 3)), tmp_path / "grown")
    for split in (*SPLITS, "tuning"):
        ours, theirs = (
            ExitOutputs.load(tmp_path / name / "exit_outputs" / f"{split}.npz")
            for name in ("grown", "base")
        )
        np.testing.assert_array_equal(ours.logits[:, :2], theirs.logits)
    # Without epochs the probe is the model, and nothing was refitted.
    probes = (tmp_path / "probe", values | {"epochs": 0})
    run(from_mapping(probes[1]), probes[0])
    run(more(probes, exits=(1, 2, 3)), tmp_path / "grown_probe")
    ours, theirs = (
        ExitOutputs.load(tmp_path / name / "exit_outputs" / "validation.npz").logits
        for name in ("grown_probe", "probe")
    )
    np.testing.assert_array_equal(ours[:, :2], theirs)
    usual = {"epochs": 2, "head_init": "random", "head_refit": False, "rate_search": "full"}
    usual["exits"] = (1, 2, 3)
    with pytest.raises(UserError, match="holds out tuning rows, but the new run does not"):
        prepare(more(folder, **usual))
