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

LENGTH, NODES, DEPTH = 2000, 800, 24
"""The most characters; numbers, names, operators and calls; and parentheses, signs, `not` and exponents inside of each other."""


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

_TOKEN = re.compile(
    r"[ \t\r\n]*(?:(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)|(?P<word>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<sign>\*\*|[<>=!]=|[-+*/<>(),])|(?P<end>\Z))"
)
_KEYWORDS = {"if", "else", "or", "and", "not"}
_HINTS = {"^": "a power is written **", "=": "only the expression itself is written, and equality as =="}
_HINTS |= {"&": "write and", "|": "write or", "!": "write not", "?": "write A if C else B"}
_VALUE = "a number, a name or ("


class _Parser:
    """Reads one text; `_word` is the token at hand, "" at the end, and `_kind` says what kind of one."""

    def __init__(self, text: str, names: Collection[str]) -> None:
        self._text, self._names = text, names
        self._nodes, self._depth, self._next = 0, 0, 0
        self._kind, self._word, self._at = "", "", 0
        self._advance()

    def whole(self) -> Expression:
        """The whole text as an expression."""
        value = self._choice()
        if self._kind != "end":
            raise self._wrong("an operator or the end")
        return value

    def _advance(self) -> str:
        """Go on to the next token; returns the one at hand before."""
        before = self._word
        found = _TOKEN.match(self._text, self._next)
        if found is None:
            at = len(self._text) - len(self._text[self._next :].lstrip(" \t\r\n"))
            self._kind, self._word, self._at = "", self._text[at], at
            raise self._wrong("a number, a name or an operator")
        self._kind = str(found.lastgroup)
        self._word, self._at, self._next = found[self._kind], found.start(self._kind), found.end()
        glued = self._kind == "number" and self._text[self._next : self._next + 1]
        if glued and (glued.isalnum() or glued in "._"):
            self._word = self._text[self._at : self._next + 1]
            raise self._wrong("a plain decimal number")
        return before

    def _taken(self, word: str) -> bool:
        """Whether that is the token at hand; if so, it is behind us now."""
        if self._word != word or self._kind == "end":
            return False
        self._advance()
        return True

    def _expect(self, word: str) -> None:
        if not self._taken(word):
            raise self._wrong(word)

    def _count(self) -> None:
        self._nodes += 1
        if self._nodes > NODES:
            raise ExpressionError(f"it has more than {NODES} numbers, names and operators")

    def _inside(self, read: Callable[[], Expression]) -> Expression:
        """What `read` reads, one level further inside."""
        self._depth += 1
        if self._depth > DEPTH:
            raise ExpressionError(f"at character {self._at + 1} it is nested more than {DEPTH} deep")
        value = read()
        self._depth -= 1
        return value

    def _wrong(self, expected: str) -> ExpressionError:
        hint = f" ({_HINTS[self._word]})" if self._word in _HINTS else ""
        found = "it ends" if self._kind == "end" else f"there is {ascii(self._word[:12])}"
        return ExpressionError(f"at character {self._at + 1} {found}{hint}, where {expected} was expected")

    def _choice(self) -> Expression:
        value, cases = self._operation(_OR), list[tuple[Expression, Expression]]()
        while self._taken("if"):
            self._count()
            condition = self._operation(_OR)
            self._expect("else")
            cases.append((condition, value))
            value = self._operation(_OR)
        return _chosen(cases, value) if cases else value

    def _operation(self, least: int) -> Expression:
        """Operands and the operators between them that bind at least so tightly."""
        value = self._negated() if least <= _NOT and self._word == "not" else self._signed()
        while (level := _LEVELS.get(self._word, 0)) >= least:
            rest: _Rest = []
            while _LEVELS.get(self._word) == level:
                self._count()
                rest.append((self._advance(), self._operation(level + 1)))
            if level <= _AND:
                value = _one_of(value, rest, until=level == _OR)
            else:
                value = _compared(value, rest) if level == _COMPARED else _calculated(value, rest)
        return value

    def _negated(self) -> Expression:
        self._count()
        self._advance()
        operand = self._inside(lambda: self._operation(_NOT))
        return lambda values: float(operand(values) == 0)

    def _signed(self) -> Expression:
        if self._kind != "sign" or self._word not in "+-":
            return self._raised()
        self._count()
        minus = self._advance() == "-"
        operand = self._inside(self._signed)
        return (lambda values: -operand(values)) if minus else operand

    def _raised(self) -> Expression:
        base = self._value()
        if not self._taken("**"):
            return base
        self._count()
        exponent = self._inside(self._signed)
        return lambda values: _power(base(values), exponent(values))

    def _value(self) -> Expression:
        self._count()
        if self._kind == "number":
            number = float(self._word)
            if math.isinf(number):
                raise self._wrong("a number below 1e308")
            self._advance()
            return lambda _: number
        if self._taken("("):
            value = self._inside(self._choice)
            self._expect(")")
            return value
        if self._kind != "word" or self._word in _KEYWORDS:
            raise self._wrong(_VALUE)
        if self._word in self._names:
            return operator.itemgetter(self._advance())
        if self._word in _FUNCTIONS:
            return self._call(self._advance())
        raise self._wrong(f"one of {', '.join([*sorted(self._names), *_FUNCTIONS])}")

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
                f"{name}() before character {self._at + 1} takes {wanted} values, not {len(arguments)}"
            )
        return lambda values: function(*[argument(values) for argument in arguments])
