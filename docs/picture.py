"""Draw docs/one-scan.svg: python docs/picture.py. Plain SVG: equal code gives equal files."""

from pathlib import Path

WIDTH, HEIGHT = 1000, 530
LEFT, RIGHT = 300, 930  # where the boxes of a row begin and end
BOX = 54  # their height
INK, FAINT, MAP, EDGE, STATE = "#1f2937", "#6b7280", "#dbeafe", "#3b82f6", "#ea580c"
SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉"

# words on the left, what they mean, label of a box, map of a box, number of boxes, top
ROWS = (
    ("tokens of a chunk", "matrix products", "x{}", "(a, u)", 8, 128),
    ("chunks of a shard", "a scan over states", "chunk {}", "(A, U)", 6, 262),
    ("shards of a sequence", "on one device or several", "shard {}", "(A, U)", 4, 396),
)


def text(x: float, y: float, words: str, size: int = 15, **style: str) -> str:
    style = {"fill": INK, "text_anchor": "start", **style}
    attributes = " ".join(f'{k.replace("_", "-")}="{v}"' for k, v in style.items())
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" {attributes}>{words}</text>'


def arrow(x0: float, x1: float, y: float) -> str:
    """A state on its way."""
    line = f'<line x1="{x0:g}" y1="{y:g}" x2="{x1 - 5:g}" y2="{y:g}" stroke-width="2.5"/>'
    head = f'<path d="M{x1:g} {y:g} l-8 -5 v10 z" stroke="none"/>'
    return f'<g stroke="{STATE}" fill="{STATE}">{line}{head}</g>'


def boxes(n: int) -> list[tuple[float, float]]:
    """Left and right ends of n boxes over the width of a row."""
    gap = 24
    width = (RIGHT - LEFT - (n - 1) * gap) / n
    return [(LEFT + i * (width + gap), LEFT + i * (width + gap) + width) for i in range(n)]


def row(what: str, how: str, label: str, inside: str, n: int, top: float) -> list[str]:
    middle = top + BOX / 2
    out = [
        text(40, middle - 3, what, 17, font_weight="600"),
        text(40, middle + 18, how, 14, fill=FAINT),
    ]
    ends = boxes(n)
    for i, (a, b) in enumerate(ends):
        number = str(i + 1) if " " in label else SUBSCRIPTS[i + 1]
        centre = (a + b) / 2
        out.append(
            f'<rect x="{a:g}" y="{top}" width="{b - a:g}" height="{BOX}" rx="7" '
            f'fill="{MAP}" stroke="{EDGE}" stroke-width="1.5"/>'
        )
        out.append(text(centre, middle - 5, label.format(number), 14, text_anchor="middle"))
        out.append(text(centre, middle + 16, inside, 14, text_anchor="middle", fill="#1d4ed8"))
    starts = [LEFT - 36, *(b for _, b in ends)]
    stops = [*(a for a, _ in ends), RIGHT + 36]
    out += [arrow(x0 + 2, x1 - 1, middle) for x0, x1 in zip(starts, stops, strict=True)]
    out.append(text(LEFT - 22, middle - 10, "S", 15, fill=STATE, text_anchor="middle"))
    out.append(text(RIGHT + 18, middle - 10, "S", 15, fill=STATE, text_anchor="middle"))
    return out


def zoom(top: float, below: float, box: tuple[float, float]) -> str:
    """A whole row is one box of the row below it."""
    y0, y1 = top + BOX + 3, below - 3
    return (
        f'<path d="M{LEFT} {y0:g} H{RIGHT} L{box[1]:g} {y1:g} H{box[0]:g} Z" fill="#f1f5f9"/>'
        f'<path d="M{LEFT} {y0:g} L{box[0]:g} {y1:g} M{RIGHT} {y0:g} L{box[1]:g} {y1:g}" '
        f'stroke="#94a3b8" stroke-dasharray="4 4" fill="none"/>'
    )


def picture() -> str:
    """The whole file."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" '
        "font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\">",
        "<title>One scan, three scales: tokens, chunks and shards are affine maps on a state"
        "</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="#ffffff"/>',
        text(40, 52, "One scan, three scales", 26, font_weight="700"),
        text(40, 84, "A stretch of tokens is a map on the state. Maps compose.", 15, fill=FAINT),
        text(960, 50, "S ← A·S + U", 20, text_anchor="end", fill="#1d4ed8"),
        text(
            960, 82, "(A₂, U₂) ∘ (A₁, U₁) = (A₂A₁, A₂U₁ + U₂)", 17,
            text_anchor="end", fill="#1d4ed8",
        ),
    ]  # fmt: skip
    for upper, lower, into in zip(ROWS, ROWS[1:], (2, 1), strict=False):
        parts.append(zoom(upper[-1], lower[-1], boxes(lower[-2])[into]))
    for one in ROWS:
        parts += row(*one)
    parts.append(
        text(
            40, HEIGHT - 32,
            "The state S is a value: save it and resume, keep it and roll back, share it and "
            "branch, or decode one token at a time.",
            15, fill=STATE,
        )
    )  # fmt: skip
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    path = Path(__file__).with_name("one-scan.svg")
    path.write_text(picture(), encoding="utf-8")
    print(f"wrote {path}")
