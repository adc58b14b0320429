"""Canaries: a version that is held back is tried beside the one in force, and what comes of it decides; resumed after any crash."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cod_agent import CoDAgent, Memory
from cod_agent.completions import Completion
from cod_agent.context import Message, Trajectory
from cod_agent.errors import UsageError
from cod_agent.events import ContextHeld, ContextKept, ContextWritten
from cod_agent.memory.projection import projection
from cod_agent.memory.readonly import look
from cod_agent.memory.verify import verify
from cod_agent.tasks import Feedback, Observation, Outcome, Pack, Task
from cod_agent.trust.write_gate import WriteGate
from cod_train.rollouts import read_rollout

NOTES = ["blue", "blue\nquickly", "red", "blue\nquickly\ngently"]
"""What the updates write: the doors open to blue."""


class Doors:
    """Opens to the right colour."""

    name = "doors"

    def start(self, task: Task) -> Doors:
        return self

    def reset(self) -> Observation:
        return Observation("A door.")

    def step(self, answer: str) -> Observation:
        return Observation("", done=True, feedback=Feedback(reward=float("blue" in answer)))


class Player:
    """Says what stands in its note, writes the note of the task that it is at; raises when its calls are used up."""

    name, form = "player", "natural"

    def __init__(self, calls: int = 1000) -> None:
        self.left = calls

    async def complete(self, messages: Sequence[Message], *, on_delta: Any = None) -> Completion:
        self.left -= 1
        if self.left < 0:
            raise KeyError("killed by the test")
        said = messages[-1].content if "You learn across" in messages[0].content else ""
        if said:
            task = int(said.partition("Task ")[2][0])
            return Completion(f"<context>\n{NOTES[task]}\n</context>")
        return Completion(messages[0].content.partition("<context>\n")[2].partition("\n</context>")[0])


CANARIES = Pack("canaries", tuple(Task(id=f"c{at}", prompt="Try.") for at in range(2)), Doors())


async def live(memory: Memory, model: Player, heard: list[Any] | None = None, **more: Any) -> list[Outcome]:
    gate = WriteGate("review", canaries=CANARIES, **more)
    watch = None if heard is None else heard.append
    async with CoDAgent("a", model=model, memory=memory, environment=Doors(), gate=gate, watch=watch) as agent:
        tasks = [Task(id=f"t{at}", prompt=f"Task {at}") for at in range(4)]
        return [outcome async for outcome in agent.run(tasks)]


def decisions(memory: Memory) -> list[tuple[str, dict[str, Any]]]:
    rows = memory.read_sync(
        lambda conn: conn.execute("SELECT what, detail FROM commits WHERE detail IS NOT NULL ORDER BY seq").fetchall()
    )
    return [(what, json.loads(detail)) for what, detail in rows]


async def test_what_does_no_worse_is_adopted_and_what_does_worse_is_refused(memory: Memory) -> None:
    heard: list[Any] = []
    outcomes = await live(memory, Player(), heard)
    assert [one.reward for one in outcomes] == [0.0, 1.0, 1.0, 1.0]
    made = decisions(memory)
    assert [what for what, _ in made] == ["adopted", "adopted", "refused", "adopted"]
    assert [said["rewards"] for _, said in made] == [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]
    assert made[2][1]["runs"] == ["life/canary/5", "life/canary/4"]
    assert made[2][1]["why"] == "mean reward 0.000 on 2 tasks, 1.000 without it"
    kinds = [type(event) for event in heard if isinstance(event, ContextHeld | ContextWritten | ContextKept)]
    assert kinds == [
        ContextHeld,
        ContextWritten,
        ContextHeld,
        ContextWritten,
        ContextHeld,
        ContextKept,
        ContextHeld,
        ContextWritten,
    ]
    assert verify(memory.path).ok


async def test_what_misbehaves_is_refused_however_good_it_is(memory: Memory) -> None:
    def misbehaved(outcome: Outcome, trajectory: Trajectory) -> str:
        return "it hurried" if "quickly" in trajectory.turns[0].answer else ""

    await live(memory, Player(), misbehaved=misbehaved)
    made = decisions(memory)
    assert [what for what, _ in made] == ["adopted", "refused", "refused", "refused"]
    assert made[1][1]["why"] == "task 'c0' misbehaved: it hurried"


@pytest.mark.parametrize("calls", range(1, 22, 3))
async def test_killed_at_any_call_it_ends_as_if_it_had_not_been(tmp_path: Path, calls: int) -> None:
    whole, cut = (Memory.open(tmp_path / name, durable=False) for name in ("whole.db", "cut.db"))
    await live(whole, Player())
    with pytest.raises(KeyError):
        await live(cut, Player(calls))
    await live(cut, Player())
    whole.close()
    cut.close()
    assert projection(cut.path) == projection(whole.path)


KILLED = """
import asyncio, os, signal, sys
sys.path.insert(0, {tests!r})
import test_canary as t

class Mortal(t.Player):
    async def complete(self, messages, *, on_delta=None):
        if self.left == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return await super().complete(messages, on_delta=on_delta)

memory = t.Memory.open({path!r})
asyncio.run(t.live(memory, Mortal(5)))
"""


async def test_kill_9_in_the_middle_of_a_trial_changes_nothing(tmp_path: Path) -> None:
    """The fifth call is the second canary task of the version in force."""
    cut = tmp_path / "cut.db"
    program = KILLED.format(tests=str(Path(__file__).parent), path=str(cut))
    died = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    whole, gone_on = (Memory.open(tmp_path / name, durable=False) for name in ("whole.db", "cut.db"))
    assert gone_on.read_sync(lambda conn: conn.execute("SELECT count(*) FROM runs").fetchone()[0]) >= 2
    await live(whole, Player())
    await live(gone_on, Player())
    whole.close()
    gone_on.close()
    assert projection(cut) == projection(whole.path)


async def test_nobody_trains_on_canaries(memory: Memory) -> None:
    await live(memory, Player())
    with look(memory.path) as conn:
        ids = [row[0] for row in conn.execute("SELECT id FROM runs WHERE name LIKE '%/canary/%'")]
        refused = {segment.refused for run in ids for segment in read_rollout(conn, run).segments}
    assert len(ids) == 7 and refused == {"the run was lived to try a context out, not to learn from"}


async def test_what_cannot_be_judged_or_tried_stays_held_back(memory: Memory) -> None:
    task = Task(id="t", prompt="Task 0")
    async with CoDAgent("a", model=Player(), memory=memory, gate=WriteGate("review", canaries=[task])) as agent:
        await agent.feedback(await agent.solve(task), 1.0)
        (trial,) = await agent.review().try_held()
        assert trial.adopted is None and "no canary task was judged" in trial.reason
        assert len(await agent.review().held()) == 1
    async with CoDAgent("a", model=Player(), memory=memory) as agent:
        with pytest.raises(UsageError, match="no tasks to try a version on"):
            await agent.review().try_held()
