"""One page for all tests of it: `hubgen demo` in a process of its own, as a user starts it."""

import os
import queue
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.hub.loopback import Hub, environment_of, loopback_hub
from tests.spaces.client import Served, adapter_file, network_folder


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The page, with two adapters, a ControlNet and a queue of six."""
    pytest.importorskip("gradio", reason="the page needs Gradio (pip install 'hubgen[demo]')")
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("strong", "gentle")):
        adapter_file(folder / f"{name}.safetensors", seed=number, size=0.6 if name == "strong" else 0.05)
    nets = tmp_path_factory.mktemp("nets")
    network_folder(nets / "shapes")
    with started(tmp_path_factory.mktemp("page"), "--adapters", str(folder), "--controls", str(nets)) as page:
        yield page


class started:  # noqa: N801  (a context manager, called like a function)
    """`hubgen demo` on a free port; stopped in the end."""

    def __init__(self, folder: Path, *options: str, environment: Mapping[str, str] = os.environ, **limits: int):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        environment = {**environment, "HUBGEN_LIMIT_QUEUE": "6", "TMPDIR": str(folder)}
        environment |= {f"HUBGEN_LIMIT_{name.upper()}": str(value) for name, value in limits.items()}
        command = [sys.executable, "-m", "hubgen.cli", "demo", "--port", str(port), *options]
        self.begun = time.monotonic()
        self.log = folder / "log.txt"
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True
        )
        self.folder = folder

    def __enter__(self) -> Served:
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: [lines.put(line) for line in self.process.stdout or ()], daemon=True).start()
        while self.process.poll() is None and time.monotonic() - self.begun < 180:
            try:
                line = lines.get(timeout=0.2)
            except queue.Empty:
                continue
            assert "served at" in line
            url = line.split()[-1].rstrip("/")
            return Served(url, self.log, self.folder, self.process.pid, time.monotonic() - self.begun)
        self.__exit__()
        raise AssertionError(f"the page did not start:\n{self.log.read_text()[-3000:]}")

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser; without one, tests of what is seen in it are left out."""
    pytest.importorskip("playwright", reason="no playwright (pip install playwright)")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no browser here: chromium is missing")
    return found


@pytest.fixture(scope="session")
def training_hub() -> Iterator[Hub]:
    """The Hub that the page that trains sends to, with a token that it takes."""
    with loopback_hub() as hub:
        hub.token = f"hf_{secrets.token_hex(16)}"
        yield hub


@pytest.fixture(scope="session")
def served_training(tmp_path_factory: pytest.TempPathFactory, training_hub: Hub) -> Iterator[Served]:
    """The page that trains; it knows this Hub alone, and has no token of its own."""
    pytest.importorskip("gradio", reason="the page needs Gradio (pip install 'hubgen[demo]')")
    folder = tmp_path_factory.mktemp("training")
    with started(folder, "--train", environment=environment_of(training_hub, folder / "home", None), queue=20) as page:
        yield page
