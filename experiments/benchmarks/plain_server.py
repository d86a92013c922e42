"""The full model of a saved one behind a plain server: ONNX Runtime, tokenizers and Starlette.

    pip install -e ".[onnx,serve]"
    python -m experiments.benchmarks.plain_server --model=runs/x/model --port=8001

What a team would write without early exits, and what `serve_load --plain` compares with: each
request is a batch of its own, tokenized, padded and run by one of a pool of threads, in one session
of the whole network as one graph with fused attention and norms.
"""

import argparse
import json
import os

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from sweet_jax.data.batches import encode
from sweet_jax.inference.artifact import open_model
from sweet_jax.inference.engine_onnx import physical_cores, start_session
from sweet_jax.inference.network import load_networks
from sweet_jax.inference.onnx_build import build_segment
from sweet_jax.inference.onnx_segments import Segment
from sweet_jax.objectives.objective import softmax


def make_app(folder: str, precision: str) -> Starlette:
    """Returns the application, which answers POST /predict of {"texts": [...]}."""
    model = open_model(folder)
    network = load_networks(model)[-1]
    whole = Segment(1, network.exits[-1], embeds=True, exits=True, returns_states=False)
    session = start_session(build_segment(network, whole, precision), physical_cores())
    temperature = np.asarray([model.resolver.calibrator.temperatures[-1]])[:, None]

    def classify(texts: list[str]) -> list[dict[str, object]]:
        ids, _ = encode(model.tokenizer, [(text,) for text in texts], model.max_length)
        tokens = np.asarray([len(row) for row in ids], np.int32)  # [B]
        padded = np.full((len(ids), tokens.max()), model.tokenizer.pad_token_id, np.int32)  # [B, L]
        for row, values in zip(padded, ids, strict=True):
            row[: len(values)] = values
        inputs = {"input_ids": padded, "token_type_ids": np.zeros_like(padded), "tokens": tokens}
        (logits,) = session.run(["logits"], inputs)  # [B, C]
        found = softmax(logits / temperature)
        return [{"label": model.classes[p.argmax()], "probability": float(p.max())} for p in found]

    async def predict(request: Request) -> JSONResponse:
        try:
            texts = json.loads(await request.body())["texts"]
        except (ValueError, KeyError, TypeError):
            return JSONResponse({"error": "the body must be {'texts': [...]}"}, 400)
        return JSONResponse({"answers": await run_in_threadpool(classify, texts)})

    return Starlette(routes=[Route("/predict", predict, methods=["POST"])])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model/ of a run, of single texts")
    parser.add_argument("--precision", default="float32", help="float32 (default) or int8")
    parser.add_argument("--port", type=int, default=8001, help="(default 8001)")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app = make_app(options.model, options.precision)
    uvicorn.run(app, port=options.port, log_level="warning", backlog=1024)


if __name__ == "__main__":
    main()
