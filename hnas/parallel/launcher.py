"""Paddle's launcher, and what it lacks: it tells its processes who it is, and users their errors.

    python -m hnas.parallel.launcher --nproc_per_node N --log_dir DIR SCRIPT FLAGS...

A user's error in any process of this machine becomes the last line, with its rank, and exit code
2. A signal gives 143, 130 or 129, after the processes have saved; a process that is killed 1.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from paddle.distributed.launch import controllers
from paddle.distributed.launch.context import Context
from paddle.distributed.launch.job.pod import Pod

from hnas.base.errors import ERRORS, HANG_UP, LAUNCHER, say

PATIENCE = 86_400
"""Seconds that a first signal's saving may take: a chunk of stage 3 takes minutes, or an hour."""


class NotingPod(Pod):
    """The processes; notes those that failed before the others were told to end."""

    failed = ()

    def stop(self, sigint=signal.SIGTERM, timeout=None):
        self.failed = self.failed or self.failed_container()
        # Paddle kills after 30 seconds; after 10 on a second signal, and after 3 where one failed.
        if timeout == 30:  # and it has closed its log by now
            say("ending when all have saved; a second signal kills in 10 seconds")
        return super().stop(sigint, PATIENCE if timeout == 30 else timeout)


def main() -> None:
    context = Context()
    errors = Path(context.args.log_dir) / "errors"
    errors.unlink(missing_ok=True)
    os.environ |= {LAUNCHER: str(os.getpid()), ERRORS: str(errors.absolute())}
    context.envs |= {name: os.environ[name] for name in (LAUNCHER, ERRORS)}
    controller = controllers.init(context)
    controller.pod = pod = NotingPod()
    for number in HANG_UP:
        signal.signal(number, controller.signal_handler)
    try:
        controller.run()
        controller.finalize()
    except SystemExit as end:
        number = getattr(controller, "sigint", None)
        if number:
            sys.exit(128 + number)
        if not end.code:
            raise
        sys.stdout.flush()  # the processes' logs come before what they say
        if told := errors.is_file():
            sys.stderr.write(errors.read_text(encoding="utf-8", errors="replace"))
        for one in pod.failed:
            if one.exit_code < 0:
                name, rank = signal.Signals(-one.exit_code).name, one.env["PADDLE_TRAINER_ID"]
                sys.exit(f"rank {rank} was killed by {name}; what is saved can be resumed")
        # Below 0 for one that did not end when it was told to.
        sys.exit(2 if told else max(end.code, 1))


if __name__ == "__main__":
    main()
