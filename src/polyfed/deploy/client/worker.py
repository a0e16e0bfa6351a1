"""A client's worker: one process that keeps torch, data and networks loaded between messages.

Flower starts a process for every message. Importing torch there, and its first step, cost more than a small round; so
that process only passes the frame on, over a socket in a folder that only its owner can enter, and the worker answers
it. The socket belongs to a keeper, which starts a new worker when the worker dies (killed, or out of memory): the
message that the worker was answering fails at once, and later messages wait for the new worker.

    python -m polyfed.deploy.client.worker SOCKET NODE_TOML
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from polyfed.base.errors import PolyfedError
from polyfed.base.imports import search_working_directory
from polyfed.deploy.client.lock import in_use
from polyfed.deploy.host.parent import with_parent
from polyfed.deploy.wire.frames import Frame, pack, unpack


class WorkerGoneError(PolyfedError):
    """The worker ended while it was working on a message."""


def ask(path: Path, header: str, body: bytes | None) -> Frame:
    """Send a frame to the worker behind a socket and return its answer.

    Raises:
        WorkerGoneError: the worker ended before it answered.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(path))
            _send(connection, pack(header, body))
            return unpack(bytes(_receive(connection)))
        except (EOFError, OSError) as error:
            raise WorkerGoneError("the client's worker ended while it was working on this message") from error


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(len(data).to_bytes(8, "little"))
    connection.sendall(data)


def _receive(connection: socket.socket) -> bytearray:
    return _read(connection, int.from_bytes(_read(connection, 8), "little"))


def _read(connection: socket.socket, count: int) -> bytearray:
    data = bytearray()
    while len(data) < count:
        piece = connection.recv(min(count - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return data


def keep(path: Path, settings: Path) -> None:
    """Hold the socket and the state directory, and keep a worker running that serves the socket, until SIGTERM.

    Raises:
        StorageError: another client uses the state directory.
    """
    from polyfed.deploy.settings import NodeSettings

    os.umask(0o077)
    folder = Path(NodeSettings.load(settings).state_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with in_use(folder) as lock, socket.socket(socket.AF_UNIX) as listener:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen(16)
        worker: subprocess.Popen[bytes] | None = None

        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(0))
        try:
            while True:
                started = time.monotonic()
                worker = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "polyfed.deploy.client.worker",
                        "--serve",
                        str(listener.fileno()),
                        str(settings),
                    ],
                    pass_fds=[listener.fileno(), lock.descriptor],  # a worker that outlives its keeper is in the way
                    preexec_fn=with_parent,
                )
                lock.name(os.getpid(), worker.pid)
                code = worker.wait()
                print(f"the worker ended with {code}; a new one starts", file=sys.stderr, flush=True)
                time.sleep(max(0.0, 1.0 - (time.monotonic() - started)))  # no faster than once a second
        finally:
            if worker is not None:
                worker.terminate()
            path.unlink(missing_ok=True)


def serve(descriptor: int, settings: Path) -> None:
    """Answer one message after another."""
    from polyfed.deploy.client.node import answer
    from polyfed.deploy.settings import NodeSettings

    with socket.socket(fileno=descriptor) as listener:
        while True:
            connection, _ = listener.accept()
            # The sender may be gone (the result is stored and sent when it asks again), or may send no valid frame.
            with connection, contextlib.suppress(EOFError, OSError, ValueError, PolyfedError):
                frame = unpack(_receive(connection))  # a bytearray, of which the message needs no copy
                _send(connection, pack(*answer(*frame, NodeSettings.load(settings))))


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        search_working_directory()
        serve(int(sys.argv[2]), Path(sys.argv[3]))
    else:
        try:
            keep(Path(sys.argv[1]), Path(sys.argv[2]))
        except PolyfedError as failure:
            sys.exit(f"error: {failure}")
