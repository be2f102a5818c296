"""Files that the command line puts on a model, by --lora and --embedding, or as the picture to repeat had them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hubgen.cli.messages import say
from hubgen.formats.digests import file_digest
from hubgen.hub.added import Added, Used, find_added, is_local, words_of
from hubgen.hub.provenance import UsedEmbedding, UsedLora

NONE = "none"
"""What --lora and --embedding say beside --from where there shall be none"""


def stay_offline(files: Sequence[str]) -> None:
    """Keeps the Hub's libraries off the network where all files are here; they read it at their first import alone."""
    if all(map(is_local, files)):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def asked_or_used(asked: Sequence[Any] | None, used: Sequence[Used] | None) -> tuple[Sequence[Any], Sequence[Used]]:
    """What an option names, and what the picture to repeat was drawn with: the one where it is given, else the other.

    Args:
        asked: Names with what stands behind them; `None` where the option is not given.
        used: As the picture's settings say.
    """
    if asked is None:
        return (), used or ()
    return () if asked[0][0] == NONE else asked, ()


def find_again(used: Sequence[Used], told: str) -> list[Added[Used]]:
    """The files that a picture was drawn with.

    Args:
        used: As its settings name them.
        told: What messages say before them.

    Raises:
        ValueError: One is nowhere, or is another than it was.
    """
    again = []
    for one in used:
        shown = f"{told}--{one.option} {one.file}"
        added = Added(one, find_added(one.option, one.file, one.revision, shown), shown)
        digest = file_digest(added.path)
        if digest != one.sha256:
            raise added.error(
                f"got a file with the sha256 {digest}, expected {one.sha256}, that of the one that the picture was "
                f"drawn with; --{one.option} FILE takes another"
            )
        again.append(added)
    return again


def put_on(pipe: Any, loras: Sequence[Added[UsedLora]], embeddings: Sequence[Added[UsedEmbedding]]) -> None:
    """Loads adapters with their weights and learned words onto a pipeline, and says what went where."""
    names = [f"lora_{number}" for number in range(1, len(loras) + 1)]
    for name, lora in zip(names, loras, strict=True):
        try:
            report = pipe.load_lora_weights(os.fspath(lora.path), adapter_name=name)
        except ValueError as error:
            raise lora.error(error) from error
        say(f"{lora.used.file}, weight {lora.used.weight:g}: {report}")
    if names:
        pipe.set_adapters(names, [lora.used.weight for lora in loras])
    for one in embeddings:
        try:
            pipe.load_textual_inversion(os.fspath(one.path), token=one.used.word)
        except ValueError as error:
            raise one.error(error) from error
        say(f"{one.used.file}: the word {', '.join(words_of(one))}")
