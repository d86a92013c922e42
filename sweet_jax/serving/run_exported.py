"""Runs an exported model; needs jax (and flatbuffers, which jax.export reads with) and numpy.

python run.py tokens.npz: input_ids and token_type_ids int [N, L], tokens int [N] (how many of L),
ids padded with the pad_id in model.json. Prints a label, a probability and a layer for each text.
"""

import json
import sys
from pathlib import Path

import jax.export
import numpy as np


def softmax(logits, temperature):
    """Of logits / temperature, float64 [N, C]; NaN for no temperature."""
    scaled = np.asarray(logits, np.float64) / (temperature or np.nan)
    shares = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def predict(folder, input_ids, token_type_ids, tokens):
    """(class int [N], probability [N], layer int [N]) of each text, where it left."""
    about = json.loads((Path(folder) / "model.json").read_text())
    values = np.load(Path(folder) / "parameters.npz", allow_pickle=False)
    rows, h = np.arange(len(tokens)), None  # the texts still on their way
    found = [np.zeros(len(tokens), int), np.zeros(len(tokens)), np.zeros(len(tokens), int)]
    for stage in about["stages"]:
        program = jax.export.deserialize((Path(folder) / stage["program"]).read_bytes())
        params = [values[name] for name in stage["parameters"]]
        given = (input_ids[rows], token_type_ids[rows]) if stage["embeds"] else (h,)
        h, logits = program.call(params, tokens[rows], *given)
        shares = softmax(logits, stage["temperature"] or 1)
        # Below 1, so that a threshold of 1 sends every text to the last exit.
        score = np.minimum(softmax(logits, stage["score_temperature"]).max(1), np.nextafter(1, 0))
        leaves = (score >= about["threshold"]) | (stage is about["stages"][-1])
        found[0][rows[leaves]] = shares.argmax(axis=1)[leaves]
        found[1][rows[leaves]] = shares.max(axis=1)[leaves]
        found[2][rows[leaves]] = stage["layer"]
        rows, h = rows[~leaves], h[~leaves]
        if not len(rows):
            break
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit(__doc__)
    here, texts = Path(__file__).parent, np.load(sys.argv[1], allow_pickle=False)
    classes = json.loads((here / "model.json").read_text())["classes"]
    arrays = [np.asarray(texts[k], np.int32) for k in ("input_ids", "token_type_ids", "tokens")]
    for label, probability, layer in zip(*predict(here, *arrays), strict=True):
        print(classes[label], f"{probability:.4f}", layer)
