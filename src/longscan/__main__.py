"""python -m longscan: the same as the longscan command."""

import sys

from longscan.cli import main

if __name__ == "__main__":
    sys.exit(main())
