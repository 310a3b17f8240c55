"""A plain network as files that run without this project: weights, a Paddle program, or ONNX."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import paddle
from paddle.static import InputSpec

from hnas.base.errors import UserError
from hnas.models.resnet import ResNet
from hnas.weights.loading import load_weights, read_weights, write_state

FILES = {
    "pdparams": ("network.pdparams",),
    "inference": ("network.json", "network.pdiparams"),
    "onnx": ("network.onnx",),
}
"""What each format consists of."""
INPUT, OUTPUT = "image", "logits"
OPSET = 17
ONNX_PACKAGES = ("paddle2onnx==2.1.0", "onnxruntime>=1.20")
"""As the extra ``onnx`` in pyproject.toml has them."""


def check_format(form: str) -> None:
    """What a format needs must be there.

    Raises:
        UserError: it is not; says what to install.
    """
    needed = ONNX_PACKAGES if form == "onnx" else ()
    missing = [
        f"'{package}'"
        for package in needed
        if importlib.util.find_spec(package.partition("=")[0].rstrip(">")) is None
    ]
    if missing:
        install = f"{sys.executable} -m pip install {' '.join(missing)} 'numpy<2'"
        raise UserError(f"--format onnx: run {install}")


def write_network(network: ResNet, folder: Path, form: str, size: int, about: Mapping) -> None:
    """Write the files of a format.

    Args:
        network: in eval mode.
        size: height and width S of its images, px.
        about: what a file of weights says of them.

    Raises:
        UserError: the network cannot be converted.
    """
    if form == "pdparams":
        write_state(folder / FILES[form][0], network.state_dict(), about)
        return
    spec = InputSpec([None, 3, size, size], "float32", name=INPUT)
    paddle.jit.save(network, str(folder / "network"), input_spec=[spec])
    if form == "onnx":
        _write_onnx(folder)


def read_network(folder: Path, form: str, blank: ResNet) -> Callable:
    """What was written, as a function from normalised images [N, 3, S, S] to logits [N, classes].

    Args:
        blank: a network of the same architecture in eval mode, to be filled with weights.
    """
    if form == "pdparams":
        load_weights(blank, read_weights(folder / FILES[form][0]), folder)
        return blank
    if form == "inference":
        return paddle.jit.load(str(folder / "network"))
    import onnxruntime

    session = onnxruntime.InferenceSession(
        folder / FILES[form][0], providers=["CPUExecutionProvider"]
    )
    return lambda x: paddle.to_tensor(session.run([OUTPUT], {INPUT: x.numpy()})[0])


def _write_onnx(folder: Path) -> None:
    """Convert the program in ``folder``, which is deleted, to ONNX."""
    import onnx
    import paddle2onnx

    program = [folder / name for name in FILES["inference"]]
    try:
        # Without a file to save, none of its optimizers runs; one of them installs packages.
        converted = paddle2onnx.export(*map(str, program), opset_version=OPSET)
    except Exception as error:
        # It reports by its own log, and then fails in any way.
        raise UserError(f"paddle2onnx cannot convert the network: {error}") from None
    for path in program:
        path.unlink()
    model = onnx.load_model_from_string(converted)
    _tidy(model.graph)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / FILES["onnx"][0])


def _tidy(graph) -> None:
    """Name what goes in and out, and leave out constants that nothing uses."""
    (output,) = graph.output
    for node in graph.node:
        node.output[:] = [OUTPUT if name == output.name else name for name in node.output]
    output.name = OUTPUT
    for value in (*graph.input, output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    used = {name for node in graph.node for name in node.input}
    kept = [part for part in graph.initializer if part.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    kept = [part for part in graph.node if part.op_type != "Constant" or used & {*part.output}]
    del graph.node[:]
    graph.node.extend(kept)
