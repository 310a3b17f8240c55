"""Fakes of a GPU, on CPUs: how it rounds, its operators, its properties.

The CPU build of Paddle has no convolution, addition or ReLU of half-precision tensors (tried:
``RuntimeError``), while such tensors can be made, cast, sliced and transposed. So the operators
below compute in float32 and round what they are given and what they give, as a GPU does, whose
accumulators are float32.
"""

import functools
from types import SimpleNamespace

import numpy as np
import paddle
from paddle.base import core
from paddle.nn import functional as F  # noqa: N812

HINT = " \n  [Hint: Please search for the error code on website.] (at /paddle/phi/a.cu:79)\n"
ERRORS = {  # Paddle 3.3.1's kinds of errors and texts: where a device fails, and where memory does
    "cuDNN": (OSError, "(External) CUDNN error(3000), CUDNN_STATUS_NOT_SUPPORTED." + HINT),
    "NCCL": (OSError, "(External) NCCL error(2), unhandled system error." + HINT),
    "Fatal": (SystemError, "(Fatal) Operator has raised an exception." + HINT),
    "kind": (IndexError, "(OutOfRange) axis is out of range." + HINT),
    "memory": (MemoryError, "(ResourceExhausted) \n\nOut of memory error on GPU 0. Cannot allocate "
               "2.0GB memory on GPU 0, available memory is only 1.0GB.\n\nPlease check "
               "whether there is any other process using GPU 0.\n"),
    "no plan": (ValueError, "(InvalidArgument) [CUDNN Frontend API] No valid plan could be found "
                "to execute. Try setting FLAGS_conv_workspace_size_limit higher. (at /c.h:450)"),
    "CUDA memory": (OSError, "(External) CUDA error(2), out of memory." + HINT),
}  # fmt: skip
DEVICE, MEMORY = [*ERRORS][:4], [*ERRORS][4:]
HALVES = (paddle.float16, paddle.bfloat16)


def raising(kind):
    """A function that raises an error as Paddle does: of ``ERRORS``, or the one given."""

    def run(*_, **__):
        raise kind if isinstance(kind, Exception) else ERRORS[kind][0](ERRORS[kind][1])

    return run


def rounded_to_tf32(x):
    """A float32 tensor with 10 bits of mantissa, to nearest, ties to even."""
    bits = np.ascontiguousarray(x.numpy()).view(np.uint32).astype(np.uint64)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000
    return paddle.to_tensor(bits.astype(np.uint32).view(np.float32))


def round_to_tf32(monkeypatch, operator="conv2d", backward_alone=False):
    """Float32 convolutions of both engines round their inputs to TF32, as cuDNN's do."""
    plain = getattr(F, operator)

    def run(x, weight, *arguments, **named):
        if x.dtype != paddle.float32:
            return plain(x, weight, *arguments, **named)
        # Gradients pass through the rounding as if there were none.
        rounded = (part + (rounded_to_tf32(part) - part).detach() for part in (x, weight))
        y = plain(*rounded, *arguments, **named)
        if backward_alone:
            y = y + (plain(x, weight, *arguments, **named) - y).detach()
        return y

    monkeypatch.setattr(F, operator, run)


def half_operators(monkeypatch):
    """Operators of half-precision tensors; they refuse mixtures, which a GPU would promote."""

    def rounding(function):
        def run(x, *arguments, **named):
            tensors = [x, *(part for part in arguments if isinstance(part, paddle.Tensor))]
            kinds = {tensor.dtype for tensor in tensors}
            if not kinds & set(HALVES):
                return function(x, *arguments, **named)
            assert len(kinds) == 1, f"a mixture of {kinds} becomes float32 on a GPU"
            wide = [
                part.astype("float32") if isinstance(part, paddle.Tensor) else part
                for part in arguments
            ]
            return function(x.astype("float32"), *wide, **named).astype(x.dtype)

        return run

    def normalising(function):
        def run(x, *statistics, **named):
            assert {part.dtype for part in statistics} == {paddle.float32}
            return function(x.astype("float32"), *statistics, **named).astype(x.dtype)

        return run

    monkeypatch.setattr(F, "batch_norm", normalising(F.batch_norm))
    for name in ("conv2d", "relu", "max_pool2d"):
        monkeypatch.setattr(F, name, rounding(getattr(F, name)))
    for name in ("__add__", "__mul__"):
        monkeypatch.setattr(paddle.Tensor, name, rounding(getattr(paddle.Tensor, name)))


def fused_operator(x, filters, bias, shortcut, stride, padding, layout, activation):
    """Convolution, bias, shortcut and ReLU, rounded once, as ``fused_conv2d_add_act``.

    Filters are [O, K, K, I] in NHWC, bias is [O], and all are of one kind of number.
    """
    tensors = [part for part in (x, filters, bias, shortcut) if part is not None]
    assert len({part.dtype for part in tensors}) == 1 and bias.ndim == 1
    wide = [part.astype("float32") for part in tensors]
    if layout == "NHWC":
        wide = [part.transpose([0, 3, 1, 2]) if part.ndim == 4 else part for part in wide]
    x_wide, filters, bias, *rest = wide
    y = F.conv2d(x_wide, filters, stride=stride, padding=padding) + bias.reshape([1, -1, 1, 1])
    y = y + rest[0] if rest else y
    y = F.relu(y) if activation == "relu" else y
    return (y.transpose([0, 2, 3, 1]) if layout == "NHWC" else y).astype(x.dtype)


def fake_card(monkeypatch, name="NVIDIA A100-SXM4-80GB", major=8, gib=80, used_gib=0.0, flags=None):
    """What Paddle says of a card; computations stay on the CPU. Returns Paddle's flags."""
    properties = SimpleNamespace(name=name, major=major, minor=0, total_memory=gib * 2**30)
    cuda = paddle.device.cuda
    off = dict.fromkeys(("FLAGS_cublas_allow_tf32", "FLAGS_cudnn_deterministic"), False)
    flags = {"FLAGS_cudnn_allow_tf32": True, **off, **(flags or {})}

    def set_flags(new):
        unknown = set(new) - set(flags)
        if unknown:
            raise ValueError(f"Flag {unknown} cannot set its value through this function.")
        flags.update(new)

    for switch in ("set_cudnn_switch", "set_cublas_switch"):
        monkeypatch.setattr(core, switch, functools.partial(flags.__setitem__, switch))
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle, "set_flags", set_flags)
    monkeypatch.setattr(paddle, "get_flags", lambda names: {flag: flags[flag] for flag in names})
    monkeypatch.setattr(cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda *_: 3 * 2**30)
    monkeypatch.setattr(cuda, "memory_reserved", lambda *_: 2 * 2**30)
    monkeypatch.setattr(cuda, "memory_allocated", lambda *_: 2**30)
    free = round((gib - used_gib) * 2**30)
    monkeypatch.setattr(paddle.cuda, "mem_get_info", lambda *_: (free, gib * 2**30))
    return flags
