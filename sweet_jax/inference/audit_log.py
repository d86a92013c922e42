"""The audit log: served texts whose outputs at all exits were computed too, as JSON lines.

Shape letters: E exit, N texts, C classes.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from sweet_jax.errors import UserError
from sweet_jax.file_lock import check_locks, lock_file
from sweet_jax.inference.audit_identity import check_same_model
from sweet_jax.paths import expand_user

_VERSION = 1


class AuditRow(NamedTuple):
    """Holds one audited text: which exit answered it, and the outputs of all exits.

    Attributes:
      time: time of the audit, in seconds since 1970.
      exit: index of the exit that answered.
      agrees: bool [E], whether each exit's prediction equals the last exit's; float64 [E] from 0
        to 1, the degree to which it does, if the metric gives partial credit to a row.
      confidence: float64 [E], exit confidences under the server's policy.
      logits: float32 [E, C].
      exit_scores: float32 [E], learning-to-exit scores, or None.
      text: the text or pair of texts, None unless the log keeps texts.

    """

    time: float
    exit: int
    agrees: np.ndarray
    confidence: np.ndarray
    logits: np.ndarray
    exit_scores: np.ndarray | None = None
    text: Any = None


class AuditLog:
    """Appends audited texts to a file of bounded size, which begins with a line about the model.

    Before it exceeds half of the maximum size, the file is renamed to NAME.old, which replaces the
    previous one. The two files together thus never exceed the maximum size, and keep at least the
    newest texts that fit into half of it. The log is locked for this process until it is closed or
    the process ends. A device is neither renamed nor locked.

    Args:
      path: path of the file; an existing file is continued.
      model: values of the first line: the model, see `describe_audited`, and the operating point.
      size: maximum size in bytes of both files together.

    Raises UserError if the file cannot be written, another process writes it, or the operating
    system has no locks.

    """

    _lock: IO[str] | None = None

    def __init__(self, path: str, model: Mapping[str, Any], size: int):
        self.path, self._half = expand_user(path), size // 2
        self._first = json.dumps({"version": _VERSION, **model}) + "\n"
        try:
            if self.path.is_file() or not self.path.exists():
                check_locks()  # before a file is left behind
            self._file = self.path.open("a", encoding="utf-8")
            with contextlib.ExitStack() as refused:
                refused.callback(self.close)
                self._begin()
                refused.pop_all()
        except OSError as error:
            raise UserError(
                f"the audit log {path!r} cannot be written ({error.strerror}): choose another file"
            ) from error

    def _begin(self) -> None:
        """Locks the file, and writes the first line."""
        self._regular = self.path.is_file()
        if self._regular:
            self._lock = _lock_beside(self.path)
        self._written = self.path.stat().st_size
        cut_off = self._regular and self._written > 0 and not _ends_line(self.path)
        # Also written when a file is continued, since another model may have written it before. It
        # must start a new line: the previous server may have been killed while it wrote one.
        self._write("\n" + self._first if cut_off else self._first)

    def add(self, row: AuditRow, layers: Sequence[int]) -> None:
        """Appends a row and flushes it. Raises OSError if it cannot be written."""
        values: dict[str, Any] = {"time": round(row.time, 3), "exit": layers[row.exit]}
        values |= {"agrees": row.agrees.tolist(), "confidence": _short(row.confidence)}
        values["logits"] = [_short(exit) for exit in row.logits]
        if row.exit_scores is not None:
            values["exit_scores"] = _short(row.exit_scores)
        if row.text is not None:
            values["text"] = row.text
        line = json.dumps(values) + "\n"
        if self._regular and self._written + len(line) > self._half:
            self._file.close()
            self.path.replace(_older(self.path))
            self._file = self.path.open("w", encoding="utf-8")
            self._written = 0
            self._write(self._first)
        self._write(line)

    def close(self) -> None:
        """Closes the file and releases its lock."""
        # Closing flushes again what could not be written, which fails again if the disk is full.
        with contextlib.suppress(OSError):
            self._file.close()
        if self._lock is not None:
            self._lock.close()

    def _write(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()
        self._written += len(line)


def _lock_beside(path: Path) -> IO[str]:
    """Locks a log for this process until the returned file is closed.

    The lock is on a separate file next to the log, since the log itself may be renamed. On a file
    system without locks, nothing is locked: the server should not fail because of its log.

    Raises UserError if another process holds the lock.
    """
    lock = path.with_name(f".{path.name}.lock").open("w", encoding="utf-8")
    try:
        lock_file(lock)
    except BlockingIOError as error:
        lock.close()
        raise UserError(
            f"the audit log {str(path)!r} is in use by another server: choose another file"
        ) from error
    except OSError:
        pass
    return lock


def _older(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _short(values: np.ndarray) -> list[float | None]:
    """Returns numbers rounded to six digits, and None for those that are not finite."""
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values]


def read_audit_log(path: str, model: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads all audited texts of a log and of its older file NAME.old.

    Args:
      path: path of the log.
      model: identity that the log must have, see `describe_audited`.

    Returns:
      (logits float32 [E, N, C], learning-to-exit scores float32 [E, N] or None), in order; NaN
      where an exit diverged.

    Raises UserError if the log does not exist, a line is damaged, or the log is from another model
    or precision.

    """
    file = expand_user(path)
    files = [each for each in (_older(file), file) if each.exists()]
    if not file.exists():
        raise UserError(
            f"there is no audit log at {path!r}: sweet-jax serve writes one with --audit_log"
        )
    rows = [row for each in files for row in _read(each, model)]
    if not rows:
        raise UserError(f"the audit log {path!r} does not hold any audited texts yet")
    logits = np.asarray([row["logits"] for row in rows], np.float32).swapaxes(0, 1)
    learned = [row.get("exit_scores") for row in rows]
    return logits, None if None in learned else np.asarray(learned, np.float32).T


def _read(path: Path, model: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the rows of one file, as parsed from JSON."""
    shape, ours = (len(model["layers"]), model["classes"]), {"version": _VERSION, **model}
    for number, values in _parse_lines(path):
        try:
            if "version" in values:
                check_same_model(values, ours, f"line {number} of {str(path)!r}")
                continue
            if np.shape(values["logits"]) != shape:
                raise ValueError(f"logits of shape {np.shape(values['logits'])}")
        except UserError:  # a subclass of ValueError
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(path, number, error) from error
        yield values


def _parse_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields the number and the values of each line, without incomplete lines.

    A server that is killed may leave an incomplete line: the last one, or the one before the line
    about the model that the next server wrote.
    """
    line, damaged = "\n", None
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                values = json.loads(line)
            except ValueError as error:
                damaged = damaged or _damaged(path, number, error)
                continue
            if damaged and not (isinstance(values, dict) and "version" in values):
                raise damaged
            damaged = None
            yield number, values
    if damaged and line.endswith("\n"):
        raise damaged


def _damaged(path: Path, number: int, error: Exception) -> UserError:
    return UserError(f"line {number} of {str(path)!r} is damaged ({error!r}): remove it")
