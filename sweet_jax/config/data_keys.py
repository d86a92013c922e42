"""The config keys of the data."""

import dataclasses

from sweet_jax.config.key import AT_LEAST_1, BETWEEN_0_AND_1, SEED_RANGE, key
from sweet_jax.objectives import OBJECTIVES


@dataclasses.dataclass(frozen=True)
class DataKeys:
    """Holds the keys of the rows."""

    task: str = key(
        "sst2",
        "Name of a GLUE task, or any name for your own data_files.",
        (bool, "a name"),
        allowed="sst2, mrpc, rte, cola, mnli, qnli or qqp; any name with data_files or dataset",
    )
    objective: str = key(
        "single_label",
        "Kind of label: one class, any number of labels (lists, or a|b), or a number.",
        choices=OBJECTIVES,
        allows_reference=True,
    )
    train_size: int = key(
        6000, "Maximum number of training rows, including tuning and calibration rows.", AT_LEAST_1
    )
    calibration_fraction: float = key(
        0.1,
        "Fraction of the training rows held out for temperatures and thresholds.",
        BETWEEN_0_AND_1,
    )
    tuning_fraction: float = key(
        0.1,
        (
            "Fraction of the training rows held out to choose learning rates, penalties and the"
            " kept state: with epochs=auto, head_init=probe, head_refit, or rate_search=short and"
            " several learning rates. Otherwise none are, and learning rates are chosen on "
            "calibration rows."
        ),
        BETWEEN_0_AND_1,
    )
    validation_fraction: float = key(
        0.2,
        "Fraction of the rows split off for validation if there is no validation file.",
        BETWEEN_0_AND_1,
    )
    split_seed: int = key(
        0,
        "Random seed of that split, the same for all replicas.",
        (lambda v: 0 <= v < 2**31, SEED_RANGE),
    )
    max_length: int = key(
        256,
        "Maximum tokens per text; longer texts are truncated.",
        (lambda v: v >= 8, "8 tokens or more"),
    )
    subset: str = key(
        "",
        (
            'Whether training rows are drawn by seed, or are the first rows of the file; "" '
            "uses the preset's choice."
        ),
        choices=("seed", "first"),
    )
    data_dir: str = key(
        "",
        "Directory with <task>/{train,validation}.parquet.",
        allowed='a directory; "" downloads from the hub',
    )
    data_files: str = key(
        "",
        (
            "Your own rows: CSV, TSV, JSON, Parquet, Arrow or Excel files, a folder of them, a "
            "glob pattern, several joined by +, or a folder with one subfolder per label."
        ),
        allowed="train[,validation]",
    )
    unlabeled_files: str = key(
        "",
        (
            "Rows without labels, with the same text columns. Every step also distills on as "
            "many of them as it has labeled rows (needs distillation)."
        ),
        allowed='a file, a folder, a glob pattern, or several joined by +; "" is none',
    )
    dataset: str = key(
        "",
        "A data set on the hub, or a folder written by save_to_disk of datasets.",
        allowed="owner/name, owner/name:subset or a folder",
    )
    splits: str = key(
        "",
        "Splits of that data set for training and validation.",
        allowed=(
            'train[,validation]; "" uses train, and the first of validation, valid, val, dev, test'
        ),
    )
    skip_invalid: bool = key(
        False, "Whether rows without a text or a label are skipped and counted."
    )
    report_texts: bool = key(
        True, "Whether the report lists the most confident mistakes with their texts."
    )
    text_columns: str = key(
        "",
        "Column of the text, or the two columns of a pair. Quote a name that has a comma.",
        allowed='a or a,b; "" finds them by their names',
    )
    label_column: str = key("label", "Column of the label.", (bool, "a column name"))
