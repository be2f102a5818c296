"""Whose turn it is: many threads that work on rows in order, few of one host at a time."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

Value = TypeVar("Value")


class InOrder(Generic[Value]):
    """Does something to each row in threads, and gives the results in the order of the rows.

    A thread takes the first row whose host has a place; rows far behind the one that is waited for are not begun, so
    that few results are held.

    Args:
        do: To a row, by its number.
        hosts: Of each row; "" for a row without.
        threads: How many.
        per_host: Rows of one host that are at work at a time.
        pause: Seconds from the begin of one row of a host to that of the next.
        ahead: Rows that may be begun behind the one that is waited for.
    """

    def __init__(
        self,
        do: Callable[[int], Value],
        hosts: Sequence[str],
        threads: int,
        per_host: int,
        pause: float = 0.0,
        ahead: int | None = None,
    ) -> None:
        self._do, self._hosts, self._per_host, self._pause = do, hosts, per_host, pause
        self._ahead = 8 * threads if ahead is None else ahead
        self._waiting, self._next_row = list[int](), 0
        self._busy, self._free_at = Counter[str](), dict[str, float]()
        self._results: dict[int, Value | BaseException] = {}
        self._first, self._stopped = 0, False
        self._lock = threading.Lock()
        self._free, self._done = threading.Condition(self._lock), threading.Condition(self._lock)
        self._threads = [
            threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True)
            for number in range(min(threads, len(hosts)))
        ]

    def __iter__(self) -> Iterator[Value]:
        for thread in self._threads:
            thread.start()
        try:
            for row in range(len(self._hosts)):
                with self._lock:
                    while row not in self._results:
                        self._done.wait()
                    result = self._results.pop(row)
                    self._first = row + 1
                    self._free.notify()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            with self._lock:
                self._stopped = True
                self._free.notify_all()

    def _work(self) -> None:
        while (row := self._take()) is not None:
            result: Value | BaseException
            try:
                result = self._do(row)
            except BaseException as error:
                result = error
            with self._lock:
                self._busy[self._hosts[row]] -= 1
                self._results[row] = result
                self._done.notify()
                self._free.notify()

    def _take(self) -> int | None:
        """The row to work on next; `None` where nothing is left."""
        with self._lock:
            while not self._stopped:
                while self._next_row < len(self._hosts) and self._next_row < self._first + self._ahead:
                    self._waiting.append(self._next_row)
                    self._next_row += 1
                if not self._waiting and self._next_row >= len(self._hosts):
                    self._free.notify_all()
                    return None
                now, soonest = time.monotonic(), None
                for place, row in enumerate(self._waiting):
                    host = self._hosts[row]
                    if host and self._busy[host] >= self._per_host:
                        continue
                    free_at = self._free_at.get(host, 0.0) if host else 0.0
                    if free_at <= now:
                        del self._waiting[place]
                        self._busy[host] += 1
                        if self._pause and host:
                            self._free_at[host] = now + self._pause
                        return row
                    soonest = free_at if soonest is None else min(soonest, free_at)
                self._free.wait(None if soonest is None else soonest - now)
            return None
