"""The evaluator's operations as programs of Paddle Inference, which uses oneDNN on CPUs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import paddle
from paddle import inference, nn
from paddle.static import InputSpec

from hnas.evaluation.kernels import DygraphKernels
from hnas.evaluation.weights import Convolution


class InferenceKernels(DygraphKernels):
    """float32 on CPUs, several times as fast as dygraph.

    A program's output lies in a buffer that its next run overwrites; :meth:`keep` copies what
    must live longer. Whole blocks alternate between two programs, so that one feeds the other.

    Args:
        threads: of oneDNN.
        calibration: as in :class:`DygraphKernels`.
    """

    def __init__(self, threads: int, calibration: int = 0):
        super().__init__(calibration)
        plain = DygraphKernels(calibration)
        parts = 3 if calibration else 2  # tensors of a convolution

        def block(x, *tensors):
            return plain.block(x, tensors[:parts], tensors[parts:], level=0)

        operations = {
            "stem": (lambda x, *conv: plain.stem(x, conv), 1, [7]),
            "first1": (lambda x, *conv: plain.first(x, conv, 1), 1, [3]),
            "first2": (lambda x, *conv: plain.first(x, conv, 2), 1, [3]),
            "project": (lambda x, *conv: plain.project(x, conv), 1, [1]),
            "last": (lambda y, shortcut, *conv: plain.last(y, shortcut, conv), 2, [3]),
            "block0": (block, 1, [3, 3]),
            "block1": (block, 1, [3, 3]),
        }
        with tempfile.TemporaryDirectory(prefix="pinas-") as folder:
            self._programs = {
                name: Program(function, activations, kernels, parts, threads, Path(folder) / name)
                for name, (function, activations, kernels) in operations.items()
            }

    def stem(self, x, conv: Convolution):
        return self._programs["stem"].run(x, *conv)

    def first(self, x, conv1: Convolution, stride: int):
        return self._programs[f"first{stride}"].run(x, *conv1)

    def project(self, x, conv: Convolution):
        return self._programs["project"].run(x, *conv)

    def last(self, y, shortcut, conv2: Convolution):
        return self._programs["last"].run(y, shortcut, *conv2)

    def block(self, x, conv1: Convolution, conv2: Convolution, level: int):
        return self._programs[f"block{level % 2}"].run(x, *conv1, *conv2)

    def keep(self, x):
        return x.clone()


class Program:
    """One operation, compiled for any batch, width and size.

    oneDNN's kernels in Paddle Inference keep re-ordered filters by the shapes of all inputs, and
    would go on using them for other filters of the same shape. Hence the last input: a tensor of
    zeros whose shape changes with every run, which with a cache of one entry makes every run
    re-order the filters that it is given.

    Args:
        function: of activations, then the tensors of one or two convolutions.
        activations: how many activations it takes.
        kernels: kernel size of each convolution.
        parts: tensors of a convolution, 2 or 3.
        threads: of oneDNN.
        path: where to export to; not needed afterwards.
    """

    def __init__(
        self,
        function: Callable,
        activations: int,
        kernels: list[int],
        parts: int,
        threads: int,
        path: Path,
    ):
        shapes = [[None] * 4] * activations
        for size in kernels:
            shapes += [[None, None, size, size]] + [[1, None, 1, 1]] * (parts - 1)
        shapes.append([None])
        specs = [InputSpec(s, "float32", f"input{i}") for i, s in enumerate(shapes)]
        layer = paddle.jit.to_static(_Operation(function), input_spec=[specs], full_graph=True)
        paddle.jit.save(layer, str(path))
        config = inference.Config(f"{path}.json", "")
        config.disable_gpu()
        config.enable_mkldnn()
        config.set_mkldnn_cache_capacity(1)
        config.set_cpu_math_library_num_threads(threads)
        config.disable_glog_info()
        self._predictor = inference.create_predictor(config)
        self._ticks = [paddle.zeros([1]), paddle.zeros([2])]

    def run(self, *tensors: paddle.Tensor) -> paddle.Tensor:
        """The output, valid until the next run."""
        self._ticks.reverse()
        return self._predictor.run([*tensors, self._ticks[0]])[0]


class _Operation(nn.Layer):
    """A function as a layer; the last input, zeros, is added to the one before, a bias."""

    def __init__(self, function: Callable):
        super().__init__()
        self._function = function

    def forward(self, tensors):
        *tensors, bias, tick = tensors
        return self._function(*tensors, bias + tick.sum())


def filters_are_fresh(kernels: InferenceKernels) -> bool:
    """Whether ``kernels`` use the filters that they are given, also at a shape seen before.

    Relies on no documented promise of Paddle, so it is tried before it is trusted.
    """
    plain = DygraphKernels(kernels.calibration)
    x = paddle.randn([kernels.calibration + 2, 16, 4, 4])
    for _ in range(4):
        conv1, conv2 = (
            (paddle.randn([16, 16, 3, 3]), *(paddle.randn([1, 16, 1, 1]) for _ in rest))
            for rest in (range(2 if kernels.calibration else 1),) * 2
        )
        expected = plain.block(x, conv1, conv2, 0)
        difference = (kernels.block(x, conv1, conv2, 0) - expected).abs().max()
        if not float(difference) <= 1e-3 * float(expected.abs().max()):
            return False
    return True
