"""python -m sweet_jax.cli is the `sweet-jax` command."""

import sys

from sweet_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
