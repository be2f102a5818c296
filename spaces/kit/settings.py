"""What a page is started with, read from the environment; `hubgen demo` sets it from its options.

| variable | meaning |
|---|---|
| HUBGEN_MODEL | a pipeline folder, or owner/name on the Hub; the bundled model by default |
| HUBGEN_SECOND_MODEL | another, to compare with |
| HUBGEN_ADAPTERS | adapters of the Style tab, one a line: files, folders with some, or owner/name on the Hub |
| HUBGEN_CONTROLS | ControlNets, T2I-adapters and IP-Adapters of the Control tab, named likewise |
| HUBGEN_DEVICE, HUBGEN_DTYPE | as `hubgen generate` has them |
| HUBGEN_HOST, HUBGEN_PORT, HUBGEN_SHARE, HUBGEN_OPEN | where it is served |
| HUBGEN_PUBLISH | 1: visitors may send what they trained to the Hub; without it, only on this machine |
| HUBGEN_LIMIT_... | see `limits.py` |
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from hubgen.spaces.kit.limits import Limits

LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """Of one page."""

    model: str = "bundled"
    second_model: str | None = None
    adapters: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    device: str | None = None
    dtype: str | None = None
    host: str | None = None
    """`None`: what the environment says (GRADIO_SERVER_NAME), else this machine alone"""
    port: int | None = None
    share: bool = False
    open: bool = False
    publish: bool = False
    limits: Limits = field(default_factory=Limits)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """See the table above."""
        given = {
            name: environment[variable]
            for name in cls.__annotations__
            if environment.get(variable := variable_of(name))
        }
        return cls(
            model=given.get("model", cls.model),
            second_model=given.get("second_model"),
            adapters=lines(given.get("adapters", "")),
            controls=lines(given.get("controls", "")),
            device=given.get("device"),
            dtype=given.get("dtype"),
            host=given.get("host") or environment.get("GRADIO_SERVER_NAME"),
            port=int(given["port"]) if "port" in given else None,
            share=given.get("share") == "1",
            open=given.get("open") == "1",
            publish=given.get("publish") == "1",
            limits=Limits.from_environment(environment),
        )

    @property
    def public(self) -> bool:
        """Whether others than the one who started it may come: then files of this machine go unnamed."""
        return self.share or (self.host is not None and self.host not in LOCAL)


def lines(text: str) -> tuple[str, ...]:
    """Those that are not blank."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def variable_of(name: str) -> str:
    """The environment's name of a setting."""
    return f"HUBGEN_{name.upper()}"
