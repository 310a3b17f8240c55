"""A plain network as files that run without this project: weights, a Paddle program, or ONNX."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import paddle
from paddle.static import InputSpec

from hnas.base.errors import UserError
from hnas.models.resnet import ResNet
from hnas.utils.weights import check_values, load_weights, read_weights, write_state

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


def check_format(form: str, precision: str) -> None:
    """What a format needs must be there, and the precision one that it has.

    Raises:
        UserError: it is not; says what to install, or to give.
    """
    if form == "inference" and precision != "float32":
        raise UserError(
            f"--precision {precision} is not for --format inference: Paddle Inference lowers the "
            "precision of a float32 program itself when it loads it; give float32"
        )
    missing = [
        package
        for package in ONNX_PACKAGES
        if form == "onnx"
        and importlib.util.find_spec(package.partition("=")[0].rstrip(">")) is None
    ]
    if missing:
        named = " ".join(f"'{package}'" for package in missing)
        raise UserError(f"--format onnx: run {sys.executable} -m pip install {named} 'numpy<2'")


def write_network(
    network: ResNet, folder: Path, form: str, precision: str, size: int, about: Mapping
) -> None:
    """Write the files of a format.

    Args:
        network: in eval mode.
        form, precision: as :func:`check_format` accepts them.
        size: height and width S of its images, px.
        about: what a file of weights says of them.

    Raises:
        UserError: a number is too large for the precision, or the network cannot be converted.
    """
    if precision != "float32":
        halves = {name: part.astype(precision) for name, part in network.state_dict().items()}
        check_values({name: part.numpy() for name, part in halves.items()}, f"as {precision}")
    if form == "pdparams":
        state = network.state_dict() if precision == "float32" else halves
        write_state(folder / FILES[form][0], state, about)
        return
    spec = InputSpec([None, 3, size, size], "float32", name=INPUT)
    paddle.jit.save(network, str(folder / "network"), input_spec=[spec])
    if form == "onnx":
        _write_onnx(folder, precision)


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


def _write_onnx(folder: Path, precision: str) -> None:
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
    if precision == "float16":
        _halve(model.graph)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / FILES["onnx"][0])


def _tidy(graph) -> None:
    """Name what goes in and out, and leave out constants that nothing uses."""
    (output,) = graph.output
    _rename(graph, output.name, OUTPUT)
    output.name = OUTPUT
    for value in (*graph.input, output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    used = {name for node in graph.node for name in node.input}
    for tensors in (graph.initializer, graph.node):
        kept = [part for part in tensors if not _is_left_over(part, used)]
        del tensors[:]
        tensors.extend(kept)


def _is_left_over(part, used: set[str]) -> bool:
    """Whether an initializer, or a node that makes a constant, is of no use."""
    if not hasattr(part, "op_type"):
        return part.name not in used
    return part.op_type == "Constant" and not used.intersection(part.output)


def _halve(graph) -> None:
    """Let a graph compute in float16; what goes in and out stays float32."""
    from onnx import AttributeProto, TensorProto, helper, numpy_helper

    attributes = [attribute for node in graph.node for attribute in node.attribute]
    constants = [part.t for part in attributes if part.type == AttributeProto.TENSOR]
    for tensor in (*graph.initializer, *constants):
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    _rename(graph, INPUT, f"{INPUT}_half")
    _rename(graph, OUTPUT, f"{OUTPUT}_half")
    first = helper.make_node("Cast", [INPUT], [f"{INPUT}_half"], to=TensorProto.FLOAT16)
    last = helper.make_node("Cast", [f"{OUTPUT}_half"], [OUTPUT], to=TensorProto.FLOAT)
    graph.node.insert(0, first)
    graph.node.append(last)
    del graph.value_info[:]  # their types


def _rename(graph, old: str, new: str) -> None:
    """Give a value another name wherever a node makes or takes it."""
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
