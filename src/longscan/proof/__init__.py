"""Proof of the GPU kernels on the machine at hand; see `longscan verify --ops`.

The library does not import this.
"""

from longscan.proof.case import Case
from longscan.proof.cases import CASES, cases
from longscan.proof.compare import LIMITS, limit, prove, worst
from longscan.proof.kernels import direct, public

__all__ = ["CASES", "LIMITS", "Case", "cases", "direct", "limit", "prove", "public", "worst"]
