"""JAX's persistent compilation cache, enabled unless JAX's own variables configure it."""

import hashlib
import logging
import os
import platform
from pathlib import Path

import jax

from sweet_jax.files import atomic_write

log = logging.getLogger(__name__)


def enable_compilation_cache(
    folder: str | Path | None = None, *, least_seconds: float = 0.0
) -> None:
    """Caches compiled programs on disk for later processes that compile the same programs.

    If JAX is already configured with a folder (JAX_COMPILATION_CACHE_DIR), that folder is used with
    JAX's own thresholds. JAX_ENABLE_COMPILATION_CACHE=0 disables the cache. If the folder cannot be
    written to, this is logged and nothing is cached.

    Args:
      folder: directory of the cache; default `default_folder()`.
      least_seconds: minimum compilation time of the programs that are cached.

    """
    _write_whole_entries()
    if jax.config.values.get("jax_compilation_cache_dir") is not None:
        return
    try:
        where = Path(folder) if folder else default_folder()
        where.mkdir(parents=True, exist_ok=True)
        if not os.access(where, os.W_OK | os.X_OK):
            raise PermissionError(f"{str(where)!r} cannot be written to")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        log.info("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(where))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _write_whole_entries() -> None:
    """Makes JAX write each entry to a temporary file, and rename it.

    JAX writes entries in place. If the process is killed or the disk is full, a truncated entry
    remains that no later process replaces; each of them would warn and compile the program again.
    The patched class is private: with a version of JAX that does not have it, nothing is patched.
    """
    try:
        from jax._src import lru_cache

        put, suffix = lru_cache.LRUCache.put, lru_cache._CACHE_SUFFIX
    except (ImportError, AttributeError):
        return

    def put_whole(self: lru_cache.LRUCache, key: str, value: bytes) -> None:
        path = Path(self.path) / f"{key}{suffix}"
        if self.eviction_enabled or "://" in str(self.path) or path.exists():
            return put(self, key, value)
        with atomic_write(path, durable=False) as aside:
            aside.write_bytes(value)

    if put.__name__ != put_whole.__name__:
        lru_cache.LRUCache.put = put_whole  # type: ignore[method-assign]


def default_folder() -> Path:
    """Returns sweet_jax/xla/<processor> in XDG_CACHE_HOME, by default ~/.cache.

    A program compiled for one CPU may use instructions that another CPU lacks. JAX's cache key does
    not distinguish them, and several machines may share a home directory.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sweet_jax" / "xla" / processor_name()


def processor_name() -> str:
    """Returns the architecture and a hash of the instruction sets of this processor."""
    features = platform.processor()
    try:
        with open("/proc/cpuinfo") as file:
            lines = (line for line in file if line.lower().startswith(("flags", "features")))
            features = " ".join(sorted(next(lines, features).partition(":")[2].split())) or features
    except OSError:  # not Linux
        pass
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
