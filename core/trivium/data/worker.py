"""A data worker: a process that makes its share of a run's items, in order, some of them ahead.

It is started as a program of its own (neither forked from a process with threads and a GPU, nor importing the caller's
main module), with signals blocked: Ctrl-C and SIGTERM are for training, which saves and then ends its workers. When
training is gone, however it went, so is the worker, even if the data set hangs. It imports what its items need and no
more: to make tokens of text takes a tenth of the time in which torch is loaded.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from queue import Queue
from threading import Event, Thread

from trivium.data.transfer import pack, receive, send, shared_value
from trivium.errors import DataError, TriviumError

SLOT = 8
"""Bytes at the start of the shared file, for each worker, that say which item it is at."""


def main(channel: int, alive: int, shared: int, parent: int) -> None:
    """Everything a worker does. channel, alive, shared: descriptors; alive is readable when the parent is gone."""
    Thread(target=_end_with, args=(alive, parent), daemon=True).start()
    to = socket.socket(fileno=channel)
    number, items, ahead, start, size = receive(to, lambda: None)
    ready: Queue[list[memoryview]] = Queue(ahead)
    Thread(target=_send_all, args=(to, ready), daemon=True).start()
    try:
        steps = shared_value(os.pread(shared, size, start), shared)
        ready.put(pack(("ready", None)))
        for item in items:
            os.pwrite(shared, struct.pack("<q", item), number * SLOT)
            ready.put(pack(("item", steps[item])))
    except DataError as error:  # the data's own sentence: whoever reads it says it unchanged
        ready.put(pack(("wrong", (str(error), error.rule))))
    except Exception as error:
        said = str(error) if isinstance(error, TriviumError) else f"{type(error).__name__}: {error}"
        ready.put(pack(("error", said)))
    Event().wait()  # until training ends it


def _send_all(to: socket.socket, ready: Queue[list[memoryview]]) -> None:
    try:
        while True:
            send(to, ready.get())
    except OSError:
        os._exit(1)  # nobody is there to be told


def _end_with(alive: int, parent: int) -> None:
    while not select.select([alive], [], [], 0.5)[0] and os.getppid() == parent:
        pass
    os._exit(1)
