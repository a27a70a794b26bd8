"""The end of a process that torchrun has started, by its own exit code.

It does not depend on what the network's threads are doing.

A thread of gloo drops a message's tensors a moment after the message is through, and needs the
interpreter for that; one whose rank is lost waits on. If the interpreter is being torn down by
then, the process is aborted, and torchrun takes a run that is through for one that failed. So such
a process does everything that belongs to its end but that.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def end_by(main: Callable[[], int]) -> NoReturn:
    """Do ``main``, and end the process by the code it returns."""
    code = 1  # of an exception, whose traceback comes before the end

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)

    if "RANK" in os.environ:
        atexit.register(end)  # what is registered first is called last
    code = main()
    sys.exit(code)
