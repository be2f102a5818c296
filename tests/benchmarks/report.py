"""How results are stored: JSON, a table in Markdown, and grids of pictures with their captions."""

import json
import os
import platform
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw, ImageFont

CAPTION_SIZE = 9
CAPTION_LINES = 2
GAP = 4


def environment() -> dict[str, str]:
    """The versions that a number may depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
        "machine": platform.machine(),
    }


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with the first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def draw_grid(groups: Sequence[torch.Tensor], captions: Sequence[str], path: Path, columns: int = 10) -> None:
    """Stores pictures side by side, a group of versions a caption: for instance the real one and the generated one.

    Args:
        groups: Versions of the same pictures, each (N, 3, H, W) in [-1, 1].
        captions: The N captions, drawn below each group.
    """
    tiles = [((group.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy() for group in groups]
    height, width = tiles[0].shape[1:3]
    cell_width = width * len(tiles) + GAP
    cell_height = height + CAPTION_LINES * (CAPTION_SIZE + 2) + GAP
    columns = min(columns, len(captions))
    rows = -(-len(captions) // columns)
    grid = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(CAPTION_SIZE)
    for number, caption in enumerate(captions):
        x, y = number % columns * cell_width, number // columns * cell_height
        grid.paste(Image.fromarray(np.concatenate([tile[number] for tile in tiles], axis=1)), (x, y))
        lines = textwrap.wrap(caption, width=max(1, cell_width // 5), max_lines=CAPTION_LINES, placeholder="…")
        draw.text((x, y + height), "\n".join(lines), fill="black", font=font, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    grid.save(temporary, format="PNG", optimize=True)
    os.replace(temporary, path)
