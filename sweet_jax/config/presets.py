"""Values of the presets, which cover the differences between the paper and the authors' release."""

# The keys that a preset sets. Each can also be set by itself, for an ablation.
#   pooler: a copy per exit | one for all exits, which then receives every exit's gradient
#   relative: the table of relative positions (DeBERTa, MPNet) belongs to the first exit | to all
#   clipping: a norm per owner of parameters | one norm over all parameters, which couples exits
#   subset: train_size rows drawn by seed | the first train_size rows, whatever the seed
#   calibration: rows held out from the subset | the validation rows | those, with dropout left on
#   confidence: p = 1 never reaches t = 1 | float32 softmax, which reaches 1.0 at a gap of 17
#   pooling: how an exit reads its layer; "" = as the checkpoint declares, see models/pooling.py;
#     "auto", which no preset sets, compares the texts of a pair
#   head_init: classifiers start random | as logistic regressions on the frozen encoder
#   exit_score: learning-to-exit's sigmoid | that, min-max normalized over the evaluated rows
# The SWEET paper's method and experimental setup, except that nothing is fitted on reported rows.
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
    # The SWEET paper fits temperatures on the evaluation set.
    "paper": _DEFAULT | {"calibration": "validation", "pooling": "first"},
    # What the authors' released code does. It also evaluates in batches of 1, padded to 256 tokens,
    # and again for every threshold, which takes longer and has the same answers.
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
