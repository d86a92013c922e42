"""Exports a saved model to a folder that ONNX Runtime runs without JAX, transformers or onnx.

The folder is itself a model folder, see `onnx_files.py`.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sweet_jax.files import read_json, write_json
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.latency import LATENCY_FILE
from sweet_jax.inference.onnx_build import build_graphs
from sweet_jax.inference.onnx_files import GRAPHS_VERSION, index_path, weights_name
from sweet_jax.inference.onnx_graph import Graph

_ALIGNMENT = 64  # alignment in bytes of each weight in its file


def write_onnx(model: ModelArtifact, folder: Path, precisions: Sequence[str]) -> None:
    """Writes the graphs, the tokenizer and the other files of a saved model to a folder.

    Args:
      model: the saved model.
      folder: an empty folder.
      precisions: precisions to write: "float32" and, if the model was quantized, "int8".

    Raises UserError, see `build_graphs`.

    """
    for path in model.folder.iterdir():
        if path.is_file() and ".safetensors" not in path.name and path.name != LATENCY_FILE:
            shutil.copyfile(path, folder / path.name)
    _write_tokenizer(model, folder)
    networks = {}
    index_path(folder).parent.mkdir()
    for precision in precisions:
        graphs = build_graphs(model, precision)
        networks[precision] = _write_graphs(graphs.networks, index_path(folder).parent, precision)
    values = {"version": GRAPHS_VERSION, "vocabulary": graphs.vocabulary, "hidden": graphs.hidden}
    write_json(index_path(folder), values | {"networks": networks})


def _write_tokenizer(model: ModelArtifact, folder: Path) -> None:
    """Writes the tokenizer as loaded, since transformers may change it when it reads its files."""
    tokenizer, path = model.tokenizer, folder / "tokenizer_config.json"
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    values = read_json(path) if path.exists() else {}
    values["pad_token"] = tokenizer.backend_tokenizer.id_to_token(tokenizer.pad_token_id)
    write_json(path, values | {"truncation_side": tokenizer.truncation_side})


def _write_graphs(
    networks: Sequence[Sequence[tuple[Any, Graph]]], folder: Path, precision: str
) -> list[list[dict[str, Any]]]:
    """Writes a file for each graph and one for all weights; returns their part of graphs.json."""
    described: list[list[dict[str, Any]]] = []
    locations: dict[str, tuple[int, int]] = {}  # offset and length of each weight in bytes
    weights = folder / weights_name(precision)
    with weights.open("wb") as file:
        for number, network in enumerate(networks):
            described.append([])
            for index, (segment, graph) in enumerate(network):
                for name, value in graph.weights.items():
                    if name not in locations:
                        file.write(bytes(-file.tell() % _ALIGNMENT))
                        locations[name] = (file.tell(), value.nbytes)
                        file.write(np.ascontiguousarray(value).tobytes())
                name = f"segment_{number:02d}_{index:02d}.{precision}.onnx"
                (folder / name).write_bytes(_located(graph, weights.name, locations))
                described[-1].append({"file": name, **segment._asdict()})
    return described


def _located(graph: Graph, file: str, locations: Mapping[str, tuple[int, int]]) -> bytes:
    """Returns a serialized graph that reads its weights from a file in the same folder."""
    model = onnx.load_from_string(graph.model)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            offset, length = locations[tensor.name]
            del tensor.external_data[:]
            for key, value in (("location", file), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
    return bytes(model.SerializeToString())
