"""How the exits' gradients agree: against plain gradients, in a run's log, and the experiment."""

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


@pytest.mark.slow
def test_it_is_the_mean_cosine_of_the_rows_of_the_gradients():
    graphdef, params = build(EXITS)
    key = jax.random.key(5)

    def loss(params, weights):
        logits = nnx.merge(graphdef, params)(BATCH, 0.0, key)
        return (mean_loss(logits) * weights).sum()

    found = jax.jit(lambda p: compare_gradients(graphdef, p, BATCH, key))(params)
    gradient = jax.jit(jax.value_and_grad(loss))
    losses, gradients = zip(
        *(gradient(params, w) for w in np.eye(3, dtype=np.float32)), strict=True
    )
    each = [g["encoder"]["layers"] for g in gradients]
    wanted, norms = np.full((3, 3, 3), np.nan), np.zeros((3, 3))
    for i, layer in enumerate(EXITS):
        # As torch has it: weight [H, F], a row for each unit of the output.
        weights = np.stack([g[layer - 1]["output"]["kernel"].T for g in each]).astype(float)
        assert weights.shape == (3, 16, 32)
        norms[i] = np.sqrt(np.square(weights).sum(axis=(1, 2)))
        for j in range(i, 3):
            for k in range(i, 3):
                cosines = [
                    np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
                    for a, b in zip(weights[j], weights[k], strict=True)
                ]
                wanted[i, j, k] = np.mean(cosines)
    np.testing.assert_allclose(found.cosines, wanted, atol=1e-5)
    assert np.abs(wanted[0, 0, 1]) < 0.99
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5)
    assert norms[0].all()
    assert norms[2, 0] == 0  # exit 1 does not depend on the last layer
    np.testing.assert_allclose(found.losses, losses, rtol=1e-6)


def test_where_no_gradient_comes_through_it_is_not_defined():
    graphdef, params = build(EXITS)
    compared = jax.jit(lambda p: compare_gradients(graphdef, p, BATCH, None, (1.0, 0.5)))(params)
    wanted = np.full((3, 3, 3), False)
    wanted[0, 0, 0] = wanted[2, 2, 2] = True
    wanted[1, 1:, 1:] = True
    np.testing.assert_array_equal(np.isfinite(compared.cosines), wanted)


@pytest.mark.slow
def test_a_run_logs_it_and_is_trained_as_if_it_did_not(options, tmp_path, one_device):
    changes = {"method": "early_exit", "max_steps": 12}
    plain = logits_of(options, tmp_path / "plain", **changes)
    logging = logits_of(options, tmp_path / "logging", **changes, conflict_every=5)
    np.testing.assert_array_equal(plain.logits, logging.logits)
    whole = logits_of(options, tmp_path / "whole", method="early_exit")
    assert not np.array_equal(plain.logits, whole.logits)
    rows, without, longer = (
        read_metrics(tmp_path / name) for name in ("logging", "plain", "whole")
    )
    assert [row["step"] for row in rows if "conflict" in row] == [0, 5, 10]
    assert not any("conflict" in row for row in without)
    conflict = np.asarray(rows[5]["conflict"], float)
    assert conflict.shape == (1, 3, 3, 3)
    np.testing.assert_allclose(conflict[0, 0].diagonal(), 1, atol=1e-5)
    assert np.isnan(conflict[0, 1, 0]).all()
    # The schedule of a run that ends early is that of the whole.
    assert [row["loss"] for row in rows] == [row["loss"] for row in longer[:12]]
    assert len(longer) == 24


def test_the_figure_has_a_panel_for_each_layer_that_exits_share():
    values = np.linspace(-1, 1, 27).reshape(3, 3, 3)
    *panels, _ = conflict_figure((1, 4, 6), values).axes
    assert [axes.get_title() for axes in panels] == ["gradients in layer 1", "gradients in layer 4"]
    written = [[text.get_text() for text in axes.texts] for axes in panels]
    assert written[0] == [f"{v:.2f}" for v in values[0].ravel()]
    assert written[1] == [f"{v:.2f}" for v in values[1, 1:, 1:].ravel()]


@pytest.fixture
def line(checkpoint, tmp_path) -> list[str]:
    """Arguments of the experiment, made tiny."""
    folder = tmp_path / "glue" / "sst2"
    folder.mkdir(parents=True)
    for split, count in (("train", 40), ("validation", 8)):
        texts = [f"{WORDS[i % 2]} {WORDS[2 + i % 30]} {WORDS[3 + i % 7]}" for i in range(count)]
        table = {"sentence": texts, "label": [i % 2 for i in range(count)]}
        pq.write_table(pa.table(table), folder / f"{split}.parquet")

    line = ["--task=sst2", f"--data_dir={tmp_path / 'glue'}", f"--checkpoint={checkpoint}"]
    return [*line, "--exits=1,2,3", "--batch_size=8", "--max_length=16", "--learning_rate=1e-3"]


@pytest.mark.slow
def test_the_experiment_writes_its_numbers_and_its_figure(line, tmp_path):
    line += ["--steps=6", "--batches=3", "--pooling=first,mean", f"--output={tmp_path / 'out'}"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.conflict", *line],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out" / "conflict.csv").open(newline="") as file:
        everything = list(csv.DictReader(file))
    rows, other = ([r for r in everything if r["pooling"] == p] for p in ("first", "mean"))
    assert len(everything) == len(rows) + len(other)
    assert [r["layer"] for r in rows] == [r["layer"] for r in other]
    assert [r["cosine"] for r in rows] != [r["cosine"] for r in other]
    assert {row["steps"] for row in rows} == {"6"}
    assert len(rows) == 3 * (6 + 3 + 1)  # batches; pairs of exits at or above each layer
    pair = [
        row for row in rows if (row["layer"], row["exit"], row["other_exit"]) == ("1", "1", "2")
    ]
    each = np.asarray([float(row["cosine"]) for row in pair])
    assert len(set(each)) == 3
    half = 4.302653 * each.std(ddof=1) / np.sqrt(3)  # Student's t, 2 degrees of freedom
    assert f"1 and 2  {each.mean():.3f} ± {half:.3f}" in done.stdout
    assert "1 and 3" in done.stdout
    last = [float(r["norm"]) for r in rows if r["layer"] == r["exit"] == r["other_exit"] == "3"]
    assert f"{np.mean(last):.3g} ± " in done.stdout
    assert all((r["norm"] != "") == (r["exit"] == r["other_exit"]) for r in everything)
    for name in ("conflict", "conflict-mean"):
        assert (tmp_path / "out" / "figures" / f"{name}.png").stat().st_size


def test_the_experiment_refuses_more_steps_than_there_are(line, tmp_path, capsys):
    assert conflict.main([*line, "--steps=11", f"--output={tmp_path / 'out'}"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("error: --steps must be from 1 to 10")
    assert conflict.main([*line, "--pooling=max", f"--output={tmp_path / 'out'}"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown --pooling 'max'")
    assert not (tmp_path / "out").exists()
