"""A plain network as files that run without this project: weights, a Paddle program, or ONNX.

What was written is read again and compared with the network that it comes from.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import paddle
from paddle.static import InputSpec
from tqdm import tqdm

from hnas.base.errors import UserError
from hnas.dataset.loader import EvalLoader
from hnas.dataset.transforms import normalize
from hnas.evaluation.counts import Counts, LogitsError, count_hits
from hnas.exporting import predict
from hnas.models.resnet import ResNet
from hnas.weights.loading import write_state

logger = logging.getLogger(__name__)

FILES = {
    "pdparams": ("network.pdparams",),
    "inference": ("network.json", "network.pdiparams"),
    "onnx": ("network.onnx",),
}
"""What each format consists of."""
INPUT, OUTPUT = "image", "logits"
OPSET = 17
ONNX_PACKAGES = ("paddle2onnx==2.1.0", "onnxruntime>=1.20")
INT8_PACKAGES = (*ONNX_PACKAGES, "ml_dtypes>=0.4")
"""As the extra ``onnx`` in pyproject.toml has them."""
CALIBRATED = 32
"""Images that the quantizer runs at a time."""
TOLERANCE = 0.01
"""Largest difference of logits, as a share of the largest one."""
MUCH = 0.01
"""Share of the images whose loss by quantizing deserves a warning."""


def check_format(form: str, quantize: str = "none") -> None:
    """What a format needs must be there.

    Raises:
        UserError: it is not, and what to install; or it cannot be quantized.
    """
    if quantize != "none" and form != "onnx":
        raise UserError(f"--quantize {quantize} takes --format onnx, not {form}")
    needed = ONNX_PACKAGES if form == "onnx" else ()
    needed = needed if quantize == "none" else INT8_PACKAGES
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


def read_network(folder: Path, form: str, strides: Sequence[int]) -> Callable:
    """What was written of a network whose blocks have ``strides``, as ``predict.py`` runs it: from
    normalised images [N, 3, S, S] to logits."""
    network = predict.LOADING[form](folder, {"strides": strides})
    return lambda x: paddle.to_tensor(network(x.numpy()))


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


def quantize_onnx(folder: Path, images: paddle.Tensor) -> None:
    """Put the network in ``folder`` into int8; it still takes and gives float32.

    Weights have a scale for each output channel, activations one each: what they reach on
    ``images``, uint8 [N, 3, S, S].

    Raises:
        UserError: the network cannot be quantized.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path, merged = folder / FILES["onnx"][0], folder / "merged.onnx"
    batches = (images[at : at + CALIBRATED] for at in range(0, len(images), CALIBRATED))
    inputs = ({INPUT: normalize(batch).numpy()} for batch in batches)
    reader = SimpleNamespace(get_next=lambda: next(inputs, None))  # all that onnxruntime asks for
    # Of weights 7 bits are used: CPUs without VNNI add up pairs of products in 16 bits.
    how = {"per_channel": True, "reduce_range": True, "activation_type": QuantType.QUInt8}
    try:
        # BatchNorm becomes part of the convolutions, or it would run in float32 between them.
        quant_pre_process(path, merged, skip_symbolic_shape=True)
        quantize_static(merged, path, reader, **how)
    except Exception as error:
        raise UserError(f"onnxruntime cannot quantize the network: {error}") from None
    merged.unlink()
    onnx.checker.check_model(path, full_check=True)


def _tidy(graph) -> None:
    """Name what goes in and out, and leave out constants that nothing uses."""
    (output,) = graph.output
    for node in graph.node:
        node.output[:] = [OUTPUT if name == output.name else name for name in node.output]
    output.name = OUTPUT
    for value in (*graph.input, output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    used = {name for node in graph.node for name in node.input}
    kept = [part for part in graph.node if part.op_type != "Constant" or used & {*part.output}]
    del graph.node[:]
    graph.node.extend(kept)


class Found(NamedTuple):
    """The same images by the source and by what was exported."""

    counts: Counts  # of both, in this order
    difference: float  # the largest between their logits
    largest: float  # logit of the source, without its sign

    @property
    def near_ties(self) -> int:
        """Hits that nearly equal logits may move."""
        return int(self.counts.near1.max())


@paddle.no_grad()
def compare(source: Callable, exported: Callable, loader: EvalLoader) -> Found:
    """Run both on all images of ``loader``; ``source`` gives logits that are finite.

    Raises:
        LogitsError: the exported network gives logits that are not.
    """
    counts, difference, largest = Counts.zeros(2), 0.0, 0.0
    for images, labels in tqdm(loader, desc="checking", unit="batch", mininterval=1):
        x = normalize(images)
        logits = paddle.stack([source(x), exported(x)])
        hits, bad = count_hits(logits, labels)
        if bad[1]:
            raise LogitsError("the exported network", bad[1], len(labels))
        counts.add(hits)
        difference = max(difference, float((logits[0] - logits[1]).abs().max()))
        largest = max(largest, float(logits[0].abs().max()))
    return Found(counts, difference, largest)


def check(found: Found) -> None:
    """Log how both compare.

    Raises:
        UserError: their logits are too far apart, or on CPUs they count hits that nearly equal
            logits do not explain. (GPUs' convolutions may compute with fewer digits.)
    """
    source, exported = found.counts.top1.tolist()
    logger.info(
        "source %d, exported network %d top-1 hits of %d images; largest logit difference %.3g",
        source,
        exported,
        found.counts.images,
        found.difference,
    )
    other_hits = paddle.get_device() == "cpu" and abs(source - exported) > found.near_ties
    if other_hits or found.difference > TOLERANCE * found.largest:
        raise UserError(
            f"the exported network has {exported} hits and its source {source}, with logits up to "
            f"{found.difference:.3g} apart: nothing was written; please report this with your "
            "versions"
        )


def tell_loss(found: Found) -> None:
    """Log the hits in float32, ``found``'s source, and in int8, and warn where many are lost."""
    hits, images = found.counts.top1.tolist(), found.counts.images
    before, after = (f"{100 * number / images:.2f} %" for number in hits)
    logger.info("float32 %s, int8 %s top-1 of %d images", before, after, images)
    if hits[0] - hits[1] > MUCH * images:
        logger.warning(
            "int8 loses %d of %d hits: raise --quantize_images, or export without --quantize",
            hits[0] - hits[1],
            hits[0],
        )


def compare_with_scores(found: Found, name: str, stated: float, on_some: bool) -> None:
    """Log whether the source is as accurate as a file of scores has ``stated`` of its ``name``.

    ``on_some`` says whether not all of the images were compared.
    """
    hits, images = int(found.counts.top1[0]), found.counts.images
    # Of a figure that was rounded to 0.1 % or finer, what that may have changed.
    digits = next((n for n in range(3, 10) if abs(round(stated, n) - stated) < 1e-12), 10)
    if abs(stated * images - hits) <= found.near_ties + images * 0.5001 * 10**-digits + 1e-6:
        logger.info("%s: %d of %d hits, as the scores say", name, hits, images)
    elif on_some:
        logger.info("%s: the scores say %.4f, of other images", name, stated)
    else:
        logger.warning(
            "the scores say %.4f for %s, here it has %.4f: they are of other images, weights or "
            "statistics",
            stated,
            name,
            hits / images,
        )
