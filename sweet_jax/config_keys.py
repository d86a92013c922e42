"""Descriptions of the config keys, for --help and the reference page of the documentation."""

import dataclasses

from sweet_jax.config import CHOICES, Config
from sweet_jax.config_values import RANGES

# By group: key → its meaning, or (its meaning, the allowed values in words) if the key is no flag
# and neither `config.CHOICES` nor `config_values.RANGES` lists its values.
MEANINGS: dict[str, dict[str, str | tuple[str, str]]] = {
    "Data": {
        "task": (
            "Name of a GLUE task, or any name for your own data_files.",
            "sst2, mrpc, rte, cola, mnli, qnli or qqp; any name with data_files or dataset",
        ),
        "objective": (
            "Kind of label: one class, any number of labels (lists, or a|b), or a number."
        ),
        "train_size": "Maximum number of training rows, including tuning and calibration rows.",
        "calibration_fraction": (
            "Fraction of the training rows held out for temperatures and thresholds."
        ),
        "tuning_fraction": (
            "Fraction of the training rows held out to choose learning rates, penalties and the "
            "kept state."
        ),
        "validation_fraction": (
            "Fraction of the rows split off for validation if there is no validation file."
        ),
        "split_seed": "Random seed of that split, the same for all replicas.",
        "max_length": "Maximum tokens per text; longer texts are truncated.",
        "subset": (
            'Whether training rows are drawn by seed, or are the first rows of the file; "" uses '
            "the preset's choice."
        ),
        "data_dir": (
            "Directory with <task>/{train,validation}.parquet.",
            'a directory; "" downloads from the hub',
        ),
        "data_files": (
            "Your own rows: CSV, TSV, JSON, Parquet, Arrow or Excel files, a folder of them, a "
            "glob pattern, several joined by +, or a folder with one subfolder per label.",
            "train[,validation]",
        ),
        "unlabeled_files": (
            "Rows without labels, with the same text columns. Every step also distills on as many "
            "of them as it has labeled rows (needs distillation_weight).",
            'a file, a folder, a glob pattern, or several joined by +; "" is none',
        ),
        "dataset": (
            "A data set on the hub, or a folder written by save_to_disk of datasets.",
            "owner/name, owner/name:subset or a folder",
        ),
        "splits": (
            "Splits of that data set for training and validation.",
            'train[,validation]; "" uses train, and the first of validation, valid, val, dev, test',
        ),
        "skip_invalid": "Whether rows without a text or a label are skipped and counted.",
        "report_texts": "Whether the report lists the most confident mistakes with their texts.",
        "text_columns": (
            "Column of the text, or the two columns of a pair. Quote a name that has a comma.",
            'a or a,b; "" finds them by their names',
        ),
        "label_column": "Column of the label.",
    },
    "Model": {
        "checkpoint": ("The pretrained encoder.", "hub id, local directory, or pkg://package/path"),
        "exits": (
            "Layers followed by an exit, numbered from 1.",
            "ascending; the last one is the depth of the encoder",
        ),
        "depth": (
            "Number of encoder layers to use; the layers above are dropped.",
            "0 (all) or more",
        ),
    },
    "Method": {
        "method": (
            "Which exits train a layer: only the next one (sweet), all exits above it "
            "(early_exit), or one exit in a model of its own (multi_model)."
        ),
        "preset": (
            "Protocol that sets keys left empty: the default, the paper's, or the authors' release."
        ),
        "grow_from": (
            "Directory of a SWEET run, which is kept unchanged while deeper exits are trained.",
            'a run directory; "" trains from the checkpoint',
        ),
        "isolation": (
            "Fraction of the gradient stopped at a boundary between exits: 1 is SWEET, 0 is "
            "Early-Exit.",
            "a number from 0 to 1, or a pair from,to; empty for the method's",
        ),
        "isolation_schedule": (
            'How isolation moves from the first to the second number of a pair; "step" switches '
            "halfway through training."
        ),
        "boundary_isolation": (
            "Factor by which isolation is multiplied at each boundary between exits.",
            "a number from 0 to 1 for each boundary; empty for 1",
        ),
        "loss_weights": (
            "Weight of each exit's loss, for exits that share layers: numbers, or a schedule: "
            '"uniform", "depth" (proportional to the layer, as in PABEE) or "shallow_deep" (rising '
            "during training). Under SWEET the weights have almost no effect: each parameter gets "
            "the gradient of one exit only, and neither Adam nor clipping per owner depends on its "
            "scale.",
            "a positive number for each exit, or a schedule; empty for the method's",
        ),
        "last_exit_first": (
            "Fraction of the steps, at the start, that minimize only the last exit's loss with all "
            "boundaries open; the remaining steps train as usual."
        ),
        "distillation_weight": (
            "Weight, in each exit's loss, of the divergence from the last exit's prediction; 0 "
            "switches distillation off."
        ),
        "distillation_temperature": "Temperature of both predictions in that divergence.",
        "pooler": (
            'One copy of the pretrained pooler for each exit, or one shared by all; "" uses the '
            "preset's choice."
        ),
        "relative": (
            "Owner of the relative-position table (DeBERTa, MPNet): the first exit, or all exits; "
            '"" uses the preset\'s choice.'
        ),
        "clipping": (
            "Gradient clipping with a norm for each exit's own parameters, or one global norm; "
            '"" uses the preset\'s choice.'
        ),
    },
    "Heads": {
        "head_init": (
            "Initialization of the classifiers: random, or logistic regressions fitted on the "
            "frozen encoder."
        ),
        "head_refit": (
            "Whether logistic regressions fitted on the trained encoder replace the classifiers."
        ),
        "class_weights": (
            "Weights of the classes in the loss, for rare classes (single_label).",
            'balanced, or one positive number for each class in their order; "" is 1',
        ),
        "focal_gamma": "Exponent of the focal loss, for rare classes; 0 is the cross-entropy.",
        "decision_thresholds": (
            "Minimum probability at which a label is predicted (multi_label): one half, or the "
            'threshold with the best F1 on calibration rows; "" is "f1" if the metric is an F1, '
            'else "half".'
        ),
        "head_learning_rate": "Learning rate of the heads, as a multiple of learning_rates.",
        "pooling": (
            "What an exit reads: the first token through the pretrained pooler, the mean of all "
            "tokens, or, for a pair of texts, both means, their difference and their product. "
            '"" uses the preset\'s choice, else the checkpoint\'s, else the mean; "auto" does the '
            'same, but uses "pair" instead of the mean for pairs of texts.'
        ),
        "learning_to_exit": (
            'Whether to train heads that predict if their exit is right; with "detached" '
            "everything else is trained as without them."
        ),
    },
    "Training": {
        "seeds": (
            "Random seeds; each is a replica, and all replicas are trained together.",
            "distinct whole numbers",
        ),
        "learning_rates": (
            "Learning rates; each is a replica for every seed, and the best one is reported.",
            "distinct positive numbers",
        ),
        "layer_decay": (
            "Learning rate of a layer, as a multiple of that of the layer above it; 1 uses the "
            "same rate for all layers."
        ),
        "layer_scaling": (
            "Fraction of the change made by training that is kept in layer 1. It rises linearly to "
            "1 in the last layer. Needs head_refit; 1 switches it off."
        ),
        "epochs": (
            'Passes over the training rows; "auto" is 96 sqrt(N) examples, at least one epoch.',
            '1 or more, or "auto"; 0 with head_init=probe or head_refit',
        ),
        "batch_size": "Training batch size.",
        "evaluation_batch_size": "Evaluation batch size.",
        "warmup_fraction": "Fraction of the steps used for linear warm-up.",
        "weight_decay": "AdamW's weight decay.",
        "clip_norm": "Gradient-norm clipping threshold.",
        "rate_search": (
            "Whether every learning rate is trained to the end, or one is chosen by short runs."
        ),
        "group_by_length": "Whether batches group texts of similar length, to reduce padding.",
    },
    "Evaluation": {
        "baselines": (
            'Baselines: majority class, TF-IDF and probes; "full" also fine-tunes a plain model, '
            "with its own learning-rate search if rate_search is short."
        ),
        "calibration": (
            'Rows on which temperatures and thresholds are fitted; "" uses the preset\'s choice.'
        ),
        "confidence": (
            'Exit policy of the run; module:function is a policy of your own; "" uses the '
            "default of the objective, else the preset's choice."
        ),
        "exit_score": ('Exit policy of a run with learning_to_exit; "" uses the preset\'s choice.'),
        "metric": "The reported metric, one of the objective's; \"\" uses the task's.",
    },
    "Hardware": {
        "dtype": "Data type of the encoder's activations; parameters and classifiers are float32.",
        "attention": (
            "Implementation of attention: einsum is this library's own; the others are those of "
            "jax.nn.dot_product_attention."
        ),
        "attention_dropout": 'Dropout of the attention weights; "" uses the checkpoint\'s rate.',
        "remat": (
            "Whether the backward pass recomputes activations, which saves memory for about a "
            "third more computation."
        ),
        "segment_parallel": "Whether each group of devices trains its own segments (sweet).",
    },
    "Run": {
        "log_to": (
            "Where losses, learning rates and the metrics on tuning rows are logged in addition to "
            "metrics.jsonl; wandb and mlflow also get the report and the model."
        ),
        "checkpoint_every": "Number of steps between checkpoints.",
        "conflict_every": (
            "Number of steps between logs of how well the exits' gradients agree, for exits that "
            "share layers.",
            "0 (never) or more",
        ),
        "max_steps": (
            "Number of steps after which training stops early; the learning-rate schedule stays "
            "that of the full training.",
            "0 (all) or more",
        ),
    },
}


@dataclasses.dataclass(frozen=True)
class Key:
    """Describes one config key."""

    name: str
    group: str
    meaning: str
    allowed: str
    default: str


def describe_keys() -> list[Key]:
    """Returns every config key, group by group.

    Raises ValueError for a key without a meaning, or a meaning without a key.
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
    """Returns a value as it is written on a command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none given"
    return '""' if value == "" else str(value)
