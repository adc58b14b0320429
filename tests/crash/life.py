"""The life the injector ends: 20 tasks, three agents, one file. The same call of `live` begins it and goes on with it.

    clerk    8 tasks of an open-ended life in a deterministic environment, with a tool of each policy, two at a time
    walker   a pack of 6 in an environment of snapshots, by the default dialogue
    desk     6 tasks without an environment, by a solver of its own that speaks HTTP; feedback comes later, out of order

Clerk and walker live at the same time, so that their transactions share savepoints. The model is a function of what it is asked;
some of the updates it writes are refused. Whatever is really done writes a line to a log outside of the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from cod_agent import CoDAgent, Completion, Memory, Message, Observation, Pack, Task, idempotency_key, tool
from cod_agent.completions import Tokens
from cod_agent.context import message
from cod_agent.errors import ModelError, ToolFailed
from cod_agent.journal import episode, http, record_completion
from cod_agent.tasks import Feedback
from crash.points import reach

TASKS = 20
DOUBT = "the process died while this ran; whether it took effect is unknown"


class Log:
    """What was really done: a line each, written at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def say(self, *words: object) -> None:
        log = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(log, (" ".join(map(str, words)) + "\n").encode())
        os.close(log)

    def lines(self, kind: str = "") -> list[str]:
        return (
            [line for line in self.path.read_text().splitlines() if line.startswith(kind)] if self.path.exists() else []
        )


def _hash(said: str) -> str:
    return sha256(said.encode()).hexdigest()[:6]


class Oracle:
    """A model whose answers are a hash of the question; of its updates, every third is refused."""

    name, form = "oracle", "natural"

    def __init__(self, log: Log) -> None:
        self.log = log

    async def complete(self, messages: Sequence[Message], *, on_delta: Any = None) -> Completion:
        return await record_completion(self.name, messages, {"temperature": 1}, self._answer)

    async def _answer(self, messages: Sequence[Message]) -> Completion:
        reach("send")
        await asyncio.sleep(0)
        asked = "|".join(said.content for said in messages)
        if messages[-1].content.startswith("too long"):
            raise ModelError("the prompt is too long")
        self.log.say("call", _hash(asked))
        reach("answer")
        text, finished = _reply(messages[-1].content, _hash(asked))
        prompt = [ord(letter) % 97 for letter in asked[-40:]]
        sampled = [ord(letter) for letter in text]
        return Completion(text, finished, Tokens(prompt, sampled, [-0.5] * len(sampled)), weights="w1")


def _reply(asked: str, hashed: str) -> tuple[str, str]:
    if "Write the new note" not in asked:
        return hashed, "stop"
    luck = int(hashed, 16) % 9
    refused = {
        0: ("no note", "stop"),
        1: (f"<context>\n{'x' * 500}\n</context>", "stop"),
        2: ("<context>\ncut", "length"),
    }
    return refused.get(luck, (f"<context>\nnote {hashed}\n</context>", "stop"))


class World:
    """Two or three steps; some of the deterministic ones are so slow that they are recorded by themselves."""

    form = "natural"

    def __init__(self, recovery: str, log: Log) -> None:
        self.name, self.recovery, self.log = f"world-{recovery}", recovery, log

    def start(self, task: Task) -> Any:
        return _Visit(self, task)


class _Visit:
    def __init__(self, world: World, task: Task) -> None:
        self.world, self.task, self.steps = world, task, list[str]()

    def reset(self) -> Observation:
        reach("reset")
        self.steps = []
        episode.QUICK = 10.0
        self.world.log.say("reset", self.task.id)
        reach("reset")
        return Observation(f"You are at {self.task.id}.")

    def step(self, answer: str) -> Observation:
        reach("step")
        self.steps.append(answer)
        episode.QUICK = 10.0 if len(self.steps) % 2 else -1.0
        self.world.log.say("step", self.task.id, len(self.steps))
        reach("step")
        done = len(self.steps) == 2 + len(self.task.id) % 2
        said = Feedback(reward=int(_hash(answer), 16) % 5 / 4, text="seen") if done else None
        return Observation(f"{len(self.steps)}: {_hash('/'.join(self.steps))}", done=done, feedback=said)

    def snapshot(self) -> Any:
        reach("snapshot")
        return self.steps

    def restore(self, state: Any) -> None:
        reach("restore")
        self.steps = [] if state is None else [*state]


class Kit:
    """A tool of each policy. Each run has arguments unlike those of any other."""

    def __init__(self, log: Log, doubts: Sequence[str]) -> None:
        self.log, self.doubts = log, doubts

    def tools(self) -> list[Any]:
        async def look(what: str) -> str:
            return await self._run("look", what)

        @tool(on_crash="ask")
        async def book(what: str) -> str:
            return await self._run("book", what)

        @tool(on_crash="fail")
        async def pay(what: str) -> str:
            return await self._run("pay", what)

        return [look, book, pay]

    async def _run(self, name: str, what: str) -> str:
        reach("tool")
        doubt = f"{name} {what}"
        if f"{doubt} late" in self.doubts:
            await asyncio.sleep(0.01)  # the one beside it is on record first
        if doubt in self.doubts:  # an error of the very words a crash would have left
            raise type(name, (Exception,), {})(DOUBT)
        self.log.say("tool", name, what, idempotency_key())
        await asyncio.sleep(0)
        reach("tool")
        return f"{name} {what}: {_hash(what)}"

    def decide(self, name: str, said: Any) -> str:
        """The operator: whoever finds that it took effect does not have it done again."""
        done = self.log.lines(f"tool {name} {said['what']} ")
        return "fail" if done else "repeat"


async def _tried(call: Any) -> str:
    try:
        return str(await call)
    except ToolFailed as error:
        return str(error)


async def clerk_solver(task: Task, context: str, tools: Any) -> str:
    """Steps, tools in parallel and alone, two equal questions at once, one that is refused."""
    look, book, pay = tools
    seen = await tools.observe()
    question = message("user", ("application", f"{task.prompt} {context} {seen.text}"))
    if task.data["odd"]:
        with contextlib.suppress(ModelError):
            await tools.ask([message("user", ("application", f"too long {task.id}"))])
        looked, booked = await asyncio.gather(_tried(look(task.id)), _tried(book(task.id)))
    else:
        looked, booked = await _tried(pay(task.id)), ""
    one, two = await asyncio.gather(tools.ask([question]), tools.ask([question]))
    answer = one.text + two.text
    while not seen.done:
        seen = await tools.act(answer)
        answer = seen.text
    return f"{answer} {looked} {booked}"


class Wire:
    """The endpoint behind HTTP: answers in pieces to who asks for a stream."""

    def __init__(self, log: Log) -> None:
        module, wire_log = http.http_module(), log

        class Transport(module.AsyncBaseTransport):  # type: ignore[name-defined]
            async def handle_async_request(self, request: Any) -> Any:
                reach("send")
                asked = json.loads(await request.aread())
                hashed = _hash(json.dumps(asked["messages"]))
                wire_log.say("call", hashed)
                await asyncio.sleep(0)
                reach("answer")
                if asked.get("stream"):
                    kind = {"content-type": "text/event-stream"}
                    return module.Response(200, headers=kind, stream=_Pieces(_chunks(hashed)), request=request)
                choice = {"index": 0, "message": {"role": "assistant", "content": hashed}, "finish_reason": "stop"}
                return module.Response(200, json={"id": "1", "model": "m", "choices": [choice]}, request=request)

        class _Pieces(module.AsyncByteStream):  # type: ignore[name-defined]
            def __init__(self, pieces: list[bytes]) -> None:
                self.pieces = pieces

            async def __aiter__(self) -> Any:
                for piece in self.pieces:
                    reach("piece")
                    yield piece

        self.client = module.AsyncClient(transport=http._transport()(Transport()))

    async def solve(self, task: Task, context: str, tools: Any) -> str:
        said = [{"role": "user", "content": f"{task.prompt} {context}"}]
        for turn in range(2):
            body = {"model": "m", "messages": said, "stream": bool(turn)}
            response = await self.client.post("http://wire/v1/chat/completions", json=body)
            response.raise_for_status()
            said = [*said, {"role": "assistant", "content": _read(response.text)}, {"role": "user", "content": "and?"}]
        return str(said[-2]["content"])


def _read(body: str) -> str:
    """The answer in a response, whole or in pieces."""
    if not body.startswith("data:"):
        return str(json.loads(body)["choices"][0]["message"]["content"])
    chunks = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])


def _chunks(text: str) -> list[bytes]:
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": text[:3]}, {"content": text[3:]}, {}]
    said = [
        {"id": "1", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": None if delta else "stop"}]}
        for delta in deltas
    ]
    return [*(f"data: {json.dumps(chunk)}\n\n".encode() for chunk in said), b"data: [DONE]\n\n"]


async def clerk(memory: Memory, log: Log, doubts: Sequence[str]) -> None:
    kit, world = Kit(log, doubts), World("deterministic", log)
    tasks = [Task(id=f"errand-{n}", prompt=f"Do errand {n}.", data={"odd": n % 2}) for n in range(8)]
    options: dict[str, Any] = {"environment": world, "solver": clerk_solver, "tools": kit.tools()}
    async with CoDAgent(
        "clerk", model=Oracle(log), memory=memory, max_context=400, on_doubt=kit.decide, **options
    ) as agent:
        async for _ in agent.run(tasks):
            pass


async def walker(memory: Memory, log: Log) -> None:
    tasks = tuple(Task(id=f"walk-{'n' * n}", prompt=f"Walk {n}.") for n in range(6))
    pack = Pack("walks", tasks, World("snapshot", log))
    async with CoDAgent("walker", model=Oracle(log), memory=memory, max_context=400) as agent:
        async for _ in agent.run(pack):
            pass


async def desk(memory: Memory, log: Log) -> None:
    wire = Wire(log)
    async with CoDAgent("desk", model=Oracle(log), memory=memory, solver=wire.solve, max_context=400) as agent:
        for position in range(6):
            await agent.solve(Task(id=f"ticket-{position}", prompt=f"Answer ticket {position}."), position=position)
            for late in {2: (1,), 4: (3, 0), 5: (4, 5)}.get(position, ()):
                await agent.feedback(late, reward=late / 4, text=f"thanks for {late}")
    await wire.client.aclose()


def live(folder: Path, doubts: Sequence[str] = (), durable: bool = True) -> None:
    """Live the whole life, or what is left of it, in a folder: `life.db`, and what was really done in `log`.

    Args:
        doubts: tools with their arguments that fail as if the process had died while they ran; "late": after those that run beside them.
        durable: of the file.
    """

    async def everything() -> None:
        memory, said = Memory.open(folder / "life.db", durable=durable), Log(folder / "log")
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(clerk(memory, said, doubts))
                both.create_task(walker(memory, said))
            await desk(memory, said)
        finally:
            memory.close()

    asyncio.run(everything())
