"""Conflict of the exits' gradients: its value, its log in a run, and the experiment."""

import csv
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx
from test_early_exit import BATCH, build, mean_loss
from test_run import logits_of
from tiny import WORDS

from experiments import conflict
from experiments.conflict_tables import conflict_figure
from sweet_jax.training.conflict import compare_gradients
from sweet_jax.training.metrics import read_metrics

EXITS = (1, 2, 3)


@pytest.mark.nightly
def test_conflict_is_mean_cosine_of_gradient_rows():
    graphdef, params = build(EXITS)
    key = jax.random.key(5)

    def loss(params, weights):
        logits = nnx.merge(graphdef, params)(BATCH, 0.0, key)
        return (mean_loss(logits) * weights).sum()

    actual = jax.jit(lambda p: compare_gradients(graphdef, p, BATCH, key))(params)
    gradient = jax.jit(jax.value_and_grad(loss))
    losses, gradients = zip(
        *(gradient(params, w) for w in np.eye(3, dtype=np.float32)), strict=True
    )
    layer_gradients = [g["encoder"]["layers"] for g in gradients]
    expected, norms = np.full((3, 3, 3), np.nan), np.zeros((3, 3))
    for i, layer in enumerate(EXITS):
        # The layout of torch: weight [H, F], with a row for each unit of the output.
        kernels = [np.asarray(g[layer - 1]["output"]["kernel"], float) for g in layer_gradients]
        weights = np.stack([kernel.T for kernel in kernels])
        assert weights.shape == (3, 16, 32)
        norms[i] = np.sqrt(np.square(weights).sum(axis=(1, 2)))
        for j in range(i, 3):
            for k in range(i, 3):
                cosines = [
                    np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
                    for a, b in zip(weights[j], weights[k], strict=True)
                ]
                expected[i, j, k] = np.mean(cosines)
    np.testing.assert_allclose(actual.cosines, expected, atol=1e-5)
    assert np.abs(expected[0, 0, 1]) < 0.99
    np.testing.assert_allclose(actual.norms, norms, rtol=1e-5)
    assert norms[0].all()
    assert norms[2, 0] == 0  # exit 1 does not depend on the last layer
    np.testing.assert_allclose(actual.losses, losses, rtol=1e-6)


def test_conflict_is_nan_when_no_gradient_crosses_boundary():
    graphdef, params = build(EXITS)
    actual = jax.jit(lambda p: compare_gradients(graphdef, p, BATCH, None, (1.0, 0.5)))(params)
    defined = np.full((3, 3, 3), False)
    defined[0, 0, 0] = defined[2, 2, 2] = True
    defined[1, 1:, 1:] = True
    np.testing.assert_array_equal(np.isfinite(actual.cosines), defined)


@pytest.mark.nightly
def test_logging_conflict_does_not_change_training(options, tmp_path, one_device):
    changes = {"method": "early_exit", "max_steps": 12}
    plain = logits_of(options, tmp_path / "plain", **changes)
    logging = logits_of(options, tmp_path / "logging", **changes, conflict_every=5)
    np.testing.assert_array_equal(plain.logits, logging.logits)
    full = logits_of(options, tmp_path / "full", method="early_exit")
    assert not np.array_equal(plain.logits, full.logits)
    logging_rows, plain_rows, full_rows = (
        read_metrics(tmp_path / name) for name in ("logging", "plain", "full")
    )
    assert [row["step"] for row in logging_rows if "conflict" in row] == [0, 5, 10]
    assert not any("conflict" in row for row in plain_rows)
    conflict = np.asarray(logging_rows[5]["conflict"], float)
    assert conflict.shape == (1, 3, 3, 3)
    np.testing.assert_allclose(conflict[0, 0].diagonal(), 1, atol=1e-5)
    assert np.isnan(conflict[0, 1, 0]).all()
    # A run that ends early has the schedule of the full run.
    assert [row["loss"] for row in logging_rows] == [row["loss"] for row in full_rows[:12]]
    assert len(full_rows) == 24


def test_conflict_figure_has_panel_for_each_shared_layer():
    values = np.linspace(-1, 1, 27).reshape(3, 3, 3)
    *panels, _ = conflict_figure((1, 4, 6), values).axes
    assert [axes.get_title() for axes in panels] == ["gradients in layer 1", "gradients in layer 4"]
    cells = [[text.get_text() for text in axes.texts] for axes in panels]
    assert cells[0] == [f"{v:.2f}" for v in values[0].ravel()]
    assert cells[1] == [f"{v:.2f}" for v in values[1, 1:, 1:].ravel()]


@pytest.fixture
def arguments(checkpoint, tmp_path) -> list[str]:
    """Returns arguments of the experiment with tiny data and a tiny checkpoint."""
    folder = tmp_path / "glue" / "sst2"
    folder.mkdir(parents=True)
    for split, count in (("train", 40), ("validation", 8)):
        texts = [f"{WORDS[i % 2]} {WORDS[2 + i % 30]} {WORDS[3 + i % 7]}" for i in range(count)]
        table = {"sentence": texts, "label": [i % 2 for i in range(count)]}
        pq.write_table(pa.table(table), folder / f"{split}.parquet")

    options = ["--task=sst2", f"--data_dir={tmp_path / 'glue'}", f"--checkpoint={checkpoint}"]
    return [*options, "--exits=1,2,3", "--batch_size=8", "--max_length=16", "--learning_rate=1e-3"]


@pytest.mark.nightly
def test_conflict_experiment_writes_records_and_figures(arguments, tmp_path):
    arguments += ["--steps=6", "--batches=3", "--pooling=first,mean"]
    arguments += [f"--output={tmp_path / 'out'}"]
    process = subprocess.run(
        [sys.executable, "-m", "experiments.conflict", *arguments],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    with (tmp_path / "out" / "conflict.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    first, mean = ([row for row in rows if row["pooling"] == p] for p in ("first", "mean"))
    assert len(rows) == len(first) + len(mean)
    assert [row["layer"] for row in first] == [row["layer"] for row in mean]
    assert [row["cosine"] for row in first] != [row["cosine"] for row in mean]
    assert {row["steps"] for row in first} == {"6"}
    assert len(first) == 3 * (6 + 3 + 1)  # batches; pairs of exits at or above each layer

    def read_column(name, *pair):  # of one layer and two exits, a value for each batch
        keys = ("layer", "exit", "other_exit")
        return np.asarray([float(row[name]) for row in first if tuple(map(row.get, keys)) == pair])

    cosines = read_column("cosine", "1", "1", "2")
    assert len(set(cosines)) == 3
    half_width = 4.302653 * cosines.std(ddof=1) / np.sqrt(3)  # Student's t, 2 degrees of freedom
    assert f"1 and 2  {cosines.mean():.3f} ± {half_width:.3f}" in process.stdout
    assert "1 and 3" in process.stdout
    assert f"{read_column('norm', '3', '3', '3').mean():.3g} ± " in process.stdout
    assert all((row["norm"] != "") == (row["exit"] == row["other_exit"]) for row in rows)
    for name in ("conflict", "conflict-mean"):
        assert (tmp_path / "out" / "figures" / f"{name}.png").stat().st_size


def test_conflict_experiment_refuses_invalid_steps_and_pooling(arguments, tmp_path, capsys):
    assert conflict.main([*arguments, "--steps=11", f"--output={tmp_path / 'out'}"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("error: --steps must be from 1 to 10")
    assert conflict.main([*arguments, "--pooling=max", f"--output={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown --pooling 'max'")
    assert not (tmp_path / "out").exists()
