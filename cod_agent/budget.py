"""What may be spent: calls, tokens, money and seconds, of an episode and of a whole run.

    CoDAgent("shop", ..., budget=Budget(calls=20, seconds=600), run_budget=Budget(money=50.0, prices=(3.0, 15.0)))

Every model call of an episode is held against both before it is sent (`Meter.admit`), whoever makes it: a call that would pass a limit
is not sent. An episode that spent its budget has ended, with a reason that begins with `budget-calls`, `budget-tokens`, `budget-money` or
`budget-seconds`. A run that spent its own stands still, as it does when an endpoint is down.

What was spent is what is on record, so that an episode which died and goes on spends no more than one that never died, and ends at the
same call.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, Literal

from cod_agent.errors import BudgetSpent, UsageError
from cod_agent.memory.content import conversation

What = Literal["calls", "tokens", "money", "seconds"]
Key = tuple[bytes, int]
"""A call: the hash of its request, and its occurrence."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits; None is no limit.

    Args:
        calls: answered model calls.
        tokens: of prompts and answers, as the server counts them.
        money: in the currency of the prices.
        prices: of a million tokens, (of prompts, of answers): those of the dearest model that is asked.
        seconds: of an episode, the time between its processes not counted. A run has no such limit.

    Raises:
        UsageError: no limit is set, or one that makes no sense.
    """

    calls: int | None = None
    tokens: int | None = None
    money: float | None = None
    prices: tuple[float, float] | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        limits = {name: limit for name, limit in asdict(self).items() if name != "prices" and limit is not None}
        if not limits:
            raise UsageError("a budget needs a limit: calls, tokens, money or seconds")
        for name, limit in limits.items():
            whole = name in ("calls", "tokens")
            if not _number(limit) or not limit > 0 or (whole and not isinstance(limit, int)):
                kind = "a whole number above 0" if whole else "a number above 0"
                raise UsageError(f"a budget's {name} must be {kind}, not {limit!r}")
        if (self.money is None) != (self.prices is None):
            raise UsageError("a budget of money needs prices=(of a million prompt tokens, of a million answer tokens)")
        prices: Any = self.prices
        if prices is not None and not (
            isinstance(prices, tuple | list) and len(prices) == 2 and all(_number(one) and one >= 0 for one in prices)
        ):
            raise UsageError(f"prices are two numbers, of a million prompt and answer tokens, not {prices!r}")

    @classmethod
    def parse(cls, said: str) -> Budget:
        """As flags and settings have it: `calls=20,tokens=50000,seconds=600,money=0.5,prices=3/15`.

        Raises:
            UsageError: it says something else.
        """
        given: dict[str, Any] = {}
        for part in filter(None, (word.strip() for word in said.split(","))):
            name, _, value = part.partition("=")
            try:
                if name == "prices":
                    given[name] = tuple(float(price) for price in value.split("/"))
                else:
                    given[name] = {"calls": int, "tokens": int, "money": float, "seconds": float}[name](value)
            except (KeyError, ValueError):
                example = "calls=20,tokens=50000,seconds=600,money=0.5,prices=3/15"
                raise UsageError(f"{part!r} is no limit of a budget: it looks like {example}") from None
        return cls(**given)

    def json(self) -> dict[str, Any]:
        """The limits that are set, as they are kept with a run."""
        return {name: limit for name, limit in asdict(self).items() if limit is not None}

    def passed(self, spent: Spent, longest: int) -> What | None:
        """The limit that one more call would pass, if any.

        Args:
            longest: tokens its answer may have; 0: nobody knows.
        """
        if self.calls is not None and spent.calls >= self.calls:
            return "calls"
        if self.tokens is not None and spent.tokens + max(longest, 1) > self.tokens:
            return "tokens"
        if self.money is not None and self.prices is not None:
            cost = self.cost(spent)
            if cost >= self.money or cost + longest * self.prices[1] / 1e6 > self.money:
                return "money"
        return None

    def cost(self, spent: Spent) -> float:
        """Money, by the prices."""
        prompt, sampled = self.prices or (0.0, 0.0)
        return (spent.prompt * prompt + spent.sampled * sampled) / 1e6

    def told(self, what: What, spent: Spent) -> str:
        """What was spent of what, in words."""
        if what == "calls":
            return f"{spent.calls} of {self.calls} calls"
        if what == "tokens":
            return f"{spent.tokens} of {self.tokens} tokens"
        if what == "money":
            return f"{self.cost(spent):.6g} of {self.money:g}"
        return f"{self.seconds:g} seconds"


@dataclass(slots=True)
class Spent:
    """What calls on record took."""

    calls: int = 0
    prompt: int = 0
    sampled: int = 0

    @property
    def tokens(self) -> int:
        """Of prompts and answers."""
        return self.prompt + self.sampled

    def take(self, usage: tuple[int, int]) -> None:
        """One more call, with (prompt, sampled) tokens."""
        self.calls, self.prompt, self.sampled = self.calls + 1, self.prompt + usage[0], self.sampled + usage[1]


@dataclass(slots=True)
class Limits:
    """The budgets of an agent's episodes and runs, with what its runs have spent so far."""

    budget: Budget | None
    run_budget: Budget | None
    _runs: dict[int, tuple[int, Spent]] = field(default_factory=dict)
    """By run: the last call that was counted, and all up to it."""

    def __post_init__(self) -> None:
        if self.run_budget is not None and self.run_budget.seconds is not None:
            raise UsageError(
                "a run has no limit of seconds: limit its calls, tokens or money, and an episode's seconds"
            )

    def meter(self, conn: sqlite3.Connection, run_id: int, episode_id: int) -> Meter:
        """What an episode may still spend, from the record."""
        mine, run = Spent(), None
        of_episode = conn.execute(f"{_CALLS} WHERE c.episode_id = ? ORDER BY c.id", (episode_id,)).fetchall()
        for row in of_episode:
            mine.take(_usage(conn, row))
        if self.run_budget is not None:
            last, run = self._runs.get(run_id, (0, Spent()))
            rows = f"{_CALLS} JOIN episodes e ON e.id = c.episode_id WHERE e.run_id = ? AND c.id > ? ORDER BY c.id"
            for row in conn.execute(rows, (run_id, last)).fetchall():
                run.take(_usage(conn, row))
                last = row[0]
            self._runs[run_id] = last, run
            run = Spent(run.calls, run.prompt, run.sampled)  # what is counted from now on is read again
        until = None
        if self.budget is not None and self.budget.seconds is not None:
            until = time.monotonic() + self.budget.seconds - _worked(conn, episode_id)
        return Meter(self.budget, self.run_budget, mine, run or Spent(), until)


@dataclass(slots=True)
class Meter:
    """One episode's calls, held against its budget and its run's."""

    budget: Budget | None
    run_budget: Budget | None
    spent: Spent
    run_spent: Spent
    until: float | None
    """On the monotonic clock: when the episode's seconds are over."""
    gate: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a call is admitted, one after the other."""
    _open: dict[Key, int] = field(default_factory=dict)
    """Calls under way, and the longest answer of each."""
    _handed: set[Key] = field(default_factory=set)
    """Those of them whose end depends on the program, which reads a stream: nobody waits for it."""
    _settled: asyncio.Event = field(default_factory=asyncio.Event)

    async def admit(self, key: Key, params: dict[str, Any]) -> None:
        """Wait until it is known whether a call may be sent: what others that are under way will have spent decides.

        Raises:
            BudgetSpent: it may not.
        """
        longest = _longest(params)
        while (spent := self._would_pass(longest)) is not None:
            if not self._waits():
                raise spent
            self._settled.clear()
            await self._settled.wait()
        self._open[key] = longest

    def settle(self, key: Key, usage: tuple[int, int] | None) -> None:
        """A call has ended; with `usage` if it was answered and is on record."""
        if self._open.pop(key, None) is not None:
            self._handed.discard(key)
            if usage is not None:
                self.spent.take(usage)
                self.run_spent.take(usage)
            self._settled.set()

    def hand(self, key: Key) -> None:
        """A call's stream goes to the program."""
        self._handed.add(key)

    def late(self) -> BudgetSpent | None:
        """That the seconds are over, if they are."""
        if self.until is None or self.budget is None or time.monotonic() < self.until:
            return None
        return _over(self.budget, "seconds", self.spent)

    def _would_pass(self, longest: int) -> BudgetSpent | None:
        for budget, spent, run in ((self.budget, self.spent, False), (self.run_budget, self.run_spent, True)):
            if budget is None:
                continue
            reserved = Spent(spent.calls, spent.prompt, spent.sampled)
            for answer in self._open.values():
                reserved.take((0, answer))
            if what := budget.passed(reserved, longest):
                return _over(budget, what, spent, run=run)
            if (budget.tokens or budget.money) and self._waits():  # what they take is not known before
                return _over(budget, "tokens", spent, run=run)
        return self.late()

    def _waits(self) -> bool:
        return len(self._open) > len(self._handed)


def _number(value: Any) -> bool:
    """Whether it is one, and an end to what it limits: nothing passes a limit that is no number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _over(budget: Budget, what: What, spent: Spent, *, run: bool = False) -> BudgetSpent:
    told = budget.told(what, spent)
    if run:
        error = BudgetSpent(
            f"the run has spent {told}, and another call might pass that: raise its budget (run_budget, --run-budget) and make the "
            "same call again, or leave it"
        )
    else:
        error = BudgetSpent(f"budget-{what}: the episode has spent {told}")
    error.what, error.run = what, run
    return error


def _longest(params: dict[str, Any]) -> int:
    """Tokens a call's answers may have by its parameters; 0 if they do not say."""
    limit, choices = params.get("max_completion_tokens") or params.get("max_tokens") or 0, params.get("n") or 1
    return limit * choices if isinstance(limit, int) and isinstance(choices, int) else 0


_CALLS = "SELECT c.id, c.prompt_tokens, c.sampled_tokens, c.answer_id, c.head_id FROM calls c"


def _usage(conn: sqlite3.Connection, row: Sequence[Any]) -> tuple[int, int]:
    """(prompt, sampled) tokens of a recorded call; where the server did not count them, see `most_tokens`."""
    _, prompt, sampled, answer_id, head_id = row
    if prompt is not None and sampled is not None:
        return prompt, sampled
    bodies = [body or "" for _, body, _ in conversation(conn, answer_id)]
    head = conn.execute("SELECT body FROM heads WHERE id = ?", (head_id,)).fetchone()[0] or ""
    return most_tokens([head, *bodies[:-1]], bodies[-1] if bodies else "")


def most_tokens(asked: Sequence[str], answer: str) -> tuple[int, int]:
    """(prompt, sampled) tokens that texts have at most: one for each byte."""
    return sum(len(text.encode()) for text in asked), len(answer.encode())


def _worked(conn: sqlite3.Connection, episode_id: int) -> float:
    """Seconds that an episode's calls, tools, steps and failed attempts took; what went on at the same time counts once."""
    spans = [
        span
        for table in ("calls", "effects", "attempts")
        for span in conn.execute(
            f"SELECT started, started + coalesce(seconds, 0) FROM {table} WHERE episode_id = ?", (episode_id,)
        )
    ]
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
