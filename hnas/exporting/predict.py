"""Classify images by the network beside this file.

Needs numpy, pillow and paddlepaddle, or of a network.onnx onnxruntime; nothing else.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

MAX_ASPECT = 100
"""How many times as long as wide an image may be: as in training."""

# Each format as a function from images, as they are prepared below, to logits [N, classes].


def onnx(folder, card):
    import onnxruntime

    session = onnxruntime.InferenceSession(
        folder / "network.onnx", providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"image": x})[0]


def inference(folder, card):
    import paddle

    program = paddle.jit.load(str(folder / "network"))
    return lambda x: program(paddle.to_tensor(x)).numpy()


def pdparams(folder, card):
    import paddle
    from paddle.nn.functional import batch_norm, conv2d, linear, max_pool2d, relu

    state = paddle.load(str(folder / "network.pdparams"))  # a pickle: load what you trust only
    w = {name: part.astype("float32") for name, part in state.items() if "@" not in name}

    def norm_of_conv(x, conv, norm, stride):
        filters = w[f"{conv}.weight"]
        x = conv2d(x, filters, stride=stride, padding=filters.shape[2] // 2)
        parts = ("_mean", "_variance", "weight", "bias")
        return batch_norm(x, *(w[f"{norm}.{part}"] for part in parts))

    def network(x):
        x = relu(norm_of_conv(paddle.to_tensor(x), "blocks.0.conv", "blocks.0.bn", 2))
        x = max_pool2d(x, 3, 2, 1)
        for index, stride in enumerate(card["strides"], 1):
            block, shortcut = f"blocks.{index}", x
            if f"{block}.downsample.0.weight" in w:
                down = f"{block}.downsample"
                shortcut = norm_of_conv(x, f"{down}.0", f"{down}.1", stride)
            x = relu(norm_of_conv(x, f"{block}.conv1", f"{block}.bn1", stride))
            x = relu(norm_of_conv(x, f"{block}.conv2", f"{block}.bn2", 1) + shortcut)
        head = f"blocks.{len(card['strides']) + 1}.fc"
        return linear(x.mean([2, 3]), w[f"{head}.weight"], w[f"{head}.bias"]).numpy()

    return network


LOADING = {"onnx": onnx, "inference": inference, "pdparams": pdparams}


def read_card(folder):
    """The card, if the files beside it are still those that it was written for."""
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    for name, digest in card["files"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{name} is not the file that card.json was written for")
    how = card["preprocessing"]
    mean, std = np.float32(how["mean"]), np.float32(how["std"])
    if not (np.isfinite([mean, std]).all() and (std > 0).all()):
        raise ValueError("mean or std in card.json is no number to prepare images with")
    return card


def find(names, endings):
    """Files as they are named; of folders all images in and below them, if there are any.

    Links are followed, once each folder; what is hidden is left out.
    """
    for name in names:
        below, seen = [], set()
        for folder, folders, files in os.walk(name, followlinks=True):
            if (real := os.path.realpath(folder)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            shown = (f for f in files if not f.startswith("."))
            # One that cannot be read is complained of as an image.
            below += [Path(folder, f) for f in folders if not os.access(Path(folder, f), os.R_OK)]
            below += [Path(folder, f) for f in shown if Path(f).suffix.lower() in endings]
        yield from map(str, sorted(below) or [name])


def prepare(path, how):
    """The image as float32 [1, 3, S, S]: shorter side, centre, mean and deviation of the card."""
    if not Path(path).is_file():
        raise ValueError("no image file, nor a folder that holds some")
    image = Image.open(path, formats=how["formats"])
    sides, most = sorted(image.size), Image.MAX_IMAGE_PIXELS
    if most and sides[0] * sides[1] > most or sides[1] > MAX_ASPECT * sides[0]:
        raise ValueError(f"{image.size[0]} x {image.size[1]} px: too large, or too long")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"grey of more than 8 bits (mode {image.mode}); convert it")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    (w, h), short, size = image.size, how["resize_shorter_side"], how["crop"]
    w, h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    left, top = (round((side - size) / 2) for side in (w, h))
    image = image.resize((w, h), Image.Resampling.BILINEAR)
    image = image.crop((left, top, left + size, top + size))
    x = (np.float32(image) / np.float32(255) - np.float32(how["mean"])) / np.float32(how["std"])
    return x.transpose(2, 0, 1)[np.newaxis]


def classify(network, card, path, number):
    """The likeliest classes of an image, each with its probability."""
    logits = network(prepare(path, card["preprocessing"]))[0].astype(np.float64)
    if not np.isfinite(logits).all():
        raise ValueError("the network gives logits that are not finite")
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    order = np.argsort(-logits, kind="stable")[:number]
    return [{"class": card["classes"][i], "probability": float(shares[i])} for i in order]


def complain(what, error):
    """Write a line to stderr; gives the exit code."""
    text = " ".join(str(error).split()) or type(error).__name__
    sys.stderr.write(f"{what}: {text:.300}\n")
    return 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", help="image files, or folders and all below them")
    parser.add_argument("--top", type=int, metavar="N", help="N classes, with probabilities")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each image")
    asked = parser.parse_args()
    if asked.top is not None and asked.top < 1:
        parser.error("--top: 1 or more")
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show
    folder = Path(__file__).resolve().parent
    try:
        card = read_card(folder)
        network = LOADING[card["identity"]["format"]](folder, card)
    except Exception as error:
        sys.exit(complain(f"cannot use the network in {folder}, export it again", error))
    code = 0
    for path in find(asked.images, card["preprocessing"]["endings"]):
        try:
            found = classify(network, card, path, asked.top or 1)
        except Exception as error:  # a broken image can make its decoder fail in any way
            code = complain(path, error)
            continue
        if asked.json:
            text = json.dumps({"image": path, "classes": found})
        elif asked.top:
            shares = (f"{each['class']} {each['probability']:.2%}" for each in found)
            text = f"{path} {', '.join(shares)}"
        else:
            text = f"{path} {found[0]['class']}"
        try:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python tries again
            sys.exit(complain("cannot write the output", error))
    sys.exit(code)


if __name__ == "__main__":
    main()
