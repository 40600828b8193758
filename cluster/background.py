"""What goes on beside a block of code for as long as that runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(act: Callable[[], object], seconds: float, *, at_once: bool) -> Iterator[None]:
    """Call `act` every so many `seconds`, in a thread that ends with the block; first `at_once`, or after a wait."""
    over = threading.Event()

    def loop() -> None:
        if at_once:
            act()
        while not over.wait(seconds):
            act()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
