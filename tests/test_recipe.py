"""Tests of the study of recipes: its committed page and its options."""

import shutil
from pathlib import Path

import pytest

from experiments import recipe

RESULTS = Path(__file__).parents[1] / "experiments" / "results" / "recipe"


def test_committed_page_and_scores_equal_those_rendered_from_records(tmp_path):
    shutil.copytree(RESULTS / "cells", tmp_path / "cells")
    assert recipe.main(["--render_only", f"--output={tmp_path}"]) == 0
    for name in ("README.md", "scores.csv"):
        assert (tmp_path / name).read_bytes() == (RESULTS / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cells=sst2-50", "--render_only"], "unknown cell 'sst2-50': did you mean 'sst2-500'?"),
        (["--variants=recip"], "unknown variant 'recip': did you mean 'recipe'?"),
        ([], "set --data_dir and --text_dir, or --render_only"),
    ],
)
def test_invalid_options_are_refused(arguments, words, tmp_path, capsys):
    assert recipe.main([*arguments, f"--output={tmp_path}"]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
