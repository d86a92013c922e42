"""Values of the presets: where the paper and the authors' release differ."""

# The decisions a preset stands for. Each can also be set alone, for an ablation.
#   pooler: a copy per exit | one for all exits, which then gets every exit's gradient
#   relative: the table of relative positions (DeBERTa, MPNet) is the first exit's | all exits'
#   clipping: norm per owner of parameters | one norm over all parameters, coupling the exits
#   subset: train_size rows drawn by seed | the first train_size rows whatever the seed
#   calibration: rows held out of the subset | the validation rows | those with dropout left on
#   confidence: p = 1 never reaches t = 1 | float32 softmax, which reaches 1.0 at a gap of 17
#   pooling: how an exit reads its layer; "" = as the checkpoint declares, see models/pooling.py;
#     "auto", which no preset has, compares the texts of a pair
#   head_init: classifiers begin random | as logistic regressions on the frozen encoder
#   exit_score: learning-to-exit's sigmoid | that, min-max normalised over the evaluated rows
# The SWEET paper's method and experimental setup, but nothing is fitted on the rows reported.
_DEFAULT = {
    "pooler": "per_exit",
    "relative": "first",
    "clipping": "owner",
    "subset": "seed",
    "calibration": "held_out",
    "confidence": "confidence",
    "exit_score": "learning_to_exit",
    "pooling": "",
    "head_init": "random",
}
PRESETS: dict[str, dict[str, str]] = {
    "": _DEFAULT,
    # SWEET paper: temperatures are fitted on the evaluation set.
    "paper": _DEFAULT | {"calibration": "validation", "pooling": "first"},
    # What the authors' released code does.
    "reference": {
        "pooler": "shared",
        "relative": "shared",
        "clipping": "global",
        "subset": "first",
        "calibration": "validation_dropout",
        "confidence": "confidence_float32",
        "exit_score": "learning_to_exit_min_max",
        "pooling": "first",
        "head_init": "random",
    },
}
