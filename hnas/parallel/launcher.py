"""Paddle's launcher, and what it lacks: it tells its processes who it is, and users their errors.

    python -m hnas.parallel.launcher --nproc_per_node N --log_dir DIR SCRIPT FLAGS...

A user's error in any process of this machine becomes the last line, with its rank, and exit code
2. A signal gives 143, 130 or 129, after the processes have saved. A process that dies gives 1.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from paddle.distributed.launch import controllers
from paddle.distributed.launch.context import Context
from paddle.distributed.launch.job.pod import Pod

from hnas.base.errors import ERRORS, LAUNCHER, heard_signals


class NotingPod(Pod):
    """The processes; notes how some ended before the others were told to.

    Attributes:
        ended: exit codes by rank, of those that failed first; minus a signal's number.
    """

    def __init__(self):
        super().__init__()
        self.ended: dict[str, int] = {}

    def stop(self, *args, **kwargs):
        failed = self.failed_container()
        self.ended = self.ended or {c.env["PADDLE_TRAINER_ID"]: c.exit_code for c in failed}
        return super().stop(*args, **kwargs)


def main() -> None:
    context = Context()
    errors = Path(context.args.log_dir) / "errors"
    errors.unlink(missing_ok=True)
    os.environ |= {LAUNCHER: str(os.getpid()), ERRORS: str(errors.absolute())}
    context.envs |= {name: os.environ[name] for name in (LAUNCHER, ERRORS)}
    controller = controllers.init(context)
    controller.pod = NotingPod()
    if signal.SIGHUP in heard_signals():
        signal.signal(signal.SIGHUP, controller.signal_handler)
    try:
        controller.run()
        controller.finalize()
    except SystemExit as end:
        number = getattr(controller, "sigint", None)
        if number:
            sys.exit(128 + number)
        if errors.is_file():
            sys.stderr.write(errors.read_text(encoding="utf-8", errors="replace"))
        sys.exit(exit_code(controller.pod.ended) if end.code else 0)


def exit_code(ended: Mapping[str, int]) -> int:
    """The launcher's, from those of :class:`NotingPod`; a line for each rank that was killed."""
    for rank, code in ended.items():
        if code < 0:
            name = signal.Signals(-code).name
            sys.stderr.write(f"rank {rank} was killed by {name}; what is saved can be resumed\n")
    codes = [*ended.values()] or [1]
    return max(codes) if min(codes) > 0 else 1


if __name__ == "__main__":
    main()
