"""Checkpoints: bitwise, the last two kept, and damage seen and stepped over."""

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


def state(step: int) -> dict:
    values = jax.random.normal(jax.random.key(step), (4, 3, 5))
    tree = {"params": {"layers": {0: values, 1: values * 1e-30}}, "step": jnp.full(4, step)}
    return jax.device_put(tree, SHARDING)


@pytest.fixture
def saved(tmp_path) -> Path:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    checkpoints.save(3, state(99))  # what is there stays
    checkpoints.close()
    return tmp_path


def restore(folder: Path):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(abstract_state(state(0), SHARDING))
    finally:
        checkpoints.close()


def array_files(folder: Path) -> list[Path]:
    return sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size)


def test_the_newest_comes_back_bitwise_where_it_was(saved):
    step, found = restore(saved)
    assert step == 3
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(state(3)), strict=True):
        assert ours.sharding == theirs.sharding
        np.testing.assert_array_equal(ours, theirs)


def test_two_are_kept(saved):
    assert sorted(p.name for p in saved.iterdir() if p.is_dir()) == ["2", "3"]
    assert sorted(p.name for p in saved.glob("*.json")) == ["2.digest.json", "3.digest.json"]


def flip(folder: Path) -> None:
    path = array_files(folder / "3")[0]
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut(folder: Path) -> None:
    path = array_files(folder / "3")[0]
    path.write_bytes(path.read_bytes()[:-1])


def lose(folder: Path) -> None:
    array_files(folder / "3")[0].unlink()


def interrupt(folder: Path) -> None:
    (folder / "3.digest.json").unlink()


@pytest.mark.parametrize("damage", [flip, cut, lose, interrupt])
def test_a_damaged_one_is_passed_over_and_said_so(saved, damage, caplog):
    damage(saved)
    with caplog.at_level(logging.WARNING):
        step, found = restore(saved)
    assert step == 2
    np.testing.assert_array_equal(found["step"], 2)
    assert "step 3" in caplog.text
    assert "going back to the one before" in caplog.text
    again = Checkpoints(saved)
    again.save(3, state(3))
    again.close()
    assert restore(saved)[0] == 3


def test_what_a_killed_save_left_is_removed(saved):
    half = saved / "4.orbax-checkpoint-tmp"
    shutil.copytree(saved / "3", half)
    assert restore(saved)[0] == 3
    assert not half.exists()


def test_a_file_that_cannot_be_removed_is_out_of_the_way(saved, monkeypatch):
    flip(saved)
    monkeypatch.setattr("sweet_jax.training.checkpoint.shutil.rmtree", lambda *_, **__: None)
    assert restore(saved)[0] == 2
    monkeypatch.undo()
    again = Checkpoints(saved)
    again.save(3, state(3))
    again.close()
    assert restore(saved)[0] == 3


@pytest.mark.parametrize("damage", [flip, cut, lose, interrupt])
def test_another_run_s_newest_is_read_or_none(saved, damage):
    """What an older one holds, training had not finished."""
    found = read_params(saved)
    np.testing.assert_array_equal(found["layers"]["0"], state(3)["params"]["layers"][0])
    damage(saved)
    assert read_params(saved) is None
    shutil.rmtree(saved / "3")
    assert (read_params(saved) is None) == (damage is not interrupt)  # a digest tells of it


def test_without_a_sound_one_training_starts_anew(saved):
    for step in (2, 3):
        (saved / f"{step}.digest.json").write_text("{")
    assert restore(saved) is None
    assert restore(saved / "empty") is None


def test_another_number_of_devices_reads_it(saved):
    one = replica_sharding(make_mesh(1, 1))
    checkpoints = Checkpoints(saved)
    _, found = checkpoints.restore(abstract_state(state(0), one))
    checkpoints.close()
    assert len(found["step"].sharding.device_set) == 1
    np.testing.assert_array_equal(found["step"], 3)
