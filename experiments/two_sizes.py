"""Compares a large encoder with exits with a small full one, at the small one's cost, on ten tasks.

  python -m experiments.two_sizes --checkpoint=MPNET --data_dir=GLUE --text_dir=TEXT --workdir=DIR
  python -m experiments.two_sizes --render_only

It tests PCEE's second claim (Mofakhami et al. 2024) with two actual sizes: MPNet-base (12 layers of
768) with exits after 1, 2, 4, 6 and 12 layers, and all of MiniLM (6 layers of 384). Both are
frozen, with a logistic regression at each exit on the same 1,000 rows, so the result says nothing
about fine-tuned encoders. The features are those of experiments.probes for both models, which are
read from --workdir (that of experiments.probes) or computed. The threshold is the confidence after
temperature scaling that costs at most as much as MiniLM on 100 calibration rows; accuracy is on
validation rows.

There are two kinds of cost: FLOPs of the layers' products, 24 H^2 + 4 L H for a token of a text
with L tokens; and time, with ONNX Runtime on one core, batch size 1, float32 and int8, from the
medians of one run of experiments.benchmarks.inference on SST-2
(experiments/results/benchmarks/cpu.md), where a layer is a twelfth of MPNet's time. Expected, if
the claim holds: the differences are above zero.

Cost: if the features exist, about 20 minutes of one core, most of them for the 77 classes of
Banking77. It writes OUTPUT/rows/TASK.npz (which rows are classified correctly) and README.md.

Shape letters: S seed, E exit, V validation row, L tokens, H hidden.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import probes
from experiments.options import check_data_folders, make_record_parser
from experiments.panel_statistics import LEVEL, holm, two_sided
from experiments.recipe_results import read_record
from experiments.rendering import table_lines
from experiments.runner import run_resumable
from sweet_jax.compilation_cache import enable_compilation_cache
from sweet_jax.errors import UserError
from sweet_jax.exits.analysis import analyse
from sweet_jax.files import atomic_write, write_text

LARGE, SMALL = "mpnet-base", "minilm-l6"
EXITS = (1, 2, 4, 6, 12)
_HIDDEN = {LARGE: 768, SMALL: 384}
# Milliseconds of a whole model for a single text: MPNet-base, MiniLM.
CLOCK = {"float32": (34.64, 5.00), "int8": (11.92, 1.87)}
BUDGETS = ("FLOPs", *(f"clock, {name}" for name in CLOCK))
_DRAWS = 2000


class Rows(NamedTuple):
    """Holds whether each validation row is classified correctly, and at which cost.

    Attributes:
      small: the small model, bool [S, V].
      first, full: the first and the last exit of the large model, bool [S, V].
      adaptive: the large model within each budget, bool [budgets, S, V].
      cost: its mean cost within each budget, as a multiple of the small model's, [budgets, S].
      share: the small model's cost as a share of the large model's, float64 [budgets].

    """

    small: np.ndarray
    first: np.ndarray
    full: np.ndarray
    adaptive: np.ndarray
    cost: np.ndarray
    share: np.ndarray


def layer_flops(lengths: np.ndarray, hidden: int) -> float:
    """Returns the mean floating-point operations of a layer for a token.

    They are those of the products: queries, keys, values, output and a feed-forward layer four
    times as wide (24 H^2), and attention scores and weighted sums (4 L H).

    lengths: numbers of tokens of the texts. hidden: H.
    """
    lengths = lengths.astype(np.float64)
    return float(24 * hidden**2 + 4 * hidden * (lengths**2).sum() / lengths.sum())


def small_share(lengths: np.ndarray) -> np.ndarray:
    """Returns the small model's cost as a share of the large model's, float64 [budgets]."""
    small = probes.LAYERS[SMALL] * layer_flops(lengths, _HIDDEN[SMALL])
    large = probes.LAYERS[LARGE] * layer_flops(lengths, _HIDDEN[LARGE])
    return np.asarray([small / large, *(s / b for b, s in CLOCK.values())])


def measure(task: str, options: argparse.Namespace) -> Rows:
    """Fits the probes of both encoders, and chooses and applies the thresholds on a task."""
    correct: dict[str, np.ndarray] = {}
    for model, exits in ((SMALL, (6,)), (LARGE, EXITS)):
        fitted = probes.fit_exits(model, task, exits, options)
        outputs = fitted.validation
        correct[model] = outputs.predictions == outputs.labels[:, None]  # [S, E, V]
    analysis = analyse(fitted.calibration, fitted.validation)  # of the large model
    share = small_share(fitted.job.validation.lengths)
    taken = np.zeros((len(share), *correct[LARGE].shape[::2]), int)  # [budgets, S, V]
    for b, s in np.ndindex(*taken.shape[:2]):
        point = analysis.operating_point(s, {"cost": float(share[b])})
        assert point.threshold is not None, "exit 1 costs less than the small model"
        taken[b, s] = analysis.exits_taken(s, point.threshold)
    by_exit = correct[LARGE].swapaxes(0, 1)  # [E, S, V]
    adaptive = np.take_along_axis(by_exit[None], taken[:, None], axis=1)[:, 0]
    cost = (np.asarray(EXITS) / EXITS[-1])[taken].mean(axis=-1) / share[:, None]
    return Rows(correct[SMALL][:, 0], by_exit[0], by_exit[-1], adaptive, cost, share)


def read_rows(output: Path, task: str) -> Rows | None:
    """Returns the rows that `write_rows` wrote, None if the task is not done."""
    path = output / "rows" / f"{task}.npz"
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        shape = arrays["shape"]
        bits = np.unpackbits(arrays["right"], count=int(shape.prod())).astype(bool).reshape(shape)
        small, first, full = bits[:3]
        return Rows(small, first, full, bits[3:], arrays["cost"], arrays["share"])


def write_rows(output: Path, task: str, rows: Rows) -> None:
    """Writes rows to OUTPUT/rows/TASK.npz, with one bit for each."""
    bits = np.stack([rows.small, rows.first, rows.full, *rows.adaptive])
    with atomic_write(output / "rows" / f"{task}.npz") as aside:
        np.savez(
            aside,
            right=np.packbits(bits),
            shape=np.asarray(bits.shape),
            cost=rows.cost,
            share=rows.share,
        )


class Gap(NamedTuple):
    """Holds a difference of accuracies, and the same on drawn rows and seeds, float64 [draws]."""

    value: float
    drawn: np.ndarray

    def p(self) -> float:
        """Returns the two-sided p-value, from a normal distribution."""
        return two_sided(self.value, float(self.drawn.std()))

    def __str__(self) -> str:
        low, high = np.quantile(self.drawn, [0.025, 0.975])
        return f"{100 * self.value:+z.1f} [{100 * low:+z.1f}, {100 * high:+z.1f}]"


def compare(first: np.ndarray, second: np.ndarray, seed: int) -> Gap:
    """Returns the difference of accuracies, paired by seed and row, with bootstrap draws.

    The bootstrap resamples rows, the same for both sides and all seeds, and seeds.

    Args:
      first, second: whether each row is classified correctly, bool [S, V].
      seed: seed of the bootstrap.

    """
    gaps = first.astype(np.float64) - second
    rng = np.random.default_rng(seed)
    seeds, count = gaps.shape
    weights = rng.multinomial(count, np.full(count, 1 / count), _DRAWS) / count  # [draws, V]
    by_seed = weights @ gaps.T  # [draws, S]
    picked = rng.integers(0, seeds, by_seed.shape)
    return Gap(gaps.mean(), np.take_along_axis(by_seed, picked, axis=1).mean(axis=1))


def best_layer(records: Path, task: str) -> float | None:
    """Returns the accuracy of MiniLM's best layer, None if experiments.probes has no record.

    It is slightly too high, since the layer is chosen on the validation rows that it is for.
    """
    record = read_record(records, f"{SMALL}-{task}", probes.VARIANT)
    if record is None:
        return None
    layers = range(1, probes.LAYERS[SMALL] + 1)
    return max(float(record.scores[f"probe_{layer}"].exits.mean()) for layer in layers)


def render(output: Path, records: Path) -> None:
    """Writes README.md from the finished tasks.

    records: folder of the results of experiments.probes.
    """
    by_task = {t: rows for t in probes.TASKS if (rows := read_rows(output, t)) is not None}
    if not by_task:
        return
    gaps = [
        [compare(rows, r.small, seed) for rows in r.adaptive]
        for seed, r in enumerate(by_task.values())
    ]
    p = holm([gap.p() for of_task in gaps for gap in of_task]).reshape(len(gaps), -1)
    table, over = [], list[float]()
    for number, (task, r) in enumerate(by_task.items()):
        name = f"{task}*" if task in probes.SEEN else task
        texts = [name, str(r.small.shape[1]), _percent(r.small), "", _percent(r.first)]
        if (best := best_layer(records, task)) is not None:
            over.append(r.adaptive[0].mean() - best)
            texts[3] = f"{100 * best:.1f}, {100 * over[-1]:+z.1f}"
        for b, gap in enumerate(gaps[number]):
            bold = "**" if p[number, b] < LEVEL else ""
            texts.append(f"{_percent(r.adaptive[b])}, {bold}{gap}{bold} ({r.cost[b].mean():.2f})")
        table.append([*texts, _percent(r.full)])
    means = [
        Gap(float(np.mean([g.value for g in column])), np.mean([g.drawn for g in column], axis=0))
        for column in zip(*gaps, strict=True)
    ]
    mean_over = f"{100 * np.mean(over):+z.1f}" if len(over) == len(by_task) else ""
    table.append([f"mean of {len(by_task)}", "", "", mean_over, "", *map(str, means), ""])
    heading: tuple[str, ...] = ("task", "n", "MiniLM", "its best layer", "MPNet, exit 1")
    heading += (*(f"at MiniLM's {b}" for b in BUDGETS), "MPNet, all layers")
    absent = [t for t in probes.TASKS if t not in by_task]
    lines = ["# A large encoder with exits at a small one's cost", "", _ABOUT, ""]
    lines += [*table_lines(heading, table), ""]
    lines += [f"Not run: {', '.join(absent)}." if absent else "All ten tasks.", ""]
    write_text(output / "README.md", "\n".join(lines))


def _percent(correct: np.ndarray) -> str:
    return f"{100 * correct.mean():.1f}"


_ABOUT = f"""Made by `python -m experiments.two_sizes`, whose docstring has the details. Accuracy in
per cent of frozen encoders with logistic regression on {probes.TRAIN:,} rows, mean of
{len(probes.SEEDS)} seeds: all of MiniLM; its best layer, whose accuracy is slightly too high since
it is chosen on these rows, and how far MPNet-base at MiniLM's FLOPs is above it; MPNet-base's exit
1; MPNet-base with exits {", ".join(map(str, EXITS))} at MiniLM's cost, the difference from all of
MiniLM with its 95% bootstrap interval over seeds and rows, bold if it is significant after Holm's
correction over the table, and in brackets the cost on validation rows as a multiple of MiniLM's;
and all of MPNet-base, at 6.4 (int8) to 8 (FLOPs) times that cost. A star: the encoders were trained
on pairs of this task."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the missing tasks and writes the table; returns the exit status."""
    return run_resumable(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> bool:
    parser = make_record_parser("two_sizes", __doc__)
    parser.add_argument("--checkpoint", help="checkpoint of MPNet-base")
    parser.add_argument(
        "--probes",
        type=Path,
        default=Path("experiments/results/probes"),
        help="results of experiments.probes; default: %(default)s",
    )
    options = parser.parse_args(argv)
    if not options.render_only:
        check_data_folders(options)
        if options.checkpoint is None:
            raise UserError("set --checkpoint, the checkpoint of MPNet-base, or --render_only")
        enable_compilation_cache(least_seconds=1.0)
        for task in probes.TASKS:
            if read_rows(options.output, task) is None:
                rows = measure(task, options)
                write_rows(options.output, task, rows)
                gaps = [f"{100 * (a.mean() - rows.small.mean()):+z.1f}" for a in rows.adaptive]
                print(task, *gaps, flush=True)
    render(options.output, options.probes)
    return True


if __name__ == "__main__":
    sys.exit(main())
