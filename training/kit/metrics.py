"""`metrics.jsonl`: what a run measured, one line a measurement."""

import json
from pathlib import Path
from typing import Any

from hubgen.formats.atomic import written


class Metrics:
    """The measurements of a run; those that a killed run made beyond its last checkpoint are taken back.

    Args:
        path: Of the file.
        first_step: Steps that the checkpoint has seen from which the run goes on.
        writer: Whether this process writes.
    """

    def __init__(self, path: Path, first_step: int, writer: bool):
        self.path, self.writer = path, writer
        if not writer or not path.exists():
            return
        kept = [row for row in self._rows() if row["step"] <= first_step]
        with written(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a killed run may be cut
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        return rows

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds what was measured at a step."""
        if self.writer:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def has(self, step: int, name: str) -> bool:
        """Whether something was measured at a step."""
        return self.path.exists() and any(row["step"] == step and name in row for row in self._rows())

    def curve(self, measured: str, *others: str) -> list[dict[str, float]]:
        """The values of these names at each step that `measured` was taken at; at every log line if at none."""
        rows: dict[int, dict[str, float]] = {}
        for row in self._rows() if self.path.exists() else []:
            kept = {key: row[key] for key in ("step", *others, measured) if key in row}
            rows.setdefault(row["step"], {}).update(kept)
        return [row for row in rows.values() if measured in row] or list(rows.values())
