"""The model card: what a saved model is, its metric at each cost, and how to use it."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_CARD = """\
---
{front}
---

# {task} with exits at layers {layers}

An encoder of the type {model_type}, fine-tuned from `{checkpoint}` by sweet_jax with the
method `{method}`, so that it can classify after {layers} of its {depth} layers and stop at the
first exit that is confident.

- Task: {task}; classes: {classes}. Reads {columns}, at most {max_length} tokens.
- Data: {train} training rows{tuning}; {validation} validation rows, on which all results below are
  measured; temperatures and thresholds fitted on {fitted}. Seed {seed}, learning rate {rate:g}.
- The metric is {metric}; costs are shares of the full model's layers, not time.

## Each exit alone

| layer | cost | {metric} | 95% interval |
| --- | --- | --- | --- |
{exits}

## Speed against {metric}

By the policy `{policy}`, read off the exact curve over all thresholds:

| mean cost | {metric} |
| --- | --- |
{curve}

## Use

```python
from sweet_jax import AdaptiveClassifier

classifier = AdaptiveClassifier.from_pretrained("this folder, or its hub id", cost=0.5)
predictions = classifier.predict([{example}])
predictions.labels, predictions.probabilities, predictions.exits, predictions.cost
```

The encoder alone, with every hidden state, loads as `transformers.AutoModel.from_pretrained(...)`
too. The results do not carry over to texts unlike those it was trained on; certificates of risk
and agreement hold for rows drawn as the calibration rows were.
"""


def model_card(
    results: Mapping[str, Any],
    *,
    model_type: str,
    classes: Sequence[str],
    text_columns: Sequence[str],
    max_length: int,
) -> str:
    """Returns the Markdown of README.md, for the best replica in the contents of results.json.

    Args:
      results: of the run.
      model_type: the encoder's, as Hugging Face names it.
      classes: their names.
      text_columns: one or two.
      max_length: in tokens.

    """
    best = results["replicas"][results["best_replica"]]
    return _CARD.format(
        **_describe_training(results),
        front="\n".join(_front_matter(results)),
        model_type=model_type,
        classes=", ".join(classes),
        columns="pairs of " + " and ".join(text_columns)
        if len(text_columns) == 2
        else text_columns[0],
        example='("a text", "another")' if len(text_columns) == 2 else '"a text"',
        max_length=max_length,
        exits="\n".join(
            f"| {row['layer']} | {row['cost']:.3f} | {row['score']:.4f} | "
            f"{row['interval'][0]:.4f} to {row['interval'][1]:.4f} |"
            for row in best["individual"]
        ),
        curve="\n".join(
            f"| {cost} | {score:.4f} |"
            for cost, score in best["at_cost"].items()
            if score is not None
        ),
    )


def _front_matter(results: Mapping[str, Any]) -> list[str]:
    """Returns the lines of YAML that the hub reads."""
    checkpoint = results["checkpoint"]
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", checkpoint) and not Path(checkpoint).exists()
    lines = ["library_name: sweet_jax", "pipeline_tag: text-classification"]
    lines += [f"base_model: {json.dumps(checkpoint)}"] if on_hub else []
    return [*lines, "tags:", "- early-exit", f"- {results['method']}"]


def _describe_training(results: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of _CARD that say how the model was trained."""
    best, count = results["replicas"][results["best_replica"]], results["n"]
    layers = [str(layer) for layer in results["exits"]]
    tuning = f", {count.get('tuning')} more that chose the learning rate and the saved state"
    held_out = f"{count['calibration']} rows held out of training"
    return {
        **{name: results[name] for name in ("task", "method", "checkpoint", "metric", "policy")},
        "layers": ", ".join(layers[:-1]) + " and " + layers[-1] if len(layers) > 1 else layers[0],
        "depth": layers[-1],
        "train": count["train"],
        "tuning": tuning if count.get("tuning") else "",
        "validation": count["validation"],
        "fitted": held_out
        if results["fitted_on"] == "held_out"
        else "the validation rows themselves",
        "seed": best["seed"],
        "rate": best["learning_rate"],
    }
