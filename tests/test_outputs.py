"""ExitOutputs: validation of arrays, and files, of which none is unpickled."""

import json

import numpy as np
import pytest

from sweet_jax import ExitOutputs
from sweet_jax.errors import UserError
from sweet_jax.exits.outputs import RunIdentity, layer_cost

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 3, 5, 4)).astype(np.float32)
LABELS = RNG.integers(0, 4, (2, 5))


@pytest.mark.parametrize("file", ["x.npz", "x", "x.dat"])
def test_outputs_round_trip_through_one_file_of_any_suffix(tmp_path, file):
    identity = RunIdentity(task="tëst", classes=("a", "b"), replicas=((0, 1e-4), (1, 1e-4)))
    outputs = ExitOutputs(LOGITS, LABELS, [1, 2, 4], exit_scores=LOGITS[..., 0], identity=identity)
    outputs.save(tmp_path / "deep" / file)
    loaded = ExitOutputs.load(tmp_path / "deep" / file)
    for name in ("logits", "labels", "layers", "cost", "exit_scores"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(outputs, name))
        assert getattr(loaded, name).dtype == getattr(outputs, name).dtype
    assert loaded.identity == identity
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [file]


def test_identity_of_other_releases_is_read_with_defaults(tmp_path):
    arrays = {"logits": LOGITS, "labels": LABELS, "layers": [1, 2, 4]}
    identity = {"metric": "f1", "replicas": [[0, 1e-4], [1, 3e-4]], "added_later": {"a": 1}}
    np.savez(tmp_path / "x.npz", **arrays, identity=np.asarray(json.dumps(identity)))
    loaded = ExitOutputs.load(tmp_path / "x.npz").identity
    assert loaded == RunIdentity(metric="f1", replicas=((0, 1e-4), (1, 3e-4)))
    assert (loaded.fitted_on, loaded.policy) == ("held_out", "confidence")
    np.savez(tmp_path / "none.npz", **arrays)
    assert ExitOutputs.load(tmp_path / "none.npz").identity == RunIdentity()
    outputs = ExitOutputs(logits=LOGITS, labels=LABELS, layers=[1, 2, 4], cost=[0.1, 0.2, 1.0])
    assert outputs.identity.metric == "accuracy"


def test_single_replica_and_shared_labels_are_broadcast():
    outputs = ExitOutputs(LOGITS[0], LABELS[0], [1, 2, 4])
    assert outputs.logits.shape == (1, 3, 5, 4)
    assert outputs.labels.shape == (1, 5)
    assert ExitOutputs(LOGITS, LABELS[0], [1, 2, 4]).labels.shape == (2, 5)
    np.testing.assert_array_equal(
        ExitOutputs(LOGITS, LABELS, [1, 2, 4]).replica(1).labels[0], LABELS[1]
    )


def test_layer_cost_accumulates_models_of_multi_model():
    np.testing.assert_allclose(layer_cost([1, 4, 6, 12], "sweet"), np.array([1, 4, 6, 12]) / 12)
    expected = np.array([1, 5, 11, 23]) / 12
    np.testing.assert_allclose(layer_cost([1, 4, 6, 12], "multi_model"), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"logits": LOGITS[0, 0]},
        {"logits": LOGITS[:, :, :0]},
        {"labels": LABELS[:, :4]},
        {"labels": LABELS + 4},
        {"labels": LABELS + 0.5},
        {"labels": LABELS * np.nan},
        {"labels": LABELS + np.inf},
        {"layers": [1, 2]},
        {"layers": [2, 1, 4]},
        {"layers": [0, 1, 4]},
        {"cost": [0.1, 0.1, 1.0]},
        {"cost": [-0.1, 0.1, 1.0]},
        {"cost": [0.1, np.nan, 1.0]},
        {"cost": [0.1, 1.0, np.inf]},
        {"cost": 0.5},
        {"exit_scores": LOGITS},
        {"identity": {"metric": "f1"}},
    ],
)
def test_invalid_or_inconsistent_arrays_are_refused(change):
    values = {"logits": LOGITS, "labels": LABELS, "layers": [1, 2, 4]}
    with pytest.raises(ValueError, match="must be"):
        ExitOutputs(**{**values, **change})


def test_file_without_intact_exit_outputs_is_refused(tmp_path):
    with pytest.raises(UserError, match="no exit outputs"):
        ExitOutputs.load(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(UserError, match="exit outputs: it is not an"):
        ExitOutputs.load(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    arrays = {"logits": LOGITS, "labels": LABELS, "layers": [1, 2, 4]}
    np.savez(tmp_path / "list.npz", **arrays, identity=np.asarray("[1]"))
    np.savez(tmp_path / "replicas.npz", **arrays, identity=np.asarray('{"replicas": 1}'))
    np.savez(tmp_path / "pickle.npz", logits=np.asarray([{"a": 1}], object))
    ExitOutputs(LOGITS, LABELS, [1, 2, 4]).save(tmp_path / "cut.npz")
    content = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    for name in ("text", "other", "pickle", "cut", "list", "replicas"):
        with pytest.raises(UserError, match="does not hold exit outputs"):
            ExitOutputs.load(tmp_path / f"{name}.npz")
