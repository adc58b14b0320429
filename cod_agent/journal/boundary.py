"""The boundary a solver works at: the environment's session and the tools, journaled.

`Boundary` is what a solver is given as `tools`: a sequence of recorded functions, and for the text dialogue also `observe` and
`act`. On resuming, recorded results are given without doing anything again; the session itself is brought to the same state
only when the episode goes on past its record: by taking the recorded steps again (deterministic), or from the last snapshot.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Literal, get_args

from cod_agent.completions import Completion
from cod_agent.context import Message
from cod_agent.errors import ReplayDiverged, ToolFailed, ToolInDoubt, UnknownName, UsageError
from cod_agent.journal.answers import Answer
from cod_agent.journal.episode import Episode, current_episode, effect_key, outside
from cod_agent.memory.hashing import compact
from cod_agent.memory.observations import pack_observation, unpack_observation
from cod_agent.tasks import Observation

Policy = Literal["repeat", "ask", "fail"]
"""What happens to a tool that was running when the process died. repeat: it is run again, with the same idempotency key; ask: the run
stops with `ToolInDoubt` until somebody decides; fail: the solver is told that the outcome is unknown."""

POLICIES: tuple[Policy, ...] = get_args(Policy)

_HIDDEN = {"cod": "a secret was in it"}
"""Stands for a snapshot that is not stored."""

_KEY: ContextVar[str] = ContextVar("cod_idempotency_key", default="")


def idempotency_key() -> str:
    """Inside a tool: a key of this very call, the same when it is repeated after a crash; hand it to services that take one."""
    return _KEY.get()


def tool(
    function: Callable[..., Any] | None = None, *, on_crash: Policy = "repeat", secrets: Sequence[str] = ()
) -> Callable[..., Any]:
    """Declare what a tool may do.

    Args:
        on_crash: what a crash in the middle of it means.
        secrets: names of secrets that its arguments may hold: it gets their values where the model wrote `[secret:NAME]`. Other
            tools get the placeholder. Whoever can write an argument can send such a secret wherever the tool sends it.
    """
    if isinstance(secrets, str):
        raise UsageError(f"secrets is a list of names: write secrets=({secrets!r},)")
    if on_crash not in POLICIES:
        raise UnknownName.among("policy of a tool after a crash", str(on_crash), list(POLICIES))

    def declare(inner: Callable[..., Any]) -> Callable[..., Any]:
        inner.__cod_on_crash__ = on_crash  # type: ignore[attr-defined]
        inner.__cod_secrets__ = tuple(secrets)  # type: ignore[attr-defined]
        return inner

    return declare(function) if function is not None else declare


def secrets_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the secrets that a tool declares."""
    return getattr(function, "__cod_secrets__", ())


class Aborted(Exception):
    """The environment cannot be brought back to where it was (recovery "abort"): the episode ends, with reward NaN."""


class Boundary(Sequence[Callable[..., Any]]):
    """The recorded tools of one solve episode, with its environment's session if there is one."""

    def __init__(
        self,
        episode: Episode,
        session: Any,
        recovery: str,
        tools: Sequence[Callable[..., Any]],
        *,
        ask: Callable[[Sequence[Message]], Awaitable[Completion]] | None = None,
        exchange: Callable[..., Awaitable[Answer]] | None = None,
        saw: Callable[[Observation], None] | None = None,
        decide: Callable[[str, Any], str | Awaitable[str]] | None = None,
    ) -> None:
        self._episode, self._session, self._recovery = episode, session, recovery
        self._ask, self._exchange, self._saw, self._decide = ask, exchange, saw, decide
        self._tools = tuple(self._recorded(function) for function in tools)
        self._first: Observation | None = None
        self._turns: list[Observation] = []
        self._behind: list[str | None] = []
        """Steps that were answered from the record and that the session has not taken; None is the reset."""
        self._snapshot: Any = None
        self.aborted = ""
        """Why the episode cannot go on, once it cannot."""

    def __len__(self) -> int:
        return len(self._tools)

    def __getitem__(self, index: Any) -> Any:
        return self._tools[index]

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter(self._tools)

    @property
    def in_environment(self) -> bool:
        """Whether there is a session to `observe` and `act` in."""
        return self._session is not None

    @property
    def last(self) -> Observation | None:
        """The newest observation."""
        return self._turns[-1] if self._turns else self._first

    async def observe(self) -> Observation:
        """The first observation."""
        if self._first is None:
            self._first = await self._step(None)
        return self._first

    async def act(self, answer: str) -> Observation:
        """Take a step with an answer; its observation is on record (see `Episode.effect`) when this returns."""
        await self.observe()
        seen = await self._step(answer)
        self._turns.append(seen)
        return seen

    async def ask(self, messages: Sequence[Message]) -> Completion:
        """The agent's model's answer, recorded.

        Raises:
            UsageError: the agent was given no model.
            ModelError: the model did not answer.
        """
        if self._ask is None:
            raise UsageError("this agent has no model to ask: give CoDAgent(model=...)")
        return await self._ask(messages)

    async def exchange(self, messages: Sequence[Any], origins: Sequence[str | None] = (), **beside: Any) -> Answer:
        """`ask` for solvers with tools: messages and answer as they go over the wire (see `OpenAIModel.exchange`).

        Raises:
            UsageError: the agent was given no model, or one that takes no tools.
            ModelError: the model did not answer.
        """
        if self._exchange is None:
            raise UsageError(
                "this agent has no model that takes tools: give CoDAgent(model='openai:NAME'), or a solver with its own"
            )
        return await self._exchange(messages, origins, **beside)

    async def _step(self, answer: str | None) -> Observation:
        async def do(_: int) -> tuple[Any, Any]:
            await self._catch_up()
            seen = await _awaited(self._session.reset() if answer is None else self._session.step(answer))
            kept = self._kept() if self._recovery == "snapshot" else None
            if not isinstance(seen, Observation):
                what = "reset()" if answer is None else "step()"
                raise UsageError(
                    f"the environment's {what} gave {type(seen).__name__} {seen!r:.60}, not an Observation"
                )
            _keepable("Observation.carried", seen.carried)
            return pack_observation(seen), kept

        kind = "observe" if answer is None else "act"
        result, snapshot, recorded = await self._episode.effect(
            kind, "", answer, do, may_repeat=self._recovery == "deterministic"
        )
        if recorded:
            self._behind.append(answer)
            self._snapshot = snapshot
        seen = unpack_observation(result)
        if self._saw is not None:
            self._saw(seen)
        return seen

    def _kept(self) -> Any:
        """A snapshot of the session. One that holds a secret is not stored, and without the secret it is none."""
        made = self._session.snapshot()
        _keepable("snapshot()", made)
        written = compact(made)
        return made if self._episode.tap.written(written) is written else _HIDDEN

    async def _catch_up(self) -> None:
        """Bring the session to where the record ends."""
        if not self._behind:
            return
        if self._recovery == "abort":
            self.aborted = "the process died in the middle of the task and its environment cannot be resumed"
            raise Aborted(self.aborted)
        if self._recovery == "snapshot" and self._snapshot == _HIDDEN:
            self.aborted = "the process died in the middle of the task, and the state of its environment held a secret"
            raise Aborted(self.aborted)
        if self._recovery == "snapshot":
            await _awaited(self._session.restore(self._snapshot))
        else:
            seen = [self._first, *self._turns]
            for answer, before in zip(self._behind, seen, strict=True):
                came = await _awaited(self._session.reset() if answer is None else self._session.step(answer))
                now = unpack_observation(self._episode.tap.value(pack_observation(came)))
                if now != before:
                    raise ReplayDiverged(
                        f"the environment, taking the recorded steps again, showed {now.text[:80]!r} where it had shown "
                        f"{before.text[:80] if before else ''!r}: it is not deterministic, or it changed. Declare its recovery as "
                        "'snapshot' or 'abort', or start another run"
                    )
        self._behind = []

    def _recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        name = getattr(function, "__name__", type(function).__name__)
        policy: Policy = getattr(function, "__cod_on_crash__", "repeat")
        secrets, tap = secrets_of(function), self._episode.tap
        if unknown := sorted(set(secrets) - set(tap.names)):
            raise UsageError(
                f"tool {name!r} asks for the secret {unknown[0]}, and there is none of that name: set the environment variable, or "
                "give it with CoDAgent(redact=Secrets(values={...}))"
            )

        @functools.wraps(function)
        async def recorded(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            said = {**bound.arguments}

            async def do(occurrence: int) -> tuple[Any, None]:
                run = functools.partial(function, *tap.resolve(args, secrets), **tap.resolve(kwargs, secrets))
                return await self._run_tool(name, policy, said, occurrence, run), None

            result, _, _ = await self._episode.effect("tool", name, _json(said), do)
            if "error" in result:
                raise ToolFailed(result["error"])
            return result["value"]

        return recorded

    async def _run_tool(
        self, name: str, policy: Policy, said: dict[str, Any], occurrence: int, call: Callable[[], Any]
    ) -> dict[str, Any]:
        episode = self._episode
        key = effect_key("tool", name, episode.tap.value(_json(said)))
        if policy != "repeat":
            if await episode.in_doubt(key, occurrence):
                if policy == "fail" or await self._decided(name, said) == "fail":
                    return {"error": f"{name}: the process died while this ran; whether it took effect is unknown"}
            else:
                await episode.starts(key, occurrence)
        token = _KEY.set(await episode.idempotency_key(key, occurrence))
        try:
            with outside():
                return {"value": _json(await _awaited(call()))}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        finally:
            _KEY.reset(token)

    async def _decided(self, name: str, said: dict[str, Any]) -> str:
        """What becomes of a tool in doubt: "repeat" or "fail".

        Raises:
            ToolInDoubt: nobody decided, or something else.
        """
        decision = "ask" if self._decide is None else await _awaited(self._decide(name, said))
        if decision in ("repeat", "fail"):
            return str(decision)
        other = "" if decision == "ask" else f" (on_doubt said {decision!r:.60})"
        raise ToolInDoubt(
            f"tool {name!r} was running when the process died, and is declared on_crash='ask': find out whether it "
            f"took effect, then resume with on_doubt=... deciding 'repeat' or 'fail'{other}"
        )


def recorded_tool(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of an application's own, recorded in whatever episode it is called from; outside of one it just runs."""

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        episode = current_episode()
        if episode is None:
            return await _awaited(function(*args, **kwargs))
        return await Boundary(episode, None, "abort", [function])[0](*args, **kwargs)

    return call


async def _awaited(value: Any) -> Any:
    return await value if isinstance(value, Awaitable) else value


def _keepable(what: str, value: Any) -> None:
    """Raises: UsageError, where an environment gives something to keep that JSON cannot hold."""
    if value is None:
        return
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the environment's {what} must be what JSON can hold ({error}): it is stored") from None


def _json(value: Any) -> Any:
    """`value` as JSON can hold it: what it cannot is shown as text, live as on replay."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json(v) for v in value]
    return str(value)
