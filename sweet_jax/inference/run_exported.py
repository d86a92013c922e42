"""Runs an exported model; needs jax (and flatbuffers, which jax.export reads with) and numpy.

python run.py tokens.npz: input_ids and token_type_ids int [N, L], tokens int [N] (how many of L),
ids padded with the pad_id in model.json. Prints a label, a probability and a layer for each text.

Shape letters: N texts, L length, H hidden, C classes.
"""

import json
import sys
from pathlib import Path

import jax.export
import numpy as np


def softmax(logits, temperature):
    """Returns the softmax of logits [N, C] / temperature, float64; NaN for no temperature."""
    scaled = np.asarray(logits, np.float64) / (temperature or np.nan)
    exponents = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def predict(folder, input_ids, token_type_ids, tokens):
    """Returns (class int [N], probability float [N], layer int [N]) of the exit each text takes."""
    about = json.loads((Path(folder) / "model.json").read_text())
    values = np.load(Path(folder) / "parameters.npz", allow_pickle=False)
    rows, h = np.arange(len(tokens)), None  # the texts that have not exited; h [rows, L, H]
    found = [np.zeros(len(tokens), int), np.zeros(len(tokens)), np.zeros(len(tokens), int)]
    for stage in about["stages"]:
        program = jax.export.deserialize((Path(folder) / stage["program"]).read_bytes())
        params = [values[name] for name in stage["parameters"]]
        inputs = (input_ids[rows], token_type_ids[rows]) if stage["embeds"] else (h,)
        h, logits = program.call(params, tokens[rows], *inputs)
        probabilities = softmax(logits, stage["temperature"] or 1)  # [rows, C]
        # Below 1, so that a threshold of 1 sends every text to the last exit.
        confidence = softmax(logits, stage["score_temperature"]).max(axis=1)
        confidence = np.minimum(confidence, np.nextafter(1, 0))
        exits = (confidence >= about["threshold"]) | (stage is about["stages"][-1])
        found[0][rows[exits]] = probabilities.argmax(axis=1)[exits]
        found[1][rows[exits]] = probabilities.max(axis=1)[exits]
        found[2][rows[exits]] = stage["layer"]
        rows, h = rows[~exits], h[~exits]
        if not len(rows):
            break
    return found


def read(path, length):
    """Reads input_ids and token_type_ids int32 [N, L] and tokens int32 [N], L being `length`.

    Raises ValueError, or what numpy raises for a file that is no .npz.
    """
    names = ("input_ids", "token_type_ids", "tokens")
    with np.load(path, allow_pickle=False) as texts:
        if missing := [name for name in names if name not in texts]:
            raise ValueError(f"it has no {missing[0]}")
        arrays = [np.asarray(texts[name], np.int32) for name in names]
    for name, array, rest in zip(names, arrays, ((length,), (length,), ()), strict=True):
        if array.shape != (len(arrays[2]), *rest):
            wanted = ", ".join(map(str, (len(arrays[2]), *rest)))
            raise ValueError(f"{name} must be [{wanted}]; got {list(array.shape)}")
    return arrays


if __name__ == "__main__":
    here = Path(__file__).parent
    about = json.loads((here / "model.json").read_text())
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    try:
        arrays = read(sys.argv[1], about["length"])
    except Exception as error:  # a file that is no .npz can break its reader in any way
        print(f"error: {sys.argv[1]}: {error}", file=sys.stderr)
        sys.exit(2)
    for label, probability, layer in zip(*predict(here, *arrays), strict=True):
        print(about["classes"][label], f"{probability:.4f}", layer)
