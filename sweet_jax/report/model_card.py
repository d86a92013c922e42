"""The model card, which describes a saved model, its metric at each cost, and how to use it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from sweet_jax.objectives.label_checks import cut_label
from sweet_jax.objectives.objective import ShownMetric
from sweet_jax.report.console import format_number
from sweet_jax.report.shortfalls import keeps_encoder

_TEMPLATE = Path(__file__).parent / "model_card.md"


def model_card(
    results: Mapping[str, Any],
    *,
    model_type: str,
    classes: Sequence[str],
    text_columns: Sequence[str],
    max_length: int,
) -> str:
    """Returns the Markdown of README.md for the best replica in results.json.

    `model_type` is Hugging Face's name of the encoder family; `max_length` is in tokens.
    """
    layers, checkpoint = [str(layer) for layer in results["exits"]], results["checkpoint"]
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", checkpoint) and not Path(checkpoint).exists()
    shown = ShownMetric.of(results["metric"])
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters |= {"number": format_number, "inline": _inline}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        results=results,
        metric=shown.name + shown.better,
        shown=shown,
        unchanged=keeps_encoder(results),
        best=results["replicas"][results["best_replica"]],
        base_model=checkpoint if on_hub else "",
        layers=", ".join(layers[:-1]) + " and " + layers[-1] if len(layers) > 1 else layers[0],
        model_type=model_type,
        classes=[cut_label(name) for name in classes],
        text_columns=text_columns,
        pairs=len(text_columns) == 2,
        max_length=max_length,
    )


def _inline(text: str) -> str:
    """Returns a text as part of a line of Markdown, in which it is no HTML and no code."""
    text = " ".join(text.split()).replace("`", "'")
    return text.replace("&", "&amp;").replace("<", "&lt;")
