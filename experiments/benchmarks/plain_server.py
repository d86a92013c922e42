"""Serves the full model of a saved model, without early exits, by ONNX Runtime and Starlette.

    pip install -e ".[onnx,serve]"
    python -m experiments.benchmarks.plain_server --model=runs/x/model --port=8001

This is a server as one would write it without this project, for comparison by `serve_load --plain`.
Each request is a batch of its own: a thread of a pool tokenizes it, pads it and runs it in one
session, which has the whole network as one graph with fused attention and norms.
"""

import json
import os
import sys

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from experiments.benchmarks.plain_inference import start_full_session
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.data.batches import encode
from sweet_jax.inference.artifact import open_model
from sweet_jax.inference.engine_onnx import physical_cores
from sweet_jax.objectives.objective import softmax


def make_app(folder: str, precision: str) -> Starlette:
    """Returns the application, which answers POST /predict of {"texts": [...]}."""
    model = open_model(folder)
    session = start_full_session(model, precision, physical_cores())
    temperature = np.asarray([model.resolver.calibrator.temperatures[-1]])[:, None]

    def classify(texts: list[str]) -> list[dict[str, object]]:
        ids, _ = encode(model.tokenizer, [(text,) for text in texts], model.max_length)
        tokens = np.asarray([len(row) for row in ids], np.int32)  # [B]
        padded = np.full((len(ids), tokens.max()), model.tokenizer.pad_token_id, np.int32)  # [B, L]
        for row, values in zip(padded, ids, strict=True):
            row[: len(values)] = values
        inputs = {"input_ids": padded, "token_type_ids": np.zeros_like(padded), "tokens": tokens}
        (logits,) = session.run(["logits"], inputs)  # [B, C]
        probabilities = softmax(logits / temperature)
        return [
            {"label": model.classes[p.argmax()], "probability": float(p.max())}
            for p in probabilities
        ]

    async def predict(request: Request) -> JSONResponse:
        try:
            texts = json.loads(await request.body())["texts"]
        except (ValueError, KeyError, TypeError):
            return JSONResponse({"error": "the body must be {'texts': [...]}"}, 400)
        return JSONResponse({"answers": await run_in_threadpool(classify, texts)})

    return Starlette(routes=[Route("/predict", predict, methods=["POST"])])


def main(argv: list[str] | None = None) -> None:
    """Serves until the process is ended."""
    parser = ArgumentParser("experiments.benchmarks.plain_server", __doc__ or "")
    parser.add_argument(
        "--model", required=True, help="model/ folder of a run that classifies single texts"
    )
    precisions = ("float32", "int8")
    parser.add_argument(
        "--precision", default="float32", choices=precisions, help="(default float32)"
    )
    parser.add_argument("--port", type=int, default=8001, help="(default 8001)")
    options = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app = make_app(options.model, options.precision)
    uvicorn.run(app, port=options.port, log_level="warning", backlog=1024)


if __name__ == "__main__":
    sys.exit(run_command(main))
