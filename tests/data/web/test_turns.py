import threading
import time
from collections import Counter
from itertools import pairwise

import pytest

from hubgen.data.web.downloading.turns import InOrder


def test_results_come_in_the_order_of_the_rows() -> None:
    def slowly(row: int) -> int:
        time.sleep(0.02 * (row % 3 == 0))
        return row * row

    assert list(InOrder(slowly, [f"h{row}" for row in range(40)], threads=8, per_host=1)) == [n * n for n in range(40)]
    assert list(InOrder(slowly, [], threads=8, per_host=1)) == []


def test_a_host_is_asked_by_few_at_a_time_and_others_do_not_wait() -> None:
    at_work, most, lock = Counter[str](), Counter[str](), threading.Lock()
    hosts = ["slow"] * 20 + [f"h{n}" for n in range(20)]
    begun: dict[int, float] = {}

    def ask(row: int) -> int:
        with lock:
            begun[row] = time.monotonic()
            at_work[hosts[row]] += 1
            most[hosts[row]] = max(most[hosts[row]], at_work[hosts[row]])
        time.sleep(0.05 if hosts[row] == "slow" else 0)
        with lock:
            at_work[hosts[row]] -= 1
        return row

    assert list(InOrder(ask, hosts, threads=6, per_host=2)) == list(range(40))
    assert most["slow"] == 2
    assert max(begun[row] for row in range(20, 40)) < begun[6]  # the other hosts were done while the slow one answered


def test_a_host_is_left_in_peace_between_two_rows() -> None:
    begun: list[float] = []
    list(InOrder(lambda row: begun.append(time.monotonic()), ["a"] * 4, threads=4, per_host=4, pause=0.3))
    assert all(after - before >= 0.2 for before, after in pairwise(begun))


def test_rows_far_ahead_are_not_begun() -> None:
    begun: list[int] = []
    wait = threading.Event()

    def ask(row: int) -> int:
        begun.append(row)
        if row == 0:
            wait.wait(5)
        return row

    results = iter(InOrder(ask, [f"h{row}" for row in range(100)], threads=3, per_host=1, ahead=10))
    threading.Timer(0.3, lambda: (begun.append(-1), wait.set())).start()
    assert next(results) == 0
    assert max(begun[: begun.index(-1)]) == 9
    assert list(results) == list(range(1, 100))


def test_what_a_thread_raises_is_raised_in_its_turn() -> None:
    def ask(row: int) -> int:
        if row == 3:
            raise RuntimeError("row 3")
        return row

    found = []
    with pytest.raises(RuntimeError, match="row 3"):
        for value in InOrder(ask, ["a"] * 10, threads=4, per_host=4):
            found.append(value)
    assert found == [0, 1, 2]
