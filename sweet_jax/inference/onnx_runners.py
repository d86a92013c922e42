"""Adds programs to an exported model that run it without sweet_jax: run.py, run.mjs, index.html.

They read model.json, which this module writes. It describes how to make a row of tokens and, for
each precision, the threshold, the temperatures and the graphs of each stage; see
`exported/README.md`.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sweet_jax.files import read_json, write_json, write_text
from sweet_jax.inference import run_onnx
from sweet_jax.inference.artifact import ModelArtifact
from sweet_jax.inference.engine import Stage, plan_stages
from sweet_jax.inference.onnx_files import PROGRAMS, SavedGraphs, read_graphs, weights_name
from sweet_jax.inference.onnx_segments import LOW_EXIT_RATE

POLICIES = tuple(run_onnx.POLICIES)
_VERSION = 1  # of model.json
_SOURCE = Path(__file__).parent / "exported"


def write_runners(
    models: Mapping[str, ModelArtifact], folder: Path, policy: str, target: Mapping[str, Any]
) -> None:
    """Writes model.json and the programs that read it, and describes them in README.md.

    Args:
      models: the model by precision, each with the thresholds fitted for that precision.
      folder: folder that holds the graphs and the tokenizer.
      policy: one of POLICIES.
      target: see `Target`.

    Raises UserError, see `ThresholdResolver.threshold`.

    """
    precisions = {
        precision: {"weights": weights_name(precision)}
        | _describe_stages(model, read_graphs(folder, precision), policy, target)
        for precision, model in models.items()
    }
    (model, *_) = models.values()
    metadata = {"format": "onnx", "version": _VERSION, "task": model.task, "policy": policy}
    metadata |= {"classes": list(model.classes), "text_columns": list(model.text_columns)}
    metadata |= _describe_tokens(model, folder)
    write_json(folder / "model.json", metadata | {"precisions": precisions})
    for name in PROGRAMS:
        shutil.copyfile(_SOURCE / name, folder / name)
    shutil.copyfile(run_onnx.__file__, folder / "run.py")
    card = folder / "README.md"
    before = card.read_text(encoding="utf-8") if card.exists() else ""
    write_text(card, before + (_SOURCE / "README.md").read_text(encoding="utf-8"))


def _describe_stages(
    model: ModelArtifact, saved: SavedGraphs, policy: str, target: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the threshold, the graphs, and the stages in order, for one precision."""
    threshold, calibrator = model.resolver.threshold(policy, **target)
    full = threshold == math.inf
    networks = saved.networks[-1:] if full else saved.networks
    segments = [segment for network in networks for segment in network]
    stages = plan_stages(
        [network.exits for network in model.networks],
        first_only=any(segment.counts for segment, _ in segments),
        full=full,
        exit_rates=model.resolver.fronts[policy].leaving(threshold),
        low_exit_rate=LOW_EXIT_RATE,
    )
    described = []
    for stage in stages:
        temperature = float(calibrator.temperatures[stage.exit])
        described.append(
            {
                "layer": stage.end,
                "cost": 1.0 if full else float(model.cost[stage.exit]),
                # None if the exit diverged.
                "temperature": temperature if math.isfinite(temperature) else None,
                "runs": _runs(stage, saved.networks[stage.network], segments),
            }
        )
    graphs = [path.name for _, path in segments]
    return {"threshold": None if full else threshold, "graphs": graphs, "stages": described}


def _runs(stage: Stage, network: Sequence[Any], segments: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns the indices of a stage's graphs, each with whether it computes only one token."""
    return [
        {
            "graph": segments.index((segment, path)),
            "first_token": segment.counts and segment.end == stage.end and not stage.whole,
        }
        for segment, path in network
        if stage.start <= segment.start and segment.end <= stage.end
    ]


def _describe_tokens(model: ModelArtifact, folder: Path) -> dict[str, Any]:
    """Returns how to make a row of token ids from a text or a pair of texts, for model.json.

    The template lists the row in order: {"id": token id, "type": token type} is a special token,
    and {"text": 0 or 1, "type": token type} stands for the tokens of that text.
    """
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.no_padding()
    backend.no_truncation()
    row = backend.encode("a", "a" if len(model.text_columns) == 2 else None)
    template: list[dict[str, int]] = []
    for text, token, kind in zip(row.sequence_ids, row.ids, row.type_ids, strict=True):
        item = {"id": token, "type": kind} if text is None else {"text": text, "type": kind}
        if text is None or item not in template:  # a text may be several tokens
            template.append(item)
    config = read_json(folder / "tokenizer_config.json")
    return {
        "truncation": {"max_length": model.max_length, "direction": config["truncation_side"]},
        "pad_id": model.tokenizer.pad_token_id,
        "split_special_tokens": bool(config.get("split_special_tokens", False)),
        "template": template,
    }
