"""Shards -> shards with the rows that a recipe and a condition leave: the stage of `hubgen data filter`.

    shards = open_shards(Path("shards"))
    stage = Filter.of(shards, recipe=load_recipe("laion-5b"), where=parse_where("top(similarity, 0.3)"))
    run(stage, stage.works(shards), Path("kept"))
    write_report(stage, Path("kept"))          # kept/report.json: how many rows each rule dropped

Keys and pictures stay as they are, and so does the number of shards. In this order a row goes, and the first reason
counts: it has no picture, a hash list names it, a rule of the recipe drops it, a part of the condition does not hold,
or a part has no answer, since a value is null.

Of a recipe, the rules of "download" and of "filter" are applied. Those of "download" which ask what shards do not tell,
the bytes and the format of the file that was downloaded, are `hubgen data download`'s to apply; where it did not, the
report names them under `not_applied`.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from hubgen.data.errors import DataError
from hubgen.data.web.filtering.hash_lists import HashList
from hubgen.data.web.filtering.where import Top, Where, least_of_top
from hubgen.data.web.rules import Recipe, Sieve, Step
from hubgen.data.web.shards import (
    STATS,
    SUCCESS,
    StoredShard,
    copy_rows,
    read_stats,
    shard_names,
    table_schema,
)
from hubgen.data.web.stages import STAGES, Stage, Work, works_on
from hubgen.formats.atomic import written
from hubgen.formats.digests import file_digest

REPORT = "report.json"
NO_PICTURE, LISTED, NULL = "no_picture", "hash_list", " (null)"
"""What the report calls rows without a picture, those on a hash list, and those without a value to compare"""
SCORE = "hubgen data score SHARDS"
MADE_BY = {
    "similarity": f"{SCORE} --scorer clip:ID",
    **dict.fromkeys(("nsfw", "under_age_prompts", "animal_prompts"), f"{SCORE} --scorer clip:ID --nsfw"),
    "language": f"{SCORE} --language",
    "text": "hubgen data download, of candidates with captions",
}
"""Columns that rules ask for, and the command that makes them"""
OF_FILES = ("byte_count", "format")
"""Columns of the rules of "download" that shards do not have"""


@dataclass
class Filter(Stage):
    """Copies the rows of a shard that stay; made by `of`."""

    steps: tuple[Step, ...] = ()
    where: Where | None = None
    least: Mapping[tuple[str, Fraction], float] = field(default_factory=dict)
    """Of each `top` in the condition"""
    hash_lists: tuple[Path, ...] = ()
    digests: tuple[str, ...] = ()
    """SHA-256 of each hash list"""
    recipe: str | None = None
    not_applied: tuple[str, ...] = ()
    """Rules of the recipe that ask what shards do not tell"""

    name = "filter"

    @classmethod
    def of(
        cls,
        shards: Sequence[StoredShard],
        *,
        recipe: Recipe | None = None,
        where: Where | None = None,
        hash_lists: Sequence[Path] = (),
    ) -> "Filter":
        """The stage for these shards; a first pass reads the columns of which the condition takes the top.

        Args:
            shards: All of a folder.
            recipe: Whose rules to apply.
            where: What has to hold beside.
            hash_lists: See `HashList`.

        Raises:
            ValueError: Nothing is asked for.
            DataError: A shard has not the columns that are asked for, or a list cannot be read; the message has the
                command that makes the column.
        """
        if recipe is None and where is None and not hash_lists:
            raise ValueError("got no recipe, condition or hash list, expected one of them.")
        steps, left = applied(recipe, shards) if recipe is not None else ((), ())
        listed = HashList.read(hash_lists)
        for shard in shards:
            schema = table_schema(shard.table)
            check_columns(steps, schema.names, str(shard.table))
            listed.check(schema.names, str(shard.table))
            if where is not None:
                where.check(schema, str(shard.table))
        tops = [leaf for leaf in where.leaves() if isinstance(leaf, Top)] if where is not None else []
        least = {(top.column, top.share): 0.0 for top in tops}
        least = {(column, share): least_of_top(shards, column, share) for column, share in least}
        digests = tuple(file_digest(path) for path in hash_lists)
        name = None if recipe is None else recipe.name
        return cls(steps, where, least, tuple(hash_lists), digests, name, left)

    @property
    def settings(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Rules with their thresholds, the condition with the least value of each top, the hash lists."""
        thresholds = {f"{step.rule.name}.{key}": value for step in self.steps for key, value in step.thresholds.items()}
        tops = {f"top({column}, {share})": least for (column, share), least in self.least.items()}
        text = None if self.where is None else self.where.text
        lists = sorted(self.digests)
        return {"rules": [step.rule.name for step in self.steps], **thresholds, "where": text, **tops, "lists": lists}

    def works(self, shards: Sequence[StoredShard]) -> list[Work]:
        """The input of each shard: the same one of the folder that is filtered."""
        return works_on(shards, self)

    def setup(self) -> None:
        """Reads the hash lists."""
        self._listed = HashList.read(self.hash_lists)

    def __call__(self, work: Work, folder: Path) -> dict[str, Any]:
        """Writes the shard's tar and table; see `Stage`."""
        shard = StoredShard(work.source.parent, work.name)
        rows, dropped = self.sieve(shard)
        counts = copy_rows(shard, rows, folder)
        before = [*shard.stats.get("before", []), *shard.stats.get(STAGES, [])]
        return {**counts, "rows_before": work.stop - work.start, "dropped": dropped, "before": before}

    def sieve(self, shard: StoredShard) -> tuple[list[int], dict[str, int]]:
        """The rows that stay, and how many went for each reason."""
        table = shard.read(self._columns(shard))
        dropped: dict[str, int] = {}
        stays = np.array(pc.fill_null(pc.equal(table.column("status"), SUCCESS), False))
        dropped[NO_PICTURE] = int((~stays).sum())
        if self.hash_lists:
            listed = self._listed.names(table) & stays
            stays, dropped[LISTED] = stays & ~listed, int(listed.sum())
        sieve = Sieve(self.steps)
        if self.steps:
            for row, values in enumerate(table.to_pylist()):
                if stays[row]:
                    values["text"] = values.get("text") or values.get("caption") or ""
                    stays[row] = sieve(values)
        dropped |= sieve.dropped
        named = zip(self.where.names, self.where.parts, strict=True) if self.where is not None else ()
        for name, part in named:
            mask = part.mask(table, self.least)
            null = np.array(pc.is_null(mask)) & stays
            false = np.array(pc.fill_null(pc.invert(mask), False)) & stays
            dropped[name] = dropped.get(name, 0) + int(false.sum())
            dropped[name + NULL] = dropped.get(name + NULL, 0) + int(null.sum())
            stays = stays & ~null & ~false
        return stays.nonzero()[0].tolist(), dropped

    def _columns(self, shard: StoredShard) -> list[str]:
        """Those that are asked for."""
        wanted = ["status", *(name for step in self.steps for name in step.rule.columns)]
        wanted += [] if self.where is None else self.where.columns
        wanted += list(self._listed.entries) if self.hash_lists else []
        found = table_schema(shard.table).names
        return [name for name in dict.fromkeys(as_stored(name, found) for name in wanted)]


def as_stored(column: str, found: Sequence[str]) -> str:
    """What shards call a column that a rule asks for: the text of a pair is the picture's caption."""
    return "caption" if column == "text" and "text" not in found else column


def applied(recipe: Recipe, shards: Sequence[StoredShard]) -> tuple[tuple[Step, ...], tuple[str, ...]]:
    """The steps of a recipe that shards can answer, and the names of those that they cannot and nobody applied.

    Raises:
        DataError: There are neither.
    """
    of_files = [step for step in recipe.steps["download"] if any(name in OF_FILES for name in step.rule.columns)]
    steps = [step for step in recipe.steps["download"] if step not in of_files] + [*recipe.steps["filter"]]
    if not steps and not of_files:
        raise DataError(f"recipe {recipe.name}: found no rule of download or filter, expected some")
    settings = [_download_of(shard) for shard in shards]
    left = [step.rule.name for step in of_files if not all(_was_applied(step, one) for one in settings)]
    return tuple(steps), tuple(left)


def _download_of(shard: StoredShard) -> Mapping[str, Any]:
    """The settings with which a shard was downloaded; of a filtered one, those of the shard that it was."""
    records = [*shard.stats.get("before", []), *shard.stats.get(STAGES, [])]
    found: dict[str, Any] = next((record["settings"] for record in records if record["stage"] == "download"), {})
    return found


def _was_applied(step: Step, settings: Mapping[str, Any]) -> bool:
    """Whether a download's own options were as strict as a rule on the files."""
    if step.rule.name == "file_size":
        return bool(settings.get("min_bytes", 0) >= step.thresholds["least"])
    allowed = {name.lower() for name in step.thresholds["allowed"]}
    return "formats" in settings and set(settings["formats"]) <= allowed


def check_columns(steps: Sequence[Step], found: Sequence[str], name: str) -> None:
    """Raises DataError where a rule asks for a column that a table (`name`) has not, with the command that makes it."""
    for step in steps:
        for column in step.rule.columns:
            if as_stored(column, found) not in found:
                how = f"; `{MADE_BY[column]}` makes it" if column in MADE_BY else ""
                raise DataError(f"{name}: found no column {column}, expected it for the rule {step.rule.name}{how}")


def write_report(stage: Filter, out: Path) -> dict[str, Any]:
    """Adds up the counts of all shards, and writes `report.json` beside them.

    Returns:
        Its content: `recipe`, `where`, `not_applied`, `shards`, `rows`, `dropped` (a count for each reason), `kept`.
        `rows` is the sum of `dropped` and `kept`.
    """
    counts, dropped = Counter[str](), dict[str, int]()
    names = shard_names(out)
    for name in names:
        stats = read_stats(out / f"{name}{STATS}")
        counts.update(rows=stats["rows_before"], kept=stats["count"])
        for reason, number in stats["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + number
    where = None if stage.where is None else stage.where.text
    report: dict[str, Any] = {"recipe": stage.recipe, "where": where, "not_applied": list(stage.not_applied)}
    report |= {"shards": len(names), "rows": counts["rows"], "dropped": dropped, "kept": counts["kept"]}
    with written(out / REPORT) as temporary:
        temporary.write_text(json.dumps(report, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
    return report
