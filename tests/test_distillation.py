"""Self-distillation on labeled and unlabeled rows, and training of the last exit first."""

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_early_exit import BATCH, EXITS, build, untrained
from test_step import settings

from sweet_jax.config import from_mapping
from sweet_jax.data.padding import pad_rows
from sweet_jax.errors import UserError
from sweet_jax.models.ownership import leaves_by_owner
from sweet_jax.objectives import OBJECTIVES
from sweet_jax.preparation import prepare
from sweet_jax.training.gradients import segment_gradients, whole_gradients
from sweet_jax.training.initialization import model_specs
from sweet_jax.training.input_pipeline import training_batches
from sweet_jax.training.losses import Distillation, TrainingLoss, distillation_loss
from sweet_jax.training.step import init_state, train_step

LABELED = jnp.array([True, False, True, False])


def divergence(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of softmax over the last axis, in float64."""
    p, q = (np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True) for z in (teacher, student))
    return (p * np.log(p / q)).sum(axis=-1)


def binary(logits: np.ndarray) -> np.ndarray:
    """Returns logits of two classes whose softmax is the sigmoid of the given ones."""
    return np.stack([np.zeros_like(logits), logits], axis=-1)


@pytest.mark.parametrize(
    ("objective", "row_losses"),
    [
        ("single_label", lambda t, z: 4 * divergence(t / 2, z / 2)),
        ("multi_label", lambda t, z: 4 * divergence(binary(t / 2), binary(z / 2)).mean(axis=-1)),
        ("regression", lambda t, z: (z[..., 0] - t[..., 0]) ** 2),
    ],
)
def test_distillation_loss_of_each_objective_equals_its_formula(objective, row_losses):
    """The temperature is 2, which regression ignores; the last row is padding."""
    logits = jax.random.normal(jax.random.key(0), (3, 4, 3)) * 2
    teacher, mask = jax.random.normal(jax.random.key(1), (4, 3)) * 2, jnp.arange(4) < 3
    loss = TrainingLoss(OBJECTIVES[objective], (), Distillation(1.0, 2.0))
    actual = jax.jit(functools.partial(distillation_loss, loss))(logits, teacher, mask)
    expected = row_losses(np.asarray(teacher, np.float64), np.asarray(logits, np.float64))[:, :3]
    np.testing.assert_allclose(actual, expected.mean(axis=-1), rtol=1e-5)
    np.testing.assert_allclose(distillation_loss(loss, teacher, teacher, mask), 0, atol=1e-6)


def select_parameters(params) -> dict:
    """Returns the heads and a layer of each segment, so that the gradient compiles sooner."""
    layers = params["encoder"]["layers"]
    return {"heads": params["heads"], "layers": {n: layers[n]["output"] for n in (0, 2)}}


def replace_parameters(params, selected):
    """Returns the parameters with those of `select_parameters` replaced."""
    layers = dict(params["encoder"]["layers"])
    for number, output in selected["layers"].items():
        layers[number] = layers[number] | {"output": output}
    return params | {"heads": selected["heads"], "encoder": params["encoder"] | {"layers": layers}}


@pytest.mark.slow
def test_gradient_sums_label_and_distillation_losses_times_exit_weights():
    """Unlabeled rows count in the distillation loss only."""
    graphdef, params = build()
    # Segment gradients compute the last exit's answer beforehand, with the same dropout masks.
    key = jax.random.key(5)
    batch = BATCH | {"labeled": LABELED, "labels": jnp.where(LABELED, BATCH["labels"], 1)}

    def reference_loss(selected):
        first, last = nnx.merge(graphdef, replace_parameters(params, selected))(batch, 1.0, key)
        answer = jax.lax.stop_gradient(jax.nn.softmax(last / 3))
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(z[::2], batch["labels"][::2]).mean()
            for z in (first, last)
        ]
        soft = 9 * optax.softmax_cross_entropy(first / 3, answer).mean()
        return 0.25 * (losses[0] + 0.5 * soft) + losses[1]

    def selected_gradients(params):
        loss = TrainingLoss(weights=(0.25, 1.0), distillation=Distillation(0.5, 3.0))
        grads, metrics, _ = segment_gradients(graphdef, params, batch, key, loss)
        return select_parameters(grads), metrics

    actual, metrics = jax.jit(selected_gradients)(params)
    expected = jax.jit(jax.grad(reference_loss))(select_parameters(params))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert float(metrics.distillation[0]) > 0
    assert float(metrics.distillation[1]) == 0


@pytest.mark.parametrize("by_segment", [pytest.param(False, marks=pytest.mark.slow), True])
def test_last_exit_gets_zero_gradient_from_unlabeled_rows(by_segment):
    """Exactly zero, with open boundaries (whole gradients) and closed ones (by segment)."""
    graphdef, params = build()
    batch = BATCH | {"labeled": jnp.zeros(4, bool)}
    loss = TrainingLoss(distillation=Distillation(1.0, 2.0))

    def compute_gradients(params):
        if by_segment:
            return segment_gradients(graphdef, params, batch, None, loss)[0]
        return whole_gradients(graphdef, params, batch, 0.0, None, loss)[0]

    paths = jax.tree_util.tree_leaves_with_path(jax.jit(compute_gradients)(params))
    owners = [owner for owner, _ in leaves_by_owner(params, EXITS)]
    for owner, (path, leaf) in zip(owners, paths, strict=True):
        assert np.any(leaf) == (owner == 1) or (owner == 1 and untrained(path)), path


def test_last_exit_first_opens_boundaries_and_zeroes_other_loss_weights():
    closed = settings(None, exits=(1, 2, 3), isolation=(1.0,), last_exit_first=0.4, total_steps=10)
    for step, value in ((0, 0.0), (3, 0.0), (4, 1.0), (9, 1.0)):
        isolation = closed.isolation_at(jnp.asarray(step))
        weights = closed.loss_at(jnp.asarray(step)).weights
        assert [float(a) for a in isolation] == [value, value]
        assert [float(w) for w in weights] == [value, value, 1.0]
    opened = dataclasses.replace(closed, isolation=(0.0,), loss_weights=((2.0, 2.0),) * 3)
    assert opened.isolation_at(jnp.asarray(0)) == (0.0, 0.0)
    assert [float(w) for w in opened.loss_at(jnp.asarray(9)).weights] == [2.0] * 3


@pytest.mark.slow
def test_other_heads_are_not_trained_during_last_exit_first():
    """Meanwhile the last exit's loss trains the first segment too."""
    graphdef, params = build()
    step_settings = settings(graphdef, isolation=(1.0,), last_exit_first=0.5)

    @jax.jit
    def moments(step):
        state = init_state(params, 1e-2, 0)._replace(step=step)
        return select_parameters(train_step(step_settings, state, BATCH)[0].opt_state.mu)

    before, after = (moments(jnp.asarray(step)) for step in (4, 5))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(before["heads"]["1"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves((before["heads"]["3"], before["layers"])))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(after))


@pytest.fixture
def distilled(options, tmp_path) -> dict:
    """Returns config values with an unlabeled file: 4 rows of the data, 3 new ones, 2 equal."""
    labeled = Path(options["data_files"]).read_text().splitlines()[1:5]
    unlabeled = ['"word7 word8"', '"word7 word8"', "word9"]
    texts = ["text,other", *(f"{line.rsplit(',', 1)[0]},x" for line in labeled)]
    (tmp_path / "new.csv").write_text("\n".join([*texts, *(f"{text},x" for text in unlabeled), ""]))
    return options | {
        "unlabeled_files": str(tmp_path / "new.csv"),
        "distillation": 1.0,
        "train_size": 1000,
        "seeds": (0, 1),
    }


def test_unlabeled_rows_are_new_texts_and_half_of_each_batch(distilled, one_device):
    job = prepare(from_mapping(distilled))
    assert len(job.unlabeled) == 2
    training_job = job.training_job(model_specs(job.config)[0], Path("unused"))
    batches = training_batches(training_job, SimpleNamespace(place=lambda *arrays: arrays))
    (tokens, rows, lengths), _ = batches(1)
    assert rows.shape == (2, 16)
    labeled = len(job.train)
    for row, training_rows in zip(rows, job.rows.training, strict=True):
        assert set(row[:8]) <= set(training_rows)
    assert all(sorted(row[8:]) == [-1] * 6 + [labeled, labeled + 1] for row in rows.tolist())
    batch = pad_rows(tokens, rows, lengths)
    np.testing.assert_array_equal(batch["labeled"], (rows >= 0) & (rows < labeled))
    np.testing.assert_array_equal(batch["row_mask"], rows >= 0)
    row, length = rows[0, 8], tokens.lengths[rows[0, 8]]
    start = job.unlabeled.starts[row - labeled]
    np.testing.assert_array_equal(
        batch["input_ids"][0, 8, :length], job.unlabeled.input_ids[start : start + length]
    )
    labeled_only = from_mapping({k: v for k, v in distilled.items() if k != "unlabeled_files"})
    assert prepare(labeled_only).digest != job.digest
    assert "labeled" not in pad_rows(job.train, rows[:, :8], lengths)


def test_unlabeled_file_without_new_texts_is_refused(distilled):
    config = from_mapping(distilled | {"unlabeled_files": distilled["data_files"]})
    with pytest.raises(UserError, match="has no text that is not among the training or validation"):
        prepare(config)
