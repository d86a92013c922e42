"""One GLUE task.

python -m sweet_jax.main --config=configs/glue.py:mrpc --workdir=runs/mrpc
"""

import ml_collections


def get_config(task: str = "sst2") -> ml_collections.ConfigDict:
    """The paper's protocol for BERT-base."""
    return ml_collections.ConfigDict({"task": task})
