"""python -m longscan.proof: as `longscan verify --ops`, for one kernel or all."""

import sys

from longscan.proof.command import main

sys.exit(main(sys.argv[1:]))
