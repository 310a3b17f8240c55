"""Ending on SIGTERM or Ctrl-C without losing the step that is under way."""

from __future__ import annotations

import signal
import threading

from hnas.base.signals import SIGNALS


class StopSignals:
    """Within the context, the first SIGTERM or Ctrl-C is noted only; the next one acts at once.

    Args:
        patient: later ones are noted only, too. Paddle's launcher sends SIGTERM several times
            within a second, and SIGKILL after 30.

    Attributes:
        received: the signal's number, or None.
    """

    def __init__(self, patient: bool = False):
        self._patient = patient
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        # Python lets no other thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _note(self, number: int, frame) -> None:
        self.received = number
        if not self._patient:
            self.__exit__()
