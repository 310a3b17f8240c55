"""The report's figures: small plots as SVG, in the colours of the page around them.

Text stays text, of a size that is legible on a phone, and colours are CSS variables, so that a page
has a dark mode; see ``COLOURS``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MINUS = "\N{MINUS SIGN}"
SMALL = (200, 165)
"""Size in px, at which text is 11 px high, of a panel of which a figure has many."""
MEDIUM = (300, 250)
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
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
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
    """One pair of axes with titles ``x`` and ``y``, and what is drawn in it; ``size`` in px."""

    def __init__(self, x: str, y: str, title: str = "", size: tuple[int, int] = MEDIUM):
        with rc_context(STYLE):
            self.figure = Figure(figsize=[side / 72 for side in size], layout="constrained")
            self.axes: Axes = self.figure.add_subplot()
            self.axes.set(xlabel=x, ylabel=y, title=title)
            for axis in (self.axes.xaxis, self.axes.yaxis):
                axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
                axis.set_major_formatter(lambda value, _: f"{value:,.6g}".replace("-", MINUS))
        self.label = title or f"{y} against {x}"

    def points(self, x: np.ndarray, y: np.ndarray, colour: str = BLUE, size: float = 5) -> None:
        """Dots at x, y [n] of so many px."""
        many = len(x) > MANY
        self.axes.plot(
            x,
            y,
            "o",
            color=colour,
            markersize=3 if many else size,
            markeredgewidth=0,
            alpha=0.2 if len(x) > DENSE else 0.45 if many else 0.65,
            rasterized=len(x) > DENSE,
        )

    def front(self, x: np.ndarray, y: np.ndarray, colour: str) -> None:
        """Points [n] by rising x, and a line that stays at each until the next, then to the end."""
        end = max(float(line.get_xdata().max()) for line in self.axes.lines)
        self.axes.step([*x, end], [*y, y[-1]], where="post", color=colour)
        self.axes.plot(x, y, "o", color=colour, markersize=7, markeredgewidth=0)

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


def option_panels(rows: Mapping[str, Sequence[Mapping]], label: str) -> list[Panel]:
    """The mean of something for every option of each choice, ``rows`` as of ``by_option``.

    Bars are twice the standard error. An option that a single architecture has is a hollow dot:
    nothing is known of its error.
    """
    panels = []
    for name, options in rows.items():
        kind, stage = name.rsplit(" ", 1)
        x = "blocks" if kind == "depth" else "% of full width"
        panel = Panel(x, label, f"stage {stage}: {kind}", SMALL)
        # Errors of rounding are none of the values'.
        mean = np.round([row["mean"] for row in options], 9)
        bars = np.array([2 * (row["standard_error"] or 0) for row in options])
        single = np.array([row["standard_error"] is None for row in options])
        places = np.array([row["option"] for row in options])
        panel.axes.errorbar(places, mean, bars, color=BLUE, capsize=3, marker="o", markersize=5)
        panel.axes.plot(places[single], mean[single], "o", color=BLUE, markerfacecolor=PAPER)
        panel.axes.set_xticks(places)
        panel.axes.yaxis.get_major_locator().set_params(nbins=4)
        panels.append(panel)
    limits = np.array([panel.axes.get_ylim() for panel in panels])
    for panel in panels:
        panel.axes.set_ylim(limits.min(), limits.max())
        if limits.min() < 0 < limits.max():
            panel.axes.axhline(0, color=INK, linestyle="--", linewidth=1)
    return panels
