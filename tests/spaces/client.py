"""The page over HTTP as anybody can call it: no widget in between, whatever data one likes."""

import io
import json
import secrets
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hubgen import bundled_model
from hubgen.formats.headers import read_header


def adapter_file(path: Path, seed: int, size: float) -> None:
    """A LoRA of rank 2 on two layers of the bundled model, with random numbers."""
    weights = read_header(bundled_model() / "transformer" / "diffusion_pytorch_model.safetensors")
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in ("transformer_blocks.0.attn.to_v", "transformer_blocks.1.attn.to_v"):
        out, into = weights[f"{layer}.weight"].shape
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(2, into, generator=random) * into**-0.5
        tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(out, 2, generator=random) * size
    save_file(tensors, path, {"format": "pt"})


def network_folder(path: Path) -> None:
    """A ControlNet of one block for the bundled model: it sees its hint, and adds a little that means nothing."""
    from hubgen import SD3ControlNetModel, SD3Transformer2DModel

    base = SD3Transformer2DModel.from_pretrained(bundled_model() / "transformer")
    net = SD3ControlNetModel.from_transformer(base, num_layers=1, num_extra_conditioning_channels=0)
    random = torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        if name.startswith(("controlnet_blocks.", "pos_embed_input.")):
            std = 0.004 if name.startswith("controlnet_blocks.") else 0.1
            torch.nn.init.normal_(parameter, std=std, generator=random)
    net.save_pretrained(path)


@dataclass
class Answer:
    """What came back for one call."""

    status: int
    value: Any = None
    error: str | None = None
    places: list[int] = field(default_factory=list)
    """In the queue, as they were told"""


@dataclass
class Served:
    """A page that runs."""

    url: str
    log: Path
    folder: Path
    pid: int
    seconds: float
    """From the start of its process until it could draw"""

    @property
    def api(self) -> str:
        return f"{self.url}/gradio_api"

    @cached_property
    def config(self) -> dict[str, Any]:
        import httpx

        return httpx.get(f"{self.url}/config", timeout=30).json()

    @property
    def drawing_event(self) -> int:
        """The number of the event of Create's button, which no program is meant to call."""
        events = [one for one in self.config["dependencies"] if one["backend_fn"]]
        return next(one["id"] for one in events if len(one["inputs"]) == 9 and len(one["outputs"]) == 5)

    def number(self, name: str) -> int:
        """Of an endpoint, as the page counts events."""
        return next(one["id"] for one in self.config["dependencies"] if one["api_name"] == name)

    def call(self, name: str | int, *data: Any, session: str | None = None, timeout: float = 120) -> Answer:
        """Joins the queue with raw data, and waits for the answer."""
        import httpx

        session = session or secrets.token_hex(6)
        number = self.number(name) if isinstance(name, str) else name
        content = json.dumps({"data": list(data), "fn_index": number, "session_hash": session})
        headers = {"content-type": "application/json"}
        with httpx.Client(timeout=timeout) as client:
            joined = client.post(f"{self.api}/queue/join", content=content, headers=headers)
            if joined.status_code != 200:
                return Answer(joined.status_code, error=joined.text)
            answer = Answer(200)
            with client.stream("GET", f"{self.api}/queue/data", params={"session_hash": session}) as stream:
                for line in stream.iter_lines():
                    if not line.startswith("data:"):
                        continue
                    message = json.loads(line[5:])
                    if message["msg"] == "estimation":
                        answer.places.append(message["rank"])
                    elif message["msg"] == "process_completed":
                        output = message["output"]
                        if message["success"]:
                            answer.value = output["data"]
                        else:
                            answer.error = str(output.get("error"))
                        return answer
                    elif message["msg"] == "unexpected_error":
                        answer.error = message["message"]
                        return answer
                    elif message["msg"] == "close_stream":
                        break
        return answer

    def generate(self, prompt: Any = "a cat", steps: Any = 2, **options: Any) -> Answer:
        """/generate with few steps."""
        names = ("negative_prompt", "steps", "guidance", "width", "height", "seed", "pictures")
        defaults = {"negative_prompt": "", "steps": steps, "seed": 1, "pictures": 1}
        values = {**defaults, **{name: value for name, value in options.items() if name in names}}
        rest = {name: value for name, value in options.items() if name not in names}
        return self.call("generate", prompt, *(values.get(name) for name in names), **rest)

    def upload(self, content: bytes, name: str = "picture.png") -> tuple[int, Any]:
        """Sends a file; (status, what came back)."""
        import httpx

        answer = httpx.post(f"{self.api}/upload", files={"files": (name, io.BytesIO(content))}, timeout=60)
        return answer.status_code, answer.json() if answer.status_code == 200 else answer.text

    def sent(self, content: bytes, name: str = "picture.png") -> dict[str, Any]:
        """An uploaded file as calls name it."""
        status, paths = self.upload(content, name)
        assert status == 200, paths
        return file_data(paths[0])

    def fetch(self, path: str) -> Any:
        """A file of the page."""
        import httpx

        return httpx.get(f"{self.api}/file={path}", timeout=30)


def file_data(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


def together(calls: list[Any]) -> list[Any]:
    """All at once, each in a thread of its own; what they returned, in their order."""
    results: list[Any] = [None] * len(calls)

    def run(place: int) -> None:
        results[place] = calls[place]()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
