"""Runs an exported model; needs only numpy, onnxruntime and tokenizers.

python run.py [float32 | int8] < texts.jsonl

Each line is a text as a JSON string, or a pair of texts as a list of two. Prints a JSON line for
each: label, probability, exit (a layer), cost (share of all layers), probabilities of all classes.

Shape letters: B texts of a batch, L length, H hidden, C classes.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tokenizers
from onnxruntime import InferenceSession

BELOW_ONE = np.nextafter(1, 0)  # so that a threshold of 1 sends every text to the last exit
# Functions from (probabilities with temperature [B, C], probabilities without [B, C], learned
# scores [B]) to confidences [B]; a text with confidence NaN never exits early.
POLICIES = {
    "confidence": lambda p, raw, learned: p.max(axis=1),
    "raw_confidence": lambda p, raw, learned: raw.max(axis=1),
    "entropy": lambda p, raw, learned: 1 + (p * np.log(p + (p == 0))).sum(1) / np.log(p.shape[1]),
    "margin": lambda p, raw, learned: np.diff(np.sort(p, axis=1))[:, -1],
    "learning_to_exit": lambda p, raw, learned: learned,
}


def softmax(logits, temperature):
    """Returns the softmax of logits [B, C] / temperature, float64; NaN if temperature is None."""
    scaled = np.asarray(logits, np.float64) / (temperature or np.nan)
    exponents = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def read_row(row, number, pair):
    """Returns a text, or a pair of texts as a tuple. Raises ValueError for anything else."""
    parts = [row] if isinstance(row, str) else row
    texts = isinstance(parts, list | tuple) and all(isinstance(part, str) for part in parts)
    if not texts or len(parts) != 1 + pair:
        wanted = "a list of two texts" if pair else "a text"
        raise ValueError(f"row {number} must be {wanted}; got {row!a:.80}")
    try:
        "".join(parts).encode()
    except UnicodeEncodeError as error:
        what = "has an unpaired surrogate, which is not valid Unicode"
        raise ValueError(f"row {number} {what}: {row!a:.80}") from error
    return tuple(parts) if pair else parts[0]


class Classifier:
    """Classifies texts, or pairs of texts as lists of two."""

    def __init__(self, folder=Path(__file__).parent, precision="float32"):
        self.about = json.loads((Path(folder) / "model.json").read_text(encoding="utf-8"))
        self.plan = self.about["precisions"].get(precision)
        if not self.plan:
            names = ", ".join(self.about["precisions"])
            raise ValueError(f"this export has no precision {precision!r}: choose from {names}")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
            graphs = [f"{folder}/onnx/{name}" for name in self.plan["graphs"]]
            self.sessions = [InferenceSession(graph) for graph in graphs]
        except Exception as error:  # the libraries' exception types are not public
            where, reason = repr(str(folder)), " ".join(str(error).split())
            raise ValueError(f"cannot read {where} ({reason:.300}): export it again") from error
        self.tokenizer.encode_special_tokens = self.about["split_special_tokens"]
        self.tokenizer.enable_truncation(**self.about["truncation"])
        self.tokenizer.enable_padding(pad_id=self.about["pad_id"])

    def predict(self, rows, batch_size=32):
        """Returns a dict for each row, in their order. Raises ValueError, see `read_row`."""
        pair = len(self.about["text_columns"]) == 2
        rows = [read_row(row, number, pair) for number, row in enumerate(rows, start=1)]
        starts = range(0, len(rows), batch_size)
        return [answer for at in starts for answer in self._predict(rows[at : at + batch_size])]

    def _predict(self, rows):
        encoded, answers = self.tokenizer.encode_batch(rows), dict.fromkeys(range(len(rows)))
        read = {"input_ids": [row.ids for row in encoded], "place": range(len(rows))}
        read["token_type_ids"] = [row.type_ids for row in encoded]
        read["tokens"] = tokens = [sum(row.attention_mask) for row in encoded]
        ends = zip(encoded, tokens, strict=True)
        read["second_start"] = [[*row.sequence_ids[: n - 1], 1].index(1) for row, n in ends]
        values = {name: np.asarray(each, np.int32) for name, each in read.items()}  # [B, ...]
        every, first = (np.asarray([n]) for n in (values["input_ids"].shape[1], 1))
        for stage in self.plan["stages"]:
            for run in stage["runs"]:
                session = self.sessions[run["graph"]]
                given = values | {"count": first if run["first_token"] else every}
                given = {value.name: given[value.name] for value in session.get_inputs()}
                names = [value.name for value in session.get_outputs()]
                outputs = dict(zip(names, session.run(names, given), strict=True))
                if not run["first_token"] and "next_states" in outputs:
                    values["states"] = outputs["next_states"]  # [B, L, H]
            raw, scaled = (softmax(outputs["logits"], t) for t in (1, stage["temperature"]))
            policy, threshold = POLICIES[self.about["policy"]], self.plan["threshold"]
            confidence = np.clip(policy(scaled, raw, outputs.get("exit_scores")), 0, BELOW_ONE)
            leaves = confidence >= (np.inf if threshold is None else threshold)
            leaves |= stage is self.plan["stages"][-1]
            answered = raw if stage["temperature"] is None else scaled
            taken = {"exit": stage["layer"], "cost": stage["cost"]}
            for place, p in zip(values["place"][leaves], answered[leaves].tolist(), strict=True):
                label = {"label": self.about["classes"][np.argmax(p)], "probability": max(p)}
                answers[place] = label | taken | {"probabilities": p}
            if leaves.all():
                break
            values = {name: value[~leaves] for name, value in values.items()}
        return [*answers.values()]


if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(encoding="utf-8")  # type: ignore[union-attr] # a TextIOWrapper here
    try:
        rows = []
        for number, line in enumerate(sys.stdin, start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {line.strip()!a:.80}") from error
        for answer in Classifier(precision=[*sys.argv[1:], "float32"][0]).predict(rows):
            print(json.dumps(answer, ensure_ascii=False))
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
