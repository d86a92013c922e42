"""Checkpoints of training: restored bitwise, two kept, damaged ones detected and skipped."""

import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sweet_jax.training.checkpoint import Checkpoints, abstract_state, read_params
from sweet_jax.training.sharding import make_mesh, replica_sharding

SHARDING = replica_sharding(make_mesh(4, 8))


def make_state(step: int) -> dict:
    values = jax.random.normal(jax.random.key(step), (4, 3, 5))
    tree = {"params": {"layers": {0: values, 1: values * 1e-30}}, "step": jnp.full(4, step)}
    return jax.device_put(tree, SHARDING)


@pytest.fixture
def saved(tmp_path) -> Path:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step))
    checkpoints.save(3, make_state(99))  # an existing step is not overwritten
    checkpoints.close()
    return tmp_path


def save_step_3(folder: Path) -> None:
    checkpoints = Checkpoints(folder)
    checkpoints.save(3, make_state(3))
    checkpoints.close()


def restore(folder: Path):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(abstract_state(make_state(0), SHARDING))
    finally:
        checkpoints.close()


def array_files(folder: Path) -> list[Path]:
    return sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size)


def test_newest_checkpoint_is_restored_bitwise_with_its_sharding(saved):
    step, restored = restore(saved)
    assert step == 3
    leaves, expected_leaves = jax.tree.leaves(restored), jax.tree.leaves(make_state(3))
    for actual, expected in zip(leaves, expected_leaves, strict=True):
        assert actual.sharding == expected.sharding
        np.testing.assert_array_equal(actual, expected)


def test_only_the_two_newest_checkpoints_are_kept(saved):
    assert sorted(p.name for p in saved.iterdir() if p.is_dir()) == ["2", "3"]
    assert sorted(p.name for p in saved.glob("*.json")) == ["2.digest.json", "3.digest.json"]


def flip_bit(folder: Path) -> None:
    path = array_files(folder / "3")[0]
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(folder: Path) -> None:
    path = array_files(folder / "3")[0]
    path.write_bytes(path.read_bytes()[:-1])


def delete_arrays(folder: Path) -> None:
    array_files(folder / "3")[0].unlink()


def delete_digest(folder: Path) -> None:
    (folder / "3.digest.json").unlink()


@pytest.mark.parametrize("damage", [flip_bit, truncate, delete_arrays, delete_digest])
def test_damaged_checkpoint_is_skipped_with_warning(saved, damage, caplog):
    damage(saved)
    with caplog.at_level(logging.WARNING):
        step, restored = restore(saved)
    assert step == 2
    np.testing.assert_array_equal(restored["step"], 2)
    assert "step 3" in caplog.text
    assert "going back to the one before" in caplog.text
    save_step_3(saved)
    assert restore(saved)[0] == 3


def test_leftovers_of_a_killed_save_are_removed(saved):
    leftover = saved / "4.orbax-checkpoint-tmp"
    shutil.copytree(saved / "3", leftover)
    assert restore(saved)[0] == 3
    assert not leftover.exists()


def test_undeletable_damaged_checkpoint_does_not_block_saving(saved, monkeypatch):
    flip_bit(saved)
    monkeypatch.setattr("sweet_jax.training.checkpoint.shutil.rmtree", lambda *_, **__: None)
    assert restore(saved)[0] == 2
    monkeypatch.undo()
    save_step_3(saved)
    assert restore(saved)[0] == 3


@pytest.mark.parametrize("damage", [flip_bit, truncate, delete_arrays, delete_digest])
def test_read_params_uses_only_the_newest_checkpoint(saved, damage):
    """Older checkpoints are from before the end of training."""
    params = read_params(saved)
    np.testing.assert_array_equal(params["layers"]["0"], make_state(3)["params"]["layers"][0])
    damage(saved)
    assert read_params(saved) is None
    shutil.rmtree(saved / "3")
    # A digest without its checkpoint is damage; without both, step 2 is the newest checkpoint.
    assert (read_params(saved) is None) == (damage is not delete_digest)


def test_restore_returns_none_without_intact_checkpoint(saved):
    for step in (2, 3):
        (saved / f"{step}.digest.json").write_text("{")
    assert restore(saved) is None
    assert restore(saved / "empty") is None


def test_checkpoint_is_restored_on_other_device_count(saved):
    one_device = replica_sharding(make_mesh(1, 1))
    checkpoints = Checkpoints(saved)
    _, restored = checkpoints.restore(abstract_state(make_state(0), one_device))
    checkpoints.close()
    assert len(restored["step"].sharding.device_set) == 1
    np.testing.assert_array_equal(restored["step"], 3)
