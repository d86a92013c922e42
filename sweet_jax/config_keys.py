"""Descriptions of the config keys, for --help and the reference page of the documentation."""

import dataclasses

from sweet_jax.config import CHOICES, Config
from sweet_jax.config_values import RANGES

# By group: key → its meaning, or (its meaning, the allowed values in words) where these are not
# those of `config.CHOICES` or `config_values.RANGES`, and the key is no flag.
MEANINGS: dict[str, dict[str, str | tuple[str, str]]] = {
    "Data": {
        "task": (
            "Name of a GLUE task, or any name for your own data_files.",
            "sst2, mrpc, rte, cola, mnli, qnli or qqp; with data_files or dataset any name",
        ),
        "objective": (
            "What a row's label is: one class, any number of labels (lists, or a|b), or a number."
        ),
        "train_size": "Upper limit on training rows, calibration rows included.",
        "calibration_fraction": "Share of training rows held out for temperatures and thresholds.",
        "tuning_fraction": (
            "Share of the training rows held out to choose rates, penalties and the kept state."
        ),
        "validation_fraction": "Share of the data split off without a validation file.",
        "split_seed": "Random seed of that split, the same for all replicas.",
        "max_length": "Tokens of a text; longer texts are cut.",
        "subset": (
            'Training rows are drawn by seed, or the first of the file; "" is the preset\'s.'
        ),
        "data_dir": (
            "Directory of <task>/{train,validation}.parquet.",
            'a directory; "" is the hub',
        ),
        "data_files": (
            "Your own rows: CSV, TSV, JSON, Parquet, Arrow or Excel files, a folder of them, a "
            "pattern, several joined by +, or a folder with one sub-folder per label.",
            "train[,validation]",
        ),
        "unlabeled_files": (
            "Rows without labels, of the same text columns: every step also distils on as many of "
            "them as it has rows with labels (needs distillation_weight).",
            'a file, a folder, a pattern, or several joined by +; "" is none',
        ),
        "dataset": (
            "A data set of the hub, or a folder that datasets' save_to_disk wrote.",
            "owner/name, owner/name:subset or a folder",
        ),
        "splits": (
            "Splits of that data set for training and validation.",
            'train[,validation]; "" is train, and the first of validation, valid, val, dev, test',
        ),
        "skip_invalid": "Leave rows without text or label out, and count them.",
        "report_texts": "List the most confident mistakes in the report, with their texts.",
        "text_columns": (
            "Column of the text, or the two columns of a pair; a name with a comma in quotes.",
            'a or a,b; "" finds them by their names',
        ),
        "label_column": "Column of the label.",
    },
    "Model": {
        "checkpoint": ("The pretrained encoder.", "hub id, local directory, or pkg://package/path"),
        "exits": (
            "Layers that an exit follows, numbered from 1.",
            "ascending; the last is the encoder's depth",
        ),
        "depth": (
            "Number of the encoder's layers that are used; those above are left out.",
            "0 (all) or more",
        ),
    },
    "Method": {
        "method": (
            "What trains a layer: the next exit, all exits above it, or a model for each depth."
        ),
        "preset": (
            "Protocol that fills in keys left empty: the default, the paper's, or its release's."
        ),
        "grow_from": (
            "Run directory of a SWEET run that is kept as it is while deeper exits are trained.",
            'a run directory; "" trains from the checkpoint',
        ),
        "isolation": (
            "How much of the gradient a boundary between exits stops: 1 is SWEET, 0 Early-Exit.",
            "a number from 0 to 1, or a pair from,to; empty for the method's",
        ),
        "isolation_schedule": 'How a pair moves over training; "step" changes at half time.',
        "boundary_isolation": (
            "Factor on isolation for each boundary between exits.",
            "a number from 0 to 1 for each boundary; empty for 1",
        ),
        "loss_weights": (
            "Weight of each exit's loss, for exits that share layers: numbers, or a schedule: "
            '"uniform", "depth" (proportional to the layer, as PABEE) or "shallow_deep" (rising '
            "over training). Under SWEET weights nearly cancel: each parameter has the gradient "
            "of one exit alone, and neither Adam nor clipping per owner depends on its scale.",
            "a positive number for each exit, or a schedule; empty for the method's",
        ),
        "last_exit_first": (
            "Share of the steps in which only the last exit's loss is minimised, all boundaries "
            "open; then all as usual."
        ),
        "distillation_weight": (
            "Weight, in each exit's loss, of its divergence from the last exit's answer; 0 is off."
        ),
        "distillation_temperature": "Temperature of both answers in that divergence.",
        "pooler": (
            'A pretrained pooler for each exit, or one that all share; "" is the preset\'s.'
        ),
        "relative": (
            'Owner of relative positions (DeBERTa, MPNet): first exit or all; "": the preset\'s.'
        ),
        "clipping": (
            "Clipping by the norm of each exit's own gradients, or of all; \"\" is the preset's."
        ),
    },
    "Heads": {
        "head_init": (
            "Start of the classifiers: random, or logistic regressions on the frozen encoder."
        ),
        "head_refit": (
            "Whether a logistic regression on the trained encoder replaces the classifiers."
        ),
        "class_weights": (
            "Weights of the classes in the loss, for rare ones (single_label).",
            'balanced, or one positive number for each class in their order; "" is 1',
        ),
        "focal_gamma": "Exponent of the focal loss, for rare classes; 0 is the cross-entropy.",
        "decision_thresholds": (
            "Probability from which on a label is given (multi_label): one half, or that with "
            'the best F1 on calibration rows; "" is "f1" where the metric is an F1, else "half".'
        ),
        "head_learning_rate": "Learning rate of the heads, a multiple of learning_rates.",
        "pooling": (
            "What an exit reads: the first token through the pretrained pooler, the mean of all "
            'tokens, or of a pair of texts both means, their difference and product. "" is the '
            "preset's, else the checkpoint's, else the mean; auto is that too, but of pairs it is "
            '"pair" in place of the mean.'
        ),
        "learning_to_exit": (
            'Heads that learn if their exit is right; "detached" trains all else as without them.'
        ),
    },
    "Training": {
        "seeds": (
            "Random seeds; each is a replica, trained beside the others.",
            "distinct whole numbers",
        ),
        "learning_rates": (
            "Learning rates; each is a replica for every seed, and the best is reported.",
            "distinct positive numbers",
        ),
        "layer_decay": (
            "Learning rate of a layer, a multiple of that of the layer above it; 1 is the same."
        ),
        "layer_scaling": (
            "Share that layer 1 keeps of what training changed in it, the last layer all, those "
            "between by their depth; needs head_refit. 1 is off."
        ),
        "epochs": (
            'Passes over the training rows; "auto" is 96 sqrt(N) examples, at least one epoch.',
            '1 or more, or "auto"; 0 with head_init=probe or head_refit',
        ),
        "batch_size": "Rows in a training step.",
        "evaluation_batch_size": "Rows in an evaluation step.",
        "warmup_fraction": "Share of the steps in which the learning rate rises.",
        "weight_decay": "AdamW's weight decay.",
        "clip_norm": "Largest norm of a gradient.",
        "rate_search": (
            "Train every learning rate to the end, or choose one by a short run of each."
        ),
        "group_by_length": "Whether batches hold texts of similar length: less padding.",
    },
    "Evaluation": {
        "baselines": (
            'Baselines: majority class, TF-IDF and probes; "full" fine-tunes a plain model too, '
            "at the best learning rate for it where rate_search is short."
        ),
        "calibration": (
            'Rows that temperatures and thresholds are fitted on; "" is the preset\'s.'
        ),
        "confidence": (
            'Exit policy of the run; module:function is a policy of your own; "" is the preset\'s.'
        ),
        "exit_score": 'Exit policy of a run with learning_to_exit; "" is the preset\'s.',
        "metric": "The reported metric, one of the objective's; \"\" is the task's.",
    },
    "Hardware": {
        "dtype": "Type of the encoder's activations; parameters and classifiers are float32.",
        "attention": "einsum is this library's own; the others are jax.nn.dot_product_attention's.",
        "attention_dropout": 'Dropout of attention weights: "" is the checkpoint\'s.',
        "remat": (
            "Whether the backward pass recomputes activations: less memory, a third more work."
        ),
        "segment_parallel": "Whether each group of devices trains its own segments (sweet).",
    },
    "Run": {
        "log_to": (
            "Where losses, learning rates and the tuning rows' metrics go beside metrics.jsonl; "
            "wandb and mlflow also get the report and the model."
        ),
        "checkpoint_every": "Steps between checkpoints.",
        "conflict_every": (
            "Steps between logs of how the exits' gradients agree, where exits share layers.",
            "0 (never) or more",
        ),
        "max_steps": (
            "Steps after which training ends early, the schedule unchanged.",
            "0 (all) or more",
        ),
    },
}


@dataclasses.dataclass(frozen=True)
class Key:
    """Describes one config key in words."""

    name: str
    group: str
    meaning: str
    allowed: str
    default: str


def describe_keys() -> list[Key]:
    """Returns every config key, group by group.

    Raises ValueError for a key without a meaning, or a meaning without its key.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    described = [name for keys in MEANINGS.values() for name in keys]
    if sorted(described) != sorted(defaults):
        raise ValueError(f"MEANINGS and Config differ in {set(described) ^ set(defaults)}")
    found = []
    for group, keys in MEANINGS.items():
        for name, said in keys.items():
            meaning, allowed = (said, _allowed(name)) if isinstance(said, str) else said
            found.append(Key(name, group, meaning, allowed, _shown(defaults[name])))
    return found


def _allowed(name: str) -> str:
    ranges = {key: wanted for keys, _, wanted in RANGES for key in keys}
    return ranges.get(name) or ", ".join(_shown(v) for v in CHOICES.get(name, (True, False)))


def _shown(value: object) -> str:
    """Returns a value as a command line has it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none given"
    return '""' if value == "" else str(value)
