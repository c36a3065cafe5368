"""One sequence on many devices: the same segment maps, from rank to rank.

from longscan.parallel import SequenceParallel
"""

from longscan.parallel.sequence import SequenceParallel
from longscan.parallel.shards import Shards
from longscan.parallel.wire import Traffic

__all__ = ["SequenceParallel", "Shards", "Traffic"]
