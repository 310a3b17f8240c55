"""The report's figures: small plots as SVG, in the colours of the page around them.

Text stays text, of a size that is legible on a phone, and colours are CSS variables, so that a page
has a dark mode; see ``COLOURS``.
"""

from __future__ import annotations

import io
import re
from html import escape

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MINUS = "\N{MINUS SIGN}"
SIZE = (300, 250)
"""Of a panel in px, at which text is 11 px high."""
MANY, DENSE = 300, 3000
"""More points than these are drawn fainter, and as an image."""
INK, MUTED, LINE, PAPER = "#1d2330", "#555d6b", "#dde1e7", "#ffffff"
BLUE, ORANGE = "#2563a8", "#c14f1d"
LIGHT = {
    "ink": INK, "muted": MUTED, "line": LINE, "paper": PAPER, "blue": BLUE, "orange": ORANGE
}  # fmt: skip
COLOURS = f"""
:root {{ {" ".join(f"--{name}: {colour};" for name, colour in LIGHT.items())} --warning: #fff4e5; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e8eaef; --muted: #a4adba; --line: #333a45; --paper: #15181e; --blue: #74aef0;
          --orange: #f0935f; --warning: #3a2c1c; }}
}}
"""
STYLE = {
    "svg.fonttype": "none",
    # Equal figures are equal files.
    "svg.hashsalt": "PiNAS",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.linewidth": 1.5,
    "figure.dpi": 72,
    "savefig.dpi": 144,
    "savefig.transparent": True,
}


class Panel:
    """One pair of axes with titles ``x`` and ``y``, and what is drawn in it."""

    def __init__(self, x: str, y: str):
        with rc_context(STYLE):
            self.figure = Figure(figsize=[side / 72 for side in SIZE], layout="constrained")
            self.axes: Axes = self.figure.add_subplot()
            self.axes.set(xlabel=x, ylabel=y)
            for axis in (self.axes.xaxis, self.axes.yaxis):
                axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
                axis.set_major_formatter(lambda value, _: f"{value:,.6g}".replace("-", MINUS))
        self.label = f"{y} against {x}"

    def points(self, x: np.ndarray, y: np.ndarray) -> None:
        """Dots at x, y [n] of so many px."""
        many, dense = len(x) > MANY, len(x) > DENSE
        alpha = 0.2 if dense else 0.45 if many else 0.65
        dots = {"color": BLUE, "markersize": 3 if many else 5, "markeredgewidth": 0}
        self.axes.plot(x, y, "o", **dots, alpha=alpha, rasterized=dense)

    def front(self, x: np.ndarray, y: np.ndarray) -> None:
        """Points [n] by rising x, and a line that stays at each until the next, then to the end."""
        end = max(float(line.get_xdata().max()) for line in self.axes.lines)
        self.axes.step([*x, end], [*y, y[-1]], where="post", color=ORANGE)
        self.axes.plot(x, y, "o", color=ORANGE, markersize=7, markeredgewidth=0)

    def svg(self) -> str:
        """The drawing, in the colours of the page around it."""
        file = io.BytesIO()
        with rc_context(STYLE):
            self.figure.savefig(file, format="svg", metadata={"Date": None})
        text = file.getvalue().decode()
        text = re.sub("<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
        for name, colour in LIGHT.items():
            text = text.replace(colour, f"var(--{name})")
        text = text.replace("'DejaVu Sans'", "system-ui, sans-serif")
        head, body = text.split(">", 1)
        size = re.search('viewBox="[^"]*"', head)[0]
        label = f'class="plot" role="img" aria-label="{escape(self.label)}"'
        return f"<svg {label} {size}>{body}"
