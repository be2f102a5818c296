"""The README's table of what works on which official repository: read from test results, not written by hand.

    python -m pytest --record-compatibility      runs the tests and stores what they showed
    python -m tests.compatibility                writes the table into the README

A test takes part by the fixture `shows(row, column, diffusers)`: the family, what works, and whether the same works
with diffusers' own class (left out where diffusers is what the test compares with). A cell is green when every test
that shows it has passed.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "compatibility.json"
FULL_SIZE = Path(__file__).parent / "full_size" / "results.json"
MARKS = ("<!-- compatibility: written by python -m tests.compatibility -->", "<!-- end of compatibility -->")

REPOSITORIES = {
    "SD 1.x": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "SD 1.x inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "SD 2.x": "stabilityai/stable-diffusion-2-1",
    "SDXL": "stabilityai/stable-diffusion-xl-base-1.0",
    "SDXL refiner": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "SD 3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "SD 3.5": "stabilityai/stable-diffusion-3.5-medium, -large",
    "FLUX.1 dev": "black-forest-labs/FLUX.1-dev",
    "FLUX.1 schnell": "black-forest-labs/FLUX.1-schnell",
    "DiT": "facebook/DiT-XL-2-256, -512",
    "DDPM": "google/ddpm-cifar10-32 and others",
    "NCSN++": "google/ncsnpp-celebahq-256 and others",
    "KL autoencoder": "the VAE of all of these",
    "VQ autoencoder": "LDM's VQ-f4, VQ-f8",
}
"""Rows of the table, by what tests call them."""

OFFICIAL = {
    "sd1": "SD 1.x",
    "sd1-inpaint": "SD 1.x inpainting",
    "sd2": "SD 2.x",
    "sdxl": "SDXL",
    "sdxl-refiner": "SDXL refiner",
    "sd3": "SD 3",
    "sd3.5": "SD 3.5",
    "flux-dev": "FLUX.1 dev",
    "flux-schnell": "FLUX.1 schnell",
    "dit": "DiT",
    "ddpm": "DDPM",
    "ddim": "DDPM",
    "ncsnpp": "NCSN++",
}
"""Rows of the tiny repositories of tests/official.py."""

Cell = dict[str, bool | None]
Table = dict[str, dict[str, Cell]]


def collect(shown: list[tuple[dict[str, Any], bool]]) -> Table:
    """Cells of what tests showed, each with whether its test passed; several tests of a cell must all pass."""
    table: Table = {}
    for what, passed in shown:
        if what["row"] not in REPOSITORIES:
            raise ValueError(f"A test shows something of {what['row']!r}, expected a row of {list(REPOSITORIES)}.")
        cell = table.setdefault(what["row"], {}).setdefault(what["column"], {"hubgen": True, "diffusers": None})
        cell["hubgen"] = bool(cell["hubgen"] and passed)
        if what.get("diffusers") is not None:
            cell["diffusers"] = what["diffusers"] and cell["diffusers"] is not False
    return table


def store(table: Table) -> None:
    """Writes the cells beside those stored already: a run of some tests leaves the others' cells alone."""
    stored: Table = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for row, cells in table.items():
        stored[row] = {**stored.get(row, {}), **cells}
    ordered = {row: dict(sorted(stored[row].items())) for row in REPOSITORIES if row in stored}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


def render(table: Table) -> str:
    """Markdown: what works a row, and with it what does not work on diffusers' own class."""
    lines = [
        "| family | official repository | works in hubgen | of that, fails with diffusers' class |",
        "|---|---|---|---|",
    ]
    for row, repository in REPOSITORIES.items():
        cells = table.get(row, {})
        works = sorted(column for column, cell in cells.items() if cell["hubgen"])
        broken = sorted(column for column, cell in cells.items() if not cell["hubgen"])
        ahead = [column for column in works if cells[column]["diffusers"] is False]
        entry = ", ".join(works + [f"**not: {column}**" for column in broken])
        lines.append(f"| {row} | {repository} | {entry} | {', '.join(ahead) or '–'} |")
    return "\n".join(lines)


def readme_with(table: str) -> str:
    """The README's text with the table between its marks.

    Raises:
        ValueError: The README lacks the marks.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start, end = (re.escape(mark) for mark in MARKS)
    if not re.search(f"{start}.*{end}", text, flags=re.DOTALL):
        raise ValueError(f"README.md has no lines {MARKS[0]!r} and {MARKS[1]!r}, expected them around the table.")
    return re.sub(f"{start}.*{end}", lambda _: f"{MARKS[0]}\n\n{table}\n\n{MARKS[1]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme_with(render(json.loads(RESULTS.read_text()))), encoding="utf-8")
