"""Ctrl-C and SIGTERM: take no more regions, and leave a state that resumes."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from segpipe.compute import Engine

log = logging.getLogger(__name__)


@dataclass
class Stop:
    """Whether to stop was asked, and the engine to tell."""

    asked: bool = False
    engine: Engine | None = None

    def watch(self, engine: Engine) -> None:
        """Stop this engine when asked, or now if that was before it stood."""
        self.engine = engine
        if self.asked:
            engine.stop()

    def ask(self, _number: int, _frame: object) -> None:
        """Handler of the signals."""
        if self.asked:  # asked twice: now
            raise KeyboardInterrupt
        self.asked = True
        log.warning("stopping; the same command goes on from here")
        if self.engine is not None:
            self.engine.stop()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """SIGINT and SIGTERM stop the engine, whose `run` then raises Stopped; what is done stays done."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
