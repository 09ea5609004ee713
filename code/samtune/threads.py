"""Work beside the main thread, taken in order and never more of it than fits a bound.

NumPy, SciPy, OpenCV and image decoders leave the interpreter lock while they work, so threads use
several cores, and nothing has to be copied to another process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

PENDING_BYTES = 2**29  # of what calls hold; one that holds more still runs, alone


class InOrder:
    """Calls made by threads, whose results are taken in the order in which the calls came.

    threads: how many; 0: the caller makes each call at once. take: gets each result, in the
    caller's thread. At most four calls per thread are pending, fewer where they hold much; one
    call more waits for the oldest. What a call raises is raised to the caller when its turn comes,
    and nothing is taken after it.
    """

    def __init__(self, threads: int, take: Callable[[Any], None] = lambda result: None):
        self.take, self.most = take, 4 * threads
        self.pool = ThreadPoolExecutor(threads) if threads else None
        self.pending: deque[tuple[Future, int]] = deque()
        self.held = 0

    def put(self, call: Callable, *arguments, size: int = 0) -> None:
        """Let a thread make the call. size: bytes that its arguments hold until it is done."""
        if self.pool is None:
            self.take(call(*arguments))
            return
        while self.pending and (len(self.pending) >= self.most or self.held + size > PENDING_BYTES):
            self._take_oldest()
        self.pending.append((self.pool.submit(call, *arguments), size))
        self.held += size

    def finish(self) -> None:
        """Take what is still pending, and let the threads go. A later `put` is an error."""
        while self.pending:
            self._take_oldest()
        if self.pool is not None:
            self.pool.shutdown()

    def _take_oldest(self) -> None:
        future, size = self.pending.popleft()
        try:
            self.take(future.result())
        except BaseException:  # also an interrupt: what nobody will take need not be computed
            self.pending.clear()
            self.pool.shutdown(wait=False, cancel_futures=True)
            raise
        self.held -= size
