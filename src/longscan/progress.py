"""A line of progress in a terminal, and how long things take in words."""

from __future__ import annotations

import math
import shutil
import sys
import time


class ProgressLine:
    """One line that redraws itself on a terminal, and plain lines now and then elsewhere."""

    def __init__(self, every: float = 10.0) -> None:
        self.live = sys.stdout.isatty()
        self.every = 0.2 if self.live else every
        self._last = -math.inf
        self._width = 0

    def due(self) -> bool:
        """Whether it is time to show something new."""
        return time.monotonic() - self._last >= self.every

    def show(self, share: float, text: str, keep: bool = False) -> None:
        """Draw the line; `keep` leaves it where it is and draws the next below."""
        self._last = time.monotonic()
        share = min(share, 1.0)
        if self.live:
            filled = round(share * 20)
            line = f"[{'=' * filled}{' ' * (20 - filled)}] {text}"
            # A line that wraps cannot be redrawn.
            line = line[: shutil.get_terminal_size().columns - 1]
            sys.stdout.write("\r" + line.ljust(self._width) + ("\n" if keep else ""))
            self._width = 0 if keep else len(line)
        else:
            sys.stdout.write(f"{share:4.0%}  {text}\n")
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """A line of its own that stays."""
        if self.live and self._width:
            sys.stdout.write("\r" + " " * self._width + "\r")
        print(text, flush=True)
        self._width = 0


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, s = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"
