"""The README's table of what works on which official repository: read from test results, not written by hand.

    python -m pytest --record-compatibility      runs the tests and stores what they showed
    python -m tests.readme_tables                writes the table into the README

A test takes part by the fixture `shows(row, column, diffusers)`: the family, what works, and whether the same works
with diffusers' own class (left out where diffusers is what the test compares with). A cell is green when every test
that shows it has passed.
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "compatibility.json"

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

COLUMNS = (
    *("text to image", "class to image", "unconditional pictures", "image to image", "inpainting", "single file"),
    *("saved files load in diffusers", "model works in diffusers' pipeline", "diffusers' schedulers"),
    *("LoRA adapters", "step cache", "compile_repeated_blocks", "gradient checkpointing"),
    *("attention processors", "attention backends", "device_map", "group offload", "layerwise casting"),
    *("sharded files", "variant, torch_dtype"),
    *("ControlNet", "ControlNet with an image", "ControlNet with a mask"),
    *("T2I-adapter", "T2I-adapter with an image", "T2I-adapter with a mask"),
    *("IP-Adapter", "IP-Adapter with an image", "IP-Adapter with a mask"),
    *("prompt-to-prompt", "prompt-to-prompt with an image", "prompt-to-prompt with a mask"),
    *(f"edit input of a widened model{task}" for task in ("", " with an image", " with a mask")),
)
"""Rows of the README's table, in its order, by what tests call them."""

MARK = {"works": "✓", "here alone": "**✓+**", "broken": "✗", "none": ""}

FULL_SIZE_CASES = {
    "SD 1.x": ["SD 1.5 U-Net"],
    "SD 2.x": ["SD 2.1 U-Net"],
    "SDXL": ["SDXL U-Net"],
    "SDXL refiner": ["SDXL refiner U-Net"],
    "SD 3": ["SD3 medium"],
    "SD 3.5": ["SD3.5 medium", "SD3.5 large"],
    "FLUX.1 dev": ["FLUX.1 dev"],
    "FLUX.1 schnell": ["FLUX.1 schnell"],
    "DiT": ["DiT-XL/2"],
    "KL autoencoder": ["SD autoencoder", "SDXL autoencoder", "SD3 autoencoder", "FLUX autoencoder"],
}
"""Comparisons of tests/full_size for a family."""

Cell = dict[str, bool | str | None]
"""Whether it works in each library, and the reason why it does not in diffusers."""
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
        if what.get("reason"):
            cell["reason"] = what["reason"]
    return table


def store(table: Table) -> None:
    """Writes the cells beside those stored already: a run of some tests leaves the others' cells alone."""
    stored: Table = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for row, cells in table.items():
        stored[row] = {**stored.get(row, {}), **cells}
    ordered = {row: dict(sorted(stored[row].items())) for row in REPOSITORIES if row in stored}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


def render(table: Table, full_size: dict[str, Any]) -> str:
    """Markdown: a row for each thing that works, a column for each family; and the repositories of the families."""
    families = [row for row in REPOSITORIES if row in table]
    columns = {column for row in families for column in table[row]}
    unknown = columns - set(COLUMNS)
    if unknown:
        raise ValueError(f"Tests show {sorted(unknown)}, expected columns of {list(COLUMNS)}.")
    lines = ["| | " + " | ".join(families) + " |", "|---|" + ":-:|" * len(families)]
    for column in COLUMNS:
        if column in columns:
            cells = [MARK[state(table[row].get(column))] for row in families]
            lines.append(f"| {column} | " + " | ".join(cells) + " |")
    largest = {row: max((full_size[case]["error"] for case in cases if case in full_size), default=None)
               for row, cases in FULL_SIZE_CASES.items()}  # fmt: skip
    cells = [f"{largest[row]:.0e}" if largest.get(row) is not None else "" for row in families]
    lines.append("| largest difference at full size | " + " | ".join(cells) + " |")
    lines += ["", "| family | official repositories |", "|---|---|"]
    lines += [f"| {row} | {REPOSITORIES[row]} |" for row in families]
    return "\n".join(lines)


def state(cell: Cell | None) -> str:
    """Whether something works in hubgen, and there alone; "none" where it is not for the family, or not tried."""
    if cell is None:
        return "none"
    if not cell["hubgen"]:
        return "broken"
    return "here alone" if cell["diffusers"] is False else "works"


def current() -> str:
    """The table of the stored results."""
    from tests.full_size.report import stored

    return render(json.loads(RESULTS.read_text(encoding="utf-8")), stored())
