"""A stage of the GPU benchmark whose items go wrong in every way."""

import os
import time

from benchmarks.gpu.stage import Item, Unavailable


def items(size):
    def fails(deadline):
        raise ValueError("no such kernel")

    def unavailable(deadline):
        raise Unavailable("needs another card")

    def dies(deadline):
        os.write(2, b"terminate called\n")
        os._exit(3)

    def hangs(deadline):
        os.write(2, b"compiling\n")
        time.sleep(60)

    return [
        Item("fails", fails, 5),
        Item("unavailable", unavailable, 5),
        Item("dies", dies, 5),
        Item(
            "of its own environment", lambda _: {"is": os.environ["OF"]}, 5, environment={"OF": "1"}
        ),
        Item("alone", lambda _: {"process": os.getpid()}, 5, alone=True),
        Item("hangs", hangs, 0.2),
        Item("large", lambda _: {}, 5, memory=2**40),
        Item("works", lambda deadline: {"left": deadline - time.time(), "process": os.getpid()}, 5),
        Item("works, too", lambda _: {"process": os.getpid(), "size": size.of("large", "tiny")}, 5),
    ]


def describe(name, result):
    return f"{name}: {sorted(result)}"
