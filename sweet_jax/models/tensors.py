"""The tensor files of a checkpoint: safetensors or torch pickles, whole or sharded.

Arrays keep the shapes of the files. They also keep the dtypes, except that floating-point tensors
from torch pickles become float32.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import safetensors.numpy

from sweet_jax.errors import UserError, one_line
from sweet_jax.files import read_json

T = TypeVar("T")
_SAFE, _PICKLE, _INDEX = "model.safetensors", "pytorch_model.bin", ".index.json"


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a checkpoint by name, from safetensors or else from torch pickles.

    As in transformers, a whole file takes precedence over shards. Raises UserError if there are no
    such files, or a file is damaged or cannot be read.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in _paths(folder):
        tensors |= _read(path, _read_pickle if _is_pickle(path) else _read_safetensors)
    return tensors


def tensor_names(folder: Path) -> set[str]:
    """Returns the names of a checkpoint's tensors, without reading the tensors of safetensors.

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
            raise ValueError(f"{name!r} is not the name of a file in the same folder")
    return names


def _read(path: Path, read: Callable[[Path], T]) -> T:
    """Returns read(path). Raises UserError with the file's name if it is missing or damaged."""
    try:
        return read(path)
    except (FileNotFoundError, PermissionError) as error:
        if path.exists():  # safetensors raises the same error for a file that it may not open
            raise UserError(f"{str(path)!r} cannot be read: change its permissions") from error
        raise UserError(
            f"{str(path.parent)!r} has no {path.name}; save a checkpoint in another format as "
            "safetensors first, with save_pretrained of transformers"
            if path.name == _SAFE
            else f"{str(path.parent)!r} has no {path.name}, which its index names: download it"
        ) from error
    except UserError:
        raise
    except Exception as error:  # a damaged file can break a reader in any way
        raise UserError(
            f"{str(path)!r} is damaged: {one_line(error)}; download it again"
        ) from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except AttributeError as error:  # raised by NumPy for an unsupported dtype
        raise UserError(
            f"{str(path)!r} holds tensors of a dtype that is not supported ({one_line(error)}): "
            "save the checkpoint in float32"
        ) from error


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    """Reads a torch file with the loader that only unpickles tensors.

    Other loaders are not used because unpickling can run arbitrary code. The tensors are the values
    of a dict, or of its entry "state_dict"; anything else that a training loop saved is ignored.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f'{str(path)!r} is a torch pickle: pip install -e ".[torch]" to read it, or save the '
            "checkpoint as safetensors elsewhere, with save_pretrained of transformers"
        ) from error
    try:
        loaded = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{str(path)!r} holds more than tensors, or is damaged: save it as safetensors"
        ) from error
    tensors = {
        name: value.detach()  # a parameter with a gradient cannot become an array
        for name, value in loaded.get("state_dict", loaded).items()
        if isinstance(value, torch.Tensor)
    }
    return {
        name: value.float().numpy() if value.is_floating_point() else value.numpy()
        for name, value in tensors.items()
    }
