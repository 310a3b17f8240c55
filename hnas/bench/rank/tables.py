"""The tables and plots of ``hnas.bench.rank``: finalists on what is held out, and all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hnas.base.files import replacing, write_json
from hnas.bench.rank.methods import RECIPE_SCORES
from hnas.bench.rank.summary import STATISTICS, TAU
from hnas.ranking.plots import methods_plot

COLUMNS = {
    "finalists": (
        ("seen", "calibrated"),
        ("sealed", "calibrated"),
        ("held_out", "plain"),
        ("held_out", "calibrated"),
    ),
    "methods": (
        ("selection", "plain"),
        ("selection", "calibrated"),
        ("seen", "plain"),
        ("seen", "calibrated"),
    ),
}
"""What each table shows: tau-b on these parts by these scores; the last part also otherwise."""


def table(summary: Mapping, kind: str) -> str:
    """Markdown: tau-b by method, mean and standard error over seeds; one of ``COLUMNS``."""
    columns = COLUMNS[kind]
    last = columns[-1][0]
    heads = [f"{part.replace('_', '-')}, {scores}" for part, scores in columns]
    # The others are of the last part's calibrated scores.
    heads += ["abs. Pearson", "Spearman", "sd of scores, %", "seeds agree", "seeds", "seconds"]
    lines = [f"| method | what | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for name, own in compared(summary, last).items():
        cells = [shown(own[part][scores][TAU]) for part, scores in columns]
        used = own[last][RECIPE_SCORES]
        cells += [shown(used["abs_pearson"]), shown(used["spearman"])]
        cells += [number(used["score_sd"], 2), number(used["pearson_between_seeds"], 2)]
        cells += [str(own["seeds"]), number(own["seconds"], 0)]
        mark = " **(the former defaults)**" if name == summary["recipe"] else ""
        lines.append(f"| `{name}` | {own['about']}{mark} | {' | '.join(cells)} |")
    for name, own in summary["baselines"].items():
        taus = [number(own[part][TAU]) for part, _ in columns]
        others = [number(own[last][key]) for key in ("abs_pearson", "spearman")]
        lines.append(f"| {name} | no training | {' | '.join([*taus, *others])} {'| – ' * 4}|")
    limits = [number(summary["truth"][part]["ceiling"]) for part, _ in columns]
    lines.append(
        f"| ceiling | one seed of the ground truth against the others | {' | '.join(limits)} "
        f"{'| – ' * 6}|"
    )
    return "\n".join(lines) + "\n"


def compared(summary: Mapping, part: str) -> dict[str, Mapping]:
    """The methods that are scored on a part."""
    return {name: own for name, own in summary["methods"].items() if part in own}


def shown(value: Mapping) -> str:
    """Mean ± standard error; the latter only where there are several seeds."""
    error = "" if value["se"] is None else f" ± {number(value['se'])}"
    return number(value["mean"]) + error


def number(value: float | None, digits: int = 3) -> str:
    """A cell of a table; a dash where nothing is known."""
    return "–" if value is None else f"{value:.{digits}f}"


def plot(summary: Mapping, part: str) -> bytes:
    """PNG of all that is compared on a part."""
    methods: dict[str, Mapping[str, Sequence[float | None]]] = {
        name: {kind: own[part][kind][TAU]["seeds"] for kind in STATISTICS}
        for name, own in compared(summary, part).items()
    }
    plain = {name: own[part][TAU] for name, own in summary["baselines"].items()}
    where = part.replace("_", "-")
    return methods_plot(methods, plain, summary["truth"][part]["ceiling"], where)


def write_summary(summary: Mapping, folder: Path) -> None:
    """``summary.json``, and for finalists (where there are) and all methods a table and a plot.

    Raises:
        UserError: they cannot be written.
    """
    write_json(folder / "summary.json", summary)
    for kind, columns in COLUMNS.items():
        if any(part not in summary["truth"] for part, _ in columns):
            continue
        with replacing(folder / f"{kind}.md") as temporary:
            temporary.write_text(table(summary, kind), encoding="utf-8")
        with replacing(folder / f"{kind}.png") as temporary:
            temporary.write_bytes(plot(summary, columns[-1][0]))
