"""Who takes part in a run of several processes: one that is missing, or has ended, is named.

JAX finds out as well, but says neither which process it is nor in a line: where one has not come it
aborts all others, and where one is gone they wait for its heartbeat, or abort too. Here each
process has a connection to the first one, which the system closes when the process ends, however it
does. Who ends when all do says so before.
"""

import contextlib
import json
import math
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from examples.flax_llama.usage import UsageError

# Of the lines that are sent: who a process is, and that all are there; which are missing; what does
# not fit together; that a process has ended; that this one has come to its end.
HERE, MISSING, WRONG, ENDED, DONE = "here", "missing", "wrong", "ended", "done"
# Seconds between attempts to reach the first process, and those after which a host that does not
# answer any more is gone: at first silent, then asked so often, so far apart.
RETRY = 0.2
SILENT, TIMES, APART = 3, 3, 1


class RollCall:
    """The connections of a process, from when all processes are there until it ends.

    Args:
      host: of the first process.
      port: of the first process; it must be free there.
      count: of processes.
      number: of this one.
      timeout: seconds within which all must come.
      settings: what must be the same in all of them; of strings, numbers and the like.

    Raises:
      UsageError: not all have, or something is not the same; says which.
    """

    def __init__(
        self,
        host: str,
        port: int,
        count: int,
        number: int,
        timeout: float,
        settings: Mapping[str, Any],
    ):
        self._count, self._number = count, number
        # As they are after they have been sent.
        self._settings = json.loads(json.dumps({**settings, "processes": count}, default=str))
        self._peers: dict[int, socket.socket] = {}
        # Those that have said that they are at their end.
        self._done: set[int] = set()
        self._lost = threading.Lock()
        # Whether this process ends by an error of its own, of which it tells itself.
        self._leaves = False
        end = time.monotonic() + timeout
        if number == 0:
            self._gather(port, end, timeout)
        else:
            self._join(host, port, end, timeout)

    def _gather(self, port: int, end: float, timeout: float) -> None:
        """Waits for all others, as the first process, and tells them that they are there."""
        try:
            two = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if two else socket.AF_INET
            options = {"family": family, "dualstack_ipv6": two, "backlog": self._count}
            server = socket.create_server(("", port), **options)
        except OSError as error:
            raise UsageError(
                f"coordinator: port {port}, the one before that of coordinator, cannot be taken "
                f"({error.strerror}): choose another coordinator=HOST:PORT."
            ) from error
        with server:
            while len(self._peers) < self._count - 1:
                here, left = dict(self._peers), max(0, end - time.monotonic())
                heard, _, _ = select.select([server, *here.values()], [], [], left)
                if not heard:
                    break
                for number, peer in here.items():
                    if peer in heard:  # A process that waits says nothing until it is gone.
                        self._end(number)
                peer, _ = server.accept()
                peer.settimeout(SILENT)
                if (member := introduced(peer)) is not None:
                    self._admit(peer, *member)
        missing = set(range(1, self._count)) - self._peers.keys()
        absent = ", ".join(map(str, sorted(missing)))
        self._tell(f"{MISSING} {absent}" if missing else HERE)
        if missing:
            raise self._missing(absent, timeout)
        for number, peer in self._peers.items():
            self._watch(number, peer)

    def _admit(self, peer: socket.socket, number: int, settings: Mapping[str, Any]) -> None:
        """Takes a process in, as the first one, if it is one of this run.

        Raises:
          UsageError: it is not; it and those that are here are told so.
        """
        wrong = None
        if settings != self._settings:
            names = [k for k in self._settings if settings.get(k) != self._settings[k]]
            theirs, ours = (
                ", ".join(f"{name}={of.get(name)!r}" for name in names)
                for of in (settings, self._settings)
            )
            wrong = f"process {number} has {theirs}, and process 0 has {ours}"
        elif number in self._peers or number == 0:
            wrong = f"process={number} was started twice"
        if wrong is None:
            self._peers[number] = peer
            return
        wrong += (
            f": start {self._count} processes with the same settings, and process=0 to "
            f"{self._count - 1}, one each."
        )
        send(peer, f"{WRONG} {wrong}")
        self._tell(f"{WRONG} {wrong}")
        raise UsageError(wrong)

    def _join(self, host: str, port: int, end: float, timeout: float) -> None:
        """Reports to the first process, and waits until all others have."""
        while True:
            try:
                peer = socket.create_connection((host, port), timeout=SILENT)
                break
            except OSError as error:
                if time.monotonic() > end:
                    why = f" (no answer at {host}:{port}: {error.strerror or error})"
                    raise self._missing("0", timeout, why) from None
                time.sleep(RETRY)
        self._peers[0] = peer
        who = {"number": self._number, "settings": self._settings}
        send(peer, f"{HERE} {json.dumps(who)}")
        # The first process says who is missing; by then it has waited as long.
        peer.settimeout(max(1.0, end - time.monotonic() + timeout))
        try:
            answer, _, more = read_line(peer).partition(" ")
        except TimeoutError:
            answer, more = MISSING, "0"
        except OSError:
            answer, more = "", ""
        if answer == WRONG:
            raise UsageError(more)
        if answer == MISSING:
            raise self._missing(more, timeout)
        if answer != HERE:
            # Without an answer the first process itself is gone.
            self._end(int(more) if answer == ENDED else 0)
        self._watch(0, peer)

    def _missing(self, who: str, timeout: float, more: str = "") -> UsageError:
        several = "processes" if "," in who else "process"
        return UsageError(
            f"distributed_timeout={timeout:g}: of {self._count} processes, {several} {who} has not "
            f"come within that many seconds{more}. Start all of them, with the same coordinator="
            f"HOST:PORT and processes={self._count}, and process=0 to {self._count - 1}."
        )

    def _watch(self, number: int, peer: socket.socket) -> None:
        """Reads what a process says, in a thread, until it ends."""
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("IDLE", SILENT), ("INTVL", APART), ("CNT", TIMES)):
            if (name := getattr(socket, f"TCP_KEEP{option}", None)) is not None:
                peer.setsockopt(socket.IPPROTO_TCP, name, value)

        def listen() -> None:
            while True:
                word = rest = ""
                with contextlib.suppress(OSError):
                    word, _, rest = read_line(peer).partition(" ")
                if word == DONE:
                    self._done.add(number)
                elif word == ENDED:
                    self._end(int(rest))
                else:
                    # The connection is closed.
                    if number not in self._done:
                        self._end(number)
                    return

        threading.Thread(target=listen, daemon=True).start()

    def _end(self, number: int) -> None:
        """Ends this process as well, since a process has ended that the run needs."""
        if self._leaves:
            return
        with self._lost:
            self._tell(f"{ENDED} {number}")
            # Not by print: another thread may hold the lock of what it writes to.
            os.write(
                sys.__stderr__.fileno() if sys.__stderr__ else 2,
                f"error: process {number} of {self._count} has ended before the run has, so that "
                f"process {self._number} ends too. Start all of them again with --resume to go on "
                "from the last checkpoint.\n".encode(),
            )
            os._exit(1)

    def _tell(self, line: str) -> None:
        for peer in self._peers.values():
            send(peer, line)

    def leave(self) -> None:
        """Says that this process ends too early, by an error of its own."""
        self._leaves = True
        self._tell(f"{ENDED} {self._number}")

    def close(self) -> None:
        """Says that this process is at its end."""
        self._tell(DONE)


def send(peer: socket.socket, line: str) -> None:
    """Sends a line to a process that may be gone."""
    with contextlib.suppress(OSError):
        peer.sendall(f"{line}\n".encode())


def read_line(peer: socket.socket, seconds: float = math.inf) -> str:
    """A line that a process has sent; nothing where it is gone, or has not sent it in time."""
    line, end = b"", time.monotonic() + seconds
    while (byte := peer.recv(1)) not in (b"", b"\n"):
        line += byte
        if time.monotonic() > end:
            return ""
    return line.decode(errors="replace") if byte else ""


def introduced(peer: socket.socket) -> tuple[int, dict[str, Any]] | None:
    """The number and the settings that a process says to have; None of what is no such process.

    Ports are also asked by what looks for open ones.
    """
    try:
        word, _, rest = read_line(peer, SILENT).partition(" ")
        said = json.loads(rest) if word == HERE else None
    except (OSError, ValueError):
        return None
    match said:
        case {"number": int(number), "settings": dict(settings)}:
            return number, settings
    return None


@contextlib.contextmanager
def together(
    host: str, port: int, count: int, number: int, timeout: float, settings: Mapping[str, Any]
) -> Iterator[None]:
    """Runs a process of several, all of which are there, and ends it where one of them ends.

    An error may be what comes of the end of another process, of which that is told in its place.
    The arguments are those of `RollCall`.

    Raises:
      UsageError: not all processes have come, or they do not belong together.
    """
    call = RollCall(host, port, count, number, timeout, settings)
    try:
        yield
    except SystemExit as stopped:
        if stopped.code:
            call.leave()
        else:
            call.close()
        raise
    except Exception as error:
        if not isinstance(error, UsageError):
            # Until the connection of a process that is gone is surely closed.
            time.sleep(SILENT)
        call.leave()
        raise
    call.close()
