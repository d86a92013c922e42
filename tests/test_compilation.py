"""The cache of compiled programs that processes share, and its failures."""

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

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
enable_compilation_cache()
jax.block_until_ready(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))))
print(*(sum(e.endswith(f"/cache_{kind}") for e in events) for kind in ("hits", "misses")))
"""


def hits_and_misses(**changes: str) -> tuple[int, int]:
    """Returns (hits, misses) of the cache in a process that compiles a program.

    changes: environment variables to add, after those on caches are removed.
    """
    environment = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        cwd=ROOT,
        env=environment | changes,
        capture_output=True,
        text=True,
        check=True,
    )
    hits, misses = map(int, process.stdout.split())
    return hits, misses


def cached_files(folder: Path) -> set[Path]:
    return {p.relative_to(folder) for p in folder.rglob("*-cache")}


def test_second_process_reads_all_programs_from_cache(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    hits, misses = hits_and_misses(**environment)
    assert hits == 0 < misses
    written = cached_files(tmp_path)
    assert written
    assert {p.parts[:3] for p in written} == {("sweet_jax", "xla", processor_name())}
    assert hits_and_misses(**environment) == (misses, 0)
    assert cached_files(tmp_path) == written


@pytest.mark.parametrize("cache_home", ["a file", "a file/of another"])
def test_programs_are_compiled_when_cache_folder_is_unwritable(tmp_path, cache_home):
    (tmp_path / "a file").write_text("")
    hits, _ = hits_and_misses(XDG_CACHE_HOME=str(tmp_path / cache_home))
    assert hits == 0


def test_jax_cache_settings_take_precedence(tmp_path):
    default_folder, jax_folder = tmp_path / "here", tmp_path / "there"
    hits_and_misses(XDG_CACHE_HOME=str(default_folder), JAX_ENABLE_COMPILATION_CACHE="0")
    assert not cached_files(tmp_path)
    jax_settings = {"JAX_COMPILATION_CACHE_DIR": str(jax_folder)}
    jax_settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    hits_and_misses(XDG_CACHE_HOME=str(default_folder), **jax_settings)
    assert cached_files(jax_folder)
    assert not cached_files(default_folder)


def test_partially_written_cache_entry_is_removed(tmp_path):
    """Every later process would read a partial entry, warn of it and never replace it."""
    enable_compilation_cache()
    cache = LRUCache(str(tmp_path), max_size=-1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            cache.put("program", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
    cache.put("program", bytes(5000))
    assert cache.get("program") == bytes(5000)
