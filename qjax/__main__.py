"""`python -m qjax` is `qjax`."""

import sys

from qjax.cli import command

if __name__ == "__main__":
    sys.exit(command())
