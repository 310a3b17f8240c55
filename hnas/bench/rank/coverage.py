"""How often the ranking bench's intervals hold, where what they should hold is known.

    python -m hnas.bench.rank.coverage --out docs/results/rank/coverage.json

Architectures, truths and supernets are made up: normal qualities; accuracies with noise of their
own; scores with deviations of their method (shared by its seeds), of their supernet, and rounded to
hits. Two methods are compared, whose deviations are partly the same.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from hnas.base.command_line import OneLineParser, read_path, whole_number
from hnas.base.errors import run_main
from hnas.base.files import check_output, write_json
from hnas.bench.rank.estimates import (
    STATISTICS,
    corrected_interval,
    difference,
    interval,
    reliability,
    subsets,
    within,
)

logger = logging.getLogger(__name__)

HITS = 20
"""Standard deviation of true qualities, in hits of 4,000 images."""


@dataclass(frozen=True)
class World:
    """Where architectures, truths and supernets are drawn from; the qualities' variance is 1.

    Attributes:
        architectures, truth_seeds, seeds: how many.
        truth_noise: standard deviation of a single truth seed's noise.
        truth_common: of how much a truth seed prefers some architectures, in all of them.
        deviation: of the two methods' preferences for single architectures.
        shared: share of their variance that both methods have.
        noise: of the two methods' single supernets, for single architectures.
        common: share of its variance that supernets of equal seeds have.
        preference: of how much a supernet prefers some architectures, in all of them.
    """

    architectures: int = 32
    truth_seeds: int = 8
    seeds: int = 8
    truth_noise: float = 0.7
    truth_common: float = 0.0
    deviation: tuple[float, float] = (0.3, 0.35)
    shared: float = 0.7
    noise: tuple[float, float] = (0.3, 0.4)
    common: float = 0.5
    preference: float = 0.05

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """Accuracies [truth seeds, n], two methods' scores [seeds, n], and true qualities [n]."""
        number, seeds = self.architectures, self.seeds
        quality, likes, both = rng.standard_normal((3, number))
        acc = quality + self.truth_noise * rng.standard_normal((self.truth_seeds, number))
        acc += self.truth_common * rng.standard_normal((self.truth_seeds, 1)) * likes
        same, same_preference = rng.standard_normal((seeds, number)), rng.standard_normal(seeds)
        scores = []
        for deviation, noise in zip(self.deviation, self.noise, strict=True):
            own = mixed(both, rng.standard_normal(number), self.shared)
            single = mixed(same, rng.standard_normal((seeds, number)), self.common)
            preference = mixed(same_preference, rng.standard_normal(seeds), self.common)
            score = quality + deviation * own + noise * single
            score += self.preference * preference[:, None] * likes
            scores.append(np.rint(HITS * score))
        return acc, scores, quality


def mixed(one: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """The sum of two standard normals of which the first has this share of the variance."""
    return np.sqrt(share) * one + np.sqrt(1 - share) * other


ANNOUNCED = World()
WORLDS = {
    "as announced, 8 seeds": ANNOUNCED,
    "as announced, 5 seeds": replace(ANNOUNCED, seeds=5),
    "equally good methods": replace(ANNOUNCED, deviation=(0.3, 0.3), noise=(0.4, 0.4), seeds=5),
    "unlike methods": replace(ANNOUNCED, deviation=(0.2, 0.8), noise=(0.2, 0.6), seeds=5),
    "supernets of different taste": replace(ANNOUNCED, preference=0.3, seeds=5),
    "truth seeds of different taste": replace(ANNOUNCED, truth_common=0.5, seeds=5),
    "what moves tau: 16 architectures, 2 seeds": replace(
        ANNOUNCED, architectures=16, truth_seeds=6, seeds=2
    ),
    "former: 48 architectures, 3 truth seeds": replace(ANNOUNCED, architectures=48, truth_seeds=3),
}


def expected(world: World, rng: np.random.Generator, draws: int) -> dict[str, np.ndarray]:
    """What is estimated, by drawing often: both methods' correlations.

    Returns:
        By statistic [2, 2]: for each method with the truth, and with the qualities.
    """
    every = np.ones((1, world.architectures))
    sums = {name: np.zeros((2, 2)) for name in STATISTICS}
    for _ in range(draws):
        acc, scores, quality = world.draw(rng)
        for name, statistic in STATISTICS.items():
            for index, own in enumerate(scores):
                for column, truth in enumerate((acc.mean(axis=0), quality)):
                    taus = [statistic.within(every, row, truth)[0] for row in own]
                    sums[name][index, column] += np.mean(taus)
    return {name: total / draws for name, total in sums.items()}


def bootstrapped(
    acc: np.ndarray, scores: Sequence[np.ndarray], rng: np.random.Generator, resamples: int = 200
) -> np.ndarray:
    """Mean tau-b of methods in a hierarchical bootstrap [methods, resamples].

    Architectures, truth seeds and supernet seeds are drawn with replacement, for all methods the
    same; copies of an architecture are tied with each other, which tau-b leaves out.
    """
    seeds, number = scores[0].shape

    def signs(values: np.ndarray) -> np.ndarray:
        return np.sign(values[..., :, None] - values[..., None, :])

    times = rng.multinomial(number, np.full(number, 1 / number), resamples).astype(np.float64)
    truth = acc[rng.integers(0, len(acc), (resamples, len(acc)))].mean(axis=1)
    drawn = rng.integers(0, seeds, (resamples, seeds))
    weights = times[:, :, None] * times[:, None, :]
    true = signs(truth)
    untied = (weights * np.abs(true)).sum(axis=(1, 2))
    flat, signed = weights.reshape(resamples, -1), (weights * true).reshape(resamples, -1)
    result = []
    for own in map(signs, scores):
        own = own.reshape(seeds, -1)
        taus = signed @ own.T / np.sqrt(untied[:, None] * (flat @ np.abs(own).T))
        result.append(np.take_along_axis(taus, drawn, axis=1).mean(axis=1))
    return np.array(result)


def coverage(world: World, trials: int, draws: int, seed: int) -> dict:
    """Shares of 95 % intervals that hold what is estimated.

    Returns:
        By statistic those of ``correlation``, ``corrected`` and ``difference``; for tau-b also of
        a ``bootstrap``'s.
    """
    rng = np.random.default_rng(seed)
    true = expected(world, rng, draws)
    number = world.architectures
    kinds = ("correlation", "corrected", "difference")
    held = {name: dict.fromkeys(kinds, 0) for name in STATISTICS}
    percentile = dict.fromkeys(("correlation", "difference"), 0)
    for _ in range(trials):
        acc, scores, _ = world.draw(rng)
        share = reliability(subsets(number), acc)
        for name, statistic in STATISTICS.items():
            own, other = (within(statistic, score, acc.mean(axis=0)) for score in scores)
            (raw, pure), (rival, _) = true[name]
            found = (
                (interval(own, number), raw),
                (corrected_interval(statistic, own, share, number), pure),
                (difference(statistic, own, other, number), raw - rival),
            )
            for kind, (ends, value) in zip(kinds, found, strict=True):
                held[name][kind] += ends["low"] <= value <= ends["high"]
        first, second = bootstrapped(acc, scores, rng)
        (raw, _), (rival, _) = true["kendall_tau_b"]
        for kind, taus, value in (
            ("correlation", first, raw),
            ("difference", first - second, raw - rival),
        ):
            low, high = np.quantile(taus, [0.025, 0.975])
            percentile[kind] += bool(low <= value <= high)
    shares = {
        name: {kind: count / trials for kind, count in own.items()} for name, own in held.items()
    }
    return {
        "world": asdict(world),
        "expected_tau": [round(float(tau), 4) for tau in true["kendall_tau_b"][:, 0]],
        **shares,
        "bootstrap": {kind: count / trials for kind, count in percentile.items()},
    }


def main(argv=None) -> None:
    parser = OneLineParser(
        prog="python -m hnas.bench.rank.coverage", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=read_path, required=True, help="JSON file of the shares")
    parser.add_argument(
        "--trials",
        type=whole_number(1, 10**6),
        default=1000,
        help="of each made-up world [default %(default)s]",
    )
    options: argparse.Namespace = parser.parse_args(argv)
    check_output(options.out, "--out")
    found = {}
    for name, world in WORLDS.items():
        found[name] = coverage(world, options.trials, options.trials, seed=0)
        logger.info("%s: %s", name, found[name])
    command = f"python -m hnas.bench.rank.coverage --out OUT --trials {options.trials}"
    write_json(options.out, {"command": command, "trials": options.trials, "worlds": found})
    sys.stdout.write(json.dumps({name: own["kendall_tau_b"] for name, own in found.items()}) + "\n")


if __name__ == "__main__":
    run_main(main)
