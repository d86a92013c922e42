"""Tasks: the columns that hold texts and labels, and the metric."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Task:
    """Names the columns, the objective, the metric and the validation split of a task."""

    name: str
    text_columns: tuple[str, ...]  # one column, or two for pairs
    label_column: str = "label"
    metric: str = "accuracy"
    validation: str = "validation"  # name of the split that results are reported on
    objective: str = "single_label"  # name of an objective in OBJECTIVES


# The seven tasks and the metrics of the SWEET paper's experimental setup.
GLUE: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sst2", ("sentence",)),
        Task("mrpc", ("sentence1", "sentence2")),
        Task("rte", ("sentence1", "sentence2")),
        Task("cola", ("sentence",), metric="matthews"),
        Task("mnli", ("premise", "hypothesis"), validation="validation_matched"),
        Task("qnli", ("question", "sentence")),
        Task("qqp", ("question1", "question2")),
    )
}
