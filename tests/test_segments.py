"""Segment-parallel training: the same numbers as on one device, each parameter on one group."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import write_checkpoint
from tqdm.auto import tqdm

from experiments.benchmarks import segments as benchmark
from experiments.benchmarks.shapes import SHAPES, Size
from sweet_jax.config import from_mapping
from sweet_jax.errors import UserError
from sweet_jax.preparation import prepare
from sweet_jax.training.expected_time import ExpectedTime
from sweet_jax.training.fit import fit
from sweet_jax.training.initialization import model_specs
from sweet_jax.training.loop import StepLog, StepRange, run_steps
from sweet_jax.training.losses import StepMetrics
from sweet_jax.training.segment_parallel import assign_segments, make_device_groups, most_layers


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Checkpoints of four layers with dropout, by model type."""
    folder = tmp_path_factory.mktemp("deep")
    return {k: write_checkpoint(folder / k, k, layers=4, dropout=0.1) for k in ("bert", "deberta")}


def trained(options, workdir, devices: int, monkeypatch, **changes):
    """(parameters, lines of metrics) after the steps of a config, on the first so many devices."""
    values = options | {"exits": (1, 2, 3, 4), "learning_rates": (1e-4,), "batch_size": 8}
    config = from_mapping(values | changes)
    job = prepare(config)
    (model,) = model_specs(config)
    workdir.mkdir(exist_ok=True)
    some = jax.local_devices()[:devices]
    with monkeypatch.context() as patch:
        patch.setattr("sweet_jax.training.sharding.jax.devices", lambda: some)
        _, params, _ = fit(job.training_job(model, workdir))
    return jax.tree.map(np.asarray, params), (workdir / "metrics.jsonl").read_text()


def assert_close(ours, theirs):
    """Equal to 1e-6, but for key biases: softmax cancels them, and Adam turns the rounding noise
    that their gradients are into whole steps.
    """

    def close(path: tuple, a: np.ndarray, b: np.ndarray) -> None:
        if [part.key for part in path[-2:]] != ["key", "bias"]:
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6, err_msg=str(path))

    jax.tree.map_with_path(close, ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "devices", "changes"),
    [
        ("bert", 2, {}),
        # Two groups, the rows or the replicas spread in each; rising weights, which Adam's moments
        # do not cancel.
        pytest.param(
            *("bert", 4, {"exits": (2, 4), "pooling": "mean", "loss_weights": "shallow_deep"}),
            marks=pytest.mark.slow,
        ),
        pytest.param("bert", 4, {"exits": (2, 4), "seeds": (0, 1)}, marks=pytest.mark.nightly),
        # Four groups.
        pytest.param("deberta", 4, {"learning_to_exit": "detached"}, marks=pytest.mark.nightly),
    ],
)
def test_twenty_steps_are_those_of_one_device(
    kind, devices, changes, deep, options, tmp_path, monkeypatch
):
    changes = {"checkpoint": str(deep[kind]), "max_steps": 20, **changes}
    one, log = trained(options, tmp_path / "one", 1, monkeypatch, **changes)
    ours, same = trained(
        options, tmp_path / "many", devices, monkeypatch, segment_parallel=True, **changes
    )
    assert_close(ours, one)
    losses, others = (
        np.array([json.loads(line)["loss"] for line in text.splitlines()]) for text in (same, log)
    )
    assert len(losses) == 20
    np.testing.assert_allclose(losses, others, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_either_way_goes_on_from_the_checkpoint_of_the_other(deep, options, tmp_path, monkeypatch):
    changes = {"checkpoint": str(deep["bert"]), "max_steps": 12}
    whole, _ = trained(options, tmp_path / "whole", 1, monkeypatch, **changes)
    for steps, parallel in ((4, True), (8, False), (12, True)):
        changes["max_steps"] = steps
        ours, log = trained(
            options, tmp_path / "run", 4, monkeypatch, segment_parallel=parallel, **changes
        )
    assert_close(ours, whole)
    assert [json.loads(line)["step"] for line in log.splitlines()] == list(range(12))


def test_an_evaluation_is_logged_after_the_steps_before_it_however_late_the_log_is():
    logged, values = [], StepMetrics(np.zeros(1, np.float32), np.zeros(1, np.int32))
    metrics = SimpleNamespace(add=lambda step, *_: logged.append(step), flush=lambda: None)
    steps = StepRange(0, 4, epoch=2, every=4, check=2)
    plan = SimpleNamespace(step=lambda number, state, inputs: (state, [values]), lag=2)
    with tqdm(total=4, disable=True) as bar:
        step_log = StepLog("exits_1", (1,), steps, metrics, bar, ExpectedTime(4, None))
        run_steps(
            plan,
            state=None,
            batch=lambda number: (None, 8),
            step_log=step_log,
            save=lambda step, state: None,
            evaluate=lambda step, state: logged.append(f"evaluation {step}"),
        )
    assert logged == [0, 1, "evaluation 2", 2, 3, "evaluation 4"]


def test_segments_are_shared_out_so_that_the_busiest_group_has_fewest_layers():
    assert assign_segments((1, 4, 6, 12), 2) == ((0, 1, 2), (3,))
    assert assign_segments((1, 4, 6, 12), 4) == ((0,), (1,), (2,), (3,))
    assert most_layers((1, 6, 12, 24), assign_segments((1, 6, 12, 24), 3)) == 12
    # Four devices: two groups of two have 3 layers a device, four groups of one would have 6.
    groups = make_device_groups((1, 4, 6, 12), 1, 8)
    assert [g.segments for g in groups] == [(0, 1, 2), (3,)]
    devices = [set(g.mesh.devices.flat) for g in groups]
    assert devices[0] | devices[1] == set(jax.devices())
    assert not devices[0] & devices[1]


@pytest.mark.slow
def test_the_benchmark_prints_all_sides(capsys):
    benchmark.compare(SHAPES["tiny"], Size(8, 16), 1, 1)
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    names, devices, _, gain, used, size = zip(*lines[2:], strict=True)
    assert names == ("one device", "data-parallel", "segments 1 / 2")
    assert devices == ("1", "4", "4")
    assert gain[0] == used[0] == "1.00"
    assert min(map(float, (*gain, *used, *size))) > 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "early_exit"}, "method"),
        ({"isolation": (0.0, 1.0)}, "isolation"),
        ({"boundary_isolation": (1.0, 0.5)}, "boundary_isolation"),
        ({"preset": "reference"}, "pooler"),
        ({"clipping": "global"}, "clipping"),
        ({"last_exit_first": 0.5}, "last_exit_first"),
        ({"distillation_weight": 1.0}, "distillation_weight"),
    ],
)
def test_exits_that_are_coupled_are_refused(changes, named, options):
    values = {"segment_parallel": True, "exits": (1, 2, 3)} | changes
    with pytest.raises(UserError, match=f"segment_parallel needs .* {named}="):
        dataclasses.replace(from_mapping(options), **values).resolved()


@pytest.mark.slow
def test_groups_keep_the_best_state_as_one_device_does(options, tmp_path, monkeypatch):
    recipe = {"pooling": "mean", "head_init": "random", "epochs": "auto", "tuning_fraction": 0.2}
    recipe |= {"learning_rates": (1e-4,), "max_steps": 20}
    found = []
    for devices, parallel in ((1, False), (2, True)):
        config = from_mapping(options | recipe | {"segment_parallel": parallel})
        job = prepare(config)
        (model,) = model_specs(config)
        workdir = tmp_path / str(devices)
        workdir.mkdir()
        some = jax.local_devices()[:devices]
        with monkeypatch.context() as patch:
            patch.setattr("sweet_jax.training.sharding.jax.devices", lambda some=some: some)
            _, params, timing = fit(job.training_job(model, workdir))
        found.append((jax.tree.map(np.asarray, params), timing.best_steps))
    assert found[0][1] == found[1][1]
    assert_close(found[0][0], found[1][0])
