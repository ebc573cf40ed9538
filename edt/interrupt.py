"""Stopping long work between two steps, so that none is left half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .files.text import say


class StopRequest:
    """True once Ctrl-C was pressed, or the process was asked to terminate."""

    requested = False

    def __bool__(self) -> bool:
        return self.requested


@contextmanager
def stop_on_interrupt() -> Iterator[StopRequest]:
    """Turns Ctrl-C, SIGTERM (what schedulers of clusters send) and SIGHUP (the terminal is gone) into a request
    that loops look at once a step.

    A second Ctrl-C or SIGTERM acts at once, should a step hang. A SIGHUP never does: a closing terminal's kernel
    and shell both send one, and systemd sends it after SIGTERM. Where it was ignored, as under nohup, it stays so.
    """
    stop = StopRequest()
    told: list[int] = []  # the signals so far but SIGHUP; `stop` may also come from another process of the run

    def on_interrupt(signum, frame):
        if signum != signal.SIGHUP:
            if told:
                raise KeyboardInterrupt
            told.append(signum)
        if not stop:
            stop.requested = True
            say("\nstopping after this step; again to stop at once …")

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, on_interrupt) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python
