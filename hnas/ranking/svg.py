"""Small plots as SVG: axes, points, lines, bars; drawn in the colours of the page around them.

Matplotlib's SVG turns text into outlines and knows no dark mode. Here text is text, of a size that
is legible on a phone, and colours are CSS variables; see ``COLOURS``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

MINUS = "\N{MINUS SIGN}"
DENSE = 3000
"""More points than this overlap so much that their density is shown instead."""
CELL = 6
"""Height and width of a density's cells, in px of the drawing."""
LEVELS = 5
RIGHT, TOP, BOTTOM = 10, 10, 38
DIGIT = 6.2
"""Width of a digit, at most, in text of 11 px."""

COLOURS = """
:root { --ink: #1d2330; --muted: #555d6b; --line: #dde1e7; --paper: #ffffff; --blue: #2563a8;
        --orange: #c14f1d; --warning: #fff4e5; }
@media (prefers-color-scheme: dark) {
:root { --ink: #e8eaef; --muted: #a4adba; --line: #333a45; --paper: #15181e; --blue: #74aef0;
        --orange: #f0935f; --warning: #3a2c1c; } }
"""
PLOTS = """
.plot { display: block; width: 100%; max-width: 27rem; height: auto; }
.plot text { font: 11px system-ui, sans-serif; fill: var(--muted); }
.plot .title { font-weight: 600; fill: var(--ink); }
.plot path { fill: none; stroke: var(--blue); stroke-width: 1.5; }
.plot .frame { stroke: var(--muted); stroke-width: 1; }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.plot .dots { stroke-linecap: round; stroke-width: 5; opacity: .65; }
.plot .many { stroke-width: 3; opacity: .45; }
.plot .ring { fill: var(--paper); }
.plot .marks { stroke-linecap: round; stroke-width: 7; }
.plot .second { stroke: var(--orange); }
.plot .guide { stroke: var(--ink); stroke-dasharray: 4 3; stroke-width: 1; }
.plot .area { fill: var(--blue); stroke: none; }
.plot .area.second { fill: var(--orange); }
.plot .band { opacity: .14; }
"""


@dataclass(frozen=True)
class Axis:
    """A range of numbers and where it is labelled.

    Attributes:
        low, high: its ends.
        ticks: values that get a label, with the label.
        title: what the numbers are, with their unit.
    """

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    title: str

    @classmethod
    def around(cls, values: np.ndarray, title: str, most: int = 5, pad: float = 0.04) -> Axis:
        """An axis for ``values`` [n], a little longer than their range, with round ticks."""
        low, high = float(np.min(values)), float(np.max(values))
        # All equal, or different by rounding errors only.
        least = 1e-9 * max(abs(low), abs(high), 1e-300)
        if high - low <= least:
            middle, room = (low + high) / 2, 0.05 * abs(high) or 1.0
            low, high = middle - room, middle + room
        room = pad * (high - low)
        return cls(low - room, high + room, round_ticks(low - room, high + room, most), title)

    @classmethod
    def of_options(cls, options: Sequence[float], title: str) -> Axis:
        """An axis with a tick at every option, each with room at its sides."""
        step = min(np.diff(options), default=1.0)
        ticks = [(float(option), f"{option:g}") for option in options]
        return cls(options[0] - 0.6 * step, options[-1] + 0.6 * step, ticks, title)


def round_ticks(low: float, high: float, most: int = 5) -> list[tuple[float, str]]:
    """At most ``most`` + 1 round numbers from ``low`` to ``high``, and how they are written.

    All with the same number of decimals, which is what the distance between them needs.
    """
    exponent = math.floor(math.log10((high - low) / most))
    step = next(
        f * 10.0**exponent for f in (1, 2, 5, 10) if (high - low) / (f * 10.0**exponent) <= most
    )
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(n * step, tick_text(n * step, decimals)) for n in range(first, last + 1)]


def tick_text(value: float, decimals: int) -> str:
    """A number with thousands marked; never a negative zero. Tiny ones have an exponent."""
    if decimals > 5:
        return f"{value:.3g}".replace("-", MINUS)
    return f"{round(value, decimals) + 0.0:,.{decimals}f}".replace("-", MINUS)


class Panel:
    """One pair of axes, and what is drawn in it.

    Args:
        x, y: the axes.
        title: above the plot.
        size: width and height in px, at which text is 11 px high.
    """

    def __init__(self, x: Axis, y: Axis, title: str = "", size: tuple[int, int] = (300, 250)):
        self.x, self.y, self.title = x, y, title
        self.width, self.height = size
        self._top = TOP + (16 if title else 0)
        # Room for the title, and the ticks' labels.
        self._left = 28 + DIGIT * max((len(label) for _, label in y.ticks), default=0)
        self._parts: list[str] = []

    def at(self, x, y) -> tuple[np.ndarray, np.ndarray]:
        """Where numbers [n] are drawn, in px from the upper left corner."""
        across = self.width - self._left - RIGHT
        down = self.height - self._top - BOTTOM
        share_x = (np.asarray(x, np.float64) - self.x.low) / (self.x.high - self.x.low)
        share_y = (np.asarray(y, np.float64) - self.y.low) / (self.y.high - self.y.low)
        return self._left + across * share_x, self.height - BOTTOM - down * share_y

    def path(self, kind: str, d: str) -> None:
        """Draw a path of the style ``kind``, the names of CSS classes."""
        self._parts.append(f'<path class="{kind}" d="{d}"/>')

    def points(self, x, y, kind: str = "dots") -> None:
        """Dots at x, y [n]; where they are very many, the density of them."""
        if len(x) > DENSE:
            self._density(*self.at(x, y))
            return
        if kind == "dots" and len(x) > 300:
            kind = "dots many"
        # Lines of no length, whose round ends are dots.
        self.path(
            kind, "".join(f"M{_px(a)} {_px(b)}h0" for a, b in zip(*self.at(x, y), strict=True))
        )

    def ring(self, x: float, y: float) -> None:
        """One hollow dot."""
        a, b = self.at(x, y)
        self.path("ring", f"M{_px(a - 3)} {_px(b)}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z")

    def line(self, x, y, kind: str = "line") -> None:
        """A line through x, y [n]."""
        places = [f"{_px(a)} {_px(b)}" for a, b in zip(*self.at(x, y), strict=True)]
        self.path(kind, "M" + "L".join(places))

    def steps(self, x, y, kind: str = "line") -> None:
        """A line that stays at a value until the next one [n], and then to the axis' end."""
        a, b = self.at(x, y)
        end = self.at(self.x.high, 0)[0]
        text = "".join(f"H{_px(p)}V{_px(q)}" for p, q in zip(a[1:], b[1:], strict=True))
        self.path(kind, f"M{_px(a[0])} {_px(b[0])}{text}H{_px(end)}")

    def area(self, left, right, low, high, kind: str = "area") -> None:
        """Rectangles between numbers [n] of both axes."""
        lefts, bottoms = self.at(left, low)
        rights, tops = self.at(right, high)
        boxes = zip(*map(np.atleast_1d, (lefts, tops, rights, bottoms)), strict=True)
        self.path(kind, "".join(_box(*box) for box in boxes))

    def error(self, x: float, low: float, high: float) -> None:
        """A vertical bar with ends."""
        a, (bottom, top) = self.at([x, x], [low, high])
        d = "".join(f"M{_px(a[0] - 3)} {_px(end)}h6" for end in (bottom, top))
        self.path("line", f"{d}M{_px(a[0])} {_px(bottom)}V{_px(top)}")

    def _density(self, a: np.ndarray, b: np.ndarray) -> None:
        columns, rows = (a // CELL).astype(int), (b // CELL).astype(int)
        cells, counts = np.unique(np.stack([columns, rows]), axis=1, return_counts=True)
        # As many levels as there are of the logarithm of the counts.
        level = np.log(counts) / max(math.log(counts.max()), 1e-9)
        level = np.minimum((level * LEVELS).astype(int), LEVELS - 1)
        for number in range(LEVELS):
            own = cells[:, level == number].T * CELL
            boxes = "".join(f"M{x} {y}h{CELL}v{CELL}h-{CELL}z" for x, y in own.tolist())
            if boxes:
                shade = 0.2 + 0.8 * number / (LEVELS - 1)
                self._parts.append(f'<path class="area" style="opacity:{shade:.2f}" d="{boxes}"/>')

    def svg(self, alone: bool = False) -> str:
        """The drawing; ``alone``: as a file, with its own colours."""
        left, right = self._left, self.width - RIGHT
        bottom = self.height - BOTTOM
        lines, texts = [], []
        for value, label in self.x.ticks:
            (a, _) = self.at(value, 0)
            texts.append(_text(a, bottom + 14, label, "middle"))
            lines.append(f"M{_px(a)} {bottom}v4")
        grid = ""
        for value, label in self.y.ticks:
            (_, b) = self.at(0, value)
            texts.append(_text(left - 6, b + 4, label, "end"))
            grid += f"M{_px(left)} {_px(b)}H{right}"
        texts.append(_text((left + right) / 2, self.height - 6, self.x.title, "middle"))
        middle = (self._top + bottom) / 2
        texts.append(
            f'<text text-anchor="middle" transform="translate(11 {_px(middle)}) rotate(-90)">'
            f"{escape(self.y.title)}</text>"
        )
        if self.title:
            texts.append(_text(left, 14, self.title, "start", "title"))
        frame = f"M{_px(left)} {self._top}V{bottom}H{right}{''.join(lines)}"
        style = f"<style>{COLOURS}{PLOTS}svg {{ background: var(--paper); }}</style>"
        style = style if alone else ""
        name = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
        label = escape(self.title or f"{self.y.title} against {self.x.title}")
        return (
            f'<svg class="plot"{name} role="img" aria-label="{label}" '
            f'viewBox="0 0 {self.width} {self.height}">{style}'
            f'<path class="grid" d="{grid}"/>{"".join(self._parts)}'
            f'<path class="frame" d="{frame}"/>{"".join(texts)}</svg>'
        )


def _px(value) -> str:
    """A coordinate to a tenth of a px."""
    return f"{float(value):.1f}".removesuffix(".0")


def _box(left, top, right, bottom) -> str:
    return f"M{_px(left)} {_px(top)}H{_px(right)}V{_px(bottom)}H{_px(left)}z"


def _text(x, y, text: str, anchor: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text{name} x="{_px(x)}" y="{_px(y)}" text-anchor="{anchor}">{escape(text)}</text>'
