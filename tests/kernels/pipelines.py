"""Loops of compiled kernels in which a load may overwrite what a product still reads.

Triton 3.6 on Hopper: a tile that a pipelined loop loads, and that is an operand of an asynchronous
product (wgmma) and is read by registers too, gets one buffer too few. The numbers are then wrong
now and then, in a few digits, which a proof may miss.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

ALLOC = re.compile(r"(%[\w#]+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")
VIEW = re.compile(r"(%[\w#]+) = ttg\.memdesc_\w+ (%[\w#]+)")
COPY = re.compile(r"async_copy_global_to_local %[\w#]+, (%[\w#]+)")
DOT = re.compile(r"ttng\.warp_group_dot (%[\w#]+), (%[\w#]+),")
WAIT = re.compile(r"warp_group_dot_wait .*pendings = (\d+)")


@dataclass
class _Buffers:
    """Shared memory: how many tiles each allocation has, what names stand for, copies so far."""

    tiles: dict[int, int] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    copies: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def read(self, at: int, line: str) -> tuple[str, list[int]] | None:
        """Take note of a line; a "copy" or "dot" with its allocations, or a "wait"."""
        if found := ALLOC.search(line):
            self.names[found[1]], self.tiles[at] = at, int(found[2])
        elif found := VIEW.search(line):
            if found[2] in self.names:  # else of something else; names are used again
                self.names[found[1]] = self.names[found[2]]
            else:
                self.names.pop(found[1], None)
        elif found := COPY.search(line):
            if found[1] in self.names:
                self.copies[self.names[found[1]]] += 1
                return "copy", [self.names[found[1]]]
        elif found := DOT.search(line):
            used = [self.names[n] for n in found.groups() if n in self.names]
            return ("dot" if "isAsync = true" in line else "wait", used)
        elif found := WAIT.search(line):
            return f"wait {found[1]}", []
        return None


def hazards(ttgir: str) -> list[str]:
    """What may go wrong in the innermost loops of a kernel, a line each."""
    lines, found, buffers = ttgir.split("\n"), [], _Buffers()
    at = 0
    while at < len(lines):
        end = _loop(lines, at)
        if end is None:
            buffers.read(at, lines[at])
            at += 1
            continue
        ahead = dict(buffers.copies)  # copies before the loop: how far it loads ahead
        steps = [buffers.read(i, lines[i]) for i in range(at + 1, end)]
        found += _walk([s for s in steps if s is not None], buffers.tiles, ahead, at)
        at = end
    return found


def _loop(lines: list[str], at: int) -> int | None:
    """Where the loop that begins on this line ends, if it holds no other loop."""
    if "scf.for" not in lines[at]:
        return None
    indent = len(lines[at]) - len(lines[at].lstrip())
    for i in range(at + 1, len(lines)):
        if "scf.for" in lines[i]:
            return None
        if lines[i].startswith(" " * indent + "}"):
            return i
    return None


def _walk(steps: list, tiles: dict[int, int], ahead: dict[int, int], line: int) -> list[str]:
    """Four rounds of a loop: which copy meets a product under way that reads the same tile."""
    under_way: list[tuple[int, list[int]]] = []
    found = set()
    for turn in range(4):
        for what, used in steps:
            if what == "dot":
                under_way.append((turn, used))
            elif what == "wait":
                under_way.clear()
            elif what.startswith("wait "):
                left = int(what[5:])
                under_way = under_way[len(under_way) - left :] if left else []
            else:
                for begun, operands in under_way:
                    n, far = tiles[used[0]], ahead.get(used[0], 0)
                    if used[0] in operands and (turn + far - begun) % n == 0:
                        found.add(f"loop at {line + 1}: {n} tiles, loads {far} ahead")
    return sorted(found)
