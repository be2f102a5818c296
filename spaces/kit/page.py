"""A page on the open net: every request is checked before anything of it is used, and every error is words.

`Page` is gr.Blocks with three doors guarded, whatever events stand in it: what comes in (files that were uploaded here
and nothing else), what fails (in words, with a number for the log), and the queue (bounded, for each visitor too).
"""

import atexit
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

# Before gradio is imported, which reads them once: it is to call nobody, and to have a folder for this page alone.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="hubgen-page-")

import gradio as gr
from gradio.components.image_editor import AcceptBlobs
from starlette.middleware import Middleware

from hubgen.spaces.kit.limits import Limits, Refused
from hubgen.spaces.kit.service import Service, Stopped
from hubgen.spaces.kit.theme import CSS, HEAD, theme
from hubgen.spaces.kit.uploads import check_upload, uploaded_file

logger = logging.getLogger(__name__)

FOLDER = Path(os.environ["GRADIO_TEMP_DIR"])
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)

DEEPEST = 12
"""Levels of lists and mappings in what is sent"""
UPLOAD_ROOM = 65_536
"""Bytes around the file in an upload"""
MOST_DRAFTS, MOST_LAYERS = 64, 8
"""Of the editor: drafts that are kept for all visitors, and layers of one"""


class Page(gr.Blocks):
    """A page whose visitors nobody vouches for.

    Args:
        limits: Of the page.
        **options: Of gr.Blocks.
    """

    def __init__(self, limits: Limits, **options: Any):
        self.limits = limits
        super().__init__(
            analytics_enabled=False, delete_cache=(max(limits.kept_seconds // 4, 1), limits.kept_seconds), **options
        )

    async def process_api(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """One event, or one step of it."""
        try:
            if not kwargs.get("iterator"):
                inputs = [self.guarded(value) for value in inputs]
            return await super().process_api(block_fn, inputs, *args, **kwargs)
        except gr.Error as error:
            raise told(error.message) from None
        except Refused as error:
            raise told(str(error)) from None
        except Stopped:
            raise told("Stopped.") from None
        except (StopAsyncIteration, StopIteration):
            raise
        except Exception:
            number = secrets.token_hex(4)
            logger.exception("fault %s", number)
            raise told(f"Something went wrong here. It is noted in the log as {number}.") from None

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What widgets make of a request; they fail in many ways over what no widget sends."""
        try:
            return await super().preprocess_data(block_fn, inputs, *args, **kwargs)
        except (gr.Error, Refused):
            raise
        except Exception as error:
            logger.info("refused: %s", type(error).__name__)
            raise Refused("What was sent does not fit this page: a value is missing, or of another kind.") from None

    def guarded(self, value: Any, depth: int = 0) -> Any:
        """A value of a request in which every file was uploaded here, and is a picture within the limits.

        Raises:
            Refused: One is not.
        """
        if depth > DEEPEST:
            raise Refused("What was sent does not fit this page: it is nested too deeply.")
        if isinstance(value, list):
            return [self.guarded(one, depth + 1) for one in value]
        if not isinstance(value, dict):
            return value
        if not {"path", "url", "is_stream"} & value.keys():
            return {name: self.guarded(one, depth + 1) for name, one in value.items()}
        path = uploaded_file(value, FOLDER, self.limits)
        self.check_file(path)
        name = value.get("orig_name")
        return {
            "path": str(path),
            "orig_name": name[:200] if isinstance(name, str) else path.name,
            "meta": {"_type": "gradio.FileData"},
        }

    def check_file(self, path: Path) -> None:
        """Raises Refused for a file that was uploaded and is no picture within the limits."""
        check_upload(path.read_bytes(), self.limits)

    def bound_queue(self) -> None:
        """One job at a time, and so many who wait; more are told so at once."""
        self.queue(max_size=self.limits.queue, default_concurrency_limit=1)
        push = self._queue.push

        async def bounded(body: Any, *args: Any, **kwargs: Any) -> Any:
            waiting = [
                event for events in self._queue.event_queue_per_concurrency_id.values() for event in events.queue
            ]
            own = sum(event.session_hash == body.session_hash for event in waiting)
            if own >= self.limits.queue_of_one:
                return False, f"{own} of your requests are waiting already; wait for one of them.", "queue_full"
            joined, message, state = await push(body, *args, **kwargs)
            if state == "queue_full":
                message = f"{len(waiting)} requests are waiting already; please try again in a minute."
            logger.info("queue: %s, %d waiting", "joined" if joined else "turned away", len(waiting) + joined)
            return joined, message, state

        self._queue.push = bounded  # type: ignore[method-assign]

    def serve(self, service: Service, name: str) -> None:
        """Serves the page until it is interrupted; one line on standard output says where, once it can draw.

        Args:
            service: The model behind it, which is loading.
            name: Of the page, for that line.
        """
        settings = service.settings
        log_to_stderr()
        self.bound_queue()
        _, local, public = self.launch(
            server_name=settings.host,
            server_port=settings.port,
            share=settings.share,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=["api"],
            theme=theme(),
            css=CSS,
            head=HEAD,
            max_file_size=self.limits.upload_bytes,
            app_kwargs={
                "middleware": [Middleware(SmallRequests, limits=self.limits)],
                "docs_url": None,
                "redoc_url": None,
            },
        )
        try:
            service.ready.result()
            print(f"{name} is served at {public or local}", flush=True)
            if settings.open:
                import webbrowser

                webbrowser.open(public or local)
            self.block_thread()
        finally:
            service.close()
            self.close(verbose=False)


def editor(limits: Limits, **options: Any) -> gr.ImageEditor:
    """A gr.ImageEditor whose second way in, for drafts of the browser, is guarded too.

    Args:
        limits: Of the page.
        **options: Of gr.ImageEditor.
    """
    made = gr.ImageEditor(**options)
    drafts: OrderedDict[Any, Any] = OrderedDict()
    made.blob_storage = drafts
    take, form = made.accept_blobs, made.convert_and_format_image

    def accept_blobs(data: AcceptBlobs) -> None:
        index = str(data.data.get("index") or "0")
        if not (index == "null" or (index.isdecimal() and len(index) < 3 and int(index) < MOST_LAYERS)):
            raise told(f"A picture has at most {MOST_LAYERS} layers here.")
        for _, content in data.files:
            try:
                check_upload(content, limits)
            except Refused as error:
                raise told(str(error)) from None
        take(data)
        while len(drafts) > MOST_DRAFTS:
            drafts.popitem(last=False)

    def convert_and_format_image(file: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, bytes):
            check_upload(file, limits)
        return form(file, *args, **kwargs)

    accept_blobs._is_server_fn = True  # type: ignore[attr-defined]
    made.accept_blobs, made.convert_and_format_image = accept_blobs, convert_and_format_image  # type: ignore[method-assign]
    return made


class SmallRequests:
    """Refuses requests with more bytes than they can need, while they arrive.

    Args:
        app: What serves the others.
        limits: Of the page.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], limits: Limits):
        self.app, self.limits = app, limits

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """As ASGI has it."""
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        files = scope["path"].rstrip("/").endswith(("/upload", "/component_server"))
        most = self.limits.upload_bytes + UPLOAD_ROOM if files else self.limits.request_bytes
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            await refuse_large(send, most)
            return
        seen = 0

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            # A request that says no length, or a wrong one: it ends here, as if the visitor had left.
            return {"type": "http.disconnect"} if seen > most else message

        await self.app(scope, counted, send)


async def refuse_large(send: Any, most: int) -> None:
    """Answers 413."""
    body = f'{{"detail": "This request is too large; at most {most:,} bytes are taken."}}'.encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def sweep(seconds: float) -> None:
    """Removes what lies in the page's folder for longer than so many seconds."""
    now = time.time()
    for path in FOLDER.iterdir():
        with suppress(OSError):  # another may be removing it
            if now - path.stat().st_mtime > seconds:
                shutil.rmtree(path)


def told(message: str) -> gr.Error:
    """The error that a visitor reads."""
    return gr.Error(message, title="Sorry", print_exception=False)


def log_to_stderr() -> None:
    """hubgen's warnings, the queue's figures and faults, a line each, if nobody has set up logging."""
    ours = logging.getLogger("hubgen")
    if not ours.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        ours.addHandler(handler)
        logging.getLogger("hubgen.spaces").setLevel(logging.INFO)
        ours.propagate = False
