"""One failed process ends all, with one message.

Who fails first leaves its message in the key-value store that torchrun's processes share. A thread
in every process looks there a few times a second: the leader's says what happened, and every
process then ends, wherever it is, because a process that waits for a collective of nccl would wait
for ever. Errors that follow from the first one (closed connections) find the alarm taken and are
not told.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

EXIT_FAILED = 2
"""How a process ends because another one has failed; the command line's code for a refusal."""

SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_BE_HEARD = 5.0


class Alarm:
    """The alarm of one run.

    Args:
        store: shared by all processes, with the methods of `torch.distributed.Store`.
        rank: of this process.
        size: number of processes.
        tell: says the message to the user; called on the leader, or where it does not answer.
        end: ends this process at once.
    """

    def __init__(
        self,
        store: Any,
        *,
        rank: int,
        size: int,
        tell: Callable[[str], None],
        end: Callable[[int], Any] = os._exit,
    ):
        self._store, self._tell, self._end = store, tell, end
        self._rank, self._size = rank, size
        self._over = threading.Event()
        self._own = False
        self._thread = threading.Thread(target=self._watch, name="spectrim-alarm", daemon=True)

    def watch(self) -> None:
        """Look for alarms of others from now on, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def sound(self, message: str) -> None:
        """This process has failed: say so once, whoever is first; returns when it was said."""
        if self._claim() > 1:
            # Another one failed first: the watching thread tells and ends this process.
            time.sleep(SECONDS_TO_BE_HEARD)
            return
        self._own = True
        self._store.set("message", f"rank {self._rank} of {self._size}: {message}")
        if self._rank != 0 and self._heard():
            return
        self._tell(f"rank {self._rank} of {self._size}: {message}")
        if self._rank == 0:
            # The store may live in this process: others read it before it goes.
            time.sleep(3 * SECONDS_BETWEEN_LOOKS)

    def _claim(self) -> int:
        """How many processes have failed so far, this one included; 1 where nobody answers."""
        try:
            return self._store.add("failures", 1)
        except RuntimeError:
            return 1

    def _heard(self) -> bool:
        deadline = time.monotonic() + SECONDS_TO_BE_HEARD
        while time.monotonic() < deadline:
            if self._has("told"):
                return True
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return False

    def _has(self, key: str) -> bool:
        """Whether the store holds a key; it does not once it is gone."""
        try:
            return bool(self._store.check([key]))
        except RuntimeError:
            return False

    def _watch(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_LOOKS):
            if self._own or not self._has("message"):
                continue
            if self._rank == 0:
                self._tell(self._store.get("message").decode())
                self._store.set("told", "yes")
            self._end(EXIT_FAILED)
            return
