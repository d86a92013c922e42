"""Tests of segment-parallel training, whose results match those of one device."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_step import assert_parameters_close
from tiny import write_checkpoint
from tqdm.auto import tqdm

from experiments.benchmarks import segments as benchmark
from experiments.benchmarks.shapes import SHAPES, Size
from sweet_jax.config import Config, from_mapping
from sweet_jax.errors import UserError
from sweet_jax.preparation import prepare
from sweet_jax.training.expected_time import ExpectedTime
from sweet_jax.training.fit import fit
from sweet_jax.training.initialization import model_specs
from sweet_jax.training.loop import StepLog, StepRange, run_steps
from sweet_jax.training.losses import StepMetrics
from sweet_jax.training.segment_parallel import assign_segments, make_device_groups, most_layers


@pytest.fixture(scope="module")
def deep_checkpoints(tmp_path_factory):
    """Checkpoints of four layers with dropout, by model type."""
    folder = tmp_path_factory.mktemp("deep")
    return {k: write_checkpoint(folder / k, k, layers=4, dropout=0.1) for k in ("bert", "deberta")}


def fit_on_devices(config: Config, workdir, devices: int, monkeypatch):
    """Trains on the first devices; returns (parameters as NumPy arrays, timing)."""
    job = prepare(config)
    (model,) = model_specs(config)
    workdir.mkdir(exist_ok=True)
    visible = jax.local_devices()[:devices]
    with monkeypatch.context() as patch:
        patch.setattr("sweet_jax.training.sharding.jax.devices", lambda: visible)
        _, params, timing = fit(job.training_job(model, workdir))
    return jax.tree.map(np.asarray, params), timing


def train_on_devices(options, workdir, devices: int, monkeypatch, **changes):
    """Trains with the options; returns (parameters, rows of metrics.jsonl)."""
    values = options | {"exits": (1, 2, 3, 4), "learning_rates": (1e-4,), "batch_size": 8}
    config = from_mapping(values | changes)
    params, _ = fit_on_devices(config, workdir, devices, monkeypatch)
    log = (workdir / "metrics.jsonl").read_text().splitlines()
    return params, [json.loads(line) for line in log]


@pytest.mark.parametrize(
    ("kind", "devices", "changes"),
    [
        pytest.param("bert", 2, {}, marks=pytest.mark.nightly),
        # Two groups of two devices, which divide the rows or the replicas. The loss weights rise,
        # because Adam's moments cancel constant ones.
        pytest.param(
            *("bert", 4, {"exits": (2, 4), "pooling": "mean", "loss_weights": "shallow_deep"}),
            marks=pytest.mark.nightly,
        ),
        pytest.param("bert", 4, {"exits": (2, 4), "seeds": (0, 1)}, marks=pytest.mark.nightly),
        # Four groups.
        pytest.param("deberta", 4, {"learning_to_exit": "detached"}, marks=pytest.mark.nightly),
    ],
)
def test_segment_parallel_steps_match_one_device(
    kind, devices, changes, deep_checkpoints, options, tmp_path, monkeypatch
):
    changes = {"checkpoint": str(deep_checkpoints[kind]), "max_steps": 20, **changes}
    reference, reference_log = train_on_devices(
        options, tmp_path / "one", 1, monkeypatch, **changes
    )
    params, log = train_on_devices(
        options, tmp_path / "many", devices, monkeypatch, segment_parallel=True, **changes
    )
    assert_parameters_close(params, reference, atol=1e-6)
    losses, reference_losses = (
        np.array([row["loss"] for row in rows]) for rows in (log, reference_log)
    )
    assert len(losses) == 20
    np.testing.assert_allclose(losses, reference_losses, rtol=0, atol=1e-5)


@pytest.mark.nightly
def test_run_resumes_after_segment_parallel_is_switched(
    deep_checkpoints, options, tmp_path, monkeypatch
):
    changes = {"checkpoint": str(deep_checkpoints["bert"]), "max_steps": 12}
    uninterrupted, _ = train_on_devices(options, tmp_path / "whole", 1, monkeypatch, **changes)
    for steps, parallel in ((4, True), (8, False), (12, True)):
        changes["max_steps"] = steps
        params, log = train_on_devices(
            options, tmp_path / "run", 4, monkeypatch, segment_parallel=parallel, **changes
        )
    assert_parameters_close(params, uninterrupted, atol=1e-6)
    assert [row["step"] for row in log] == list(range(12))


def test_evaluation_is_logged_after_preceding_steps_despite_log_lag():
    logged, values = [], StepMetrics(np.zeros(1, np.float32), np.zeros(1, np.int32))
    metrics = SimpleNamespace(add=lambda step, *_: logged.append(step), flush=lambda: None)
    steps = StepRange(0, 4, epoch=2, every=4, rows=np.full(4, 8), check=2)
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


def test_segment_assignment_minimizes_layers_of_busiest_group():
    assert assign_segments((1, 4, 6, 12), 2) == ((0, 1, 2), (3,))
    assert assign_segments((1, 4, 6, 12), 4) == ((0,), (1,), (2,), (3,))
    assert most_layers((1, 6, 12, 24), assign_segments((1, 6, 12, 24), 3)) == 12
    # On four devices: two groups of two have 3 layers per device, four groups of one up to 6.
    groups = make_device_groups((1, 4, 6, 12), 1, 8)
    assert [g.segments for g in groups] == [(0, 1, 2), (3,)]
    devices = [set(g.mesh.devices.flat) for g in groups]
    assert devices[0] | devices[1] == set(jax.devices())
    assert not devices[0] & devices[1]


@pytest.mark.nightly
def test_segments_benchmark_prints_every_variant(capsys):
    benchmark.compare(SHAPES["tiny"], Size(8, 16), 1, 1)
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    names, devices, _, gain, memory, size = zip(*lines[2:], strict=True)
    assert names == ("one device", "data-parallel", "segments 1 / 2")
    assert devices == ("1", "4", "4")
    assert gain[0] == memory[0] == "1.00"
    assert min(map(float, (*gain, *memory, *size))) > 0


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"method": "early_exit"}, "method"),
        ({"isolation": (0.0, 1.0)}, "isolation"),
        ({"boundary_isolation": (1.0, 0.5)}, "boundary_isolation"),
        ({"preset": "reference"}, "pooler"),
        ({"clipping": "global"}, "clipping"),
        ({"last_exit_first": 0.5}, "last_exit_first"),
        ({"distillation": 1.0}, "distillation"),
    ],
)
def test_segment_parallel_refuses_options_that_couple_exits(changes, key, options):
    values = {"segment_parallel": True, "exits": (1, 2, 3)} | changes
    with pytest.raises(UserError, match=f"segment_parallel needs .* {key}="):
        dataclasses.replace(from_mapping(options), **values).resolved()


@pytest.mark.slow
def test_segment_parallel_keeps_best_state_of_one_device(options, tmp_path, monkeypatch):
    recipe = {"pooling": "mean", "head_init": "random", "epochs": "auto", "tuning_fraction": 0.2}
    recipe |= {"learning_rates": (1e-4,), "max_steps": 20}
    config = from_mapping(options | recipe)
    reference, timing = fit_on_devices(config, tmp_path / "1", 1, monkeypatch)
    config = from_mapping(options | recipe | {"segment_parallel": True})
    params, segment_timing = fit_on_devices(config, tmp_path / "2", 2, monkeypatch)
    assert segment_timing.best_steps == timing.best_steps
    assert_parameters_close(params, reference, atol=1e-6)
