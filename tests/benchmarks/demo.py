"""Does the page of `hubgen demo` start soon, serve many, keep its memory, and cost little beside drawing itself?

    python -m tests.benchmarks.demo [--starts 3] [--requests 200] [--pairs 15] [--output DIR]

- *Ready*: seconds from the start of `hubgen demo` until it says that it can draw; the median of several starts.
- *Twenty at once*: each with a connection of its own; all are served, or told their place in the queue.
- *Memory*: of the page's process after 20 requests and after all.
- *Time of a picture*: through the page, over HTTP with its frames, against the sampling of `hubgen generate` on the
  same pipeline in the same process, in turns; the median of pairs.

Exit code 1: a figure misses what is expected of it. Stored: demo.json, demo.md.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.benchmarks import report
from tests.spaces.client import Served, together
from tests.spaces.conftest import started

RESULTS = Path(__file__).parent / "results" / "demo"
USERS = 20
MOST_SECONDS, MOST_GROWTH, MOST_COST = 15.0, 0.05, 0.10
PROMPT = "a smiling cat"
SEED = 1


def start(folder: Path, name: str, **limits: int) -> started:
    """`hubgen demo` in a process of its own."""
    (folder / name).mkdir()
    return started(folder / name, **limits)


def seconds_until_ready(folder: Path, starts: int) -> list[float]:
    """Of several starts, each in a fresh process."""
    seconds = []
    for number in range(starts):
        with start(folder, f"start-{number}") as page:
            seconds.append(page.seconds)
        print(f"ready after {seconds[-1]:.1f} s")
    return seconds


def many_at_once(page: Served) -> dict[str, Any]:
    """Twenty users who ask in the same moment."""
    page.number("generate")  # known before, so that all ask at once
    began = time.perf_counter()
    answers = together([lambda: page.generate(PROMPT, steps=24, timeout=600) for _ in range(USERS)])
    seconds = time.perf_counter() - began
    served = [one for one in answers if one.error is None]
    return {
        "users": USERS,
        "served": len(served),
        "told_their_place": sum(bool(one.places) for one in served),
        "turned_away_in_words": sum("waiting already" in (one.error or "") for one in answers),
        "last_place": max((place for one in served for place in one.places), default=0),
        "seconds": seconds,
    }


def memory_of(pid: int) -> int:
    """Resident bytes of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no memory of process {pid} is told here")


def memory_growth(page: Served, requests: int) -> dict[str, int]:
    """After 20 requests and after all, of several kinds, each by a visitor of its own."""
    figures = {}
    for number in range(1, requests + 1):
        answer = page.generate(PROMPT, steps=4, seed=number, pictures=1 + number % 4)
        assert answer.error is None, answer.error
        if number in (20, requests):
            figures[str(number)] = memory_of(page.pid)
    return figures


def time_of_a_picture(pairs: int) -> dict[str, list[float]]:
    """Seconds through the page and of sampling alone, in turns, in this process."""
    import socket

    from hubgen.cli.demo import page as page_module
    from hubgen.cli.generate import KINDS, sample
    from hubgen.hub.quiet import quiet_libraries

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ["HUBGEN_PORT"] = str(port)
    module = page_module("text_to_image")
    from hubgen.spaces.kit.service import Service
    from hubgen.spaces.kit.settings import Settings

    service = Service(Settings.from_environment())
    service.start()
    page = module.build(service)
    threading.Thread(target=page.serve, args=(service, "the page"), daemon=True).start()
    service.ready.result()
    served = Served(f"http://127.0.0.1:{port}", Path(os.devnull), Path(), os.getpid(), 0.0)
    wait_for(served)
    event = served.drawing_event
    model = service.model
    request = model.request(module.Desk(service).drawing(PROMPT, steps=24, guidance=4.0, seed=SEED))

    def through_the_page() -> float:
        began = time.perf_counter()
        answer = served.call(event, PROMPT, "", 24, 4.0, "64 × 64", SEED, False, 1, None)
        assert answer.error is None, answer.error
        return time.perf_counter() - began

    def sampling() -> float:
        def work() -> float:
            began = time.perf_counter()
            with quiet_libraries():
                sample(KINDS[0], model.pipe, request, {})
            return time.perf_counter() - began

        return service.thread.submit(work).result()

    through_the_page(), sampling()
    times: dict[str, list[float]] = {"page": [], "sampling": []}
    for _ in range(pairs):
        times["page"].append(through_the_page())
        times["sampling"].append(sampling())
    return times


def wait_for(served: Served) -> None:
    """Until it answers."""
    import httpx

    for _ in range(300):
        try:
            httpx.get(f"{served.url}/config", timeout=10).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise OSError("the page does not answer")


def judged(results: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(measure, figure, expected, whether it is met) of each."""
    ready, users, memory, times = (results[name] for name in ("ready", "users", "memory", "times"))
    (begin, first), (end, last) = list(memory.items())
    cost = statistics.median(a / b for a, b in zip(times["page"], times["sampling"], strict=True)) - 1
    seconds = statistics.median(ready)
    answered = users["served"] + users["turned_away_in_words"]
    return [
        ("seconds until it can draw", f"{seconds:.1f}", f"at most {MOST_SECONDS:.0f}", seconds <= MOST_SECONDS),
        (
            f"{USERS} users at once: served or told",
            f"{users['served']} served, the last from place {users['last_place'] + 1}",
            str(USERS),
            answered == USERS and users["told_their_place"] == users["served"],
        ),
        (
            f"memory after {end} requests against after {begin}",
            f"{report.percent(last / first - 1)} of {first / 1e6:.0f} MB",
            f"at most {report.percent(MOST_GROWTH)}",
            last / first - 1 <= MOST_GROWTH,
        ),
        (
            "a picture through the page against sampling alone",
            f"{report.percent(cost)} more than {statistics.median(times['sampling']):.2f} s",
            f"at most {report.percent(MOST_COST)}",
            cost <= MOST_COST,
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        results: dict[str, Any] = {"ready": seconds_until_ready(folder, arguments.starts)}
        with start(folder, "page", queue=USERS) as page:
            results["memory"] = memory_growth(page, arguments.requests)
            results["users"] = many_at_once(page)
        results["times"] = time_of_a_picture(arguments.pairs)
    rows = judged(results)
    table = report.markdown_table(
        ["measure", "figure", "expected"], [[name, figure, expected] for name, figure, expected, _ in rows]
    )
    print(table)
    report.write_json(arguments.output / "demo.json", {"environment": report.environment(), **results})
    report.write_text(
        arguments.output / "demo.md", f"# The page of `hubgen demo`\n\nBy `python -m tests.benchmarks.demo`.\n\n{table}"
    )
    return 0 if all(met for *_, met in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
