"""Expressions a model wrote: the values are Python's, the size is bounded, and whatever else is written is refused with a reason."""

from __future__ import annotations

import math
import time
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cod_agent.environments.expressions import DEPTH, LENGTH, PARTS, ExpressionError, parse

VALUES = {"x": 1.5, "v": -0.25, "t": 3.0, "zero": 0.0}


def value(text: str) -> float:
    return parse(text, VALUES)(VALUES)


def refused(text: str) -> str:
    with pytest.raises(ExpressionError) as refusal:
        parse(text, VALUES)
    return str(refusal.value)


def failed(text: str) -> str:
    law = parse(text, VALUES)
    with pytest.raises(ExpressionError) as failure:
        law(VALUES)
    return str(failure.value)


# The values are Python's

BINARY = ["+", "-", "*", "/", "**", "<", "<=", ">", ">=", "==", "!=", "and", "or"]
LEAVES = st.sampled_from(["x", "v", "t", "zero", "2.0", "0.5", ".25", "1.", "1e1", "3.0E-1"])


def _grown(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Texts out of texts, mostly without parentheses, so that precedence decides, and some of them are no expressions."""
    return st.one_of(
        st.builds("{} {} {}".format, parts, st.sampled_from(BINARY), parts),
        st.builds("{}{}".format, st.sampled_from(["-", "+", "not ", "- -"]), parts),
        st.builds("({})".format, parts),
        st.builds("{} if {} else {}".format, parts, parts, parts),
        st.builds("{}({})".format, st.sampled_from(["abs", "-abs"]), parts),
        st.builds("{}({}, {})".format, st.sampled_from(["min", "max", "pow"]), parts, parts),
        st.builds("clip({}, {}, {})".format, parts, parts, parts),
        st.builds("max({}, {}, {})".format, parts, parts, parts),
    )


PYTHON = {"__builtins__": {}, "abs": abs, "min": min, "max": max, "pow": pow, **VALUES}
PYTHON["clip"] = lambda value, low, high: min(max(value, low), high)


def python(text: str) -> object:
    """Python's value of a text that this test made, or its error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return eval(text, dict(PYTHON))  # noqa: S307
    except (SyntaxError, ZeroDivisionError, OverflowError, TypeError) as error:
        return error


@settings(max_examples=300, deadline=None)
@given(st.recursive(LEAVES, _grown, max_leaves=14))
@example("-x ** -t ** 2.0 / v")
@example("1.0 < t > 2.0 == t")
@example("zero or v and not x < t")
@example("x if zero else v if t else 2.0")
def test_every_value_is_the_one_python_gives_and_what_python_refuses_is_refused(text):
    wanted = python(text)
    try:
        law = parse(text, VALUES)
    except ExpressionError as error:
        assert isinstance(wanted, SyntaxError) or "nested" in str(error) or "more than" in str(error), text
        return
    assert not isinstance(wanted, SyntaxError), text
    try:
        found = law(VALUES)
    except ExpressionError as error:
        if "zero" in str(error):
            assert isinstance(wanted, ZeroDivisionError), text
        elif "large" in str(error):  # where Python has a product that is infinite, it goes on with that
            assert isinstance(wanted, OverflowError) or "**" in text or "pow" in text, text
        else:
            assert "negative" in str(error)  # Python goes on with a complex number
        return
    assert math.isfinite(found)
    assert found == float(wanted), text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("-2**2", -4),
        ("2**-1", 0.5),
        ("2**3**2", 512),
        ("2 - 3 - 4", -5),
        ("12 / 3 / 2", 2),
        ("1 < 3 > 2", 1),
        ("1 < 0 < 1/zero", 0),
        ("zero != 0 and 1/zero > 1", 0),
        ("2 or 1/zero", 2),
        ("1 if 1 else 1/zero", 1),
        ("not x == 2", 1),
        ("(x > 1) * 5", 5),
        ("clip(7, -1, 1) + clip(-7, -1, 1) + clip(.5, -1, 1)", 0.5),
        ("clip(0, 2, 1)", 1),
        ("\n( x\t+ 1 )\r\n", 2.5),
        ("1e-400", 0),
    ],
)
def test_values(text, wanted):
    assert value(text) == wanted
    assert type(value(text)) is float


# What has no value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1/0", "divides by zero"),
        ("zero**-1", "divides by zero"),
        ("pow(zero, v)", "divides by zero"),
        ("(-8)**(1/3)", "negative number"),
        ("1e308*10", "too large"),
        ("min(1e308*10, 1)", "too large"),
        ("1e308 * 10 * 0", "too large"),
        ("1e308 + 1e308 - 1e308", "too large"),
        ("9**9**9**9", "too large"),
        ("-(9**9**9)", "too large"),
        ("clip(10**400, -1, 1)", "too large"),
    ],
)
def test_what_is_no_finite_number_fails_when_it_is_evaluated(text, why):
    assert why in failed(text)


# What is no expression


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "at character 1 it ends"),
        ("  ", "at character 3 it ends"),
        ("x +", "at character 4 it ends, where a number, a name or ( was expected"),
        ("x 2", "at character 3 there is '2', where an operator or the end was expected"),
        ("2x", "at character 2 there is 'x', where an operator or the end"),
        ("1_000", "'_000'"),
        ("0x10", "'x10'"),
        ("1e5e", "at character 4 there is 'e'"),
        ("1..2", "'.2'"),
        ("1e999", "below 1e308"),
        ("3j", "'j'"),
        ("\u0663", "at character 1 there is '\\u0663'"),
        ("1\u0663", "at character 2 there is '\\u0663'"),
        ("\uff11 + x", "'\\uff11'"),
        ("x \u2212 1", "at character 3 there is '\\u2212'"),
        ("\u00d7", "'\\xd7'"),
        ("x^2", "a power is written **"),
        ("x = 2", "equality as =="),
        ("x && v", "write and"),
        ("x ? 1 : 2", "write A if C else B"),
        ("x // 2", "there is '/'"),
        ("x % 2", "'%'"),
        ("x < not v", "'not'"),
        ("x if t", "else was expected"),
        ("x if t else", "it ends"),
        ("(x", ") was expected"),
        ("x)", "an operator or the end"),
        ("(x)(v)", "an operator or the end"),
        ("(x, v)", ") was expected"),
        ("x.real", "'.'"),
        ("x[0]", "'['"),
        ("__import__", "where one of t, v, x, zero, abs, min, max, pow, clip was expected"),
        ("().__class__", "')'"),
        ("lambda: 1", "'lambda'"),
        ("lambda x: x", "'lambda'"),
        ("'x'", '"\'"'),
        ("f'{x}'", "'f'"),
        ("print(x)", "'print'"),
        ("True", "'True'"),
        ("nan", "'nan'"),
        ("x is v", "'is'"),
        ("x; v", "';'"),
        ("x # a", "'#'"),
        ("x\x00", "'\\x00'"),
        ("\ud800", "'\\ud800'"),
        ("abs", "( was expected"),
        ("abs()", "')'"),
        ("abs(x, v)", "takes 1 values, not 2"),
        ("min(x)", "takes at least 2 values, not 1"),
        ("clip(x, 1)", "takes 3 values, not 2"),
        ("max(x, v,)", "')'"),
        ("pow(*x)", "'*'"),
        ("<answer>x</answer>", "'<'"),
        ("a" * 1000, "'aaaaaaaaaaaa'"),
    ],
)
def test_what_is_no_expression_is_refused_with_the_place_and_what_was_expected(text, why):
    assert why in refused(text)


def test_size_and_nesting_are_bounded():
    assert value("(" * DEPTH + "x" + ")" * DEPTH) == 1.5
    assert value("-" * DEPTH + "x") == 1.5
    assert value(" + ".join(["1"] * (PARTS // 2))) == PARTS // 2
    assert value(" if zero else ".join(["x"] * 70)) == 1.5
    for nested in ("(", "-", "not ", "2**", "abs(", "min(1,", "1 if (", "-("):
        assert f"nested more than {DEPTH} deep" in refused(nested * 100)
    assert f"at most {PARTS}" in refused("+".join(["1"] * (PARTS // 2 + 1)))
    assert f"at most {LENGTH}" in refused("1" * (LENGTH + 1))


HARD = ["(" * 10**6, "-" * 10**6, "x" * 10**6, "1" * LENGTH, "." * LENGTH, " " * LENGTH, "9**" * 600 + "9", "x<" * 140]
HARD += ["(" * LENGTH, "1 if " * 400, "1e" * 1000, "not " * 500, "min(" * 500, "1" * 1990 + "e", " " * 1999 + "$"]


@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_texts_written_to_break_the_parser_are_refused_at_once(text):
    seconds = []
    for _ in range(3):
        began = time.thread_time()
        assert len(refused(text)) < 200
        seconds.append(time.thread_time() - began)
    assert min(seconds) < 5e-3


@settings(deadline=None)
@given(
    st.one_of(
        st.text(),
        st.lists(st.sampled_from([*"xvt0129.e_-+*/()<>=!,^ ", "**", "if ", "else ", "and ", "min(", "__"])).map(
            "".join
        ),
    )
)
def test_no_text_raises_anything_else_and_every_reason_is_short_and_plain(text):
    try:
        found = value(text)
    except ExpressionError as error:
        assert 0 < len(str(error)) < 200
        assert str(error).isascii() and str(error).isprintable()
    else:
        assert math.isfinite(found)


def test_an_evaluation_costs_microseconds():
    law = parse("clip(-0.8 * (x - 2) - v, -1, 1) if t < 3 else 0.5 * x ** 2", VALUES)
    seconds = []
    for _ in range(5):
        began = time.thread_time()
        for _ in range(200):
            law(VALUES)
        seconds.append((time.thread_time() - began) / 200)
    assert min(seconds) < 50e-6
