"""Tables of URLs and captions, cut into the input of shards.

Parquet is read where the rows are. Of CSV, TSV and JSON lines, a process keeps the table that it read last.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from hubgen.data.errors import DataError
from hubgen.data.web.shards import table_rows, table_schema
from hubgen.data.web.stages import Work
from hubgen.formats.digests import file_digest

KINDS = ("parquet", "csv", "tsv", "jsonl")
ENDINGS = tuple(f".{kind}{packed}" for kind in KINDS for packed in (("",) if kind == "parquet" else ("", ".gz")))


def candidate_files(source: Path) -> list[Path]:
    """The tables of a folder in the order of their names, or the one file.

    Raises:
        DataError: There is none, or tables of several kinds.
    """
    if source.is_file():
        if not source.name.endswith(ENDINGS):
            raise DataError(f"{source}: expected a table of URLs ({', '.join(ENDINGS)}), or a folder of some")
        return [source]
    if not source.is_dir():
        raise DataError(f"{source}: no such file or folder, expected a table of URLs, or a folder of some")
    files = sorted(path for path in source.iterdir() if path.name.endswith(ENDINGS) and not path.name.startswith("."))
    kinds = sorted({_kind(path) for path in files})
    if len(kinds) != 1:
        raise DataError(f"{source}: got {' and '.join(kinds) or 'no'} files, expected one kind of {', '.join(KINDS)}")
    return files


def schema_of(path: Path) -> Any:
    """The names and types of a table's columns (`pyarrow.Schema`).

    Raises:
        DataError: It cannot be read.
    """
    return table_schema(path) if _kind(path) == "parquet" else _whole(path).schema


def works_of(files: Sequence[Path], rows: int) -> list[Work]:
    """The input of shards: each file's rows by `rows`, and what is left of a file is a shard too, as in img2dataset.

    Raises:
        DataError: A file cannot be read, or all are empty.
    """
    works: list[Work] = []
    for path in files:
        count = table_rows(path) if _kind(path) == "parquet" else len(_whole(path))
        digest = file_digest(path)
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            part = hashlib.sha256(f"{digest} {start} {stop}".encode()).hexdigest()
            works.append(Work(len(works), path, start, stop, part))
    if not works:
        raise DataError(f"{files[0]}: got no rows, expected some")
    return works


def read_rows(work: Work) -> Any:
    """The rows of a shard's input, as a `pyarrow.Table`.

    Raises:
        DataError: The file cannot be read.
    """
    if _kind(work.source) != "parquet":
        return _whole(work.source).slice(work.start, work.stop - work.start)
    try:
        with pa.parquet.ParquetFile(work.source) as file:
            first, groups, begin = None, [], 0
            for group in range(file.num_row_groups):
                end = begin + file.metadata.row_group(group).num_rows
                if begin < work.stop and end > work.start:
                    first = begin if first is None else first
                    groups.append(group)
                begin = end
            table = file.read_row_groups(groups)
    except (pa.ArrowException, OSError) as problem:
        raise _unreadable(work.source, problem) from problem
    return table.slice(work.start - (first or 0), work.stop - work.start)


def _kind(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[2]


@lru_cache(maxsize=1)
def _whole(path: Path) -> Any:
    try:
        if _kind(path) == "jsonl":
            return pa.json.read_json(path)
        options = pa.csv.ParseOptions(delimiter="\t" if _kind(path) == "tsv" else ",", newlines_in_values=True)
        return pa.csv.read_csv(path, parse_options=options)
    except (pa.ArrowException, OSError) as problem:
        raise _unreadable(path, problem) from problem


def _unreadable(path: Path, problem: Exception) -> DataError:
    return DataError(f"{path}: cannot be read as {_kind(path)} ({' '.join(str(problem).split())[:200]})")
