r"""Runs the whole grid of the SWEET paper, every task with every method, and makes no table.

  python -m experiments.grid --model=minilm-l6 --tasks=sst2,cola --data_dir=DIR
  python -m experiments.grid --list

A cell is one task and one method of a model, with all learning rates and seeds; these are the
replicas of one compiled program (for Multi-Model, one program for each depth). The metrics of the
cells are written to OUTPUT/scores.csv, and their full outputs to --workdir. When the command is run
again, it runs the missing cells, and a cell that was interrupted resumes from its checkpoint. A
cell that fails does not stop the others; --retry runs it again. The tables and figures of the other
scripts show every task that OUTPUT has cells of, not only those of the last command.

By default, the cells run one after the other in this process. With --engine=ray (pip install -e
".[cluster]"), they run in parallel on the nodes of a Ray cluster or, without --address, on the
cores of this machine:

  python -m experiments.grid --model=bert-base --engine=ray --address=auto

All nodes must find this folder, --workdir, --data_dir and the checkpoint at the same paths.

Cost: hours on 2 cores for minilm-l6; the paper's models need a GPU or TPU.
"""

import functools
import sys

from experiments.options import method_cells
from experiments.runner import Script, main

SCRIPT = Script("grid", __doc__, method_cells, lambda options, records: [])
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
