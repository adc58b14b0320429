"""What stands between AgentScope and the journal: its model, its tools, the order of its memory. Imported when used."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

from agentscope.agent import Agent, ContextConfig, InjectionConfig, ReActConfig
from agentscope.credential import OpenAICredential
from agentscope.exception import DeveloperOrientedException
from agentscope.formatter import OpenAIChatFormatter
from agentscope.message import (
    Msg,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
    ToolResultBlock,
    ToolResultState,
    UserMsg,
)
from agentscope.middleware import MiddlewareBase
from agentscope.model import ChatModelBase, ChatResponse, ChatUsage
from agentscope.permission import PermissionBehavior, PermissionContext, PermissionDecision, PermissionMode
from agentscope.state import AgentState
from agentscope.tool import FunctionTool, ToolChoice, ToolChunk, Toolkit
from pydantic import SecretStr

from cod_agent.context import defuse
from cod_agent.errors import CodError, ModelRefused, ToolFailed
from cod_agent.journal.answers import Answer
from cod_agent.journal.boundary import Boundary
from cod_agent.models.openai import OpenAIModel

ALLOW = PermissionDecision(behavior=PermissionBehavior.ALLOW, message="The application gave this tool.")
MALFORMED = "malformed_arguments"
"""Arguments that are no JSON object stand under this name, as they were: valid for any server, and for no tool."""

# AgentScope's own wording has the time of day in it: a resumed task would ask something else.
COMPRESS = (
    "<system-hint>The conversation so far is about to be replaced by a summary. Write it so that you can go on with "
    "the task from the summary alone: keep names, numbers, identifiers and exact error messages as they are, what was "
    "tried and what came of it, and what is still to be done.</system-hint>"
)


class Stopped(DeveloperOrientedException):
    """Ends a reply from inside a tool: AgentScope shows any other exception to the model and goes on."""


class Life:
    """One task's agent."""

    def __init__(
        self,
        endpoint: OpenAIModel,
        *,
        model: str,
        system: str,
        tools: Boundary,
        origins: dict[str, str],
        max_iters: int,
        context_size: int,
        middlewares: Sequence[MiddlewareBase],
    ) -> None:
        self.origins = origins
        self.over = False
        """The environment said it is over."""
        self.stopped: Exception | None = None
        """What must end the task instead of being told to the model."""
        self._answer = ""
        self._boundary = tools
        self._model = RecordedModel(endpoint, model, context_size, origins)
        self._agent = Agent(
            "solver",
            system,
            self._model,
            Toolkit([*self._tools(tools)]),
            middlewares=[InOrder(), *middlewares],
            # A fresh state each time: AgentScope's saved ones would repeat work.
            state=AgentState(permission_context=PermissionContext(mode=PermissionMode.BYPASS)),
            context_config=ContextConfig(compression_prompt=COMPRESS),
            react_config=ReActConfig(max_iters=max_iters, interruption_raise_cancelled_error=True),
            injection_config=InjectionConfig(inject_runtime_state=False),
        )

    async def reply(self, text: str) -> str:
        """The agent's answer to `text`; its last step, if that ended the environment. Empty if it ran out of rounds."""
        try:
            await self._agent.reply(UserMsg(name="user", content=text))
        except Exception:
            if self.stopped is not None:
                raise self.stopped from None
            if not self.over:
                raise
        return self._answer if self.over else self._model.said

    def _tools(self, tools: Boundary) -> list[RecordedTool]:
        given = [RecordedTool(function, self) for function in tools]
        if tools.in_environment and not any(tool.name == "act" for tool in given):
            # Steps depend on each other: never two at once.
            given.append(RecordedTool(self._act, self, name="act", is_concurrency_safe=False))
        return given

    async def _act(self, answer: str) -> str:
        """Give the environment your next move, or your answer, and see what comes of it.

        Args:
            answer: what you do or say, in the form the task asks for.
        """
        seen = await self._boundary.act(answer)
        shown = defuse(seen.text)
        self.origins[shown] = f'[[{len(shown)},"environment"]]'
        if seen.done:
            self.over, self._answer = True, answer
            raise Stopped("the environment is over")
        return seen.text


class RecordedTool(FunctionTool):
    """A recorded function as AgentScope's tool. Only its own failures are shown to the model."""

    def __init__(self, function: Callable[..., Any], life: Life, **options: Any) -> None:
        super().__init__(function, permission=ALLOW, **options)
        self._signature, self._life = inspect.signature(function), life

    async def call(self, **kwargs: Any) -> Any:
        """Run it; see `FunctionTool.call`."""
        try:
            self._signature.bind(**kwargs)
        except TypeError as error:
            return ToolChunk(content=[TextBlock(text=f"TypeError: {error}")], state=ToolResultState.ERROR)
        try:
            return await super().call(**kwargs)
        except (ToolFailed, Stopped):
            raise
        except Exception as error:
            self._life.stopped = self._life.stopped or error
            raise Stopped(str(error)) from error


class InOrder(MiddlewareBase):
    """Parallel tools' results in the order of their calls: AgentScope keeps them as they come, in any order."""

    async def on_compress_context(
        self, agent: Agent, input_kwargs: dict[str, Any], next_handler: Callable[..., Any]
    ) -> None:
        """Runs before every call of the model."""
        for message in agent.state.context:
            if isinstance(message.content, list):
                message.content[:] = in_order(message.content)
        await next_handler(**input_kwargs)


def in_order(blocks: Sequence[Any]) -> list[Any]:
    """`blocks` with each run of tool results sorted by their calls."""
    place = {block.id: at for at, block in enumerate(blocks) if isinstance(block, ToolCallBlock)}
    out: list[Any] = []
    run: list[Any] = []
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            run.append(block)
            continue
        out += [*sorted(run, key=lambda result: place.get(result.id, -1)), block]
        run = []
    return out + sorted(run, key=lambda result: place.get(result.id, -1))


class RecordedModel(ChatModelBase):
    """`OpenAIModel` as AgentScope's model: the same retries, errors and record."""

    def __init__(self, endpoint: OpenAIModel, model: str, context_size: int, origins: dict[str, str]) -> None:
        super().__init__(
            credential=OpenAICredential(api_key=SecretStr("unused")),
            model=model,
            parameters=self.Parameters(),
            stream=False,
            max_retries=0,
            context_size=context_size,
        )
        self.said = ""
        """The newest answer's text, if it called no tool."""
        self._endpoint, self._origins, self.formatter = endpoint, origins, OpenAIChatFormatter()
        self._failed: CodError | None = None
        self._ids: set[str] = set()

    @classmethod
    def _get_structured_output_fallback_exceptions(cls) -> tuple[type[Exception], ...]:
        return (ModelRefused,)  # an endpoint that cannot be made to call a tool may still be asked to

    async def generate_structured_output(self, *args: Any, **kwargs: Any) -> Any:
        """See `ChatModelBase`. When this fails AgentScope drops what it was going to sum up, and goes on.

        That is right for a model that sums up badly, and wrong for one that was only away: resumed, it would be asked
        something else.
        """
        try:
            return await super().generate_structured_output(*args, **kwargs)
        except CodError as error:
            self._failed = error
            raise

    async def _call_api(
        self,
        model_name: str,
        messages: list[Msg],
        tools: list[dict[str, Any]] | None = None,
        tool_choice: ToolChoice | None = None,
        **kwargs: Any,
    ) -> ChatResponse:
        if self._failed is not None:
            raise self._failed
        formatted = map(plain, await self.formatter.format(messages))
        wire = [said for said in formatted if (said["role"], said["content"]) != ("system", "")]
        origins = [self._origins.get(said["content"]) if isinstance(said["content"], str) else None for said in wire]
        beside: dict[str, Any] = {}
        if tools:
            beside["tools"] = tools
            if tool_choice is not None:
                mode = tool_choice.mode
                literal = mode in ("auto", "none", "required")
                beside["tool_choice"] = mode if literal else {"type": "function", "function": {"name": mode}}
        return self._response(await self._endpoint.exchange(wire, origins, **beside))

    def _response(self, answer: Answer) -> ChatResponse:
        message = answer.body["choices"][0]["message"]
        blocks: list[Any] = []
        thought = message.get("reasoning_content") or message.get("reasoning")
        if isinstance(thought, str) and thought:
            blocks.append(ThinkingBlock(thinking=thought))
        if answer.completion.text:
            blocks.append(TextBlock(text=answer.completion.text))
        calls = [self._called(call) for call in message.get("tool_calls") or [] if isinstance(call, dict)]
        self.said = "" if calls else answer.completion.text
        used = answer.completion.usage
        usage = ChatUsage(input_tokens=used[0], output_tokens=used[1], time=0.0) if used else None
        return ChatResponse(content=[*blocks, *calls], is_last=True, usage=usage)

    def _called(self, call: dict[str, Any]) -> ToolCallBlock:
        function = call.get("function") or {}
        # A call whose id came before is taken for done, and made-up ids must be the same on replay.
        name = call.get("id")
        if not isinstance(name, str) or not name or name in self._ids:
            name = f"call_{len(self._ids)}"
        self._ids.add(name)
        tool = str(function.get("name") or "unknown")
        return ToolCallBlock(id=name, name=tool, input=well_formed(function.get("arguments")))


def well_formed(arguments: Any) -> str:
    """Arguments as a JSON object: as they are, or as `MALFORMED` if they are none.

    AgentScope would execute its guess at what was meant (and half of a path that was cut off is another path); servers
    refuse a conversation that contains them.
    """
    if isinstance(arguments, dict):
        return json.dumps(arguments)
    text = str(arguments or "")
    if not text.strip():
        return "{}"
    try:
        if isinstance(json.loads(text), dict):
            return text
    except ValueError:
        pass
    return json.dumps({MALFORMED: text})


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """A formatted message without the agent's name, its text as a string, which more servers take than lists.

    Delimiters in what a tool gave are defused here, where errors come by, too.
    """
    content = message.get("content")
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        content = "\n".join(part["text"] for part in content)
    if message["role"] == "tool" and isinstance(content, str):
        content = defuse(content)
    kept = {key: value for key, value in message.items() if key != "name" or message["role"] == "tool"}
    return {**kept, "content": content}
