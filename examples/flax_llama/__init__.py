"""A LLaMA in Flax NNX, trained with GaLore."""

import os
import signal
import sys

# Of the library that does the SVDs on the CPU: its threads wait for each other in busy loops, which
# on a shared machine took seconds for matrices of milliseconds. It must be set before JAX comes in.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# While Python looks for the module of `python -m`, sys.argv[0] is "-m": this is a program then, of
# which everything is still to be imported. `command.program` answers signals when that is done.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:

    def _quit(*_: object) -> None:
        os.write(2, b"Interrupted.\n")
        os._exit(128 + signal.SIGINT)

    signal.signal(signal.SIGINT, _quit)
