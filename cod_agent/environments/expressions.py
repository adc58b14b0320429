"""Expressions that a model wrote, read and evaluated without Python ever seeing them.

    law = parse("clip(-0.8 * (x - 2) - v, -1, 1) if t < 3 else 0", {"x", "v", "t"})
    law({"x": 0.5, "v": 0.1, "t": 2.0})         # a finite float

The grammar is a small part of Python's, with Python's precedence and values. Weakest first:

    A if C else B                   only the branch that counts is evaluated
    A or B    A and B    not A      0 is false, all else is true; `or` and `and` give one of their operands, as in Python
    A < B <= C                      < <= > >= == !=, chained as in Python; true is 1, false is 0
    A + B    A - B    A * B    A / B    -A    +A
    A ** B                          binds to the right, and more tightly than a sign before it: -2**2 is -4
    2  .5  1e-3  NAME  (A)
    abs(A)  min(A, B, ...)  max(A, B, ...)  pow(A, B)  clip(A, LOW, HIGH)

Every number is a finite float. What would be none (a division by zero, an overflow, a root of a negative number) is an
`ExpressionError` when it is evaluated; a text that is no expression, or too large a one, is one when it is read. Its words are short
and quote at most a few characters, as ASCII, so that they can be shown.

An own tokenizer and a parser by precedence make nested functions of it. Length, size and nesting are bounded, so that reading costs
at most a few milliseconds and an evaluation far less, whatever is given.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping

Values = Mapping[str, float]
"""What the names stand for; finite."""

Expression = Callable[[Values], float]
"""Gives a finite value. Raises: ExpressionError."""

LENGTH, PARTS, DEPTH = 2000, 1000, 24
"""The most characters; numbers, words and signs; and parentheses, signs, `not` and exponents inside of each other."""


class ExpressionError(Exception):
    """A text is no expression, or has no finite value; `str()` says why, in a few words that may be shown."""


def parse(text: str, names: Collection[str]) -> Expression:
    """What `text` says, as a function of the values of `names`.

    Raises:
        ExpressionError: it is no expression. The words say at which character (from 1) and what was expected there.
    """
    if len(text) > LENGTH:
        raise ExpressionError(f"it has {len(text)} characters, at most {LENGTH} are read")
    value = _Parser(text, names).whole()

    def evaluated(values: Values) -> float:
        try:
            return value(values)
        except ZeroDivisionError:
            raise ExpressionError("it divides by zero") from None
        except OverflowError:
            raise ExpressionError("a number in it becomes too large") from None

    return evaluated


# ---- values ----


def _finite(value: float) -> float:
    if value - value != 0:  # infinity or NaN; cheaper than a call of math.isfinite
        raise OverflowError
    return value


def _power(base: float, exponent: float) -> float:
    try:
        return math.pow(base, exponent)
    except ValueError:
        if base == 0:
            raise ZeroDivisionError from None
        raise ExpressionError("a negative number in it has a power that is no whole number") from None


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


_FUNCTIONS: dict[str, tuple[Callable[..., float], int, int | None]] = {
    "abs": (abs, 1, 1),
    "min": (min, 2, None),
    "max": (max, 2, None),
    "pow": (_power, 2, 2),
    "clip": (_clip, 3, 3),
}
"""Name -> (function, fewest arguments, most). None of them makes anything infinite of what is not."""

_OR, _AND, _NOT, _COMPARED, _SUM, _PRODUCT = range(1, 7)

_COMPARISONS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_LEVELS = {"or": _OR, "and": _AND, **dict.fromkeys(_COMPARISONS, _COMPARED), "+": _SUM, "-": _SUM}
_LEVELS |= {"*": _PRODUCT, "/": _PRODUCT}
"""How tightly an operator between two operands binds."""

_Rest = list[tuple[str, Expression]]
"""The operators after a first operand, each with its second one."""


def _one_of(first: Expression, rest: _Rest, *, until: bool) -> Expression:
    """`or` (until a true one) and `and` (until a false one)."""
    operands = [operand for _, operand in rest]

    def value(values: Values) -> float:
        found = first(values)
        for operand in operands:
            if (found != 0) == until:
                break
            found = operand(values)
        return found

    return value


def _compared(first: Expression, rest: _Rest) -> Expression:
    pairs = [(_COMPARISONS[sign], operand) for sign, operand in rest]

    def value(values: Values) -> float:
        left = first(values)
        for holds, operand in pairs:
            right = operand(values)
            if not holds(left, right):
                return 0.0
            left = right
        return 1.0

    return value


def _calculated(first: Expression, rest: _Rest) -> Expression:
    pairs = [(_ARITHMETIC[sign], operand) for sign, operand in rest]

    def value(values: Values) -> float:
        found = first(values)
        for apply, operand in pairs:
            found = apply(found, operand(values))
        return _finite(found)  # what became infinite on the way stays so, as all operands are finite

    return value


def _chosen(cases: list[tuple[Expression, Expression]], otherwise: Expression) -> Expression:
    """The value of the first case whose condition is true."""

    def value(values: Values) -> float:
        for condition, then in cases:
            if condition(values):
                return then(values)
        return otherwise(values)

    return value


# ---- reading ----

_PART = re.compile(r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[A-Za-z_][A-Za-z0-9_]*|\*\*|[<>=!]=|\S", re.ASCII)
"""A number, a word or a sign, or a character that is none of them."""
_KEYWORDS = {"if", "else", "or", "and", "not"}
_HINTS = {"^": "a power is written **", "=": "only the expression itself is written, and equality as =="}
_HINTS |= {"&": "write and", "|": "write or", "!": "write not", "?": "write A if C else B"}
_VALUE = "a number, a name or ("


class _Parser:
    """Reads one text; `_word` is the part at hand, "" at the end."""

    def __init__(self, text: str, names: Collection[str]) -> None:
        self._text, self._names = text, names
        self._parts, self._at, self._depth = _PART.findall(text), 0, 0
        if len(self._parts) > PARTS:
            raise ExpressionError(f"it has {len(self._parts)} numbers, words and signs, at most {PARTS} are read")
        self._parts.append("")
        self._word: str = self._parts[0]

    def whole(self) -> Expression:
        """The whole text as an expression."""
        value = self._choice()
        if self._word:
            raise self._wrong("an operator or the end")
        return value

    def _advance(self) -> str:
        """Go on to the next part; returns the one at hand before."""
        before = self._word
        self._at += 1
        self._word = self._parts[self._at]
        return before

    def _taken(self, word: str) -> bool:
        """Whether that is the part at hand; if so, it is behind us now."""
        if self._word != word:
            return False
        self._advance()
        return True

    def _expect(self, word: str) -> None:
        if not self._taken(word):
            raise self._wrong(word)

    def _inside(self, read: Callable[[], Expression]) -> Expression:
        """What `read` reads, one level further inside."""
        self._depth += 1
        if self._depth > DEPTH:
            raise ExpressionError(f"at character {self._place()} it is nested more than {DEPTH} deep")
        value = read()
        self._depth -= 1
        return value

    def _place(self) -> int:
        """Where the part at hand stands in the text, from 1."""
        starts = [found.start() for found in _PART.finditer(self._text)]
        return 1 + [*starts, len(self._text)][self._at]

    def _wrong(self, expected: str) -> ExpressionError:
        hint = f" ({_HINTS[self._word]})" if self._word in _HINTS else ""
        found = f"there is {ascii(self._word[:12])}" if self._word else "it ends"
        return ExpressionError(f"at character {self._place()} {found}{hint}, where {expected} was expected")

    def _choice(self) -> Expression:
        value = self._operation(_OR)
        if self._word != "if":
            return value
        cases: list[tuple[Expression, Expression]] = []
        while self._taken("if"):
            condition = self._operation(_OR)
            self._expect("else")
            cases.append((condition, value))
            value = self._operation(_OR)
        return _chosen(cases, value)

    def _operation(self, least: int) -> Expression:
        """Operands and the operators between them that bind at least so tightly."""
        value = self._negated() if least <= _NOT and self._word == "not" else self._signed()
        level = _LEVELS.get(self._word, 0)
        while level >= least:
            rest: _Rest = []
            this = level
            while level == this:
                rest.append((self._advance(), self._signed() if this == _PRODUCT else self._operation(this + 1)))
                level = _LEVELS.get(self._word, 0)
            if this <= _AND:
                value = _one_of(value, rest, until=this == _OR)
            else:
                value = _compared(value, rest) if this == _COMPARED else _calculated(value, rest)
        return value

    def _negated(self) -> Expression:
        self._advance()
        operand = self._inside(lambda: self._operation(_NOT))
        return lambda values: float(operand(values) == 0)

    def _signed(self) -> Expression:
        if self._word == "-" or self._word == "+":
            minus = self._advance() == "-"
            operand = self._inside(self._signed)
            return (lambda values: -operand(values)) if minus else operand
        base = self._value()
        if self._word != "**":
            return base
        self._advance()
        exponent = self._inside(self._signed)
        return lambda values: _power(base(values), exponent(values))

    def _value(self) -> Expression:
        word = self._word
        if word in self._names:
            return operator.itemgetter(self._advance())
        if word == "(":
            self._advance()
            value = self._inside(self._choice)
            self._expect(")")
            return value
        if word in _FUNCTIONS:
            return self._call(self._advance())
        if "0" <= word[:1] <= "9" or (word[:1] == "." and word != "."):
            return self._number()
        named = word.isidentifier() and word not in _KEYWORDS
        raise self._wrong(f"one of {', '.join([*sorted(self._names), *_FUNCTIONS])}" if named else _VALUE)

    def _number(self) -> Expression:
        number = float(self._word)
        if math.isinf(number):
            raise self._wrong("a number below 1e308")
        self._advance()
        return lambda _: number

    def _call(self, name: str) -> Expression:
        function, fewest, most = _FUNCTIONS[name]
        self._expect("(")
        arguments = [self._inside(self._choice)]
        while self._taken(","):
            arguments.append(self._inside(self._choice))
        self._expect(")")
        if len(arguments) < fewest or (most is not None and len(arguments) > most):
            wanted = f"{fewest}" if most == fewest else f"at least {fewest}"
            raise ExpressionError(
                f"{name}() before character {self._place()} takes {wanted} values, not {len(arguments)}"
            )
        return lambda values: function(*[argument(values) for argument in arguments])
