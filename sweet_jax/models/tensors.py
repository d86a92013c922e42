"""Files of a checkpoint's tensors: safetensors or torch pickles, whole or in shards.

Arrays have the shapes and dtypes of the files.
"""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy

from sweet_jax.config import UserError

_SAFE, _PICKLE = "model.safetensors", "pytorch_model.bin"


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a checkpoint by name, from its safetensors or else its torch pickles.

    Raises UserError when there are neither, or a file is damaged or not readable.
    """
    try:
        found = {path.name.removesuffix(".index.json") for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be listed ({error.strerror})") from error
    if _PICKLE in found and _SAFE not in found:
        return _read_files(folder, _PICKLE, _read_pickle)
    return _read_files(folder, _SAFE, safetensors.numpy.load_file)


def _read_files(folder: Path, name: str, read: Callable) -> dict[str, np.ndarray]:
    """Reads the file of that name, or the shards that its index names."""
    index = folder / f"{name}.index.json"
    names = [name]
    tensors: dict[str, np.ndarray] = {}
    try:
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for name in names:
            tensors |= read(folder / name)
    except FileNotFoundError as error:
        raise UserError(
            f"{str(folder)!r} has no {names[0]}; a checkpoint in another format must be saved as "
            "safetensors first (save_pretrained of transformers does)"
        ) from error
    except UserError:
        raise
    except Exception as error:  # a damaged file can break a reader in any way
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{str(folder / names[0])!r} is damaged: {reason}; download it again"
        ) from error
    return tensors


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
