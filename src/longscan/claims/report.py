"""What bench/claims.csv says of the claims, for the pages of the mixers."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from longscan.claims import CLAIMS, Claim
from longscan.claims.results import Row
from longscan.cli import load

RECORDS = "claims.csv"  # beside bench/history.csv


@dataclass(frozen=True)
class Recorded:
    """The latest recorded run of a claim on one device; lines as they are in the file."""

    claim: Claim
    device: str
    lines: list[dict[str, str]]

    def verdict(self) -> tuple[bool, str]:
        """Whether the claim holds by these numbers, and a sentence."""
        rows = [
            Row(x["case"], x["mixer"], x["metric"], float(x["mean"]), x["published"], 0)
            for x in self.lines
        ]
        return load(self.claim.check)(rows)  # type: ignore[arg-type,misc,return-value]


def read_records(path: Path) -> list[Recorded]:
    """The latest run of every claim on every device, in the order of CLAIMS."""
    if not path.is_file():
        return []
    latest: dict[tuple[str, str], dict[tuple[str, str], dict[str, str]]] = {}
    with open(path, newline="", encoding="utf-8") as f:
        for line in csv.DictReader(f):
            key, what = (line["claim"], line["device"]), (line["case"], line["metric"])
            if what in latest.get(key, {}):  # once more: another run begins
                del latest[key]
            latest.setdefault(key, {})[what] = line
    return [
        Recorded(claim, device, list(lines.values()))
        for claim in CLAIMS.values()
        for (name, device), lines in latest.items()
        if name == claim.name
    ]
