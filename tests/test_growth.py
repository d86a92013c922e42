"""Runs grown by a deeper exit, whose earlier exits stay the same to the last bit."""

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
        "weight_decay": 0.01,  # would change unfrozen parameters without gradients
    }
    run(from_mapping(values), folder / "base")
    return folder / "base", values


def grown_config(base, **changes):
    """Returns the config of a run that adds exit 4 to a base run."""
    folder, values = base
    return from_mapping(
        values | {"grow_from": str(folder), "exits": (1, 2, 4), "depth": 0} | changes
    )


@pytest.mark.slow
def test_grown_run_keeps_earlier_logits_and_trains_new_exit(base, tmp_path):
    base_copy = tmp_path / "base"
    shutil.copytree(base[0], base_copy)
    run(grown_config(base, epochs=4), tmp_path / "grown")
    for split in SPLITS:
        grown, original = (
            ExitOutputs.load(folder / "exit_outputs" / f"{split}.npz")
            for folder in (tmp_path / "grown", base_copy)
        )
        assert grown.logits.shape[:2] == (2, 3)
        np.testing.assert_array_equal(grown.logits[:, :2], original.logits)
        np.testing.assert_array_equal(grown.labels, original.labels)
    lines = (tmp_path / "grown" / "metrics.jsonl").read_text().splitlines()
    losses = np.array([json.loads(line)["loss"] for line in lines])  # [steps, R, E]
    assert (losses[-5:, :, 2].mean(axis=0) < losses[:5, :, 2].mean(axis=0)).all()
    expected_paths = {p.relative_to(base_copy) for p in base_copy.rglob("*")}
    assert expected_paths == {p.relative_to(base[0]) for p in base[0].rglob("*")}


@pytest.mark.nightly
def test_grown_model_keeps_tensors_and_predictions_of_earlier_exits(base, tmp_path):
    values = base[1] | {"seeds": (0,)}
    run(from_mapping(values), tmp_path / "alone")
    run(grown_config((tmp_path / "alone", values)), tmp_path / "grown")
    grown, original = (
        safetensors.numpy.load_file(tmp_path / name / "model" / "model.safetensors")
        for name in ("grown", "alone")
    )
    # The encoder's pooler tensors are those of the last exit.
    original = {k: v for k, v in original.items() if not k.startswith("pooler.")}
    assert len(original) > 40
    for name, tensor in original.items():
        assert grown[name].tobytes() == tensor.tobytes(), name
    texts = ["word0 word5 word9", "word1 word30", "word0 word7 " * 5]
    grown_predictions, original_predictions = (
        AdaptiveClassifier.from_pretrained(tmp_path / name / "model", threshold=0.0).predict(texts)
        for name in ("grown", "alone")
    )
    assert set(grown_predictions.exits) == {1}
    np.testing.assert_array_equal(grown_predictions.labels, original_predictions.labels)


@pytest.mark.nightly
def test_segment_parallel_growth_equals_data_parallel_growth(base, tmp_path):
    logits = {}
    for parallel in (False, True):
        run(
            grown_config(base, exits=(1, 2, 3, 4), segment_parallel=parallel),
            tmp_path / str(parallel),
        )
        outputs = ExitOutputs.load(tmp_path / str(parallel) / "exit_outputs" / "validation.npz")
        logits[parallel] = outputs.logits
    base_logits = ExitOutputs.load(base[0] / "exit_outputs" / "validation.npz").logits
    np.testing.assert_array_equal(logits[True][:, :2], base_logits)
    np.testing.assert_allclose(logits[True], logits[False], rtol=0, atol=1e-5)
    assert np.abs(logits[True][:, 2:]).max() > 1e-2


@pytest.mark.nightly
def test_grown_run_can_be_grown_again_and_resumed(base, tmp_path):
    shutil.copytree(base[0], tmp_path / "base")
    run(grown_config((tmp_path / "base", base[1]), exits=(1, 2, 3), depth=3), tmp_path / "first")
    shutil.rmtree(tmp_path / "base")  # no longer needed
    config = grown_config((tmp_path / "first", base[1]), exits=(1, 2, 3, 4))
    run(config, tmp_path / "second")
    folders = (tmp_path / "first", tmp_path / "second")
    first, second = (ExitOutputs.load(f / "exit_outputs" / "validation.npz") for f in folders)
    np.testing.assert_array_equal(second.logits[:, :3], first.logits)
    run(config, tmp_path / "second")  # from its last checkpoint


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
def test_growth_settings_that_do_not_fit_the_base_are_refused(base, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(grown_config(base, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooler": "shared"}, "has pooler='shared', but the new run has 'per_exit'"),
        (
            {"unlabeled_files": "more.csv", "distillation": 1.0},
            "was trained with unlabeled_files='more.csv': such a run cannot be grown",
        ),
        (
            {"layer_scaling": 0.5, "head_refit": True},
            "was trained with layer_scaling=0.5: such a run cannot be grown",
        ),
    ],
)
def test_base_run_with_unsupported_training_settings_is_refused(base, tmp_path, changes, message):
    changed = tmp_path / "changed"
    shutil.copytree(base[0], changed)
    values = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(UserError, match=message):
        prepare(grown_config((changed, base[1])))


def test_growth_of_unfinished_or_damaged_run_is_refused(base, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(base[0], damaged)
    (newest,) = damaged.glob("checkpoints/*/*.digest.json")
    shutil.copytree(newest.with_name("24"), newest.with_name("12"))
    shutil.copy(newest, newest.with_name("12.digest.json"))
    newest.write_text("{}")  # the checkpoint before it is not that of the last step
    with pytest.raises(UserError, match="has no intact checkpoint"):
        run(grown_config((damaged, base[1])), tmp_path / "grown")
    shutil.rmtree(damaged / "checkpoints")
    with pytest.raises(UserError, match="has no intact checkpoint"):
        run(grown_config((damaged, base[1])), tmp_path / "grown")
    (damaged / "results.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        prepare(grown_config((damaged, base[1])))


@pytest.mark.nightly
def test_base_run_with_rate_search_probe_and_refit_can_be_grown(
    base, checkpoint, tmp_path, one_device
):
    """The base has one replica, of the chosen rate, with its best state and refitted heads."""
    recipe = {
        **{"pooling": "mean", "head_init": "probe", "head_refit": True, "epochs": "auto"},
        **{"rate_search": "short", "learning_rates": (1e-3, 3e-3), "tuning_fraction": 0.2},
        **{"seeds": (1,), "checkpoint": str(checkpoint)},
    }
    values = base[1] | recipe
    run(from_mapping(values), tmp_path / "base")
    searched_base = (tmp_path / "base", values)
    run(grown_config(searched_base, exits=(1, 2, 3)), tmp_path / "grown")
    for split in (*SPLITS, "tuning"):
        grown, original = (
            ExitOutputs.load(tmp_path / name / "exit_outputs" / f"{split}.npz")
            for name in ("grown", "base")
        )
        np.testing.assert_array_equal(grown.logits[:, :2], original.logits)
    # Without epochs the model is the probe, and no head is refitted.
    probe_base = (tmp_path / "probe", values | {"epochs": 0})
    run(from_mapping(probe_base[1]), probe_base[0])
    run(grown_config(probe_base, exits=(1, 2, 3)), tmp_path / "grown_probe")
    grown, original = (
        ExitOutputs.load(tmp_path / name / "exit_outputs" / "validation.npz").logits
        for name in ("grown_probe", "probe")
    )
    np.testing.assert_array_equal(grown[:, :2], original)
    plain = {"epochs": 2, "head_init": "random", "head_refit": False, "rate_search": "full"}
    plain["exits"] = (1, 2, 3)
    with pytest.raises(UserError, match="holds out tuning rows, but the new run does not"):
        prepare(grown_config(searched_base, **plain))
