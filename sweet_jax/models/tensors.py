"""Files of a checkpoint's tensors: safetensors or torch pickles, whole or in shards.

Arrays have the shapes and dtypes of the files.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import safetensors.numpy

from sweet_jax.config import UserError
from sweet_jax.files import one_line, read_json

T = TypeVar("T")
_SAFE, _PICKLE, _INDEX = "model.safetensors", "pytorch_model.bin", ".index.json"


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a checkpoint by name, from its safetensors or else its torch pickles.

    A whole file is read before shards, as transformers does. Raises UserError when there are
    neither, or a file is damaged or not readable.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in _paths(folder):
        tensors |= _read(path, _read_pickle if _is_pickle(path) else safetensors.numpy.load_file)
    return tensors


def tensor_names(folder: Path) -> set[str]:
    """Returns the names of a checkpoint's tensors; of safetensors, without reading these.

    Raises UserError as `read_tensors` does.
    """

    def names(path: Path) -> list[str]:
        with safetensors.safe_open(path, framework="numpy") as file:
            return list(file.keys())

    return {
        name
        for path in _paths(folder)
        for name in _read(path, _read_pickle if _is_pickle(path) else names)
    }


def _is_pickle(path: Path) -> bool:
    return path.suffix != ".safetensors"


def _paths(folder: Path) -> list[Path]:
    """Returns the files that hold the tensors: one, or the shards that an index names."""
    try:
        found = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be listed ({error.strerror})") from error
    for name in (_SAFE, _PICKLE):
        if name in found:
            return [folder / name]
        if f"{name}{_INDEX}" in found:
            return [folder / shard for shard in _read(folder / f"{name}{_INDEX}", _shards)]
    return [folder / _SAFE]


def _shards(index: Path) -> list[str]:
    names = sorted(set(read_json(index)["weight_map"].values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{name!r} is not the name of a file beside it")
    return names


def _read(path: Path, read: Callable[[Path], T]) -> T:
    """Returns read(path); raises UserError, which names the file, where it is absent or damaged."""
    try:
        return read(path)
    except (FileNotFoundError, PermissionError) as error:
        if path.exists():  # safetensors raises the same error for a file that it may not open
            raise UserError(f"{str(path)!r} cannot be read: change its permissions") from error
        raise UserError(
            f"{str(path.parent)!r} has no {path.name}; a checkpoint in another format must be "
            "saved as safetensors first (save_pretrained of transformers does)"
            if path.name == _SAFE
            else f"{str(path.parent)!r} has no {path.name}, which its index names: download it"
        ) from error
    except UserError:
        raise
    except Exception as error:  # a damaged file can break a reader in any way
        raise UserError(
            f"{str(path)!r} is damaged: {one_line(error)}; download it again"
        ) from error


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    """Reads a file of torch with the loader that unpickles tensors only.

    Unpickling can run arbitrary code, so no other loader is used.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f'{str(path)!r} is a pickle of torch: pip install -e ".[torch]" to read it, or save '
            "the checkpoint as safetensors elsewhere (save_pretrained of transformers does)"
        ) from error
    try:
        loaded = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{str(path)!r} holds more than tensors, or is damaged: not read"
        ) from error
    return {
        name: value.float().numpy() if value.is_floating_point() else value.numpy()
        for name, value in loaded.items()
    }
