import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hubgen.data.errors import DataError
from hubgen.data.web.filtering.where import least_of_top, parse_where
from hubgen.data.web.shards import open_shards
from tests.data.web.pairs import write_pairs

TABLE = pa.table(
    {
        "similarity": pa.array([0.27, 0.28, 0.29, None, math.nan], pa.float32()),
        "score": pa.array([0.27, 0.28, 0.29, None, math.nan], pa.float64()),
        "width": pa.array([100, 200, 300, 400, None], pa.int32()),
        "hash": pa.array([-5, 2**62 + 1, 2**62, 0, None], pa.int64()),
        "language": pa.array(["en", "de", "", None, "en"]),
        "kind": pa.array(["a", "b", "a", None, "b"]).dictionary_encode(),
        "is_used": pa.array([True, False, None, True, False]),
        "odd name": pa.array([1, 2, 3, 4, 5]),
        "nearest": pa.array([[1, 2], [2], None, [], [3]]),
    }
)


def holds(text: str) -> list[bool | None]:
    where = parse_where(text)
    where.check(TABLE.schema, "00000.parquet")
    whole = [
        all(rows) if None not in rows else (False if False in rows else None) for rows in zip(*masks(text), strict=True)
    ]
    return whole


def masks(text: str) -> list[list[bool | None]]:
    return [part.mask(TABLE, {}).to_pylist() for part in parse_where(text).parts]


T, F, N = True, False, None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("similarity >= 0.28", [F, T, T, N, N]),
        ("similarity > 0.28", [F, F, T, N, N]),
        ("similarity == 0.28", [F, T, F, N, N]),  # single precision: 0.28 is none of its numbers
        ("similarity <= 0.27", [T, F, F, N, N]),
        ("similarity < 0.27", [F, F, F, N, N]),
        ("similarity != 0.29", [T, T, F, N, N]),
        ("score >= 0.28", [F, T, T, N, N]),
        ("similarity >= 1", [F, F, F, N, N]),
        ("similarity >= -1e-3", [T, T, T, N, N]),
        ("width >= 200", [F, T, T, T, N]),
        ("width > 199.5", [F, T, T, T, N]),
        ("width = 200", [F, T, F, F, N]),
        ("width < 1000000000000", [T, T, T, T, N]),
        ("hash == 4611686018427387905", [F, T, F, F, N]),  # which a double cannot hold
        ("hash < -4", [T, F, F, F, N]),
        ("language == 'en'", [T, F, F, N, T]),
        ('language != "en"', [F, T, T, N, F]),
        ("language > 'de'", [T, F, F, N, T]),
        ("kind == 'a'", [T, F, T, N, F]),
        ("is_used == true", [T, F, N, T, F]),
        ("is_used != TRUE", [F, T, N, F, T]),
        ("similarity is null", [F, F, F, T, T]),
        ("similarity IS NOT NULL", [T, T, T, F, F]),
        ("nearest is null", [F, F, T, F, F]),
        ("`odd name` >= 4", [F, F, F, T, T]),
        ("not similarity >= 0.28", [T, F, F, N, N]),
        ("not not similarity >= 0.28", [F, T, T, N, N]),
        ("similarity >= 0.28 and width >= 300", [F, F, T, N, N]),
        ("similarity >= 0.28 or width >= 400", [F, T, T, T, N]),
        ("similarity >= 0.28 or width >= 400 and language == 'de'", [F, T, T, N, N]),
        ("(similarity >= 0.28 or width >= 400) and language == 'de'", [F, T, F, N, F]),
        ("similarity >= 0.28 and similarity is null", [F, F, F, N, N]),
        ("(width >= 300 and (language == ''))", [F, F, T, N, F]),
    ],
)
def test_a_condition_holds_where_it_says(text: str, expected: list[bool | None]) -> None:
    assert holds(text) == expected


def test_a_condition_of_random_form_holds_where_python_says() -> None:
    chance = random.Random(0)
    rows = [
        dict(zip(TABLE.column_names, values, strict=True))
        for values in zip(*TABLE.slice(0, 3).to_pydict().values(), strict=True)
    ]

    def made(depth: int) -> tuple[str, str]:
        """In our words, and in Python's."""
        if depth == 0 or chance.random() < 0.2:
            column, sign = chance.choice(["width", "hash", "score"]), chance.choice([">=", "<", "==", "!="])
            value = chance.choice([100, 200, 0.28, -5, 2**62])
            return f"{column}{sign}{value}", f"row['{column}'] {sign} {value}"
        word = chance.choice(["and", "or", "not"])
        first, second = made(depth - 1), made(depth - 1)
        if word == "not":
            return f"not ({first[0]})", f"(not ({first[1]}))"
        return f"({first[0]}) {word} ({second[0]})", f"(({first[1]}) {word} ({second[1]}))"

    for _ in range(200):
        ours, theirs = made(4)
        assert holds(ours)[:3] == [eval(theirs, {"row": row}) for row in rows], ours


def test_the_outermost_parts_are_told_apart() -> None:
    assert parse_where("similarity >= 0.28  and width>=200 and (a == 1 and b == 2)").names == (
        "similarity >= 0.28",
        "width>=200",
        "(a == 1 and b == 2)",
    )
    assert parse_where("a == 1 or b == 2 and c == 3").names == ("a == 1 or b == 2 and c == 3",)
    assert len(parse_where("(a == 1 and b == 2)").parts) == 1
    assert parse_where("a == 1 and not b is null or top(c, 0.5)").columns == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "character 1: found the end, expected a column"),
        ("similarity", "character 11: found the end, expected a comparison"),
        ("similarity >=", "character 14: found the end, expected a number, a text in quotes, true or false"),
        ("similarity >= 0.28 width", "character 20: found 'width', expected and, or, or the end"),
        ("similarity >= width", "character 15: found 'width', expected a number"),
        ("(similarity >= 0.28", "character 20: found the end, expected and, or, or a closing bracket"),
        ("similarity >= 0.28)", "character 19: found ')', expected and, or, or the end"),
        ("similarity >= 0.2.8", "character 15: found '0.2.8', expected a condition"),
        ("width >= 200px", "character 10: found '200px'"),
        ("language == 'en", "character 13: found a text or name without its end"),
        ("similarity => 0.28", "character 13: found '>', expected a number"),
        ("0.28 <= similarity", "character 1: found '0.28', expected a column"),
        ("similarity is 0.28", "character 15: found '0.28', expected null or not null"),
        ("similarity == null", "character 15: found 'null', expected a value; `similarity is null` asks for none"),
        ("__import__('os')", "character 11: found '(', expected a comparison"),
        ("similarity >= 1e999", "character 15: found 1e999, expected a number that 64 bits can hold"),
        ("hash == 9223372036854775808", "expected a number that 64 bits can hold"),
        ("top(similarity, 1.5)", "character 17: found '1.5', expected a share above 0, up to 1"),
        ("top(similarity, 0)", "expected a share above 0, up to 1"),
        ("top(similarity)", "character 15: found ')', expected a comma, and a share"),
        ("similarity >= 0.28 & width > 1", "character 20: found '& width > 1'"),
        ("(" * 60 + "width > 1" + ")" * 60, "character 51: found '(', expected at most 50 brackets"),
        ("not " * 60 + "width > 1", "expected at most 50 brackets and negations"),
    ],
)
def test_what_is_no_condition_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_where(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "width > 1 and similarty >= 0.28",
            "character 15: found 'similarty', expected a column of 0.parquet: similarity",
        ),
        ("language >= 0.28", "character 1: found language, a column of string, >= 0.28, expected a number for it"),
        ("width == 'a'", "character 1: found width, a column of int32, == 'a', expected a text for it"),
        ("is_used > true", "expected == or != of truth values"),
        ("width == true", "expected == or != of truth values"),
        ("nearest == 1", "a column of list<"),
        ("top(language, 0.5)", "character 5: found language, a column of string, expected numbers"),
    ],
)
def test_a_column_that_does_not_fit_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_where(text).check(TABLE.schema, "0.parquet")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.int32()])
def test_the_top_of_a_column_is_that_of_a_sort(kind: Any, tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    values = np.concatenate([chance.normal(0, 100, 27), [5.0, 5.0, 5.0]])
    if kind == pa.int32():
        values = values.round()
    columns = [pa.array(part.tolist(), kind) for part in np.split(values, [10, 19])]
    columns[1] = pa.array([*columns[1].to_pylist(), None], kind)
    failed = {(0, 3)}
    write_pairs(tmp_path, *[{"score": column} for column in columns], failed=failed)
    shards = open_shards(tmp_path)
    known = [value for number, column in enumerate(columns) for row, value in enumerate(column.to_pylist())
             if value is not None and (number, row) not in failed]  # fmt: skip
    known.sort(reverse=True)
    for share in ("0.3", "0.01", "1", "0.5", "1e-1"):
        rank = math.ceil(Fraction(share) * len(known))
        least = least_of_top(shards, "score", Fraction(share))
        assert least == known[rank - 1], share
        where = parse_where(f"top(score, {share})")
        leaf = where.parts[0]
        mask = leaf.mask(pa.table({"score": columns[0]}), {("score", Fraction(share)): least})
        assert mask.to_pylist() == [value >= known[rank - 1] for value in columns[0].to_pylist()]


def test_a_column_without_a_value_has_no_top(tmp_path: Path) -> None:
    write_pairs(tmp_path, {"score": pa.array([None, math.nan], pa.float32())})
    assert least_of_top(open_shards(tmp_path), "score", Fraction(1, 2)) == math.inf
