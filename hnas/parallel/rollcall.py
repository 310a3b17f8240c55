"""Who of the processes is still there, and waiting until all are at the same point.

Collectives serve for neither: gloo's give up after 30 seconds of waiting, NCCL's may hang for
half an hour when a peer has died, and the launcher of one machine does not see another's processes.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable

from hnas.base.errors import UserError

logger = logging.getLogger(__name__)

HERE, LEAVING = b".", b"x"
HELLO = struct.Struct("!q")
"""What a process says first: its rank."""
CONNECT_SECONDS = 30
REPORT_SECONDS = 3
"""The launcher needs about one to notice and report which process died; it ends the others."""
KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)
"""A machine that is switched off is noticed after 10 + 5 * 4 seconds."""


class RollCall:
    """A connection between rank 0 and every other process, each watched by a thread.

    A connection that ends without a farewell means a dead process: this one then ends too, at
    once wherever it is, since it may be inside a collective that will never return.

    Args:
        lines: at rank 0 the connection to each other rank; elsewhere the one to rank 0.
    """

    def __init__(self, lines: dict[int, socket.socket]):
        self._lines = lines
        for line in lines.values():
            line.settimeout(None)
            for option in KEEPALIVE:
                line.setsockopt(*option)
        self._heard = dict.fromkeys(lines, 0)
        self._left: set[int] = set()
        self._calls = 0
        self._leaving = False
        self._news = threading.Condition()
        for each in lines.items():
            threading.Thread(target=self._listen, args=each, daemon=True).start()

    @classmethod
    def connect(
        cls, rank: int, world_size: int, host: str, share: Callable[[list[int]], list[int]]
    ) -> RollCall:
        """Called by all ranks at once; :class:`UserError` if one does not come in 30 seconds.

        ``host`` is rank 0's machine; ``share`` gives everyone rank 0's list of whole numbers.
        """
        if rank:
            (port,) = share([0])
            try:
                line = socket.create_connection((host, port), CONNECT_SECONDS)
                line.sendall(HELLO.pack(rank))
            except OSError as error:
                raise UserError(f"rank {rank} cannot reach rank 0 at {host}: {error}") from None
            return cls({0: line})
        with socket.create_server(("", 0), backlog=world_size) as server:
            share([server.getsockname()[1]])
            return cls(_accept(server, world_size))

    def wait(self) -> None:
        """Return when every rank has called this as often as this one has; no limit of time.

        :class:`UserError` where one has ended already.
        """
        self._calls += 1
        answers = 0 not in self._lines  # rank 0
        if not answers:
            self._say(HERE)
        with self._news:
            self._news.wait_for(lambda: self._left & self._absent() or not self._absent())
            if self._absent():
                gone = min(self._left & self._absent())
                raise UserError(f"rank {gone} has ended before the others")
        if answers:
            self._say(HERE)

    def _absent(self) -> set[int]:
        return {rank for rank, calls in self._heard.items() if calls < self._calls}

    def leave(self) -> None:
        """Say farewell: this process is done, and not dead."""
        self._leaving = True
        self._say(LEAVING)

    def _say(self, word: bytes) -> None:
        for line in self._lines.values():
            try:
                line.sendall(word)
            except OSError:
                continue  # whose thread sees it as well, and knows what it means

    def _listen(self, rank: int, line: socket.socket) -> None:
        """Take in what a rank says until it leaves; where it is gone this process ends, too."""
        words = HERE
        while words and LEAVING not in words:
            try:
                words = line.recv(4096)
            except OSError:
                words = b""
            with self._news:
                self._heard[rank] += words.count(HERE)
                if LEAVING in words:
                    self._left.add(rank)
                self._news.notify_all()
        if not words and not self._leaving:
            time.sleep(1)  # if all end for the same reason, each says it itself
            logger.error(
                "rank %d is gone, so this process ends too; its log in save_dir may say why", rank
            )
            time.sleep(REPORT_SECONDS)
            os._exit(1)  # not sys.exit: the main thread may be inside a collective


def _accept(server: socket.socket, world_size: int) -> dict[int, socket.socket]:
    """Connections from ranks 1 to ``world_size - 1``; others are turned away."""
    lines: dict[int, socket.socket] = {}
    server.settimeout(CONNECT_SECONDS)
    while missing := set(range(1, world_size)) - set(lines):
        try:
            line, _ = server.accept()
        except OSError:
            raise UserError(f"no word from rank {min(missing)} at the start") from None
        line.settimeout(CONNECT_SECONDS)
        try:
            (rank,) = HELLO.unpack(line.recv(HELLO.size, socket.MSG_WAITALL))
        except (OSError, struct.error):
            rank = 0
        if rank in missing:
            lines[rank] = line
        else:
            line.close()
    return lines
