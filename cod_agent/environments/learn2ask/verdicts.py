"""What a consultation is and what a question in it is worth: cases, verdicts, and the published reward made of them.

The decision to ask or to stop is judged by the data alone. How good a question is, a judge says (`Verdict`): whether it is about
something that is missing (direct), near it (related) or not (irrelevant), and how many questions it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

Content = Literal["direct", "related", "irrelevant"]
CONTENTS: tuple[Content, ...] = get_args(Content)
"""The best first."""

WORTH: dict[Content, float] = {"direct": 1.0, "related": 0.5, "irrelevant": 0.0}

Scoring = Literal["default", "additive", "content", "action"]
"""How action, content and form become a reward, as published."""

Line = tuple[Literal["Patient", "Doctor"], str]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of a question."""

    content: Content
    questions: int
    """How many questions were asked in one."""
    feedback: str = ""
    """In words, without naming what is missing."""
    record: str = ""
    """Who said so, and what exactly."""

    @property
    def form(self) -> float:
        """1 for one question, .5 for two, 0 for more, or for none."""
        return {1: 1.0, 2: 0.5}.get(self.questions, 0.0)


class Case(Protocol):
    """A patient's dialogue so far, and what is still missing in it."""

    @property
    def lines(self) -> tuple[Line, ...]: ...

    @property
    def missing(self) -> tuple[str, ...]:
        """What a doctor would have to ask for, in words; nothing: it is time to stop."""
        ...

    @property
    def reference(self) -> tuple[str, ...]:
        """The same as a judge is told it."""
        ...

    def by_words(self, question: str) -> Verdict:
        """What can be said of a question without understanding it."""
        ...

    def gives_away(self, feedback: str, question: str) -> bool:
        """Whether words of a judge name what is missing or near it, and the question did not."""
        ...


def worst(contents: Iterable[Content]) -> Content:
    """The least of them; irrelevant if there is none. So nothing is won by asking for everything at once."""
    return max(contents, key=CONTENTS.index, default="irrelevant")


def reward(scoring: Scoring, content: float, form: float) -> float:
    """Of a right decision; a wrong one is worth 0.

    Args:
        content: 0 to 1.
        form: 0 to 1.
    """
    if scoring == "default":
        return 1 + 2 * content + form
    if scoring == "additive":
        return 1 + content + form
    return 2 * content + form if scoring == "content" else 3 + form
