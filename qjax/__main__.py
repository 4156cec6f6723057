"""`python -m qjax` is `qjax`."""

import sys

from qjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
