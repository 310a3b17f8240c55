"""Paddle's launcher, and what it lacks: it tells its processes who it is, and users their errors.

    python -m hnas.parallel.launcher --nproc_per_node N --log_dir DIR SCRIPT FLAGS...

A user's error in any process of this machine becomes the last line, with its rank, and exit code
2. A signal gives 143 or 130, after the processes have saved.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from paddle.distributed.launch import controllers
from paddle.distributed.launch.context import Context

from hnas.base.errors import ERRORS, LAUNCHER


def main() -> None:
    context = Context()
    errors = Path(context.args.log_dir) / "errors"
    errors.unlink(missing_ok=True)
    os.environ |= {LAUNCHER: str(os.getpid()), ERRORS: str(errors.absolute())}
    context.envs |= {name: os.environ[name] for name in (LAUNCHER, ERRORS)}
    controller = controllers.init(context)
    try:
        controller.run()
        controller.finalize()
    except SystemExit as end:
        number = getattr(controller, "sigint", None)
        if number:
            sys.exit(128 + number)
        if end.code and errors.is_file():
            sys.stderr.write(errors.read_text(encoding="utf-8", errors="replace"))
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
