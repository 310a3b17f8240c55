"""Timing networks, and parts of networks, as Paddle Inference runs them."""

from __future__ import annotations

import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import paddle
from paddle import inference, nn
from paddle.base.core import set_num_threads
from paddle.static import InputSpec

from hnas.base.device import on_gpu
from hnas.base.memory import keep_freed_memory
from hnas.models.resnet import BasicBlock, Head, ResNet, Stem
from hnas.ranking.latency import Part
from hnas.search_space import ChannelPlan, feature_sizes

FEWEST_RUNS = 10
WARM_UP = 2
QUANTILE = 0.1
"""Of the runs' times. Other programs can only slow a run down, so the fast ones say what the device
takes; the very fastest of many may be a misreading."""
MEMORY_MIB = 256
"""That a predictor takes of a GPU at first."""
FEEDING = 8
"""Channels that the convolution before a timed block reads."""


class Stopwatch:
    """Milliseconds of networks on this device, in float32.

    A part is timed where it will be: a block or head between a 1x1 convolution, which hands it
    activations as they lie in memory within a network, and global pooling. The same program without
    the part is timed, too, and subtracted.

    Args:
        image_size: height and width of the images, px.
        batch_size: images a run.
        num_classes: outputs of the classifier.
        threads: of CPUs; without effect on GPUs.
        seconds: to repeat a program for; ten times at least.
    """

    def __init__(
        self, image_size: int, batch_size: int, num_classes: int, threads: int, seconds: float
    ):
        self._size = image_size
        self._batch = batch_size
        self._classes = num_classes
        self._threads = threads
        self._seconds = seconds
        self._frame = cache(self._time_frame)
        keep_freed_memory()

    def network(self, plan: ChannelPlan) -> float:
        """Milliseconds of a batch through a whole network."""
        return self._time(ResNet(plan, self._classes), 3, self._size)

    def part(self, part: Part) -> float:
        """Milliseconds that a part adds to a network; a stem's hold what a run costs in itself."""
        _, sizes = feature_sizes(self._size)
        if part.kind == "stem":
            return self._time(_Framed(Stem(*part.channels)), 3, self._size)
        if part.kind == "head":
            cin, size = part.channels[0], sizes[-1]
            layer, whole = Head(cin, self._classes), False
        else:
            cin, mid, cout = part.channels
            size = sizes[part.stage - 1] if part.stride == 2 else sizes[part.stage]
            layer, whole = BasicBlock(cin, mid, cout, part.stride), True
        framed = _Framed(layer, cin, pools=whole)
        return max(0.0, self._time(framed, FEEDING, size) - self._frame(cin, size))

    def _time_frame(self, cin: int, size: int) -> float:
        return self._time(_Framed(None, cin), FEEDING, size)

    def _time(self, network: nn.Layer, channels: int, size: int) -> float:
        """Milliseconds of a batch [N, ``channels``, ``size``, ``size``] through ``network``."""
        network.eval()
        pixels = np.random.default_rng(0).normal(size=(self._batch, channels, size, size))
        with tempfile.TemporaryDirectory(prefix="pinas-") as folder:
            spec = InputSpec([self._batch, channels, size, size], "float32", "x")
            traced = paddle.jit.to_static(network, input_spec=[spec], full_graph=True)
            paddle.jit.save(traced, str(Path(folder) / "net"))
            predictor = self._predictor(Path(folder) / "net")
        name = predictor.get_input_names()[0]
        predictor.get_input_handle(name).copy_from_cpu(pixels.astype("float32"))
        try:
            return self._repeat(predictor)
        finally:
            # A predictor leaves the process with one thread for matrix products.
            set_num_threads(self._threads)

    def _predictor(self, path: Path):
        program, weights = f"{path}.json", f"{path}.pdiparams"
        if not on_gpu():
            return onednn_predictor(program, weights, self._threads)
        config = inference.Config(program, weights)
        config.enable_use_gpu(MEMORY_MIB, paddle.device.current_device())
        config.disable_glog_info()
        return inference.create_predictor(config)

    def _repeat(self, predictor) -> float:
        waits = on_gpu()
        # On an idle core the same; on a busy one it leaves out the time that others run.
        alone = not waits and self._threads == 1
        clock = time.process_time if alone else time.perf_counter
        times: list[float] = []
        ends = clock() + self._seconds
        while len(times) < WARM_UP + FEWEST_RUNS or clock() < ends:
            began = clock()
            predictor.run()
            if waits:
                paddle.device.synchronize()
            times.append(clock() - began)
        return 1000 * float(np.quantile(times[WARM_UP:], QUANTILE))


class _Framed(nn.Layer):
    """A part between a 1x1 convolution from ``FEEDING`` channels and global average pooling.

    Args:
        part: None: only the frame.
        channels: that the part reads; 0: it reads the input itself.
        pools: whether the frame does the pooling; a head does its own.
    """

    def __init__(self, part: nn.Layer | None, channels: int = 0, pools: bool = True):
        super().__init__()
        self.feed = nn.Conv2D(FEEDING, channels, 1) if channels else None
        self.part = part
        self.pool = nn.AdaptiveAvgPool2D(1) if pools else None

    def forward(self, x):
        for layer in (self.feed, self.part, self.pool):
            if layer is not None:
                x = layer(x)
        return x


def onednn_predictor(program: str, weights: str, threads: int):
    """A predictor on CPUs with oneDNN.

    Args:
        program, weights: files that ``paddle.jit.save`` wrote.
        threads: of oneDNN.
    """
    config = inference.Config(program, weights)
    config.disable_gpu()
    config.enable_mkldnn()
    config.set_cpu_math_library_num_threads(threads)
    config.disable_glog_info()
    return inference.create_predictor(config)
