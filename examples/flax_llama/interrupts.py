"""Ctrl-C and SIGTERM, answered at once whatever the main thread is busy with.

Python calls handlers of signals in the main thread, between two of its own instructions: while XLA
compiles there, that is minutes later. What lies beneath them writes the signal's number to a socket
at once (`signal.set_wakeup_fd`), and a thread reads it here.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils
from rich import get_console

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A program is told to end by a signal, which is its number."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__()
        self.number = number


class Stop:
    """Whether a run is to stop after the update that it is at."""

    def __init__(self, how_to_go_on: str):
        self.how_to_go_on = how_to_go_on
        self.requested = False
        # By the thread that reads signals; a signal after that one quits.
        self.told = False

    def __call__(self, step: int) -> bool:
        return self.requested


def never(step: int) -> bool:
    """Where nothing asks a run to stop."""
    return False


class Answers:
    """What the signals of this program come to: the first one stops a run, any other one quits."""

    def __init__(self) -> None:
        self.stop: Stop | None = None

    def handle(self, *_: object) -> None:
        """Python's own handler, in the main thread: what it does next knows of the signal."""
        if self.stop is not None:
            self.stop.requested = True

    def listen(self, signals: socket.socket) -> None:
        """Answers until the other end of the socket is closed."""
        with signals:
            while received := signals.recv(1):
                if (number := received[0]) in SIGNALS:
                    self.answer(number)

    def answer(self, number: int) -> None:
        if self.stop is not None and not self.stop.told:
            self.stop.told = self.stop.requested = True
            get_console().print("Stopping after this update; again to quit now.")
        else:
            quit_now(number, self.stop)


def quit_now(number: int, stop: Stop | None) -> None:
    """Ends the program as a kill would, which no file of a run minds, with the signal's status."""
    console = get_console()
    # A progress bar hides it.
    console.show_cursor()
    # With no end of a line that is none of the command's.
    console.print(f"Quit. {stop.how_to_go_on}" if stop else "Interrupted.", soft_wrap=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + number)


# Of the program, which has the signals: None where nothing answers them but Python.
_answers: Answers | None = None


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Answers the signals of a program: they quit at once, but for the first one in `stopping`."""
    global _answers
    if threading.current_thread() is not threading.main_thread():
        yield  # Python has signals in the main thread only
        return
    reading, writing = socket.socketpair()
    # Python does not wait for the reader.
    writing.setblocking(False)
    _answers = answers = Answers()
    threading.Thread(target=answers.listen, args=[reading], daemon=True).start()
    # Those that a program is started without, as in the background of a script, stay so.
    taken = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, answers.handle) for number in taken}
    other = signal.set_wakeup_fd(writing.fileno())
    try:
        yield
    finally:
        _answers = None
        signal.set_wakeup_fd(other)
        for number, handler in previous.items():
            signal.signal(number, handler)
        writing.close()


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM raise `Interrupted`, for a program that has something to clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: object) -> None:
        raise Interrupted(number)

    # Those that a program is started without stay so.
    taken = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in taken}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stopping(how_to_go_on: str) -> Iterator[Callable[[int], bool]]:
    """Yields whether, by some update, a first signal has come to the program.

    Where nothing answers signals, none is seen here: Python raises KeyboardInterrupt.
    """
    if jax.process_count() > 1:
        # All must stop after the same update; JAX's own handler of SIGTERM sees to that.
        yield multihost_utils.reached_preemption_sync_point
    elif _answers is None:
        yield lambda step: False
    else:
        _answers.stop = Stop(how_to_go_on)
        try:
            yield _answers.stop
        finally:
            _answers.stop = None
