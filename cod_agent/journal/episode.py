"""The journal of one episode: recorded before visible, and nothing recorded is done twice.

Whatever reaches outside (a model call, a tool, a step of the environment) asks the episode first. It has a key, (request
hash, occurrence): the n-th time this episode makes this very request. A key on record is answered from the record, so that a
program started again after kill -9 walks through what it did and goes on where it stopped; an unknown key is done, stored
in one transaction, and only then shown. Parallel calls do not matter: keys, not sequence numbers, decide.

If a program that changed in between asks for what it did not ask before, while recorded answers wait that nobody asks for,
the journal does not guess: `ReplayDiverged`.

This is also the tap: every text that is sent or stored passes `Episode.clean` first, which is where redaction goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, TypeVar

from cod_agent.context import Message, Part, WireMessage, labels
from cod_agent.errors import CodError, ReplayDiverged, StoreError, ToolInDoubt
from cod_agent.journal.answers import Answer, restore_logprobs
from cod_agent.memory import lease
from cod_agent.memory.content import (
    Node,
    conversation,
    link,
    pack_floats,
    pack_ids,
    read_tokens,
    shared_prefix,
    store_child,
    store_head,
    store_nodes,
    write_request,
)
from cod_agent.memory.database import Job, Memory
from cod_agent.memory.hashing import (
    call_hash,
    canonical,
    checksum,
    compact,
    effect_hash,
    effect_key,
    request_hash,
)
from cod_agent.completions import Completion, Tokens

T = TypeVar("T")
Redact = Callable[[str], str]
Said = Message | WireMessage | dict[str, Any]

_CURRENT: ContextVar[Episode | None] = ContextVar("cod_episode", default=None)

QUICK = 0.02
"""Seconds up to which a deterministic environment's step waits for the next commit instead of making its own."""

STOPS = (StoreError, ReplayDiverged, ToolInDoubt)
"""What ends an episode even if the solver's framework swallows it: nothing more is done that could not be recorded."""

PATIENCE = 1.0
"""Seconds a new request waits while recorded ones are unasked for, in case a parallel branch is about to ask."""


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


OCCURRENCE: ContextVar[int] = ContextVar("cod_occurrence", default=0)
"""While an effect is done: which one of several equal ones it is."""


@dataclass(slots=True)
class Request:
    """A model call about to be made: its parts as they are stored, its bytes as they are sent."""

    head: str
    head_hash: bytes
    nodes: Sequence[Node]
    style: str
    params: dict[str, Any]
    """What stands beside the messages: the model's name, the sampling parameters, tools."""
    key: bytes
    occurrence: int = 0

    @property
    def body(self) -> bytes:
        return write_request(self.head, [node.body for node in self.nodes], self.style)


@dataclass(slots=True)
class _Recorded:
    """What the file holds under a key."""

    row: dict[str, Any]
    used: bool = False


@dataclass
class Episode:
    """One episode's journal. `kind` is "solve" or "update"."""

    memory: Memory
    run_id: int
    id: int
    redact: Redact | None = None
    calls: int = 0
    """Model calls answered so far, from the record or live."""
    stopped: CodError | None = None
    """One of `STOPS` that was raised in here."""
    _known: dict[tuple[bytes, int], _Recorded] = field(default_factory=dict)
    _taken: dict[bytes, set[int]] = field(default_factory=dict)
    _spoken: tuple[list[Said], list[Node]] = field(default_factory=lambda: ([], []))
    _pending: list[Job[Any]] = field(default_factory=list)
    """Steps that may be lost, because they can be taken again: they ride with the next commit."""
    _running: dict[bytes, int] = field(default_factory=dict)
    _tokens: tuple[int, list[int]] | None = None
    """(call row, its prompt and sampled ids): what the next exact prompt is stored relative to."""

    async def load(self) -> None:
        """Read what an earlier process recorded."""

        def read(conn: sqlite3.Connection) -> dict[tuple[bytes, int], _Recorded]:
            known = {}
            for table in ("calls", "effects"):
                cursor = conn.execute(f"SELECT * FROM {table} WHERE episode_id = ?", (self.id,))
                names = [column[0] for column in cursor.description]
                for values in cursor:
                    row = dict(zip(names, values, strict=True))
                    known[row["request"], row["occurrence"]] = _Recorded(row)
            return known

        self._known = await self.memory.read(read)

    def __enter__(self) -> Episode:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _CURRENT.reset(self._token)

    # ---- the tap ----

    def clean(self, text: str) -> str:
        """`text` as it may be sent and stored: redacted, and encodable (a lone surrogate is no text)."""
        if self.redact is not None:
            text = self.redact(text)
        return text if text.isascii() else text.encode("utf-8", "replace").decode()

    def clean_value(self, value: Any) -> Any:
        """`clean` for every text inside a JSON value."""
        if isinstance(value, str):
            return self.clean(value)
        if isinstance(value, dict):
            return {self.clean(str(k)): self.clean_value(v) for k, v in value.items()}
        return [self.clean_value(v) for v in value] if isinstance(value, list | tuple) else value

    # ---- keys ----

    def take(self, key: bytes) -> int:
        """The next occurrence of a request: the smallest that is not taken."""
        taken = self._taken.setdefault(key, set())
        occurrence = 0
        while occurrence in taken:
            occurrence += 1
        taken.add(occurrence)
        return occurrence

    def give_back(self, key: bytes, occurrence: int) -> None:
        """The request failed: whoever makes it again is the same occurrence."""
        self._taken[key].discard(occurrence)

    async def find(self, key: bytes, occurrence: int) -> dict[str, Any] | None:
        """The recorded row under a key, or None if it is new.

        Raises:
            ReplayDiverged: it is new although recorded ones wait that nobody asks for.
        """
        if self.stopped is not None:
            raise self.stopped
        if not self._known:
            return None
        found = self._known.get((key, occurrence))
        if found is not None:
            found.used = True
            return found.row
        waited, left = 0.0, self.unused()
        while left and waited < PATIENCE:
            await asyncio.sleep(0.02)
            now = self.unused()
            waited, left = (waited + 0.02, left) if now == left else (0.0, now)
        if left:
            raise ReplayDiverged(
                f"episode {self.id}: the program asks for something it did not ask before the crash, while {left} recorded "
                "answers wait: it changed since. Resume with the program that wrote the record, or start another run"
            )
        return None

    def unused(self) -> int:
        return sum(not recorded.used for recorded in self._known.values())

    def finish(self) -> None:
        """At the end of an episode everything recorded must have been asked for.

        Raises:
            ReplayDiverged: the program ended earlier than it did before the crash.
        """
        if self.stopped is not None:
            raise self.stopped
        if left := self.unused():
            raise ReplayDiverged(f"episode {self.id}: the program ended, but {left} recorded answers were never asked for: it changed since")

    def commit(self, job: Job[T]) -> Job[T]:
        """`job` with the steps that wait to ride along, for one transaction."""
        riding, self._pending = self._pending, []
        if not riding:
            return job

        def together(conn: sqlite3.Connection) -> T:
            for ride in riding:
                ride(conn)
            return job(conn)

        return together

    # ---- model calls ----

    def request(
        self, model: str, messages: Sequence[Said], params: dict[str, Any], origins: Sequence[str | None] = ()
    ) -> Request:
        """A call of our own. Messages that begin the last one's too, the same objects, are not worked on again.

        Args:
            messages: ours, or as they go over the wire: plain dictionaries are labelled by `origins` (canonical JSON of
                `cod_agent.context.labels`), or by their role where it has None.
        """
        said, nodes = self._spoken
        fresh: list[Node] = []
        parent, same = b"", True
        for at, message in enumerate(messages):
            same = same and at < len(said)
            if same and said[at] is message and not isinstance(message, dict):
                node = nodes[at]
            else:
                message = self._cleaned(message)
                body = _body(message)
                same = same and nodes[at].body == body
                node = nodes[at] if same else link(parent, body, _spans(message, body, origins[at : at + 1]))
            fresh.append(node)
            parent = node.hash
        self._spoken = (list(messages), fresh)
        params = params if self.redact is None else self.clean_value(params)
        head = compact({"model": model, "messages": None, **params})
        digest = sha256(head.encode()).digest()
        return Request(head, digest, fresh, "own", {"model": model, **params}, request_hash(digest, parent))

    def _cleaned(self, message: Said) -> Said:
        if isinstance(message, Message):
            return Message(message.role, tuple(Part(part.origin, self.clean(part.text)) for part in message.parts))
        if self.redact is None:
            return message
        if isinstance(message, WireMessage):
            return WireMessage(compact(self.clean_value(json.loads(message.body))), message.spans)
        return {name: self.clean_value(value) for name, value in message.items()}

    async def replay(self, request: Request) -> Answer | None:
        """The recorded answer of a call whose occurrence is taken, or None if it has to be made."""
        row = await self.find(request.key, request.occurrence)
        if row is None:
            return None
        self.calls += 1

        def read(conn: sqlite3.Connection) -> tuple[str, tuple[list[int], list[int], list[float]] | None]:
            return conversation(conn, row["answer_id"])[-1][1] or "", read_tokens(conn, row["id"])

        message, exact = await self.memory.read(read)
        tokens = Tokens(*exact) if exact else None
        if tokens is not None:
            self._tokens = (row["id"], [*tokens.prompt, *tokens.sampled])
        return _answer_of(row, json.loads(message), tokens)

    async def record(self, request: Request, answer: Answer, started: float, *, on_policy: bool, lean: bool) -> Answer:
        """Store a finished call; it is durable when this returns.

        What it gives back is what the solver may see: the answer, redacted.
        """
        if self.redact is not None:
            answer = _redacted(answer, self)
        completion = answer.completion
        parent = request.nodes[-1].hash if request.nodes else request.head_hash
        node = link(parent, compact(answer.message), f'[[{len(completion.text)},"model"]]')
        envelope = answer.envelope(lean)
        seconds = time.time() - started

        def store(conn: sqlite3.Connection) -> int:
            return self._store_call(conn, request, completion, node, compact(envelope), on_policy, started, seconds)

        row_id = await self.memory.write(self.commit(store))
        self.calls += 1
        if completion.tokens is not None:
            self._tokens = (row_id, [*completion.tokens.prompt, *completion.tokens.sampled])
        return answer

    def _store_call(
        self,
        conn: sqlite3.Connection,
        request: Request,
        completion: Completion,
        node: Node,
        envelope: str,
        on_policy: bool,
        started: float,
        seconds: float,
    ) -> int:
        lease.hold(conn, self.run_id)
        cache = self.memory.cache
        head_id = store_head(conn, cache, request.head_hash, request.head)
        prompt_id = store_nodes(conn, cache, request.nodes)
        answer_id = store_child(conn, cache, prompt_id, node)
        tokens, base, shared, blobs = completion.tokens, None, None, (None, None, None)
        if tokens is not None:
            prompt = list(tokens.prompt)
            if self._tokens is not None and (shared := shared_prefix(self._tokens[1], prompt)):
                base = self._tokens[0]
            shared = shared or 0
            blobs = (pack_ids(prompt[shared:]), pack_ids(tokens.sampled), pack_floats(tokens.logprobs))
        usage = completion.usage or (None, None)
        said = {
            "style": request.style,
            "finish_reason": completion.finish_reason,
            "weights": completion.weights,
            "inexact": completion.inexact,
            "on_policy": on_policy,
            "usage": usage,
        }
        exact = tokens and (tokens.prompt, tokens.sampled, blobs[2] or b"")
        hashed = call_hash(request.key, request.occurrence, node.hash, said, exact)
        made = conn.execute(
            "INSERT INTO calls (episode_id, request, occurrence, head_id, prompt_id, style, answer_id, envelope, envelope_crc, finish_reason,"
            " model, weights, prompt_base_id, prompt_shared, prompt_ids, sampled_ids, logprobs, on_policy, inexact, prompt_tokens,"
            " sampled_tokens, hash, started, seconds) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (self.id, request.key, request.occurrence, head_id, prompt_id, request.style, answer_id, envelope, checksum(envelope),
             completion.finish_reason, str(request.params.get("model", "")), completion.weights, base, shared, *blobs, int(on_policy), completion.inexact, *usage,
             hashed, started, seconds),
        )  # fmt: skip
        return int(made.lastrowid or 0)

    async def failed(self, kind: str, key: bytes, occurrence: int, started: float, detail: str) -> None:
        """Put a failed attempt on record."""
        seconds = time.time() - started

        def store(conn: sqlite3.Connection) -> None:
            conn.execute(
                "INSERT INTO attempts (episode_id, kind, request, occurrence, state, detail, started, seconds) "
                "VALUES (?, ?, ?, ?, 'failed', ?, ?, ?)",
                (self.id, kind, key, occurrence, self.clean(detail)[:2000], started, seconds),
            )

        await self.memory.write(self.commit(store))

    # ---- effects: tools and the environment ----

    async def effect(
        self, kind: str, name: str, arguments: Any, do: Callable[[], Awaitable[tuple[Any, Any]]], *, may_repeat: bool = False
    ) -> tuple[Any, Any, bool]:
        """(result, snapshot, was it recorded) of a tool call or a step; `do` gives (result, snapshot), both JSON values.

        `may_repeat`: a step of a deterministic environment. If it was quick it need not have a commit of its own: it rides with
        the next one, and a crash before that takes it again, with the same result.
        """
        arguments = self.clean_value(arguments)
        key = effect_key(kind, name, arguments)
        occurrence = self.take(key)
        try:
            row = await self.find(key, occurrence)
            if row is not None:
                return json.loads(row["result"]), row["snapshot"] and json.loads(row["snapshot"]), True
            started = time.time()
            token = OCCURRENCE.set(occurrence)
            try:
                result, snapshot = await do()
            finally:
                OCCURRENCE.reset(token)
            result = self.clean_value(result)
            store = self._effect(kind, name, key, occurrence, arguments, result, snapshot, started)
            if may_repeat and time.time() - started < QUICK:
                self._pending.append(store)
            else:
                await self.memory.write(self.commit(store))
            return json.loads(compact(result)), snapshot, False
        except BaseException as error:
            if isinstance(error, STOPS):
                self.stopped = error
            self.give_back(key, occurrence)
            raise

    async def in_doubt(self, key: bytes) -> bool:
        """Whether a tool with this key was started, by an earlier process, and never finished."""

        def read(conn: sqlite3.Connection) -> bool:
            started = conn.execute(
                "SELECT count(*) FROM attempts WHERE episode_id = ? AND kind = 'tool' AND request = ? AND state = 'started'",
                (self.id, key),
            ).fetchone()[0]
            done = conn.execute(
                "SELECT count(*) FROM effects WHERE episode_id = ? AND request = ?", (self.id, key)
            ).fetchone()[0]
            return bool(started > done + self._running.get(key, 0))

        return await self.memory.read(read)

    async def starts(self, key: bytes) -> None:
        """Put on record that a tool is about to run, so that a crash in the middle is known as one."""
        self._running[key] = self._running.get(key, 0) + 1

        def store(conn: sqlite3.Connection) -> None:
            lease.hold(conn, self.run_id)
            conn.execute(
                "INSERT INTO attempts (episode_id, kind, request, occurrence, state, detail, started) "
                "VALUES (?, 'tool', ?, 0, 'started', '', ?)",
                (self.id, key, time.time()),
            )

        await self.memory.write(self.commit(store))

    def starts_again(self, key: bytes) -> None:
        """A tool in doubt is repeated: the start that is on record stands for this one."""
        self._running[key] = self._running.get(key, 0) + 1

    def _effect(
        self, kind: str, name: str, key: bytes, occurrence: int, arguments: Any, result: Any, snapshot: Any, started: float
    ) -> Job[None]:
        said = compact(result)
        kept = None if snapshot is None else compact(snapshot)
        hashed = effect_hash(key, occurrence, said, kept)
        seconds = time.time() - started

        def store(conn: sqlite3.Connection) -> None:
            lease.hold(conn, self.run_id)
            conn.execute(
                "INSERT INTO effects (episode_id, kind, name, request, occurrence, arguments, result, snapshot, hash, started, seconds)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (self.id, kind, name, key, occurrence, compact(arguments), said, kept, hashed, started, seconds),
            )

        return store


def _body(message: Said) -> str:
    """A message's text as it is sent and stored."""
    if isinstance(message, WireMessage):
        return message.body
    return compact(message.wire() if isinstance(message, Message) else message)


def _spans(message: Said, body: str, origin: Sequence[str | None]) -> str:
    if isinstance(message, Message):
        return canonical(labels([message])[0])
    if isinstance(message, WireMessage):
        return message.spans
    return (origin[0] if origin else None) or canonical([[len(body), origin_by_role(message)]])


def origin_by_role(message: Any) -> str:
    """Where a message of somebody else's making came from, as far as its role tells."""
    role = message.get("role") if isinstance(message, dict) else None
    return {"assistant": "model", "tool": "tool"}.get(str(role), "application")


def _answer_of(row: dict[str, Any], message: dict[str, Any], tokens: Tokens | None) -> Answer:
    body = json.loads(row["envelope"])
    first = body["choices"][0]
    first["message"] = {**message, **first["message"]}
    if tokens is not None:
        body["prompt_token_ids"], first["token_ids"] = list(tokens.prompt), list(tokens.sampled)
        restore_logprobs(first, tokens.logprobs)
    content = message.get("content")
    usage = None if row["prompt_tokens"] is None else (row["prompt_tokens"], row["sampled_tokens"])
    text = content if isinstance(content, str) else "" if content is None else json.dumps(content)
    completion = Completion(text, row["finish_reason"], tokens, row["inexact"], row["weights"], usage)
    return Answer(body, completion)


def _redacted(answer: Answer, episode: Episode) -> Answer:
    """The answer with its texts redacted; where that changed anything its tokens say otherwise and are dropped."""
    body = episode.clean_value(answer.body)
    if body == answer.body:
        return answer
    body.pop("prompt_token_ids", None)
    for choice in body["choices"]:
        choice.pop("token_ids", None)
        choice.pop("logprobs", None)
    said, content = answer.completion, body["choices"][0]["message"].get("content")
    text = content if isinstance(content, str) else "" if content is None else json.dumps(content)
    return Answer(body, replace(said, text=text, weights=episode.clean(said.weights), tokens=None, inexact="redacted"))
