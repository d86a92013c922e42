"""The full model as a program without early exits runs it: torch, and one graph in ONNX Runtime.

The graphs are those that torch.onnx exports of transformers' own model of the same config.json,
with ONNX Runtime's optimizer for transformers where that is faster, and its dynamic quantisation,
per channel. Where torch is not installed they are this library's own, all layers in one session.
Weights are random, since they do not bear on time.

Shape letters: B batch, L length.
"""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sweet_jax.inference.artifact import ModelArtifact

# Of texts int32 [2, B, L] (ids and token types) and mask int64 [B, L].
Answer = Callable[[np.ndarray, np.ndarray], np.ndarray]
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_ROUNDS = 20  # to find the faster of two graphs


def plain_answers(model: ModelArtifact, threads: int, folder: Path) -> dict[str, Answer]:
    """Returns the sides by name; graphs are written to an empty folder."""
    if importlib.util.find_spec("torch") is None:
        return _own_graphs(model, threads)
    import torch

    torch.set_num_threads(threads)
    network = _network(model, "sdpa")

    def in_torch(texts: np.ndarray, mask: np.ndarray) -> np.ndarray:
        arrays = {name: torch.from_numpy(x) for name, x in _feed(texts, mask).items()}
        with torch.inference_mode():
            return network(**{name: arrays[name] for name in _names(model)}).logits.numpy()

    path = _export(model, folder)
    _optimize(model, path, folder / "optimized.onnx")
    candidates = [_session(each, threads) for each in (path, folder / "optimized.onnx")]
    faster = min(candidates, key=_milliseconds)
    _quantize(path, folder / "int8.onnx")
    return {
        "torch": in_torch,
        "plain onnxruntime": faster,
        "plain onnxruntime/int8": _session(folder / "int8.onnx", threads),
    }


def _own_graphs(model: ModelArtifact, threads: int) -> dict[str, Answer]:
    from sweet_jax.inference.engine_onnx import start_session
    from sweet_jax.inference.network import load_networks
    from sweet_jax.inference.onnx_build import build_segment
    from sweet_jax.inference.onnx_segments import Segment

    network = load_networks(model)[-1]
    whole = Segment(1, network.exits[-1], embeds=True, exits=True, returns_states=False)

    def answer(precision: str) -> Answer:
        session = start_session(build_segment(network, whole, precision), threads)

        def run(texts: np.ndarray, mask: np.ndarray) -> np.ndarray:
            tokens = mask.sum(axis=1).astype(np.int32)  # [B]
            given = {"input_ids": texts[0], "token_type_ids": texts[1], "tokens": tokens}
            names = {each.name for each in session.get_inputs()}
            return session.run(["logits"], {k: v for k, v in given.items() if k in names})[0]

        return run

    return {
        "plain onnxruntime": answer("float32"),
        "plain onnxruntime/int8": answer("int8"),
    }


def _network(model: ModelArtifact, attention: str) -> Any:
    """Returns transformers' model of a config.json; some families have eager attention only."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model.folder, num_labels=len(model.classes))
    make = transformers.AutoModelForSequenceClassification.from_config
    try:
        return make(config, attn_implementation=attention).eval()
    except ValueError:
        return make(config, attn_implementation="eager").eval()


def _names(model: ModelArtifact) -> tuple[str, ...]:
    """Returns the inputs; MPNet has no token types."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model.folder)
    return _INPUTS if getattr(config, "type_vocab_size", 0) else _INPUTS[:2]


def _feed(texts: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    arrays = (texts[0].astype(np.int64), mask, texts[1].astype(np.int64))
    return dict(zip(_INPUTS, arrays, strict=True))


def _export(model: ModelArtifact, folder: Path) -> Path:
    """Writes the graph that torch traces: its attention is what the optimizer looks for."""
    import torch

    names, path = _names(model), folder / "exported.onnx"

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = _network(model, "eager")

        def forward(self, *arrays: torch.Tensor) -> torch.Tensor:
            return self.network(**dict(zip(names, arrays, strict=True))).logits

    rows = torch.ones(2, 8, dtype=torch.int64)
    torch.onnx.export(
        Logits().eval(),
        (rows, rows, torch.zeros_like(rows))[: len(names)],
        str(path),
        input_names=list(names),
        output_names=["logits"],
        dynamic_axes={name: {0: "b", 1: "l"} for name in names},
        dynamo=False,
        opset_version=17,
    )
    return path


def _optimize(model: ModelArtifact, source: Path, target: Path) -> None:
    import transformers
    from onnxruntime.transformers import optimizer

    config = transformers.AutoConfig.from_pretrained(model.folder)
    found = optimizer.optimize_model(
        str(source),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        opt_level=0,
    )
    found.save_model_to_file(str(target))


def _quantize(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)


def _session(path: Path, threads: int) -> Answer:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
    wanted = {each.name: kinds[each.type] for each in session.get_inputs()}

    def run(texts: np.ndarray, mask: np.ndarray) -> np.ndarray:
        arrays = _feed(texts, mask)
        given = {name: arrays[name].astype(kind, copy=False) for name, kind in wanted.items()}
        return session.run(["logits"], given)[0]

    return run


def _milliseconds(answer: Answer) -> float:
    """Returns the least time of a text of 24 tokens."""
    texts, mask = np.full((2, 1, 24), 7, np.int32), np.ones((1, 24), np.int64)
    texts[1] = 0
    seconds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        answer(texts, mask)
        seconds.append(time.perf_counter() - began)
    return 1e3 * min(seconds)
