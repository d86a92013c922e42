"""Runs the full model without early exits, as one would otherwise: in torch and in ONNX Runtime.

The graphs for ONNX Runtime are exported by torch from transformers' own model of the same
config.json. In float32 they are optimized by ONNX Runtime's optimizer for transformers if that is
faster, and for int8 they are quantized dynamically, per channel. If torch is not installed, they
are this library's own graphs, with all layers in one session. The weights of transformers' models
are random, because times do not depend on them.

Shape letters: B batch, L length.
"""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sweet_jax.inference.artifact import ModelArtifact

if TYPE_CHECKING:
    import onnxruntime

# From token ids and token types, int32 [2, B, L], and the mask int64 [B, L], to logits.
FullModel = Callable[[np.ndarray, np.ndarray], np.ndarray]
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_ROUNDS = 20  # timed calls to find the faster of two graphs


def load_full_models(model: ModelArtifact, threads: int, folder: Path) -> dict[str, FullModel]:
    """Returns the full models by name; writes graphs to an empty folder."""
    if importlib.util.find_spec("torch") is None:
        return {
            "plain onnxruntime": _run_own_graph(model, "float32", threads),
            "plain onnxruntime/int8": _run_own_graph(model, "int8", threads),
        }
    import torch

    torch.set_num_threads(threads)
    network, names = _make_network(model, "sdpa"), _input_names(model)

    def run_torch(texts: np.ndarray, mask: np.ndarray) -> np.ndarray:
        arrays = {name: torch.from_numpy(x) for name, x in _feed(texts, mask).items()}
        with torch.inference_mode():
            return network(**{name: arrays[name] for name in names}).logits.numpy()

    exported = _export(model, folder)
    _optimize(model, exported, folder / "optimized.onnx")
    candidates = [_run_graph(path, threads) for path in (exported, folder / "optimized.onnx")]
    faster = min(candidates, key=_milliseconds)
    _quantize(exported, folder / "int8.onnx")
    return {
        "torch": run_torch,
        "plain onnxruntime": faster,
        "plain onnxruntime/int8": _run_graph(folder / "int8.onnx", threads),
    }


def start_full_session(
    model: ModelArtifact, precision: str, threads: int, *, every_token: bool = False
) -> "onnxruntime.InferenceSession":
    """Returns a session of this library's graph of a saved model's deepest network, without exits.

    every_token: whether the last layer is computed at every token, and not only where the last exit
      reads it.
    """
    from sweet_jax.inference.engine_onnx import start_session
    from sweet_jax.inference.network import load_networks
    from sweet_jax.inference.onnx_build import build_segment
    from sweet_jax.inference.onnx_segments import Segment

    network = load_networks(model)[-1]
    whole = Segment(1, network.exits[-1], embeds=True, exits=True, returns_states=every_token)
    return start_session(build_segment(network, whole, precision), threads)


def _run_own_graph(model: ModelArtifact, precision: str, threads: int) -> FullModel:
    session = start_full_session(model, precision, threads)
    names = {each.name for each in session.get_inputs()}  # some families have no token types

    def run(texts: np.ndarray, mask: np.ndarray) -> np.ndarray:
        tokens = mask.sum(axis=1).astype(np.int32)  # [B]
        arrays = {"input_ids": texts[0], "token_type_ids": texts[1], "tokens": tokens}
        return session.run(["logits"], {k: v for k, v in arrays.items() if k in names})[0]

    return run


def _make_network(model: ModelArtifact, attention: str) -> Any:
    """Returns transformers' model; some families only have eager attention."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model.folder, num_labels=len(model.classes))
    make = transformers.AutoModelForSequenceClassification.from_config
    try:
        return make(config, attn_implementation=attention).eval()
    except ValueError:
        return make(config, attn_implementation="eager").eval()


def _input_names(model: ModelArtifact) -> tuple[str, ...]:
    """Returns the names of the inputs of transformers' model; MPNet has no token types."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model.folder)
    return _INPUTS if getattr(config, "type_vocab_size", 0) else _INPUTS[:2]


def _feed(texts: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    arrays = (texts[0].astype(np.int64), mask, texts[1].astype(np.int64))
    return dict(zip(_INPUTS, arrays, strict=True))


def _export(model: ModelArtifact, folder: Path) -> Path:
    """Writes the graph that torch traces, with the eager attention that the optimizer looks for."""
    import torch

    names, path = _input_names(model), folder / "exported.onnx"

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = _make_network(model, "eager")

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
    optimized = optimizer.optimize_model(
        str(source),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        opt_level=0,
    )
    optimized.save_model_to_file(str(target))


def _quantize(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)


def _run_graph(path: Path, threads: int) -> FullModel:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    dtypes = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
    inputs = {each.name: dtypes[each.type] for each in session.get_inputs()}

    def run(texts: np.ndarray, mask: np.ndarray) -> np.ndarray:
        arrays = _feed(texts, mask)
        feed = {name: arrays[name].astype(dtype, copy=False) for name, dtype in inputs.items()}
        return session.run(["logits"], feed)[0]

    return run


def _milliseconds(run: FullModel) -> float:
    """Returns the least time for one text of 24 tokens."""
    texts, mask = np.full((2, 1, 24), 7, np.int32), np.ones((1, 24), np.int64)
    texts[1] = 0
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        run(texts, mask)
        seconds.append(time.perf_counter() - start)
    return 1e3 * min(seconds)
