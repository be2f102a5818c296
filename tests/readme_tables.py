"""The README's tables, drawn from stored results and not written by hand.

python -m tests.readme_tables      writes them between their marks
"""

import json
import re
from pathlib import Path

from tests.benchmarks.report import markdown_table
from tests.compatibility import current

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
SPEED = ROOT / "tests" / "benchmarks" / "results" / "inference" / "inference.json"
DTYPES = ("float32", "bfloat16")
ROWS = {
    "sd15-unet-256": "SD 1.5 U-Net step, 256²",
    "sd15-unet-512": "SD 1.5 U-Net step, 512²",
    "sdxl-unet-512": "SDXL U-Net step, 512²",
    "mmdit-256": "MM-DiT step (12 layers, width 768), 256²",
    "mmdit-512": "MM-DiT step (12 layers, width 768), 512²",
    "flux-blocks-512": "FLUX, 1 + 2 blocks of full width, 512²",
    "vae-decode-256": "VAE decode, 256²",
    "vae-decode-512": "VAE decode, 512²",
    "sd15-pipeline-256": "SD 1.5 pipeline, 20 steps, 256²",
    "mmdit-pipeline-256": "MM-DiT pipeline, 20 steps, 256²",
}
"""Rows of the inference benchmark, in the README's order and words."""


def speed() -> str:
    """Time of hubgen over diffusers' on a CPU, by row and type; of pipelines also with a guidance interval."""
    stored = {
        row["row"]: row for row in json.loads(SPEED.read_text(encoding="utf-8"))["rows"] if row["device"] == "cpu"
    }
    table = []
    for name, words in ROWS.items():
        for suffix, more in (("", ""), ("-interval", ", guidance in half of the way")):
            found = [stored.get(f"{name}-{dtype}{suffix}") for dtype in DTYPES]
            if any(found):
                table.append([words + more, *("" if row is None else shown(row["ratio"]) for row in found)])
    named = ("cpu", "cores", "instructions", "threads")
    machines = {tuple(row["machine"][name] for name in named) for row in stored.values()}
    described = "; ".join(f"{cpu}, {cores} cores, {kind}, {threads} threads" for cpu, cores, kind, threads in machines)
    return markdown_table(["time of hubgen / diffusers", *DTYPES], table) + f"\nMachine: {described}."


def shown(ratio: dict[str, float]) -> str:
    return f"**{ratio['median']:.2f}** ({ratio['min']:.2f}–{ratio['max']:.2f})"


def written() -> str:
    """The README's text with the tables of the stored results.

    Raises:
        ValueError: The README lacks the marks of a table.
    """
    text = README.read_text(encoding="utf-8")
    for name, table in (("compatibility", current()), ("speed", speed())):
        start, end = f"<!-- {name}: written by python -m tests.readme_tables -->", f"<!-- end of {name} -->"
        pattern = f"{re.escape(start)}.*{re.escape(end)}"
        if not re.search(pattern, text, flags=re.DOTALL):
            raise ValueError(f"README.md has no lines {start!r} and {end!r}, expected them around the table.")
        block = f"{start}\n\n{table}\n\n{end}"
        text = re.sub(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(written(), encoding="utf-8")
