"""A tool-using solver: a fresh AgentScope agent for every task, with AgentScope's loop and this project's journal.

    async with AgentScopeSolver("Qwen/Qwen3-8B", base_url="http://127.0.0.1:8000/v1") as solver:
        agent = CoDAgent("shop", model="openai:Qwen/Qwen3-8B", memory="shop.db", tools=[search, order], solver=solver)

AgentScope decides what to say and which tools to call; every call goes out through `OpenAIModel` and every tool through
the recorded functions it is given, so that they are journaled as for any other solver. Durability is the journal's: the
agent keeps no state of its own between tasks, and one that died is started again and walks through its record.

What AgentScope would do by itself, and does not do here (each has a test): swallow cancellation; put the time of day
in prompts; wait for a person to permit a tool; execute malformed arguments as it guesses them to be; tell the model,
as a tool's result, of errors that are none of its business (a full disk, a tool in doubt); send parallel results in
the order they came; forget what an endpoint that is away could not sum up.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from cod_agent.context import NATURAL, Message, Prompts, labels, next_turn
from cod_agent.errors import CodError, MissingExtra
from cod_agent.journal.boundary import Boundary
from cod_agent.memory.hashing import canonical
from cod_agent.models.base import Sampling
from cod_agent.models.openai import RETRIES, TIMEOUT, OpenAIModel
from cod_agent.tasks import Task

if TYPE_CHECKING:
    from agentscope.middleware import MiddlewareBase

T = TypeVar("T")


class AgentScopeSolver:
    """Solves a task with an AgentScope agent.

    It calls the tools of the agent and of the environment, parallel ones in parallel. In an environment it also has
    `act(answer)`, which takes a step and shows what came of it; a plain answer is taken as a step, too. Either way the
    environment says when it is over.

    Args:
        model: the endpoint's name for the model ("openai:" before it is ignored).
        base_url, api_key: default to OPENAI_BASE_URL and OPENAI_API_KEY; a local server without a key needs none.
        sampling: how answers are drawn.
        exact: ask for token ids and log-probabilities, as `OpenAIModel` does.
        stream: have answers streamed, for endpoints that cut off long silences; nobody sees the pieces.
        extra: anything else that belongs in the request's body.
        timeout: seconds one attempt may take.
        retries: attempts after the first; each is on record.
        max_iters: rounds of thinking and acting before the agent is told to answer.
        context_size: the model's window in tokens; near it AgentScope has the model sum up, in recorded calls.
        prompts: how task, context and observation are worded.
        middlewares: AgentScope's. What they do must depend only on what they see, or a resumed task diverges.

    Raises:
        MissingExtra: AgentScope is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        sampling: Sampling | None = None,
        exact: bool = False,
        stream: bool = False,
        extra: dict[str, Any] | None = None,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        max_iters: int = 50,
        context_size: int = 128_000,
        prompts: Prompts = NATURAL,
        middlewares: Sequence[MiddlewareBase] = (),
    ) -> None:
        if importlib.util.find_spec("agentscope") is None:
            raise MissingExtra("AgentScopeSolver", "agentscope")
        self._model = model.removeprefix("openai:")
        self._endpoint = OpenAIModel(
            self._model,
            base_url=base_url,
            api_key=api_key,
            sampling=sampling,
            exact=exact,
            stream=stream,
            extra=extra,
            timeout=timeout,
            retries=retries,
        )
        self._max_iters, self._context_size = max_iters, context_size
        self._prompts, self._middlewares = prompts, tuple(middlewares)

    async def __call__(self, task: Task, context: str, tools: Boundary) -> str:
        """The agent's last words, or its last step where there is an environment.

        Raises:
            ModelError, ReplayDiverged, StoreError, ToolInDoubt: what stopped the agent; the model is not told.
        """
        from cod_agent.solvers._agentscope import Life

        seen = await tools.observe() if tools.in_environment else None
        if seen is not None and seen.done:
            return ""
        said = self._prompts.solve(task, context, seen)
        text = "\n\n".join(message.content for message in said if message.role != "system")
        life = Life(
            self._endpoint,
            model=self._model,
            system="\n\n".join(message.content for message in said if message.role == "system"),
            tools=tools,
            origins=_origins(said),
            max_iters=self._max_iters,
            context_size=self._context_size,
            middlewares=self._middlewares,
        )
        while True:
            answer = await _alone(life.reply(text))
            if seen is None or life.over:
                return answer
            seen = await tools.act(answer)
            if seen.done:
                return answer
            shown = next_turn(self._prompts, seen)
            text = shown.content
            life.origins |= _origins([shown])

    @property
    def secrets(self) -> dict[str, str]:
        """What must stand in no prompt and no record, by name (see `cod_agent.secrets`)."""
        return self._endpoint.secrets

    async def aclose(self) -> None:
        """Close the connections; the next task opens new ones."""
        await self._endpoint.aclose()

    async def __aenter__(self) -> AgentScopeSolver:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _origins(said: Sequence[Message]) -> dict[str, str]:
    """The labels of texts that the project's prompts made, by text: AgentScope hands on strings."""
    return {message.content: canonical(parts) for message, parts in zip(said, labels(said), strict=True)}


async def _alone(work: Coroutine[Any, Any, T]) -> T:
    """`work` in a task of its own, so that being cancelled is not left to it: AgentScope takes cancellations back."""
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task})
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # looked at, so that nobody complains that it was not
        raise
    if task.cancelled():
        raise CodError("a tool or a middleware cancelled the agent from inside: the task stays open")
    return task.result()
