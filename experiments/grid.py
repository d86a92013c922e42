r"""The whole grid of the SWEET paper: every task and method of a model, without a table.

  python -m experiments.grid --model=minilm-l6 --tasks=sst2,cola --data_dir=DIR
  python -m experiments.grid --list

A cell is one model, task and method with all its learning rates and seeds, which are replicas of
one compiled program (Multi-Model: one for each depth). What the cells measured goes into
OUTPUT/scores.csv, their full outputs stay in --workdir. A second start runs what is missing, a cell
stopped in the middle resumes from its checkpoint, and one that failed does not stop the others
(--retry runs it again). Tables and figures are of all tasks that OUTPUT has cells of, whichever
were asked for last.

The cells run one after the other in this process; with --engine=ray (pip install -e ".[cluster]")
side by side on the nodes of a Ray cluster, or on this machine's cores where none is given:

  python -m experiments.grid --model=bert-base --engine=ray --address=auto

All nodes must see this folder, --workdir, --data_dir and the checkpoint under the same paths.
"""

import functools
import sys

from experiments.options import method_cells
from experiments.runner import Script, main

SCRIPT = Script("grid", __doc__, method_cells, lambda options, records: [])
run = functools.partial(main, SCRIPT)

if __name__ == "__main__":
    sys.exit(run())
