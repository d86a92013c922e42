"""Trains and evaluates the model of `experiments.benchmarks.job` by a plain loop in torch.

    pip install -e ".[torch]"
    python -m experiments.benchmarks.torch_job --checkpoint=DIR --data_dir=DIR --padding=longest

Trains transformers' BertModel (SDPA attention) with exits on rows of SST-2: summed cross-entropy,
clipping per owner, fused AdamW without weight decay, linear decay to zero, float32. Then evaluates
all exits on the validation rows, sorted by length, in one batched pass. Rows are padded to
--max_length tokens ("max_length", as in the authors' release) or to the longest row of their batch
("longest"). The last line of the output is JSON. Imports no jax.

With --share, only that share of the steps is taken, but at least two. With --release_rows, the
release's evaluation is also timed on that many rows: batches of 1, padded to --max_length, once for
each of 11 thresholds, stopped at the exit. Its time is reported separately, as release_seconds.
"""

import json
import sys

from experiments.packages import check_torch
from sweet_jax.arguments import ArgumentParser, run_command


def main(argv: list[str] | None = None) -> None:
    """Trains and evaluates; prints the measurements as one line of JSON."""
    options = _make_parser().parse_args(argv)
    check_torch()
    from experiments.benchmarks.torch_training import run_job  # imports torch

    print(json.dumps(run_job(options)))


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser("experiments.benchmarks.torch_job", __doc__ or "")
    parser.add_argument("--checkpoint", required=True, help="folder of a BERT checkpoint")
    parser.add_argument(
        "--data_dir", required=True, help="folder with sst2/{train,validation}.parquet"
    )
    paddings = ("max_length", "longest")
    parser.add_argument("--padding", default="longest", choices=paddings, help="(default longest)")
    parser.add_argument("--max_length", type=int, default=256, help="tokens (default 256)")
    parser.add_argument("--exits", default="1,2,4,6", help="layers (default 1,2,4,6)")
    methods = ("sweet", "early_exit")
    parser.add_argument("--method", default="sweet", choices=methods, help="(default sweet)")
    parser.add_argument("--rows", type=int, default=5400, help="training rows (default 5400)")
    parser.add_argument("--epochs", type=int, default=2, help="(default 2)")
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch (default 16)")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="(default 3e-4)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps (default 1, all)")
    text = "validation rows of the release's evaluation (default 0, not timed)"
    parser.add_argument("--release_rows", type=int, default=0, help=text)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
