"""A web site on loopback for the tests of downloads: real sockets, and answers that a test writes."""

import io
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

Handler = BaseHTTPRequestHandler
Answer = Callable[[Handler], None]


class Site:
    """Answers by path; `asked` counts the requests.

    The paths are the site's own, and a test adds to `answers`. What is not there is 404, as robots.txt is.
    """

    def __init__(self, answers: dict[str, Answer] | None = None) -> None:
        self.answers, self.asked, self.headers = dict(answers or {}), Counter[str](), list[dict[str, str]]()
        self.at_work, self.most_at_work, self.begun = 0, 0, list[tuple[str, float]]()
        lock = threading.Lock()

        class Handle(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with lock:
                    site.asked[self.path] += 1
                    site.headers.append({"path": self.path, **dict(self.headers)})
                    site.at_work += 1
                    site.most_at_work = max(site.most_at_work, site.at_work)
                try:
                    site.answers.get(self.path, missing)(self)
                except OSError:
                    pass  # the client went away
                finally:
                    with lock:
                        site.at_work -= 1

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

        site = self
        self.server = Quiet(("127.0.0.1", 0), Handle)
        self.port = self.server.server_address[1]

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"


@contextmanager
def serving(answers: dict[str, Answer] | None = None) -> Iterator[Site]:
    """A site that runs."""
    site = Site(answers)
    threading.Thread(target=site.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield site
    finally:
        site.server.shutdown()
        site.server.server_close()


def reply(
    content: bytes = b"", kind: str = "image/jpeg", status: int = 200, headers: tuple[tuple[str, str], ...] = ()
) -> Answer:
    """An answer with a body."""

    def answer(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(content))), *headers):
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


missing = reply(b"no such page", "text/plain", 404)


def redirect(location: str, status: int = 302) -> Answer:
    return reply(status=status, headers=(("Location", location),))


def in_turn(*answers: Answer) -> Answer:
    """The first answer to the first request, and so on; the last one again and again."""
    left = list(answers)

    def answer(handler: Handler) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(handler)

    return answer


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Soft noise, of any mode."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    soft = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    if mode == "RGBA":
        soft.putalpha(Image.fromarray(coarse[..., 0]).resize((width, height), Image.Resampling.BICUBIC))
        return soft
    if mode == "I;16":
        return Image.fromarray(np.asarray(soft.convert("L")).astype(np.uint16) * 257)
    return soft.convert(mode)


def file_of(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(width: int, height: int) -> bytes:
    """A JPEG that is to be turned by a quarter."""
    exif = Image.Exif()
    exif[274] = 6
    exif[271] = "Camera"
    return file_of(picture(width, height), exif=exif)
