"""Runs an exported model; needs only numpy, jax, and flatbuffers, which jax.export requires.

python run.py tokens.npz

The file holds input_ids and token_type_ids int [N, L], padded with the pad_id in model.json, and
tokens int [N], the number of tokens of each text. If model.json has "pairs": true, it also holds
second_start int [N], the index of the second text's first token.

Prints a label, a probability and a layer for each text. For a multi-label model, these are the
labels as a|b and the probability of the least certain one; for a regression, the number and nan.

Shape letters: N texts, L length, H hidden, C classes.
"""

import json
import sys
from pathlib import Path

import jax.export
import numpy as np


def softmax(logits, temperature):
    """Returns the softmax of logits [N, C] / temperature, float64; NaN if temperature is None."""
    scaled = np.asarray(logits, np.float64) / (temperature or np.nan)
    exponents = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def read_outputs(about, stage, logits, before):
    """Returns (answers, probability [N], exit confidence [N]) for the logits [N, C] of a stage.

    Answers are classes int [N], labels bool [N, C] or numbers [N]; `before` holds the answers of
    the previous exit, or is None.
    """
    objective = about.get("objective", "single_label")
    if objective == "single_label":
        probabilities = softmax(logits, stage["temperature"] or 1)  # [N, C]
        answers, probability = probabilities.argmax(axis=1), probabilities.max(axis=1)
        return answers, probability, softmax(logits, stage["score_temperature"]).max(axis=1)
    logits = np.asarray(logits, np.float64)
    if objective == "regression":
        values = logits[:, 0]
        change = np.inf if before is None else np.abs(values - before)
        return values, np.full(len(values), np.nan), np.full(len(values), 1.0) / (1 + change)
    margins = np.abs(logits)  # [N, C], how far each label is from being decided the other way
    probability = 1 / (1 + np.exp(-margins.min(axis=1) / (stage["temperature"] or 1)))
    sure = 1 / (1 + np.exp(-margins / (stage["score_temperature"] or np.nan)))
    least = about["policy"] == "min_confidence"
    return logits > 0, probability, sure.min(axis=1) if least else sure.mean(axis=1)


def predict(folder, input_ids, token_type_ids, tokens, *second_start):
    """Returns (answer, probability float [N], layer int [N]) of the exit that each text takes.

    Answers are classes int [N]; for multi-label, labels bool [N, C]; for regression, float [N].
    """
    about = json.loads((Path(folder) / "model.json").read_text(encoding="utf-8"))
    values = np.load(Path(folder) / "parameters.npz", allow_pickle=False)
    # The texts that have not exited; their hidden states h [rows, L, H].
    rows, h, before = np.arange(len(tokens)), None, None
    empty = {
        "multi_label": np.zeros((len(tokens), len(about["classes"])), bool),
        "regression": np.zeros(len(tokens)),
    }
    answers = empty.get(about.get("objective"), np.zeros(len(tokens), int))
    found = [answers, np.zeros(len(tokens)), np.zeros(len(tokens), int)]
    for stage in about["stages"]:
        program = jax.export.deserialize((Path(folder) / stage["program"]).read_bytes())
        params = [values[name] for name in stage["parameters"]]
        inputs = [input_ids[rows], token_type_ids[rows]] if stage["embeds"] else [h]
        inputs += [starts[rows] for starts in second_start]
        h, logits = program.call(params, tokens[rows], *inputs)
        given, probability, confidence = read_outputs(about, stage, logits, before)
        # Below 1, so that a threshold of 1 sends every text to the last exit.
        confidence = np.minimum(confidence, np.nextafter(1, 0))
        exits = (confidence >= about["threshold"]) | (stage is about["stages"][-1])
        found[0][rows[exits]] = given[exits]
        found[1][rows[exits]] = probability[exits]
        found[2][rows[exits]] = stage["layer"]
        rows, h, before = rows[~exits], h[~exits], given[~exits]
        if not len(rows):
            break
    return found


def read(path, length, pairs=False):
    """Reads input_ids and token_type_ids int32 [N, L] and tokens int32 [N]; L is `length`.

    With `pairs`, it also reads second_start int32 [N]. Raises ValueError for missing or misshapen
    arrays, and whatever numpy raises for a file that is not .npz.
    """
    names = ("input_ids", "token_type_ids", "tokens", *(["second_start"] if pairs else []))
    with np.load(path, allow_pickle=False) as texts:
        if missing := [name for name in names if name not in texts]:
            raise ValueError(f"the array {missing[0]} is missing")
        arrays = [np.asarray(texts[name], np.int32) for name in names]
    for name, array in zip(names, arrays, strict=True):
        rest = (length,) if name.endswith("ids") else ()
        if array.shape != (len(arrays[2]), *rest):
            wanted = ", ".join(map(str, (len(arrays[2]), *rest)))
            raise ValueError(f"{name} must have shape [{wanted}]; got {list(array.shape)}")
    return arrays


if __name__ == "__main__":
    here = Path(__file__).parent
    about = json.loads((here / "model.json").read_text(encoding="utf-8"))
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr] # a TextIOWrapper here
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    try:
        arrays = read(sys.argv[1], about["length"], about.get("pairs", False))
    except Exception as error:  # numpy may raise any exception for a file that is not .npz
        print(f"error: {sys.argv[1]}: {error}", file=sys.stderr)
        sys.exit(2)
    names = np.asarray(about["classes"])
    for given, probability, layer in zip(*predict(here, *arrays), strict=True):
        if given.dtype == float:
            label = f"{given:g}"
        else:
            label = "|".join(names[given]) if given.ndim else about["classes"][given]
        print(label, f"{probability:.4f}", layer)
