"""What a task is: which columns hold text and label, and what it is scored by."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Task:
    """A classification task: one text column, or two for pairs."""

    name: str
    text_columns: tuple[str, ...]
    label_column: str = "label"
    metric: str = "accuracy"
    validation: str = "validation"  # name of the split that is reported


# The seven tasks of the SWEET paper's experimental setup. Its score is accuracy, Matthews for CoLA.
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
