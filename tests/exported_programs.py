"""Texts for the programs of an exported ONNX folder, and a check of their answers."""

import importlib.util
from pathlib import Path

import numpy as np

# ruff: noqa: RUF001 - characters of other scripts
UNUSUAL = (
    "",
    " ",
    "word1",
    "WORD1 Wörd1 word2.",
    "word3,word4 don't 1,234.5",
    "  before and after  ",
    "tab\tand\nline \x07bell",
    "naïve café – “quotes” …",
    "e\u0301 n\u0303 nbsp\u00a0 zero\u200bwidth",
    "ﬁne İstanbul ẞ ß Ⅳ ½ ٣٤٥",
    "東京は日本の首都です word5 한국어 텍스트",
    "हिन्दी ไทย \u202eעברית\u202c العربية",
    "😀😀 word6 👩\u200d👧",
    "ＦＵＬＬ ｗｉｄｔｈ a▁b",
    "[CLS] </s> [MASK]",
    "x" * 300,
    "word1 " * 200,
    "word7 " * 40 + "。",
)


def load_python(folder: Path):
    """run.py, as a program beside it would import it."""
    spec = importlib.util.spec_from_file_location("exported_run", folder / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same(found: list[dict], wanted, tolerance: float = 1e-4) -> None:
    """Answers of a program are `Predictions`."""
    assert [answer["exit"] for answer in found] == wanted.exits.tolist()
    assert [answer["label"] for answer in found] == wanted.labels.tolist()
    probabilities = [answer["probabilities"] for answer in found]
    np.testing.assert_allclose(probabilities, wanted.probabilities, atol=tolerance)
    np.testing.assert_allclose([answer["cost"] for answer in found], wanted.cost)
    largest = [answer["probability"] for answer in found]
    assert largest == [max(values) for values in probabilities]
