"""Compiled programs kept between processes: JAX's persistent cache, on unless told otherwise."""

import hashlib
import logging
import os
import platform
from pathlib import Path

import jax

log = logging.getLogger(__name__)


def enable_compilation_cache(
    folder: str | Path | None = None, *, least_seconds: float = 0.0
) -> None:
    """Keeps compiled programs on disk, for the next process that would compile the same.

    JAX_COMPILATION_CACHE_DIR says where, and JAX_ENABLE_COMPILATION_CACHE=0 that none are kept:
    where JAX was told of a folder, that one stays, with JAX's own thresholds. A folder that cannot
    be written to is done without.

    Args:
      folder: default `default_folder()`.
      least_seconds: programs that took less time to compile are not kept.

    """
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


def default_folder() -> Path:
    """~/.cache/sweet_jax/xla, or XDG_CACHE_HOME's; in it, a folder for this kind of processor.

    A program compiled for a CPU may hold instructions that another lacks, and nothing in JAX's key
    tells them apart: a home directory may be that of many machines.
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sweet_jax" / "xla" / processor_name()


def processor_name() -> str:
    """A short name for what instructions this processor has."""
    features = platform.processor()
    try:
        with open("/proc/cpuinfo") as file:
            lines = (line for line in file if line.lower().startswith(("flags", "features")))
            features = " ".join(sorted(next(lines, features).partition(":")[2].split())) or features
    except OSError:  # not Linux
        pass
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:12]}"
