"""What one process compiled, the next reads; and where that cannot be, it compiles."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from jax._src.lru_cache import LRUCache

from sweet_jax.compilation_cache import enable_compilation_cache, processor_name

ROOT = Path(__file__).parents[1]
PROGRAM = """
import jax, jax.numpy as jnp
from sweet_jax.compilation_cache import enable_compilation_cache

found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
enable_compilation_cache()
jax.block_until_ready(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))))
print(*(sum(e.endswith(f"/cache_{kind}") for e in found) for kind in ("hits", "misses")))
"""


def hits_and_misses(**changes: str) -> tuple[int, int]:
    """Of a process that compiles something, with nothing said but what `changes` say."""
    kept = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        cwd=ROOT,
        env=kept | changes,
        capture_output=True,
        text=True,
        check=True,
    )
    hits, misses = map(int, done.stdout.split())
    return hits, misses


def files(folder: Path) -> set[Path]:
    return {p.relative_to(folder) for p in folder.rglob("*-cache")}


def test_a_second_process_compiles_nothing(tmp_path):
    where = {"XDG_CACHE_HOME": str(tmp_path)}
    hits, misses = hits_and_misses(**where)
    assert hits == 0 < misses
    written = files(tmp_path)
    assert written
    assert {p.parts[:3] for p in written} == {("sweet_jax", "xla", processor_name())}
    assert hits_and_misses(**where) == (misses, 0)
    assert files(tmp_path) == written


@pytest.mark.parametrize("below", ["a file", "a file/of another"])
def test_without_a_folder_that_can_be_written_to_programs_are_compiled(tmp_path, below):
    (tmp_path / "a file").write_text("")
    hits, _ = hits_and_misses(XDG_CACHE_HOME=str(tmp_path / below))
    assert hits == 0


def test_jax_s_own_switches_hold(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    hits_and_misses(XDG_CACHE_HOME=str(here), JAX_ENABLE_COMPILATION_CACHE="0")
    assert not files(tmp_path)
    told = {"JAX_COMPILATION_CACHE_DIR": str(there)}
    told["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    hits_and_misses(XDG_CACHE_HOME=str(here), **told)
    assert files(there)
    assert not files(here)


def test_of_an_entry_that_cannot_be_written_nothing_is_kept(tmp_path):
    """Half an entry would be read, warned of and never replaced by every later process."""
    enable_compilation_cache()
    cache = LRUCache(str(tmp_path), max_size=-1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            cache.put("program", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    cache.put("program", bytes(5000))
    assert cache.get("program") == bytes(5000)
