"""The model card of a saved model."""

import json

from sweet_jax.report.model_card import model_card


def test_names_of_the_data_are_neither_html_nor_lines_of_markdown(fine_tuned):
    results = json.loads((fine_tuned[0] / "results.json").read_text())
    results["task"] = "</title><script>alert(4)</script>"
    classes = ["=cmd\nx: y", "<img src=x>"]
    card = model_card(
        results, model_type="bert", classes=classes, text_columns=["a`b"], max_length=32
    )
    assert "<script" not in card
    assert "<img" not in card
    assert "=cmd x: y, &lt;img src=x>. Reads a'b, at most 32 tokens" in card
