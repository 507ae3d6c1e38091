"""`python -m nanochat <command>`: the command line for torchrun, which starts modules rather than scripts."""

import sys

from nanochat.cli import main

if __name__ == "__main__":
    sys.exit(main())
