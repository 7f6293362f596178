"""Work in threads, in order, a little ahead of where its results are used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def read_ahead(
    function: Callable[[ItemT], ResultT], items: Iterable[ItemT], num_threads: int
) -> Generator[tuple[ItemT, ResultT], None, None]:
    """Every item with what `function` makes of it; at most ``num_threads`` results wait in memory.

    Closing the generator (`contextlib.closing`), or an error or a signal while it waits, drops what has not begun.
    """
    pool = ThreadPoolExecutor(num_threads)
    try:
        pending: deque[tuple[ItemT, Future[ResultT]]] = deque()
        for item in items:
            pending.append((item, pool.submit(function, item)))
            if len(pending) > num_threads:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
