"""What the full-size comparisons showed: a file of results, and the table that it makes.

python -m tests.full_size.report      prints the table
"""

import json
from pathlib import Path
from typing import Any

from tests.benchmarks.report import environment, markdown_table, write_json
from tests.full_size.cases import CASES

RESULTS = Path(__file__).parent / "results.json"


def store(name: str, row: dict[str, Any]) -> None:
    """Writes one comparison beside those that are stored, in the order of the cases."""
    rows = {**stored(), name: {**row, "environment": environment()}}
    write_json(RESULTS, {case: rows[case] for case in CASES if case in rows})


def stored() -> dict[str, Any]:
    """All comparisons that were run, by name."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def to_markdown(rows: dict[str, Any]) -> str:
    header = ["network", "parameters", "blocks", "largest difference / std", "seconds", "peak memory"]
    table = []
    for name, row in rows.items():
        ours, theirs = row["hubgen"], row["diffusers"]
        table.append(
            [
                name,
                f"{row['parameters']:,}",
                "all" if row["computed_parameters"] == row["parameters"] else f"{row['computed_parameters']:,}",
                f"{row['error']:.1e}",
                f"{ours['seconds']:.1f} (diffusers {theirs['seconds']:.1f})",
                f"{ours['peak_bytes'] / 1e9:.1f} GB",
            ]
        )
    return markdown_table(header, table)


if __name__ == "__main__":
    print(to_markdown(stored()), end="")
