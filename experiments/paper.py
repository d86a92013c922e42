"""Results of the SWEET paper (Rotem et al. 2023, arXiv 2306.02307), for comparison with ours.

Scores are means over its seven GLUE tasks in per cent, at exits 1, 4, 6, 12 of BASE models and at
exits 1, 6, 12, 24 of LARGE models.
"""

# A note for every table that shows the paper's numbers beside ours.
LEFT_OUT = (
    "The paper left out runs that did not converge and drew new seeds for them; here no seed is "
    "replaced, and collapsed runs count."
)

# Tables 1, 3 and 4, individual exits. For BERT, the text has differences and one exit's scores.
INDIVIDUAL: dict[str, dict[str, tuple[float | None, ...]]] = {
    "deberta-base": {
        "multi_model": (60.1, 74.6, 78.3, 82.2),
        "early_exit": (52.3, 70.9, 77.9, 81.7),
        "sweet": (59.1, 72.4, 75.1, 79.5),
    },
    "deberta-large": {
        "multi_model": (61.9, 76.2, 80.2, 86.8),
        "early_exit": (55.8, 74.7, 79.2, 83.6),
        "sweet": (61.3, 76.0, 77.8, 82.7),
    },
    "bert-base": {
        "multi_model": (None, 71.4, None, None),
        "early_exit": (None, 70.3, None, None),
        "sweet": (None, 71.6, None, None),
    },
    "bert-large": {
        "multi_model": (None, 66.9, None, None),
        "early_exit": (None, 65.6, None, None),
        "sweet": (None, 66.5, None, None),
    },
}

# BERT with learning to exit.
LEARNING_TO_EXIT: dict[str, dict[str, tuple[float, ...]]] = {
    "bert-base": {
        "multi_model": (53.7, 66.1, 71.1, 75.4),
        "early_exit": (49.5, 63.0, 70.0, 75.3),
        "sweet": (53.5, 64.9, 68.5, 74.1),
    },
    "bert-large": {
        "multi_model": (51.6, 59.9, 67.6, 77.9),
        "early_exit": (50.5, 59.3, 68.8, 76.6),
        "sweet": (53.9, 60.6, 69.5, 75.8),
    },
}

# Table 2, chosen learning rates of Early-Exit, Multi-Model and SWEET in units of 1e-5, by task.
TASKS = ("sst2", "mrpc", "cola", "mnli", "qqp", "qnli", "rte")
RATES: dict[str, tuple[str, ...]] = {
    "bert-base": ("5 5 5", "5 3 4", "4 4 5", "5 5 5", "5 5 5", "5 4 5", "5 5 4"),
    "bert-large": ("4 2 2", "4 5 4", "4 3 4", "4 3 4", "5 3 4", "4 4 3", "3 3 3"),
    "deberta-base": ("3 3 3", "4 5 5", "4 5 4", "2 4 3", "4 5 5", "3 4 3", "2 1 4"),
    "deberta-large": ("2 4 3", "3 2 1", "3 3 2", "2 2 2", "2 2 3", "3 2 1", "1 2 2"),
}

# Pairs of methods, the first minus the second of which the tables show.
PAIRS = (("multi_model", "early_exit"), ("sweet", "early_exit"), ("sweet", "multi_model"))
NAMES = {"multi_model": "Multi-Model", "early_exit": "Early-Exit", "sweet": "SWEET"}
