"""The model card: what a saved model is, how good at what cost, and how to use it."""

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
method `{method}`, so that it can answer after {layers} of its {depth} layers and stop at the first
exit that is sure.

- Task: {task}; classes: {classes}. Reads {columns}, at most {max_length} tokens.
- Data: {train} training rows{tuning}; {validation} validation rows, which all scores below are of;
  temperatures and dials fitted on {fitted}. Seed {seed}, learning rate {rate:g}.
- Scores are {metric}; costs are shares of the full model's layers, not time.

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
found = classifier.predict([{example}])
found.labels, found.probabilities, found.exits, found.cost
```

The encoder alone, with every hidden state, loads as `transformers.AutoModel.from_pretrained(...)`
too. The scores say nothing of texts unlike those it was trained on; certificates of a dial hold for
rows drawn as the calibration rows were.
"""


def model_card(
    results: Mapping[str, Any],
    *,
    model_type: str,
    classes: Sequence[str],
    text_columns: Sequence[str],
    max_length: int,
) -> str:
    """The Markdown of README.md, of the best replica in the contents of results.json."""
    best = results["replicas"][results["best_replica"]]
    checkpoint = results["checkpoint"]
    on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", checkpoint) and not Path(checkpoint).exists()
    held_out = results["fitted_on"] == "held_out"
    front = ["library_name: sweet_jax", "pipeline_tag: text-classification"]
    front += [f"base_model: {json.dumps(checkpoint)}"] if on_hub else []
    front += ["tags:", "- early-exit", f"- {results['method']}"]
    layers = [str(layer) for layer in results["exits"]]
    pair = len(text_columns) == 2
    return _CARD.format(
        front="\n".join(front),
        task=results["task"],
        layers=", ".join(layers[:-1]) + " and " + layers[-1] if len(layers) > 1 else layers[0],
        depth=layers[-1],
        model_type=model_type,
        checkpoint=checkpoint,
        method=results["method"],
        classes=", ".join(classes),
        columns="pairs of " + " and ".join(text_columns) if pair else text_columns[0],
        max_length=max_length,
        train=results["n"]["train"],
        tuning=f", {tuned} more that chose the learning rate and the state that was kept"
        if (tuned := results["n"].get("tuning"))
        else "",
        validation=results["n"]["validation"],
        fitted=f"{results['n']['calibration']} rows held out of training"
        if held_out
        else "the validation rows themselves",
        seed=best["seed"],
        rate=best["learning_rate"],
        metric=results["metric"],
        policy=results["policy"],
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
        example='("a text", "another")' if pair else '"a text"',
    )
