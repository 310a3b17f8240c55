"""Every operator that the networks, the walk and the samplers use, in every type of number.

Expected values come from the twin, in float64 on inputs rounded to the type in question.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F  # noqa: N812

from hnas.dataset.transforms import normalize
from hnas.evaluation.variants import Precision
from hnas.tools.check_device.arithmetic import FLOAT32, LIMITS, precisions
from hnas.tools.check_device.machine import Machine
from hnas.tools.check_device.results import Result, at_most, failure, not_here, relative_error

CLASSES = 20


@dataclass(frozen=True)
class Case:
    """One operator.

    Attributes:
        name: of it.
        function: of tensors, gives a tensor.
        shapes: of its arguments, drawn from a normal distribution.
        gradients: compare the gradients of all arguments, too.
        halves: whether the code ever runs it in half precision.
    """

    name: str
    function: Callable[..., paddle.Tensor]
    shapes: tuple[tuple[int, ...], ...]
    gradients: bool = False
    halves: bool = True


def convolution(kernel: int, stride: int, layout: str = "NCHW"):
    """A convolution as the networks pad it."""

    def convolve(x, filters):
        return F.conv2d(x, filters, stride=stride, padding=kernel // 2, data_format=layout)

    return convolve


def max_pool(layout: str):
    return lambda x: F.max_pool2d(x, 3, 2, 1, data_format=layout)


def labels(number: int) -> paddle.Tensor:
    """Labels [N], the same everywhere."""
    return paddle.arange(number) * 7 % CLASSES


def optimizer_step(weight, gradient):
    """A weight after two steps with momentum, weight decay and clipped gradients."""
    weight = paddle.create_parameter(
        weight.shape, weight.dtype, default_initializer=nn.initializer.Assign(weight)
    )
    optimizer = paddle.optimizer.Momentum(
        0.1,
        0.9,
        parameters=[weight],
        weight_decay=paddle.regularizer.L2Decay(1e-2),
        grad_clip=nn.ClipGradByGlobalNorm(1.0),
    )
    for _ in range(2):
        (weight * gradient).sum().backward()
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
    return weight.detach()


def moved(key, query):
    """A momentum update of a key encoder's tensor."""
    key = key.clone()
    key.lerp_(query, paddle.full([1], 0.25, key.dtype))
    return key


def enqueued(queue, keys):
    """A queue [D, K] of which keys [N, D] replace the columns from the last one on."""
    queue = queue.clone()
    size = queue.shape[1]
    columns = (paddle.to_tensor([size - 1]) + paddle.arange(keys.shape[0])) % size
    queue.index_put_((paddle.arange(queue.shape[0]).unsqueeze(1), columns), keys.T)
    return queue


def as_bytes(x) -> paddle.Tensor:
    """Bytes of the shape of ``x``, the same whatever it holds, since products may round."""
    return (paddle.arange(x.size) * 37 % 251).reshape(x.shape).astype("uint8")


def ahead_of_label(logits):
    """What counting hits is made of: logits that exceed the label's, summed as a product."""
    networks, images, classes = logits.shape
    index = labels(images).reshape([1, images, 1]).expand([networks, images, 1])
    own = paddle.take_along_axis(logits, index, axis=2)
    ahead = (logits > own).astype("float32") @ paddle.ones([classes])
    return ahead + paddle.isfinite(logits).all(axis=2).astype("float32")


def biased_sum(x, shortcut, bias):
    return F.relu(x + bias + shortcut)


ACTIVATIONS = ((4, 8, 6, 6), (4, 8, 6, 6), (1, 8, 1, 1))
CASES = (
    Case("convolution 3x3", convolution(3, 1), ((4, 24, 10, 10), (40, 24, 3, 3)), True),
    Case("convolution 3x3/2", convolution(3, 2), ((4, 24, 11, 11), (40, 24, 3, 3)), True),
    Case("convolution 1x1/2", convolution(1, 2), ((4, 24, 10, 10), (48, 24, 1, 1)), True),
    Case("convolution 7x7/2", convolution(7, 2), ((3, 3, 32, 32), (16, 3, 7, 7)), True),
    Case(
        "convolution 3x3, channels last",
        convolution(3, 1, "NHWC"),
        ((4, 10, 10, 24), (40, 24, 3, 3)),
    ),
    Case(
        "convolution 3x3/2, channels last",
        convolution(3, 2, "NHWC"),
        ((4, 11, 11, 24), (40, 24, 3, 3)),
    ),
    Case("matrix product", paddle.matmul, ((32, 64), (64, 48)), True),
    Case(
        "classifier, leading features",
        lambda x, w, b: F.linear(x, w[:24], b),
        ((16, 24), (40, CLASSES), (CLASSES,)),
        True,
    ),
    Case("bias, ReLU and sum", biased_sum, ACTIVATIONS),
    # Rounded sums may have another sign, and so another gradient.
    Case("bias, ReLU and sum, trained", biased_sum, ACTIVATIONS, True, halves=False),
    Case("max pooling", max_pool("NCHW"), ((4, 8, 13, 13),)),
    Case("max pooling, channels last", max_pool("NHWC"), ((4, 13, 13, 8),)),
    # Rounded values would tie, and which of them gets the gradient is nobody's promise.
    Case("max pooling, trained", max_pool("NCHW"), ((4, 8, 13, 13),), True, halves=False),
    Case("average pooling", lambda x: F.adaptive_avg_pool2d(x, 1), ((4, 8, 7, 7),), True),
    Case(
        "mean and variance",
        lambda x: paddle.concat(
            [x.mean([0, 2, 3]), (x - x.mean([0, 2, 3], True)).square().mean([0, 2, 3])]
        ),
        ((16, 8, 9, 9),),
        halves=False,
    ),
    Case("reciprocal root", lambda x: paddle.rsqrt(x.square() + 0.5), ((64,),), halves=False),
    Case(
        "slices and layouts",
        lambda x: x[:, :5].contiguous().transpose([0, 2, 3, 1]),
        ((4, 8, 5, 6),),
    ),
    Case(
        "joining and splitting",
        lambda x, y: paddle.concat([y, x]).split(2)[1],
        ((4, 6), (4, 6)),
        True,
    ),
    Case("L2 norm", lambda x: F.normalize(x, axis=1), ((16, 32),), True, halves=False),
    Case("softmax", lambda x: F.softmax(x / 0.7), ((16, CLASSES),), True, halves=False),
    Case(
        "cross-entropy with labels",
        lambda x: F.cross_entropy(x, labels(x.shape[0])),
        ((16, CLASSES),),
        True,
        halves=False,
    ),
    Case(
        "cross-entropy with a teacher",
        lambda x: F.cross_entropy(x, F.softmax(x.detach().flip([1])), soft_label=True),
        ((16, CLASSES),),
        True,
        halves=False,
    ),
    Case("largest logit", lambda x: x.argmax(axis=1), ((16, CLASSES),), halves=False),
    Case("logits ahead of the label's", ahead_of_label, ((3, 16, CLASSES),), halves=False),
    Case(
        "order by importance",
        lambda x, w: paddle.index_select(w, paddle.argsort(x.abs(), descending=True, stable=True)),
        ((12,), (12, 5)),
        halves=False,
    ),
    Case("rows by index", lambda x: paddle.gather(x, paddle.to_tensor([3, 0, 3])), ((5, 6),)),
    Case("images normalised", lambda x: normalize(as_bytes(x)), ((2, 3, 8, 8),), halves=False),
    Case(
        "images shuffled",
        lambda x: paddle.gather(as_bytes(x), paddle.to_tensor([2, 0, 1])),
        ((3, 2, 4, 4),),
        halves=False,
    ),
    Case("queue of negatives", enqueued, ((6, 10), (4, 6)), halves=False),
    Case("momentum update of keys", moved, ((7, 5), (7, 5)), halves=False),
    Case("optimizer", optimizer_step, ((30,), (30,)), halves=False),
)


def drawn(case: Case, index: int, shape: Sequence[int]) -> np.ndarray:
    """The ``index``-th array of a case, the same in every process."""
    seed = zlib.crc32(case.name.encode())
    return np.random.default_rng((seed, index)).normal(size=shape).astype(np.float32)


def compute(case: Case, dtype: str, computed_in: str) -> dict[str, np.ndarray]:
    """Output and gradients of a case.

    Args:
        case: what to run.
        dtype: to which inputs are rounded.
        computed_in: the type that they have then.
    """
    tensors = [
        paddle.to_tensor(drawn(case, index, shape)).astype(dtype).astype(computed_in)
        for index, shape in enumerate(case.shapes)
    ]
    for tensor in tensors:
        tensor.stop_gradient = not case.gradients
    output = case.function(*tensors)
    found = {"output": output}
    if case.gradients:
        upstream = paddle.to_tensor(drawn(case, len(tensors), output.shape))
        gradients = paddle.grad(output, tensors, upstream.astype(dtype).astype(output.dtype))
        found |= {f"gradient {index + 1}": each for index, each in enumerate(gradients)}
    wide = "float64" if computed_in == "float64" else "float32"
    return {name: tensor.detach().astype(wide).numpy() for name, tensor in found.items()}


def cases_in(dtype: str) -> Iterator[Case]:
    """Those that the code runs in this type."""
    return (case for case in CASES if case.halves or dtype == FLOAT32.dtype)


def expected(machine: Machine) -> dict[str, np.ndarray]:
    """For the twin: all cases in all types, computed in float64."""
    return {
        f"{case.name}|{dtype}|{part}": array
        for dtype in ("float32", "bfloat16", "float16")
        for case in cases_in(dtype)
        for part, array in compute(case, dtype, "float64").items()
    }


def check(machine: Machine) -> Iterator[Result]:
    """(b) The device's operators against a CPU's in float64."""
    right = machine.expected("operators")
    for precision, missing in precisions(machine):
        if missing:
            yield not_here(f"operators in {precision.value}", missing)
            continue
        for case in cases_in(precision.dtype):
            yield judge(case, precision, right)


def judge(case: Case, precision: Precision, right: dict[str, np.ndarray]) -> Result:
    """One case in one precision: the worst of output and gradients."""
    name = f"{case.name} in {precision.value}"
    try:
        found = compute(case, precision.dtype, precision.dtype)
    except Exception as error:
        return failure(name, error)
    errors = {
        part: relative_error(array, right[f"{case.name}|{precision.dtype}|{part}"])
        for part, array in found.items()
    }
    worst = max(errors, key=lambda part: (np.isnan(errors[part]), errors[part]))
    note = f"of the largest value: {worst}"
    return at_most(name, errors[worst], LIMITS[precision], note)
