"""Measure the latency of every block of a search space on this device.

    python -m hnas.tools.latency --output latency.json [--threads 1] [--coarse True]

An architecture's latency is then the sum of its blocks', which `search` and `choose` look up. The
sum is compared with whole networks at the end. A run that is killed goes on from OUTPUT.partial.
How long all takes is told after a few blocks. --coarse True measures fewer, once, and interpolates.
"""

from __future__ import annotations

from hnas.base.errors import UserError, hold_signals, run_main

if __name__ == "__main__":
    hold_signals()  # before Paddle is imported below

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import paddle
from paddle import inference, nn
from paddle.base.core import set_num_threads
from paddle.static import InputSpec
from tqdm import tqdm

from hnas.base.command_line import (
    LARGEST_SIDE,
    OneLineParser,
    read_bool,
    read_path,
    real_number,
    whole_number,
)
from hnas.base.device import (
    choose_device,
    cpu_threads,
    device_name,
    on_gpu,
    processor,
    set_tf32,
)
from hnas.base.files import check_output, print_text, read_json, write_json
from hnas.base.settings import check_same_settings
from hnas.models.resnet import BasicBlock, Head, ResNet, Stem
from hnas.parallel.distributed import finished_before_stopping
from hnas.programs.parsing import refuse_contrastive
from hnas.ranking.costs import FORMAT, LatencyTable, Part, all_parts, is_time
from hnas.search_space import (
    SAMPLE_SPACES,
    Architecture,
    ChannelPlan,
    feature_sizes,
    search_space,
)

logger = logging.getLogger(__name__)

GOOD_ERROR = 0.1
"""Mean difference of sums and whole networks up to which the sums are good, as a share."""
FEWEST_RUNS, WARM_UP = 10, 2
COARSE = {"seconds": 0.0, "rounds": 1, "networks": 5}
TRIED = 8
"""Programs, spread over all, after which it is told how long the others take."""
QUANTILE = 0.1
"""Of the runs' times. Other programs can only slow a run down, so the fast ones say what the device
takes; the very fastest of many may be a misreading."""
MEMORY_MIB = 256
"""That a predictor takes of a GPU at first."""
FEEDING = 8
"""Channels that the convolution before a timed block reads."""
REMEDY = "remove it, or choose another --output"


def main(argv: Sequence[str] | None = None) -> None:
    options = parser().parse_args(argv)
    if options.coarse:
        vars(options).update(COARSE)
    refuse_contrastive(options.backbone, "latency")
    check_output(options.output, "--output")
    choose_device(options.device)
    set_num_threads(options.threads)
    settings = settings_of(options)
    if options.output.is_file():
        check_same_settings(options.output, read_json(options.output), settings, REMEDY)
        logger.info("%s is finished; remove it to measure again", options.output)
        return
    space = search_space(options.backbone, options.sample_space)
    drawn = space.sample_distinct(np.random.default_rng(0), options.networks).values()
    watch = Stopwatch(options)
    every, chosen = all_parts(space), all_parts(space, options.coarse)
    parts = {part.name: partial(watch.part, part) for part in chosen}
    networks = {arch.code: partial(watch.network, space.plan(arch)) for arch in drawn}
    unfinished = Path(f"{options.output}.partial")
    times = measure(parts | networks, options.rounds, unfinished, settings)
    milliseconds = completed(every, chosen, times)
    check = compare(LatencyTable(options.output, space, settings, milliseconds), drawn, times)
    content = {"format": FORMAT, **settings, "milliseconds": milliseconds, "check": check}
    content["interpolated"] = [part.name for part in every if part.name not in parts]
    write_json(options.output, content)
    unfinished.unlink(missing_ok=True)
    report(check, options.output)


def parser() -> OneLineParser:
    made = OneLineParser(description=__doc__.splitlines()[0])
    number = whole_number(1, 100_000)
    made.add_argument("--output", type=read_path, required=True, help="JSON file to write")
    made.add_argument("--backbone", default="resnet48", help="whose blocks [resnet48]")
    made.add_argument("--sample_space", choices=SAMPLE_SPACES, default="released", help="of widths")
    made.add_argument("--image_size", type=whole_number(32, LARGEST_SIDE), default=224, help="px")
    made.add_argument("--batch_size", type=number, default=1, help="images [1]")
    made.add_argument("--num_classes", type=whole_number(1, 1_000_000), default=1000, help="[1000]")
    threads, seconds = whole_number(1, 1024), real_number(0, 3600)
    made.add_argument("--threads", type=threads, default=cpu_threads(), help="of CPUs")
    made.add_argument("--seconds", type=seconds, default=0.2, help="of each program in a round")
    made.add_argument("--rounds", type=whole_number(1, 1000), default=3, help="[3]")
    made.add_argument("--networks", type=number, default=20, help="to check sums with [20]")
    coarse = "in minutes, in place of the last three: few widths, others interpolated"
    made.add_argument("--coarse", type=read_bool, default=False, help=coarse)
    made.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="[auto]")
    return made


def settings_of(options) -> dict:
    """What the times belong to, as the file says it."""
    engine = "oneDNN, float32"
    if on_gpu():
        engine = "TF32" if set_tf32("auto") else "float32"
    given = {name: v for name, v in vars(options).items() if name not in ("output", "coarse")}
    return given | {
        "device": "gpu" if on_gpu() else "cpu",
        "processor": device_name() if on_gpu() else f"{processor()}, {os.cpu_count()} cores",
        "engine": f"Paddle Inference, {engine}",
        "paddle": paddle.__version__,
    }


def completed(
    parts: Iterable[Part], measured: Iterable[Part], times: Mapping[str, float]
) -> dict[str, float]:
    """Milliseconds of all parts; on lines between others' of a block that was not measured."""

    def ends_of(part: Part) -> tuple:
        return part.kind, part.stage, part.stride, part.channels[0], part.channels[-1]

    found = {part.name: times[part.name] for part in measured}
    for part in parts:
        if part.name not in found:
            like = [own for own in measured if ends_of(own) == ends_of(part)]
            line = [own.channels[1] for own in like], [times[own.name] for own in like]
            found[part.name] = round(float(np.interp(part.channels[1], *line)), 6)
    return found


class Stopwatch:
    """Milliseconds of networks on this device, as Paddle Inference runs them in float32.

    A part is timed where it will be: a block or head between a 1x1 convolution, which hands it
    activations as they lie in memory within a network, and global pooling. The same program without
    the part is timed, too, and subtracted.
    """

    def __init__(self, options):
        self._options = options
        self._frame = cache(lambda cin, size: self._time(framed(cin), FEEDING, size))

    def network(self, plan: ChannelPlan) -> float:
        """Milliseconds of a batch through a whole network."""
        return self._time(ResNet(plan, self._options.num_classes), 3, self._options.image_size)

    def part(self, part: Part) -> float:
        """Milliseconds that a part adds to a network; a stem's hold what a run costs in itself."""
        _, sizes = feature_sizes(self._options.image_size)
        if part.kind == "stem":
            stem = nn.Sequential(Stem(*part.channels), nn.AdaptiveAvgPool2D(1))
            return self._time(stem, 3, self._options.image_size)
        cin, size = part.channels[0], sizes[-1]
        if part.kind == "head":
            whole = nn.Sequential(feed(cin), Head(cin, self._options.num_classes))  # it pools
        else:
            size = sizes[part.stage - 1] if part.stride == 2 else sizes[part.stage]
            whole = framed(cin, BasicBlock(*part.channels, part.stride))
        return max(0.0, self._time(whole, FEEDING, size) - self._frame(cin, size))

    def _time(self, network: nn.Layer, channels: int, size: int) -> float:
        """Milliseconds of a batch [N, ``channels``, ``size``, ``size``] through ``network``."""
        network.eval()
        shape = [self._options.batch_size, channels, size, size]
        pixels = np.random.default_rng(0).normal(size=shape)
        with tempfile.TemporaryDirectory(prefix="pinas-") as folder:
            spec = InputSpec(shape, "float32", "x")
            traced = paddle.jit.to_static(network, input_spec=[spec], full_graph=True)
            paddle.jit.save(traced, f"{folder}/net")
            predictor = make_predictor(f"{folder}/net", self._options.threads)
        name = predictor.get_input_names()[0]
        predictor.get_input_handle(name).copy_from_cpu(pixels.astype("float32"))
        try:
            return self._repeat(predictor)
        finally:
            # A predictor leaves the process with one thread for matrix products.
            set_num_threads(self._options.threads)

    def _repeat(self, predictor) -> float:
        waits = on_gpu()
        # On an idle core the same; on a busy one it leaves out the time that others run.
        alone = not waits and self._options.threads == 1
        clock = time.process_time if alone else time.perf_counter
        times: list[float] = []
        ends = clock() + self._options.seconds
        while len(times) < WARM_UP + FEWEST_RUNS or clock() < ends:
            began = clock()
            predictor.run()
            if waits:
                paddle.device.synchronize()
            times.append(clock() - began)
        return 1000 * float(np.quantile(times[WARM_UP:], QUANTILE))


def feed(channels: int) -> nn.Layer:
    """The convolution before a part that reads so many channels."""
    return nn.Conv2D(FEEDING, channels, 1)


def framed(channels: int, *parts: nn.Layer) -> nn.Layer:
    """Parts, or none, between that convolution and global average pooling."""
    return nn.Sequential(feed(channels), *parts, nn.AdaptiveAvgPool2D(1))


def make_predictor(path: str, threads: int):
    """A predictor on this device: on CPUs with oneDNN and so many threads.

    ``path`` is the program's that ``paddle.jit.save`` wrote.
    """
    config = inference.Config(f"{path}.json", f"{path}.pdiparams")
    if on_gpu():
        config.enable_use_gpu(MEMORY_MIB, paddle.device.current_device())
    else:
        config.disable_gpu()
        config.enable_mkldnn()
        config.set_cpu_math_library_num_threads(threads)
    config.disable_glog_info()
    return inference.create_predictor(config)


def measure(
    programs: Mapping[str, Callable[[], float]], rounds: int, path: Path, settings: Mapping
) -> dict[str, float]:
    """Milliseconds of each program in the fastest round; what ``path`` has is not measured again.

    Raises:
        UserError: ``path`` is of other settings.
    """
    times: dict[str, list[float]] = {}
    if path.is_file():
        content = read_json(path)
        check_same_settings(path, content, settings, REMEDY)
        times = content.get("times", {})
        rows = times.values() if isinstance(times, dict) else [None]
        known = all(isinstance(row, list) and all(map(is_time, row)) for row in rows)
        if not known:
            raise UserError(f"{path} holds times that are none; {REMEDY}")
        logger.info("continuing with the %d programs of %s", len(times), path)
    blocks = sum(name.startswith("block") for name in programs)
    told = f"{blocks} blocks and {len(programs) - blocks} other programs, {rounds} times each"
    logger.info("%s, on %s", told, settings["processor"])
    # Round after round, so that what slows the machine for a while slows no block in all of them.
    missing = [
        (number, name)
        for number, name in product(range(rounds), programs)
        if len(times.get(name, [])) <= number
    ]
    tried = missing[:: max(1, len(missing) // TRIED)]
    began = time.monotonic()
    with tqdm(total=len(missing), unit="program") as progress:
        for done, (number, name) in enumerate([*tried, *missing]):
            if done == len(tried):
                left = (len(missing) - done) * (time.monotonic() - began) / done / 60
                logger.info("about %.1f minutes more", left)
            own = times.setdefault(name, [])
            if len(own) <= number:
                # Not while Paddle traces: it wraps exceptions, the end of the program, too.
                with finished_before_stopping():
                    own.append(programs[name]())
                    write_json(path, {**settings, "times": times})
                progress.update()
    return {name: round(min(times[name]), 6) for name in programs}


def compare(
    table: LatencyTable, archs: Iterable[Architecture], measured: Mapping[str, float]
) -> dict:
    """How far the sums are from whole networks: errors as shares of what was measured."""
    rows = []
    for arch in archs:
        added, whole = table.of(arch), measured[arch.code]
        row = {"arch": arch.code, "added": round(added, 4), "measured": whole}
        rows.append({**row, "error": round(added / whole - 1, 4)})
    errors = np.array([row["error"] for row in rows])
    return {
        "mean_error": round(float(errors.mean()), 4),
        "mean_absolute_error": round(float(np.abs(errors).mean()), 4),
        "largest_absolute_error": round(float(np.abs(errors).max()), 4),
        "networks": rows,
    }


def report(check: Mapping, path: Path) -> None:
    """Log what the sums are worth, and print it as JSON."""
    if check["mean_absolute_error"] > GOOD_ERROR:
        logger.warning(
            "the sums are off by %.0f %% on average: was the machine busy? Networks may still be "
            "in the right order; raise --rounds or --seconds, or measure on an idle machine",
            100 * check["mean_absolute_error"],
        )
    told = {name: value for name, value in check.items() if name != "networks"}
    print_text(json.dumps({**told, "output": str(path)}) + "\n")


if __name__ == "__main__":
    run_main(main, "lower --batch_size, or end what else takes memory")
