"""The journal of one episode: recorded before visible, and nothing recorded is done twice.

Whatever reaches outside (a model call, a tool, a step of the environment) asks the episode first. It has a key, (request
hash, occurrence): the n-th time this episode makes this very request. A key on record is answered from the record, so that a
program started again after kill -9 walks through what it did and goes on where it stopped; an unknown key is done, stored
in one transaction, and only then shown. Parallel calls do not matter: keys, not sequence numbers, decide.

If a program that changed in between asks for what it did not ask before, while recorded answers wait that nobody asks for,
the journal does not guess: `ReplayDiverged`.

Every text that is sent or stored passes the episode's `Tap` first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cod_agent.budget import Meter, most_tokens
from cod_agent.errors import (
    BudgetSpent,
    CodError,
    ModelError,
    ModelOverloaded,
    ReplayDiverged,
    StoreError,
    ToolInDoubt,
    UsageError,
)
from cod_agent.journal.answers import Answer
from cod_agent.journal.calls import FinishedCall, read_call, redacted
from cod_agent.journal.keys import Keys
from cod_agent.journal.requests import Conversation, Request
from cod_agent.journal.tap import Redact, Said, Tap
from cod_agent.memory import lease, rows
from cod_agent.memory.database import Job, Memory
from cod_agent.memory.hashing import compact, effect_hash, effect_key, value_hash

T = TypeVar("T")

_CURRENT: ContextVar[Episode | None] = ContextVar("cod_episode", default=None)

QUICK = 0.02
"""Seconds up to which a deterministic environment's step waits for the next commit instead of making its own."""

STOPS = (StoreError, ReplayDiverged, ToolInDoubt, BudgetSpent)
"""What ends an episode even if the solver's framework swallows it: nothing more is done that could not be recorded or paid for."""

ATTEMPTS = 100
"""Failed attempts of calls without an answer between them, after which a process tries no more: programs may retry without end."""

GRACE = 5.0
"""Seconds a program has to end by itself when its episode was stopped; then it is cut off."""


def current_episode() -> Episode | None:
    """The episode this code runs in, if any: how recording finds its way through frameworks that know nothing of it."""
    return _CURRENT.get()


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """What goes on in here is not journaled: the inside of a tool, whose result is its record.

    Recorded calls of its own would wait to be asked for when the tool itself is answered from the record.
    """
    token = _CURRENT.set(None)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@dataclass
class Episode:
    """One episode's journal. `kind` is "solve" or "update"."""

    memory: Memory
    run_id: int
    id: int
    redact: Redact | None = None
    calls: int = 0
    """Model calls answered so far, from the record or live."""
    _stopped: CodError | None = None
    _limit: asyncio.Timeout | None = None
    """Cuts off what goes on inside of `timed`."""
    meter: Meter | None = None
    """What may be spent in here; None: whatever it takes."""
    over: bool = False
    """Nothing is recorded any more: what a program left running comes too late."""
    _failures: int = 0
    """Failed attempts of calls since the last answer."""
    _pending: list[Job[Any]] = field(default_factory=list)
    """Steps that may be lost, because they can be taken again: they ride with the next commit."""
    _said: tuple[str, int] | None = None
    """(text, call row) of the newest answer: a step that takes it is stored as a reference to it."""
    _life: tuple[Any, ...] = ()
    """Agent, name and beginning of the run: what makes idempotency keys unlike those of any other file."""
    _tokens: tuple[int, list[int]] | None = None
    """(call row, its prompt and sampled ids): what the next exact prompt is stored relative to."""

    def __post_init__(self) -> None:
        self.tap = Tap(self.redact)
        self._conversation = Conversation(self.tap)
        self._keys = Keys(self.memory, self.id)

    async def load(self) -> None:
        """Read what an earlier process recorded."""
        await self._keys.load()

    def __enter__(self) -> Episode:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ModelError):  # endpoints repeat what they were sent
            error.args = (self.tap.text(str(error)),)
        self.over = True
        _CURRENT.reset(self._token)

    # ---- keys ----

    def take(self, key: bytes) -> int:
        """The next occurrence of a request: the smallest that is not taken."""
        return self._keys.take(key)

    def give_back(self, key: bytes, occurrence: int) -> None:
        """The request failed: whoever makes it again is the same occurrence."""
        self._keys.give_back(key, occurrence)
        if self.meter is not None:
            self.meter.settle((key, occurrence), None)

    async def _find(self, key: bytes, occurrence: int) -> dict[str, Any] | None:
        """What is on record under a key, if anything. Raises: ReplayDiverged, or what stopped the episode."""
        if self.stopped is not None:
            raise self.stopped
        return await self._keys.find(key, occurrence)

    @property
    def stopped(self) -> CodError | None:
        """One of `STOPS` that was raised in here, or another reason why nothing more is done."""
        return self._stopped

    @stopped.setter
    def stopped(self, why: CodError | None) -> None:
        before, self._stopped = self._stopped, why
        if before is None and self._limit is not None and not self._limit.expired():
            # A program that tries again whatever is raised would do so without end.
            self._limit.reschedule(asyncio.get_running_loop().time() + GRACE)

    @property
    def spent(self) -> BudgetSpent | None:
        """The budget of its own that ended it, if one did."""
        return self.stopped if isinstance(self.stopped, BudgetSpent) and not self.stopped.run else None

    @contextlib.asynccontextmanager
    async def timed(self) -> AsyncIterator[None]:
        """What goes on in here is cut off when the episode's seconds are over, or soon after something stopped it.

        Raises:
            CodError: what stopped it, whatever the program made of it.
        """
        until = self.meter.until if self.meter is not None else None
        error: Exception | None = None
        limit = asyncio.timeout(None if until is None else max(0.0, until - time.monotonic()))
        try:
            async with limit as self._limit:
                yield
        except Exception as raised:
            error = raised
            if self._stopped is None and not limit.expired():
                raise
        finally:
            self._limit = None
        if self._stopped is None and self.meter is not None and limit.expired():
            self._stopped = self.meter.late()
        if self._stopped is not None:
            raise self._stopped from (None if error is self._stopped else error)

    def finish(self) -> None:
        """At the end of an episode everything recorded must have been asked for.

        Raises:
            ReplayDiverged: the program ended earlier than it did before the crash.
            CodError: what stopped it, unless it is a budget of its own (`spent`).
        """
        if self.stopped is not None and self.spent is None:
            raise self.stopped
        if left := self._keys.unused():
            raise ReplayDiverged(
                f"episode {self.id}: the program ended, but {left} recorded answers were never asked for: it changed since"
            )

    def commit(self, job: Job[T]) -> Job[T]:
        """`job`, which makes sure that the lease is held, with the steps that wait to ride along, for one transaction."""
        riding, self._pending = self._pending, []
        if not riding:
            return job

        def together(conn: sqlite3.Connection) -> T:
            for ride in riding:
                ride(conn)
            return job(conn)

        return together

    async def _write(self, job: Job[T]) -> T:
        """Raises: StoreError; nothing more is done in this episode then, for it could not be recorded."""

        def held(conn: sqlite3.Connection) -> T:
            lease.hold(conn, self.run_id)
            return job(conn)

        try:
            return await self.memory.write(self.commit(held))
        except (asyncio.CancelledError, *STOPS) as error:
            # Whoever wrote may have been cancelled meanwhile: that it could not be recorded stops the episode all the same.
            why = error.__cause__ if isinstance(error, asyncio.CancelledError) else error
            if isinstance(why, STOPS):
                self.stopped = why
            raise

    # ---- model calls ----

    def request(
        self, model: str, messages: Sequence[Said], params: dict[str, Any], origins: Sequence[str | None] = ()
    ) -> Request:
        """A call of our own: see `Conversation.request`."""
        return self._conversation.request(model, messages, params, origins)

    async def replay(self, request: Request) -> Answer | None:
        """The recorded answer of a call whose occurrence is taken, or None if it has to be made."""
        at = (request.key, request.occurrence)
        if self.meter is None or at in self._keys:
            row = await self._find(*at)
        else:
            # In the order they came, though one may wait in `_find`: or it would depend on chance which calls are made.
            async with self.meter.gate:
                row = await self._find(*at)
                await self._admitted(self.meter, request)
        if row is None:
            return None
        answer = await self.memory.read(lambda conn: read_call(conn, row))
        self._answered(row["id"], answer)
        return answer

    async def _admitted(self, meter: Meter, request: Request) -> None:
        """Raises: BudgetSpent, where another call may not be sent."""
        try:
            await meter.admit((request.key, request.occurrence), request.params)
        except BudgetSpent as error:
            self.stopped = self.stopped or error
        if self.stopped is not None:
            raise self.stopped

    async def record(self, request: Request, answer: Answer, started: float, *, on_policy: bool, lean: bool) -> Answer:
        """Store a finished call; it is durable when this returns.

        What it gives back is what the solver may see: the answer, redacted.
        """
        if self.over:
            await self.failed("call", request.key, request.occurrence, started, "answered after its episode had ended")
            raise UsageError(
                f"episode {self.id} is over, and an answer came that nobody had waited for: a solver awaits every call it begins"
            )
        answer = answer if self.tap.redact is None else redacted(answer, self.tap, request)
        call = FinishedCall(request, answer, started, time.time() - started, on_policy, lean, self._tokens)
        try:
            row_id = await self._write(lambda conn: call.store(conn, self.memory.cache, self.id))
        except asyncio.CancelledError:
            await self._keys.reread("calls", request.key, request.occurrence)
            raise
        self._answered(row_id, answer)
        self._failures = 0
        if self.meter is not None:
            said = [request.head, *(node.body for node in request.nodes)], compact(answer.message)
            self.meter.settle((request.key, request.occurrence), answer.completion.usage or most_tokens(*said))
        return answer

    def _answered(self, row_id: int, answer: Answer) -> None:
        self.calls += 1
        content = answer.body["choices"][0]["message"].get("content")
        self._said = (content, row_id) if isinstance(content, str) and "\0" not in content else None
        if (tokens := answer.completion.tokens) is not None:
            self._tokens = (row_id, [*tokens.prompt, *tokens.sampled])

    async def failed(self, kind: str, key: bytes, occurrence: int, started: float, detail: str) -> None:
        """Put a failed attempt on record."""
        self._failures += 1
        if self._failures >= ATTEMPTS and self.stopped is None:
            self.stopped = ModelOverloaded(f"{ATTEMPTS} attempts in a row have failed: {detail}; resume later")
        seconds = time.time() - started

        said = {"state": "failed", "detail": self.tap.text(detail)[:2000], "started": started, "seconds": seconds}
        row = {**self._keyed(kind, key, occurrence), **said}
        await self._write(lambda conn: rows.insert(conn, "attempts", row))

    # ---- effects: tools and the environment ----

    async def effect(
        self,
        kind: str,
        name: str,
        arguments: Any,
        do: Callable[[int], Awaitable[tuple[Any, Any]]],
        *,
        may_repeat: bool = False,
    ) -> tuple[Any, Any, bool]:
        """(result, snapshot, was it recorded) of a tool call or a step; `do`, told which of several equal ones
        it is, gives (result, snapshot), both JSON values.

        `may_repeat`: a step of a deterministic environment. If it was quick it need not have a commit of its own: it rides with
        the next one, and a crash before that takes it again, with the same result.
        """
        arguments = self.tap.value(arguments)
        key = effect_key(kind, name, arguments)
        occurrence = self.take(key)
        try:
            row = await self._find(key, occurrence)
            if row is not None:
                return json.loads(row["result"]), row["snapshot"] and json.loads(row["snapshot"]), True
            started = time.time()
            result, snapshot = await do(occurrence)
            result = self.tap.value(result)
            store = self._effect(kind, name, key, occurrence, arguments, result, snapshot, started)
            if may_repeat and time.time() - started < QUICK:
                self._pending.append(store)
            else:
                await self._write(store)
            return json.loads(compact(result)), snapshot, False
        except BaseException as error:
            if isinstance(error, STOPS):
                self.stopped = error
            if isinstance(error, asyncio.CancelledError):
                await self._keys.reread("effects", key, occurrence)
            self.give_back(key, occurrence)
            raise

    async def in_doubt(self, key: bytes, occurrence: int) -> bool:
        """Whether this very run of a tool was started and never finished."""

        def read(conn: sqlite3.Connection) -> bool:
            started = (
                "SELECT 1 FROM attempts WHERE episode_id = ? AND request = ? AND occurrence = ? AND state = 'started'"
            )
            return conn.execute(started, (self.id, key, occurrence)).fetchone() is not None

        return await self.memory.read(read)

    async def starts(self, key: bytes, occurrence: int) -> None:
        """Put on record that a tool is about to run, so that a crash in the middle is known as one."""
        said = {"state": "started", "detail": "", "started": time.time()}
        row = {**self._keyed("tool", key, occurrence), **said}
        await self._write(lambda conn: rows.insert(conn, "attempts", row))

    async def idempotency_key(self, key: bytes, occurrence: int) -> str:
        """A name for one run of a tool, the same after a crash and unlike any other, whichever file that is in."""
        if not self._life:
            query = "SELECT agent, name, created FROM runs WHERE id = ?"
            self._life = await self.memory.read(lambda conn: conn.execute(query, (self.run_id,)).fetchone())
        return value_hash([*self._life, self.id, key.hex(), occurrence])[:32]

    def _effect(
        self,
        kind: str,
        name: str,
        key: bytes,
        occurrence: int,
        arguments: Any,
        result: Any,
        snapshot: Any,
        started: float,
    ) -> Job[int]:
        said = compact(result)
        kept = None if snapshot is None else compact(snapshot)
        hashed = effect_hash(key, occurrence, said, kept)
        seconds = time.time() - started
        taken = self._said is not None and kind == "act" and arguments == self._said[0]
        row = {**self._keyed(kind, key, occurrence), "name": name, "result": said, "snapshot": kept, "hash": hashed}
        row |= {"call_id": self._said[1]} if taken and self._said else {"arguments": compact(arguments)}
        row |= {"started": started, "seconds": seconds}
        return lambda conn: rows.insert(conn, "effects", row)

    def _keyed(self, kind: str, key: bytes, occurrence: int) -> dict[str, Any]:
        return {"episode_id": self.id, "kind": kind, "request": key, "occurrence": occurrence}
