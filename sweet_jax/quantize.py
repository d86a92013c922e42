"""Fits the thresholds of a run's saved model for int8, whose answers differ a little.

  sweet-jax quantize --run=runs/x
  sweet-jax predict --model=runs/x/model --precision=int8 --input=new.csv --output=new.jsonl

The layers of the model multiply int8 (engine=onnxruntime); what an exit then answers on the run's
calibration rows fits its temperatures, curves, thresholds and certificates anew, in
model/int8.json. The rows are not in the model: they are read as the run's own config names them,
on the kind of processor that will serve the model, since processors round int8 products
differently. Prints the metric of every exit on the validation rows before and after. Exit status: 0
done, 2 the run or its data will not do, 1 anything else.

"""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.config import Config, UserError, from_mapping
from sweet_jax.exits.metrics import compute_metric
from sweet_jax.exits.operating_point import deployable_policies, make_resolver
from sweet_jax.exits.outputs import ExitOutputs
from sweet_jax.files import write_json
from sweet_jax.inference.all_exits import compute_all_exits
from sweet_jax.inference.artifact import INT8_FILE, INT8_VERSION, ModelArtifact, open_model
from sweet_jax.inference.engine import Engine, load_engine

_LOSS = 0.005  # of an exit's metric, that is warned of


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return run_command(lambda: _run(_parse(argv)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser("sweet_jax.quantize", __doc__ or "")
    parser.add_argument("--run", required=True, help="directory of a run that is complete")
    parser.add_argument("--data_dir", help="where its data set lies now, if it was moved")
    return parser.parse_args(argv)


def _run(options: argparse.Namespace) -> None:
    folder = Path(options.run)
    config, digest = _read_config(folder, options.data_dir)
    model = open_model(folder / "model")
    engine = load_engine("onnxruntime", model, "int8")
    from sweet_jax.preparation import prepare  # imports JAX

    job = prepare(config)
    if job.digest != digest:
        raise UserError(f"{options.run!r} was trained on other data: give the same files")
    about = json.loads((model.folder / "exits.json").read_text())
    seed, rate = about["seed"], about["learning_rate"]
    shown = job.dataset.validation.texts
    texts = shown
    if config.calibration == "held_out":
        replica = [own for own, _ in job.config.replicas()].index(seed)
        texts = [job.texts[row] for row in job.rows.calibration[replica]]
    saved = {name: _read_outputs(folder, name) for name in ("calibration", "validation")}
    replica = saved["validation"].identity.replicas.index((seed, rate))
    compared = 1 if job.config.tunes else len(saved["calibration"].logits)
    fitted = quantized_outputs(model, engine, texts, saved["calibration"].replica(replica))
    resolver = make_resolver(fitted, deployable_policies(fitted), compared)
    before = saved["validation"].replica(replica)
    metrics = [_metrics(each) for each in (before, quantized_outputs(model, engine, shown, before))]
    values = {"version": INT8_VERSION, "dials": resolver.as_dict()}
    write_json(
        model.folder / INT8_FILE, values | dict(zip(("float32", "int8"), metrics, strict=True))
    )
    _print_table(model, before.metric.name, *metrics)
    print(f"written to {model.folder / INT8_FILE}")


def _read_outputs(folder: Path, split: str) -> ExitOutputs:
    return ExitOutputs.load(folder / "exit_outputs" / f"{split}.npz")


def _read_config(folder: Path, data_dir: str | None) -> tuple[Config, str]:
    """Returns a run's config and the digest of its data. Raises UserError where there is none."""
    try:
        values = json.loads((folder / "config.json").read_text())
        digest = values.pop("data_sha256")
        values["clip_norm"] = math.inf if values["clip_norm"] == "inf" else values["clip_norm"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{str(folder)!r} is not the directory of a run ({error!r})") from error
    if not (folder / "results.json").exists():
        raise UserError(f"{str(folder)!r} is not finished: run its command again, in its workdir")
    return from_mapping(values | ({"data_dir": data_dir} if data_dir else {})), digest


def quantized_outputs(
    model: ModelArtifact, engine: Engine, texts: Sequence[Any], like: ExitOutputs
) -> ExitOutputs:
    """Returns the outputs of every exit on some texts; all but logits and scores are `like`'s."""
    rows = [text[0] if len(text) == 1 else text for text in texts]
    logits, scores = compute_all_exits(model, engine, rows)  # [E, N, C], [E, N]
    learned = None if scores is None else scores[None]
    return dataclasses.replace(like, logits=logits[None], exit_scores=learned)


def _metrics(outputs: ExitOutputs) -> list[float]:
    """Returns the metric of each exit."""
    classes = outputs.logits.shape[-1]
    targets = outputs.labels[0]
    return [compute_metric(outputs.metric, p, targets, classes) for p in outputs.predictions[0]]


def _print_table(
    model: ModelArtifact, metric: str, before: Sequence[float], after: Sequence[float]
) -> None:
    """Prints each exit's metric in float32 and int8, with a warning where it falls by _LOSS."""
    print(f"{'exit':>6}{'float32':>9}{'int8':>9}  {metric} on the validation rows")
    for layer, old, new in zip(model.layers, before, after, strict=True):
        print(f"{layer:6d}{old:9.4f}{new:9.4f}")
        if old - new > _LOSS:
            print(
                f"warning: exit {layer} loses {100 * (old - new):.1f} points in int8: serve this "
                "model in float32",
                file=sys.stderr,
            )


if __name__ == "__main__":
    sys.exit(main())
