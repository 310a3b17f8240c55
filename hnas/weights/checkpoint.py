"""What training resumes from.

That is a *set* of three files: ``NAME.pdparams`` (weights), ``NAME.pdopt`` (the optimizer's
velocities) and ``NAME.pdstates`` (position, losses). The last is written last and holds
the digests of the others, so a set that a crash left half-written, or mixed of two, is never
loaded. The learning rate is in none: it follows from the position.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from hnas.base.errors import UserError
from hnas.base.files import digest_path, file_digest, read_json
from hnas.weights.loading import (
    PARAMS,
    check_finite,
    load_weights,
    read_checkpoint,
    read_state,
    write_state,
)
from hnas.weights.public_files import NAME_TABLE

logger = logging.getLogger(__name__)

OPTIMIZER, STATES = ".pdopt", ".pdstates"
# Which run began last in a folder and writes there; every set holds its run's id.
RUN_NOTE = "run_id.json"
# Sets: 3 is after epoch 3 (from 0), 3-120 is 120 steps into epoch 3.
SET_NAME = re.compile(r"([0-9]+)(?:-([0-9]+))?")
VELOCITY = "_velocity_0"


def save_training(
    stem: str | Path, network: nn.Layer, optimizer, progress: Mapping, about: Mapping | None = None
) -> None:
    """Write the set ``stem``, a path without suffix.

    Args:
        progress: what :func:`read_progress` gives back: plain values and arrays, with the run's
            ``run_id``.
        about: how the weights are trained; see :class:`hnas.weights.loading.Checkpoint`.

    Raises:
        NotFiniteError: before anything is written.
        UserError: files that cannot be written.
    """
    check_finite(network)
    others = [other["number"] for _, other in sets_in(Path(stem).parent)]
    digests = {
        PARAMS: write_state(f"{stem}{PARAMS}", network.state_dict(), about),
        OPTIMIZER: write_state(f"{stem}{OPTIMIZER}", optimizer_state(network, optimizer)),
    }
    number = 1 + max(others, default=0)
    write_state(f"{stem}{STATES}", {**progress, "digests": digests, "number": number})


def load_training(stem: str | Path, network: nn.Layer, optimizer, progress: Mapping) -> None:
    """Restore weights and velocities of the set whose :func:`read_progress` is ``progress``.

    Raises:
        UserError: of another network, or files that are not of that set.
    """
    params, moving = f"{stem}{PARAMS}", f"{stem}{OPTIMIZER}"
    checkpoint, (velocities, digest) = read_checkpoint(params), read_state(moving)
    if progress["digests"] != {PARAMS: checkpoint.digest, OPTIMIZER: digest}:
        raise UserError(f"{params}, {moving} and {stem}{STATES} are not of one set")
    load_weights(network, checkpoint.weights, params)
    restore_optimizer(network, optimizer, velocities, moving)


def read_progress(stem: str | Path) -> dict:
    """The content of ``stem.pdstates``.

    Raises:
        UserError: not a state of this program.
    """
    progress, _ = read_state(f"{stem}{STATES}")
    found = progress if isinstance(progress, dict) else {}
    digests = found.get("digests")
    whole = isinstance(digests, dict) and set(digests) == {PARAMS, OPTIMIZER}
    if not whole or type(found.get("number")) is not int or type(found.get("run_id")) is not str:
        raise UserError(f"{stem}{STATES} is not what this program saves; start anew")
    return found


def newest_set(
    folder: str | Path, run_id: str | None = None, names: Container[str] | None = None
) -> Path | None:
    """The set in ``folder`` that was saved last and is whole, as a path without suffix.

    With a ``run_id`` only that run's sets count, with ``names`` only those that are called so. Each
    set has a larger number than those that were there when it was saved; clocks may go back. One
    that a crash left unfinished, or that is damaged, is passed over with a line in the log.
    """
    found = sets_in(folder, log=True)
    own = [each for each in found if run_id in (None, each[1]["run_id"])]
    own = [each for each in own if names is None or each[0].name in names]
    for stem, progress in sorted(own, key=lambda each: each[1]["number"], reverse=True):
        try:
            _check_whole(stem, progress)
            return stem
        except UserError as error:
            logger.warning("passed over %s: %s", stem, error)
    return None


def sets_in(folder: str | Path, log: bool = False) -> Iterator[tuple[Path, dict]]:
    """The sets in a folder, without suffix, with what :func:`read_progress` gives."""
    for path in Path(folder).glob(f"*{STATES}"):
        stem = path.with_suffix("")
        if SET_NAME.fullmatch(stem.name):
            try:
                yield stem, read_progress(stem)
            except UserError as error:
                if log:
                    logger.warning("passed over %s: %s", stem, error)


def _check_whole(stem: Path, progress: Mapping) -> None:
    for suffix, digest in progress["digests"].items():
        path = Path(f"{stem}{suffix}")
        if not path.is_file():
            raise UserError(f"{path} is missing")
        if file_digest(path) != digest:
            raise UserError(f"{path} is damaged or not of the same set as {stem}{STATES}")


def remove_set(stem: str | Path) -> None:
    """Delete a set, in the order that never leaves a half that looks whole."""
    for suffix in (STATES, OPTIMIZER, PARAMS):
        for path in (Path(f"{stem}{suffix}"), digest_path(f"{stem}{suffix}")):
            path.unlink(missing_ok=True)


def optimizer_state(network: nn.Layer, optimizer) -> dict:
    """The velocity of every parameter that trains, under the network's structured names.

    Paddle's own names count the layers that the process ever made, so they would not fit a
    process that built them in another order. A parameter that no sub-network has trained so far
    has a velocity of zero.
    """
    # Paddle gives out what was restored only when it has been used since.
    moving = {**optimizer._accumulators_holder, **optimizer.state_dict()}
    state = {}
    for name, tensor in _trained(network).items():
        velocity = moving.get(f"{tensor.name}{VELOCITY}")
        state[name] = paddle.zeros_like(tensor) if velocity is None else velocity
    return state


def _trained(network: nn.Layer) -> dict[str, paddle.Tensor]:
    """The parameters that train, by the names of their velocities."""
    own = network.named_parameters()
    return {f"{name}@{VELOCITY}": tensor for name, tensor in own if not tensor.stop_gradient}


def restore_optimizer(network: nn.Layer, optimizer, state: dict, source: str) -> None:
    """Set the optimizer's state from :func:`optimizer_state`'s.

    Raises:
        UserError: it is of another network, or not finite.
    """
    trained = _trained(network)
    found = state if isinstance(state, dict) else {}
    odd = trained.keys() ^ (found.keys() - {NAME_TABLE})
    for key, tensor in trained.items():
        value, dtype = found.get(key), str(tensor.dtype).removeprefix("paddle.")
        fits = isinstance(value, np.ndarray) and value.shape == tuple(tensor.shape)
        if not fits or value.dtype != dtype or not np.isfinite(value).all():
            odd.add(key)
    if odd:
        key = min(map(str, odd))
        raise UserError(f"optimizer state {source} is of another network or broken: {key}")
    optimizer.set_state_dict(
        {f"{t.name}{VELOCITY}": paddle.to_tensor(found[key]) for key, t in trained.items()}
    )


def noted_run(folder: str | Path) -> str | None:
    """The run that began last in ``folder``; None: nobody noted any there.

    Raises:
        UserError: the note is not this program's.
    """
    path = Path(folder) / RUN_NOTE
    if not path.is_file():
        return None
    run_id = read_json(path).get("run_id")
    if not isinstance(run_id, str):
        raise UserError(f"{path} is not what this program saves; remove it to resume any run's set")
    return run_id
