"""The tables and plots of ``hnas.bench.rank``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from hnas.base.files import replacing, write_json
from hnas.bench.rank.comparison import TAU
from hnas.bench.rank.estimates import STATISTICS
from hnas.bench.rank.methods import (
    CHANGES,
    COMPARED,
    LEARNING_RATES,
    LENGTHS,
    REFERENCE,
    find_method,
)
from hnas.ranking.plots import Bar, curves_plot, estimates_plot

HEADS = ("tau-b", "corrected", "Pearson", "Spearman")


def comparisons(summary: Mapping) -> Iterator[tuple[str, Mapping, str]]:
    """Of those that are finished, a name for files, the comparison, and which architectures."""
    where = {
        "final": (summary["final"], "final"),
        "changes": (summary["changes"], "selection"),
        **{f"changes_at_{rate}": (own, "selection") for rate, own in summary["changes_at"].items()},
        "improved": (summary["improved"], "final"),
        "breaking": (summary["breaking"], "selection"),
        "former": (summary["former"].get("held_out", {}), "seen and sealed"),
        "former_seen": (summary["former"].get("seen", {}), "seen"),
        "former_selection": (summary["former"].get("selection", {}), "selection"),
    }
    for name, (own, archs) in where.items():
        if "methods" in own:
            yield name, own, archs


def table(own: Mapping) -> str:
    """Markdown: correlations with their intervals, and what the reference leads by."""
    reference = own["methods"].get(own["reference"], {}).get("title", own["reference"])
    heads = ["method", *HEADS, f"lead of {reference}, tau-b", "p, Holm"]
    heads += ["sd of scores, %", "seeds agree", "learning rate", "seeds", "seconds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, method in own["methods"].items():
        title = f"{method['title']} **(the default)**" if is_default(name) else method["title"]
        lines.append(f"| {' | '.join([title, *cells(method)])} |")
    return "\n".join(lines) + "\n"


def is_default(name: str) -> bool:
    """Whether an entry is what the launchers do."""
    return name in (REFERENCE, CHANGES[0].title)


def cells(method: Mapping) -> list[str]:
    """A row but for its title."""
    if "diverged" in method:
        correlations = [f"{method['diverged']} of {method['seeds']} diverged", "–", "–", "–"]
    else:
        corrected = method[TAU]["corrected"]
        correlations = [estimate(method[name]) for name in STATISTICS]
        correlations.insert(1, estimate(corrected))
    lead = method.get("reference_leads_by", {}).get(TAU, {})
    return [
        *correlations,
        estimate(lead),
        probability(lead.get("p_holm")),
        number(method.get("score_sd"), 2),
        number(method.get("pearson_between_seeds"), 2),
        f"{method['rate']:g}" if method.get("rate") else "–",
        str(method["seeds"] or "–"),
        number(method.get("seconds"), 0),
    ]


def estimate(found: Mapping) -> str:
    """A value with the ends of its interval, where there is one."""
    if found.get("low") is None:
        return number(found.get("value"))
    return f"{number(found['value'])} [{number(found['low'])}, {number(found['high'])}]"


def probability(value: float | None) -> str:
    """A p-value's cell."""
    return "< 0.001" if value is not None and value < 0.001 else number(value)


def number(value: float | None, digits: int = 3) -> str:
    """A cell of a table; a dash where nothing is known."""
    return "–" if value is None else f"{value:.{digits}f}"


def methods_table() -> str:
    """Markdown: what is compared."""
    lines = ["| method | what | scored |", "|---|---|---|"]
    for name, method in COMPARED.items():
        mark = " **(the default)**" if name == REFERENCE else ""
        scored = "re-calibrated" if method.scores == "calibrated" else "as it is"
        lines.append(f"| `{name}`{mark} | {method.about} | {scored} |")
    return "\n".join(lines) + "\n"


def tuning_table(tuning: Mapping) -> str:
    """Markdown: tau-b of every learning rate."""
    rates = [f"{rate:g}" for rate in LEARNING_RATES]
    lines = [f"| method | {' | '.join(rates)} |", "|---" * (1 + len(rates)) + "|"]
    for name, choice in tuning.items():
        shown = [
            f"**{number(choice['taus'][rate])}**"
            if float(rate) == choice["chosen"]
            else number(choice["taus"][rate])
            for rate in rates
        ]
        lines.append(f"| `{name}` | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def plot(own: Mapping, where: str) -> bytes:
    """PNG of a comparison: tau-b of each with its interval, and every seed's."""
    bars = [
        Bar(
            f"{method['title']} (the default)" if is_default(name) else method["title"],
            method[TAU]["value"],
            method[TAU]["low"],
            method[TAU]["high"],
            method[TAU]["seed_values"] or (),
            is_default(name),
        )
        for name, method in own["methods"].items()
        if TAU in method
    ]
    label = f"tau-b with stand-alone accuracies, {where} architectures"
    return estimates_plot(bars, own["truth"]["best_tau"], label)


def length_plot(summary: Mapping) -> bytes:
    """PNG of what a longer stage 2 gives, at every learning rate at which the changes are done.

    Lengths are left out at which a supernet diverged.
    """
    parts = {"changes": summary["changes"], **summary["changes_at"]}
    curves, best = {}, None
    for own in parts.values():
        if "unfinished" in own:
            continue
        best, found = own["truth"]["best_tau"], {}
        for change in LENGTHS:
            method = own["methods"][change.title]
            if TAU in method and None not in method[TAU]["seed_values"]:
                found[find_method(change.method).stage2] = method[TAU]["seed_values"]
        rate = own["methods"][CHANGES[0].title]["rate"]
        curves[f"learning rate {rate:g}"] = found
    across = "length of stage 2, relative to the usual one; points: single supernets"
    return curves_plot(curves, best, across, "tau-b, selection architectures")


def write_summary(summary: Mapping, folder: Path) -> None:
    """``summary.json``, and a table and a plot of each comparison that is finished.

    Raises:
        UserError: they cannot be written.
    """
    write_json(folder / "summary.json", summary)
    tables = {"tuning": tuning_table(summary["tuning"])} if summary["tuning"] else {}
    plots = {}
    for name, own, where in comparisons(summary):
        tables[name] = table(own)
        plots[name] = plot(own, where)
    if summary["changes_at"] or "methods" in summary["changes"]:
        plots["length"] = length_plot(summary)
    for name, image in plots.items():
        with replacing(folder / f"{name}.png") as temporary:
            temporary.write_bytes(image)
    for name, text in tables.items():
        with replacing(folder / f"{name}.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
