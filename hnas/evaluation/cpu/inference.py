"""The evaluator's operations as programs of Paddle Inference, which uses oneDNN on CPUs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import paddle
from paddle import inference, nn
from paddle.base.core import set_num_threads
from paddle.nn import functional as F  # noqa: N812
from paddle.static import InputSpec

from hnas.evaluation.kernels import DygraphKernels
from hnas.evaluation.weights import Convolution, new_identity

MARK_DIMENSIONS, MARK_BASE = 8, 5


def mark_shape(identity: int) -> list[int]:
    """The shape that stands for a number: its last eight digits in base 5, each plus 1.

    Only numbers that differ by a multiple of 5**8 = 390,625 share a shape.
    """
    return [1 + identity // MARK_BASE**place % MARK_BASE for place in range(MARK_DIMENSIONS)]


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
        plain = _Definition(calibration)
        parts = 3 if calibration else 2  # tensors of a convolution

        def conv(tensors):
            return Convolution(tensors[0], tuple(tensors[1:]), 0)

        def block(x, *tensors):
            return plain.block(x, conv(tensors[:parts]), conv(tensors[parts:]), level=0)

        operations = {
            "stem": (lambda x, *w: plain.stem(x, conv(w)), 1, [7]),
            "first1": (lambda x, *w: plain.first(x, conv(w), 1), 1, [3]),
            "first2": (lambda x, *w: plain.first(x, conv(w), 2), 1, [3]),
            "project": (lambda x, *w: plain.project(x, conv(w)), 1, [1]),
            "last": (lambda y, shortcut, *w: plain.last(y, shortcut, conv(w)), 2, [3]),
            "block0": (block, 1, [3, 3]),
            "block1": (block, 1, [3, 3]),
        }
        with tempfile.TemporaryDirectory(prefix="pinas-") as folder:
            self._programs = {
                name: Program(function, activations, kernels, parts, threads, Path(folder) / name)
                for name, (function, activations, kernels) in operations.items()
            }

    def stem(self, x, conv: Convolution):
        return self._programs["stem"].run([x], conv)

    def first(self, x, conv1: Convolution, stride: int):
        return self._programs[f"first{stride}"].run([x], conv1)

    def project(self, x, conv: Convolution):
        return self._programs["project"].run([x], conv)

    def last(self, y, shortcut, conv2: Convolution):
        return self._programs["last"].run([y, shortcut], conv2)

    def block(self, x, conv1: Convolution, conv2: Convolution, level: int):
        return self._programs[f"block{level % 2}"].run([x], conv1, conv2)

    def keep(self, x):
        return x.clone()


class _Definition(DygraphKernels):
    """The operations that :class:`InferenceKernels` compiles."""

    def _mean_of_calibration(self, x):
        # oneDNN's mean over several axes would print a line for each.
        return F.adaptive_avg_pool2d(x, 1).sum(0, keepdim=True) / self.calibration


def cpu_threads() -> int:
    """``OMP_NUM_THREADS``, as everything else in the process uses, or one a core."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def onednn_predictor(program: str, weights: str, threads: int, cache: int | None = None):
    """A predictor on CPUs with oneDNN.

    Args:
        program, weights: files that ``paddle.jit.save`` wrote; no weights: an empty name.
        threads: of oneDNN.
        cache: combinations of input shapes whose kernels are kept; None: Paddle's default.
    """
    config = inference.Config(program, weights)
    config.disable_gpu()
    config.enable_mkldnn()
    if cache is not None:
        config.set_mkldnn_cache_capacity(cache)
    config.set_cpu_math_library_num_threads(threads)
    config.disable_glog_info()
    return inference.create_predictor(config)


class Program:
    """One operation, compiled for any batch, width and size.

    In Paddle Inference oneDNN re-orders filters once and keeps them for the next run whose inputs
    have the same shapes, even if that run is given other filters, or is another program's. Hence
    one more input, the mark: zeros whose shape is another for every choice of convolutions, so
    that equal shapes mean equal filters. The re-ordered filters of one combination of shapes are
    kept; keeping more gained nothing.

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
        shapes.append([None] * MARK_DIMENSIONS)
        specs = [InputSpec(s, "float32", f"input{i}") for i, s in enumerate(shapes)]
        layer = paddle.jit.to_static(_Operation(function), input_spec=[specs], full_graph=True)
        paddle.jit.save(layer, str(path))
        self._predictor = onednn_predictor(f"{path}.json", "", threads, cache=1)
        self._threads = threads
        self._marks: dict[tuple[int, ...], list[int]] = {}

    def run(self, activations: list[paddle.Tensor], *convolutions: Convolution) -> paddle.Tensor:
        """The output, valid until the next run."""
        whose = tuple(convolution.identity for convolution in convolutions)
        if whose not in self._marks:
            self._marks[whose] = mark_shape(new_identity())
        tensors = [part for conv in convolutions for part in (conv.filters, *conv.rest)]
        mark = paddle.zeros(self._marks[whose])
        output = self._predictor.run([*activations, *tensors, mark])[0]
        # A predictor leaves the process with one thread for matrix products.
        set_num_threads(self._threads)
        return output


class _Operation(nn.Layer):
    """A function as a layer. Its last input, the mark of :class:`Program`, changes nothing: the
    sum of its zeros is added to the input before it, a bias."""

    def __init__(self, function: Callable):
        super().__init__()
        self._function = function

    def forward(self, tensors):
        *tensors, bias, mark = tensors
        return self._function(*tensors, bias + mark.sum())


def filters_are_fresh(kernels: InferenceKernels) -> bool:
    """Whether ``kernels`` use the filters that they are given, also at a shape seen before.

    Relies on no documented promise of Paddle, so it is tried before it is trusted.
    """
    plain = DygraphKernels(kernels.calibration)
    parts = 2 if kernels.calibration else 1
    x = paddle.randn([kernels.calibration + 2, 16, 4, 4])
    for _ in range(4):
        conv1, conv2 = (
            Convolution(
                paddle.randn([16, 16, 3, 3]),
                tuple(paddle.randn([1, 16, 1, 1]) for _ in range(parts)),
                new_identity(),
            )
            for _ in range(2)
        )
        expected = plain.block(x, conv1, conv2, 0)
        difference = (kernels.block(x, conv1, conv2, 0) - expected).abs().max()
        if not float(difference) <= 1e-3 * float(expected.abs().max()):
            return False
    return True
