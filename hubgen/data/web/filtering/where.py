"""Conditions on the columns of shards, as text that is parsed and never run: `hubgen data filter --where`.

    where = parse_where("similarity >= 0.28 and (width >= 200 or not license is null)")
    where.check(schema, "00000.parquet")       # each column is there, and can be compared so
    where.parts[0].mask(table, {})             # (N,): true, false, or null

    condition   = column sign value | column is [not] null | top(column, share) | not condition | (condition)
                | condition and condition | condition or condition
    sign        = >= > <= < == = !=
    value       = a number, 'text', "text", true or false

`top(similarity, 0.3)` are the rows of the largest 30 % of all values of a column, in all shards together (DataComp's
"CLIP score, top 30 %", Gadre et al., 2023). A column whose name is no plain word stands in backquotes.

Null is SQL's: a comparison with it is neither true nor false, nor is its negation, so a row without a value does not
stay; NaN counts as null. A number is compared in the precision of the column, so that what is equal to it stays.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hubgen.data.errors import DataError
from hubgen.data.web.shards import SUCCESS, StoredShard

SIGNS = {">=": "greater_equal", ">": "greater", "<=": "less_equal", "<": "less", "==": "equal", "!=": "not_equal"}
WORDS = ("and", "or", "not", "is", "null", "true", "false", "top")
DEEPEST = 50
"""Brackets and negations within each other"""

Least = Mapping[tuple[str, Fraction], float]
"""The least value of each `top`, see `least_of_top`"""


class WhereError(DataError):
    """A condition that is none, or that asks a column what it cannot answer; opens with the place in its text."""


class Condition(ABC):
    """A part of the tree."""

    def leaves(self) -> Iterator["Leaf"]:
        """What it asks of single columns."""
        for part in self.within():
            yield from part.leaves()

    def within(self) -> Sequence["Condition"]:
        """The conditions that it is made of."""
        return ()

    @abstractmethod
    def mask(self, table: Any, least: Least) -> Any:
        """Whether it holds for each row of a table, (N,) truth values or null; `least` has each `top`'s."""


@dataclass(frozen=True)
class Leaf(Condition):
    """A condition on one column; `position` is where its name begins, from 1."""

    column: str
    position: int

    def leaves(self) -> Iterator["Leaf"]:
        yield self

    def check(self, kind: Any) -> None:
        """Raises WhereError unless a column of this type can be asked so."""


@dataclass(frozen=True)
class Comparison(Leaf):
    """A column beside a value."""

    sign: str
    value: Any

    def check(self, kind: Any) -> None:
        if isinstance(self.value, bool):
            fits, expected = pa.types.is_boolean(kind) and self.sign in ("==", "!="), "== or != of truth values"
        elif isinstance(self.value, str):
            fits, expected = _is_text(kind), "a text"
        else:
            fits, expected = _is_number(kind), "a number"
        if not fits:
            found = f"{self.column}, a column of {kind}, {self.sign} {self.value!r}"
            raise WhereError(f"character {self.position}: found {found}, expected {expected} for it")

    def mask(self, table: Any, least: Least) -> Any:
        column, value = _values(table.column(self.column)), self.value
        kind = table.schema.field(self.column).type
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if pa.types.is_floating(kind):
                value = float(kind.to_pandas_dtype()(value))  # as the column has it
            elif isinstance(value, float) or kind == pa.uint64():
                column, value = column.cast(pa.float64(), safe=False), float(value)
        return getattr(pc, SIGNS[self.sign])(column, pa.scalar(value))


@dataclass(frozen=True)
class IsNull(Leaf):
    """A column without a value."""

    def mask(self, table: Any, least: Least) -> Any:
        return pc.is_null(_values(table.column(self.column)))


@dataclass(frozen=True)
class Top(Leaf):
    """A column among the largest share of its values."""

    share: Fraction

    def check(self, kind: Any) -> None:
        if not _is_number(kind):
            raise WhereError(f"character {self.position}: found {self.column}, a column of {kind}, expected numbers")

    def mask(self, table: Any, least: Least) -> Any:
        column = _values(table.column(self.column)).cast(pa.float64(), safe=False)
        return pc.greater_equal(column, pa.scalar(least[self.column, self.share]))


@dataclass(frozen=True)
class Not(Condition):
    """What does not hold."""

    inner: Condition

    def within(self) -> Sequence[Condition]:
        return (self.inner,)

    def mask(self, table: Any, least: Least) -> Any:
        return pc.invert(self.inner.mask(table, least))


@dataclass(frozen=True)
class Joined(Condition):
    """Conditions by "and" or by "or"."""

    word: str
    parts: tuple[Condition, ...]

    def within(self) -> Sequence[Condition]:
        return self.parts

    def mask(self, table: Any, least: Least) -> Any:
        join: Callable[[Any, Any], Any] = pc.and_kleene if self.word == "and" else pc.or_kleene
        first, *others = (part.mask(table, least) for part in self.parts)
        for other in others:
            first = join(first, other)
        return first


@dataclass(frozen=True)
class Where:
    """A condition that was parsed.

    Attributes:
        text: As given.
        parts: The conditions that all have to hold, in order: those between "and" of the outermost level.
        names: The text of each.
    """

    text: str
    parts: tuple[Condition, ...]
    names: tuple[str, ...]

    def leaves(self) -> list[Leaf]:
        """What is asked of single columns."""
        return [leaf for part in self.parts for leaf in part.leaves()]

    @property
    def columns(self) -> list[str]:
        """The columns that it reads, each once."""
        return list(dict.fromkeys(leaf.column for leaf in self.leaves()))

    def check(self, schema: Any, name: str) -> None:
        """Looks at the columns of a table.

        Args:
            schema: Of the table (`pyarrow.Schema`).
            name: Of its file, for messages.

        Raises:
            WhereError: One is not there, or of another type than its value.
        """
        for leaf in self.leaves():
            if leaf.column not in schema.names:
                raise WhereError(
                    f"character {leaf.position}: found {leaf.column!r}, expected a column of {name}: "
                    f"{', '.join(schema.names)}"
                )
            leaf.check(schema.field(leaf.column).type)


def _is_text(kind: Any) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _values(column: Any) -> Any:
    """A column with null for NaN, and in a type that can be compared."""
    if pa.types.is_floating(column.type):
        column = column.cast(pa.float64())
        return pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


# ---- the text ----


class Token(NamedTuple):
    """A word of the text: its kind, its value, and where it stands."""

    kind: str
    value: Any
    start: int
    end: int


TOKENS = re.compile(
    r"""\s*(?:(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))|(?P<sign>>=|<=|==|!=|=|>|<)
    |(?P<mark>[(),])|(?P<word>[A-Za-z_]\w*)|`(?P<quoted>[^`]+)`|'(?P<single>[^']*)'|"(?P<double>[^"]*)")""",
    re.VERBOSE,
)


def parse_where(text: str) -> Where:
    """The tree of a condition.

    Raises:
        WhereError: It is none; the message opens with the place of the fault in the text, counted from 1.
    """
    return _Parser(text).whole()


def _tokens(text: str) -> list[Token]:
    tokens, place = [], 0
    while text[place:].strip():
        match = TOKENS.match(text, place)
        if match is None:
            start = len(text) - len(text[place:].lstrip())
            found = "a text or name without its end" if text[start] in "'\"`" else repr(text[start : start + 12])
            raise WhereError(f"character {start + 1}: found {found}, expected a condition, such as similarity >= 0.28")
        kind = str(match.lastgroup)
        value: Any = match[kind]
        start = match.start(kind) - (kind in ("quoted", "single", "double"))
        if kind == "number":
            value = _number(value, start)
        elif kind == "word" and value.lower() in WORDS:
            kind, value = value.lower(), value.lower()
        elif kind in ("mark", "sign"):
            kind = value = "==" if value == "=" else value
        kind = {"quoted": "name", "word": "name", "single": "text", "double": "text"}.get(kind, kind)
        tokens.append(Token(kind, value, start + 1, match.end()))
        place = match.end()
    return [*tokens, Token("end", "the end", len(text) + 1, len(text))]


def _number(word: str, start: int) -> Any:
    value: int | float = int(word) if re.fullmatch(r"[+-]?\d+", word) else float(word)
    if not (-(2**63) <= value < 2**63 if isinstance(value, int) else math.isfinite(value)):
        raise WhereError(f"character {start + 1}: found {word}, expected a number that 64 bits can hold")
    return value if isinstance(value, int) else (value, Fraction(word))


class _Parser:
    """Reads tokens from left to right; each method reads what it is named after."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, self.place, self.depth = text, _tokens(text), 0, 0

    @property
    def next(self) -> Token:
        return self.tokens[self.place]

    def take(self, *kinds: str, expected: str) -> Token:
        token = self.next
        if token.kind not in kinds:
            raise self.wrong(token, expected)
        self.place += 1
        return token

    def wrong(self, token: Token, expected: str) -> WhereError:
        found = "the end" if token.kind == "end" else repr(self.text[token.start - 1 : token.end])
        return WhereError(f"character {token.start}: found {found}, expected {expected}")

    def whole(self) -> Where:
        self.names: list[str] = []
        condition = self.joined("or")
        self.take("end", expected="and, or, or the end")
        if isinstance(condition, Joined) and len(self.names) == len(condition.parts) and condition.word == "and":
            return Where(self.text, condition.parts, tuple(self.names))
        return Where(self.text, (condition,), (" ".join(self.text.split()),))

    def joined(self, word: str) -> Condition:
        parts, names = [], []
        while True:
            start = self.next.start
            parts.append(self.joined("and") if word == "or" else self.single())
            names.append(" ".join(self.text[start - 1 : self.tokens[self.place - 1].end].split()))
            if self.next.kind != word:
                break
            self.place += 1
        if word == "and":
            self.names = names  # the outermost comes last
        return parts[0] if len(parts) == 1 else Joined(word, tuple(parts))

    def single(self) -> Condition:
        token = self.next
        if token.kind not in ("not", "("):
            return self.leaf()
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.wrong(token, f"at most {DEEPEST} brackets and negations within each other")
        self.place += 1
        inner: Condition
        if token.kind == "not":
            inner = Not(self.single())
        else:
            inner = self.joined("or")
            self.take(")", expected="and, or, or a closing bracket")
        self.depth -= 1
        return inner

    def leaf(self) -> Condition:
        token = self.take("name", "top", expected="a column, top(, not, or an opening bracket")
        if token.kind == "top":
            return self.top(token)
        sign = self.take(*SIGNS, "is", expected="a comparison (>= > <= < == !=) or `is null`")
        if sign.kind == "is":
            negated = self.next.kind == "not"
            self.place += negated
            self.take("null", expected="null" if negated else "null or not null")
            absent = IsNull(token.value, token.start)
            return Not(absent) if negated else absent
        if self.next.kind == "null":
            raise self.wrong(self.next, f"a value; `{token.value} is null` asks for none")
        value = self.take("number", "text", "true", "false", expected="a number, a text in quotes, true or false")
        given = {"true": True, "false": False}.get(value.kind, value.value)
        return Comparison(token.value, token.start, sign.kind, given[0] if isinstance(given, tuple) else given)

    def top(self, token: Token) -> Condition:
        self.take("(", expected="top(column, share)")
        column = self.take("name", expected="a column")
        self.take(",", expected="a comma, and a share")
        share = self.take("number", expected="a share above 0, up to 1")
        exact = share.value[1] if isinstance(share.value, tuple) else Fraction(share.value)
        if not 0 < exact <= 1:
            raise self.wrong(share, "a share above 0, up to 1")
        self.take(")", expected="a closing bracket")
        return Top(column.value, column.start, exact)


# ---- the largest values ----


def least_of_top(shards: Sequence[StoredShard], column: str, share: Fraction) -> float:
    """The least value of the largest `share` of a column: of N values, the ⌈share · N⌉-th from above.

    Counted are rows with a picture and a value, of all shards. It is exact, and memory does not grow with the rows:
    four passes read the column, and each settles 16 bits of the answer by counting.

    Returns:
        The value; infinity where no row has one.
    """
    settled, wanted = 0, 0
    for step in range(4):
        shift = 48 - 16 * step
        counts = np.zeros(2**16, np.int64)
        for shard in shards:
            keys = _in_order(shard, column)
            if step:
                keys = keys[keys >> np.uint64(shift + 16) == settled]
            counts += np.bincount((keys >> np.uint64(shift) & np.uint64(0xFFFF)).astype(np.int64), minlength=2**16)
        if step == 0:
            if not counts.sum():
                return math.inf
            wanted = math.ceil(share * int(counts.sum()))
        above = np.cumsum(counts[::-1])[::-1]  # as many as have these bits or more
        digit = int(np.flatnonzero(above >= wanted)[-1])
        wanted -= int(above[digit] - counts[digit])
        settled = settled << 16 | digit
    bits = settled ^ (1 << 63) if settled >> 63 else ~settled & (1 << 64) - 1
    return float(np.array([bits], np.uint64).view(np.float64)[0])


def _in_order(shard: StoredShard, column: str) -> Any:
    """(N,) whole numbers of 64 bits in the order of the values: the bits of a double, all of a negative one turned."""
    table = shard.read(dict.fromkeys([column, "status"]))
    table = table.filter(pc.equal(table.column("status"), SUCCESS))
    values = _values(table.column(column)).cast(pa.float64(), safe=False).drop_null().to_numpy()
    bits = np.ascontiguousarray(values, np.float64).view(np.uint64)
    return np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(1 << 63))
