"""The controls of an evaluation: what each of them is given, what it may spend, when it is lived."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cod_agent import Memory
from cod_agent.completions import Completion
from cod_agent.context import Message
from cod_agent.environments import FrozenLake, make_world
from cod_agent.errors import UnknownName, UsageError
from cod_agent.evaluation import Plan, Watch, controls_of, evaluate, lanes_of, live_all
from cod_agent.evaluation.given import Giver, history
from cod_agent.journal import record_completion
from cod_agent.memory.verify import verify

PLAN = Plan("frozen-lake:small", "scripted:perfect", packs=4, pack_size=3)
OWN = ("no-context", "frozen", "foreign", "blank", "shuffled", "history", "attempts", "ralph-sample", "ralph-full")
Shown = dict[tuple[str, str], list[str]]


def shown(memory: Memory) -> Shown:
    """(lane, run) -> the context of each of its solve episodes."""
    query = (
        "SELECT r.agent, r.name, c.body FROM episodes e JOIN runs r ON r.id = e.run_id JOIN contexts c ON c.id = e.context_id "
        "WHERE e.kind = 'solve' ORDER BY r.id, e.position"
    )
    found: Shown = {}
    for agent, run, body in memory.read_sync(lambda conn: conn.execute(query).fetchall()):
        found.setdefault((agent.partition("/")[2], run), []).append(body)
    return found


def run(pack: int) -> str:
    return f"frozen-lake:small/eval/1/{pack}"


# ---- contexts that are given ----


async def test_each_is_made_of_the_main_lanes_contexts(memory: Memory) -> None:
    await evaluate(replace(PLAN, controls=("frozen", "foreign", "blank", "shuffled", "no-context")), memory)
    found = shown(memory)
    for pack in range(4):
        main, other = found["", run(pack)], found["", run((pack + 1) % 4)]
        assert main[0] == "" and main[2].count("\n") > 0
        assert found["frozen", run(pack)] == ["", main[1], main[1]]
        assert found["foreign", run(pack)] == other
        assert found["blank", run(pack)] == ["\n" * note.count("\n") for note in main]
        assert found["no-context", run(pack)] == ["", "", ""]
        assert [sorted(note.split("\n")) for note in found["shuffled", run(pack)]] == [
            sorted(note.split("\n")) for note in main
        ]
    assert any(found["shuffled", run(pack)] != found["", run(pack)] for pack in range(4))
    assert verify(memory.path).ok


async def test_the_next_pack_is_of_the_same_seed_and_the_same_repeat(memory: Memory) -> None:
    await evaluate(replace(PLAN, packs=2, more_seeds=(5,), repeats=2, controls=("foreign",)), memory)
    found = shown(memory)
    for seed in (1, 5):
        for repeat in ("", "#1"):
            name = f"frozen-lake:small/eval/{seed}"
            assert found["foreign", f"{name}/0{repeat}"] == found["", f"{name}/1{repeat}"]
            assert found["foreign", f"{name}/1{repeat}"] == found["", f"{name}/0{repeat}"]


async def test_a_loop_takes_notes_of_another_pack_not_of_another_of_its_own_tasks(memory: Memory) -> None:
    """Loops of one pack share what is hidden: their notes are no foreign ones."""
    await evaluate(replace(PLAN, packs=6, packing="ralph-full", controls=("foreign",)), memory)
    found = shown(memory)
    assert found["foreign", f"{run(0)}/1/ralph-full"] == found["", f"{run(1)}/1/ralph-full"]


async def test_the_history_is_what_the_lane_saw_itself(memory: Memory) -> None:
    await evaluate(replace(PLAN, controls=("history",)), memory)
    told = shown(memory)["history", run(0)]
    assert told[0] == "" and told[2].startswith(told[1] + "\n")
    last = told[1].rsplit("\n", 1)[-1]
    assert float(last.rpartition(" ")[2]) in (0.0, 1.0)  # the feedback and the reward end a task


@pytest.mark.parametrize("form", ["compact", "natural"])
async def test_of_a_long_history_the_newest_tasks_that_fit_are_shown(memory: Memory, form: Any) -> None:
    await evaluate(replace(PLAN, packs=1, pack_size=4), memory)

    def told(limit: int) -> str:
        giver = Giver("history", history, memory, ("agent", run(0)), ("agent", run(0)), form, limit)
        return memory.read_sync(lambda conn: history(conn, giver, 3))

    whole = told(100_000)
    assert ("What happened:" in whole) == (form == "natural")
    less = told(len(whole) - 1)
    assert less and whole.endswith(less) and told(len(less) + 1) == less
    assert told(0) == ""


# ---- as many tokens, without a context ----


class Costly:
    """A guess for every step; a call costs `solve` tokens, an update `update`."""

    name, form = "costly", "compact"

    def __init__(self, *, counted: bool = True, cost: int = 10, update: int = 100) -> None:
        self.counted, self.cost, self.update, self._dice = counted, cost, update, random.Random(4)

    async def complete(self, messages: Sequence[Message], *, on_delta: Any = None) -> Completion:
        async def answer(messages: Sequence[Message]) -> Completion:
            noting = messages[0].content.startswith("Update")
            usage = ((self.update if noting else self.cost) - 1, 1) if self.counted else None
            text = "<context>\n1: up\n</context>" if noting else f"Direction {self._dice.randint(1, 4)}"
            return Completion(text, usage=usage, inexact="counted by the test")

        return await record_completion(self.name, messages, {}, answer)


async def attempted(memory: Memory, model: Any) -> Any:
    plan = replace(PLAN, controls=("attempts",))
    world = make_world(plan.world, seed=1, form="compact")
    lanes = lanes_of(plan, world, model)
    await live_all(lanes, memory)
    return lanes[1]


SPENT = """
SELECT r.agent, t.name, t.position, sum(k.prompt_tokens + k.sampled_tokens), t.reward
FROM runs r JOIN tasks t ON t.run_id = r.id JOIN episodes e ON e.run_id = r.id AND e.position = t.position
JOIN calls k ON k.episode_id = e.id GROUP BY r.id, t.position ORDER BY r.id, t.position
"""


async def test_a_task_is_tried_again_for_what_the_main_lane_spent(memory: Memory) -> None:
    lane = await attempted(memory, Costly())
    spent: dict[str, int] = {}
    tries: dict[str, list[tuple[int, float]]] = {}
    for agent, task, _, tokens, reward in memory.read_sync(lambda conn: conn.execute(SPENT).fetchall()):
        if agent == "agent":
            spent[task] = tokens
        else:
            tries.setdefault(task, []).append((tokens, reward))
    assert len(tries) == 12 and max(map(len, tries.values())) > 3
    for task, found in tries.items():
        before = sum(tokens for tokens, _ in found[:-1])
        assert before < spent[task], "every attempt but the first had something left to spend"
        assert found[-1][1] == 1 or before + found[-1][0] >= spent[task], "it ended for a reason"
        assert all(reward < 1 for _, reward in found[:-1])
    best = [max(reward for _, reward in tries[f"{run(pack)}/{at}"]) for pack in range(4) for at in range(3)]
    assert lane.rewards.ravel().tolist() == best
    assert verify(memory.path).ok


async def test_a_reward_of_one_ends_no_attempts_where_a_world_gives_more(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrozenLake, "highest_reward", 4.0, raising=False)
    await attempted(memory, Costly())
    spent: dict[tuple[str, str], int] = {}
    for agent, task, _, tokens, _ in memory.read_sync(lambda conn: conn.execute(SPENT).fetchall()):
        spent[agent, task] = spent.get((agent, task), 0) + tokens
    assert all(spent["agent/attempts", task] >= tokens for (agent, task), tokens in spent.items() if agent == "agent")


async def test_the_first_attempt_is_always_allowed(memory: Memory) -> None:
    """The last task has no update, and the main lane may have failed at once."""
    await attempted(memory, Costly(cost=1, update=2))
    lived = memory.read_sync(
        lambda conn: conn.execute(
            "SELECT count(DISTINCT t.name) FROM tasks t JOIN runs r ON r.id = t.run_id WHERE r.agent = 'agent/attempts'"
        ).fetchone()[0]
    )
    assert lived == 12


async def test_where_nothing_counts_tokens_characters_count(memory: Memory) -> None:
    lane = await attempted(memory, Costly(counted=False))
    assert np.isfinite(lane.rewards).all()
    tries = memory.read_sync(
        lambda conn: conn.execute(
            "SELECT count(*) FROM tasks t JOIN runs r ON r.id = t.run_id WHERE r.agent = 'agent/attempts'"
        ).fetchone()[0]
    )
    assert 12 <= tries < 60


# ---- all of them ----


async def test_all_of_them_end_in_a_sound_file_and_go_on_after_a_stop(memory: Memory) -> None:
    plan = replace(PLAN, packs=3, controls=("all",))
    told: list[str] = []

    def stop(lane: Any, pack: int, outcome: Any) -> None:
        told.append(lane.name)
        if len(told) == 60:
            raise KeyError("stopped by the test")

    with pytest.raises(KeyError):
        await evaluate(plan, memory, Watch(outcome=stop))
    found = await evaluate(plan, memory)
    assert [arm.name for arm in found.arms] == ["with context", *OWN, "memoryless", "perfect"]
    assert all(np.isfinite(arm.rewards).all() for arm in found.arms)
    assert verify(memory.path).ok
    before = {name: lived for name, lived in shown(memory).items() if not name[0]}
    assert before[("", run(1))] == shown(memory)["foreign", run(0)]
    again = await evaluate(plan, memory)
    assert replace(again, seconds=0) == replace(found, seconds=0)


async def test_a_world_that_remembers_does_so_in_every_lane(memory: Memory) -> None:
    plan = Plan("grid-navigation:paper", "scripted:perfect", packs=2, pack_size=2, controls=("all",))
    found = await evaluate(plan, memory)
    assert len(found.arms) == 12 and all(np.isfinite(arm.rewards).all() for arm in found.arms)
    carried = "SELECT count(*) FROM effects x WHERE json_array_length(x.result) > 4"
    assert memory.read_sync(lambda conn: conn.execute(carried).fetchone()[0])
    assert verify(memory.path).ok


async def test_a_loop_over_each_task_averages_over_the_packs_tasks(memory: Memory) -> None:
    found = await evaluate(replace(PLAN, packs=2, controls=("ralph-full",)), memory)
    arm = found.arms[1]
    assert arm.runs[1] == tuple(f"{run(1)}/{task}/ralph-full" for task in range(3))

    def rewards(name: str) -> Any:
        query = "SELECT t.reward FROM tasks t JOIN runs r ON r.id = t.run_id WHERE r.name = ? ORDER BY t.position"
        return memory.read_sync(lambda conn: [row[0] for row in conn.execute(query, (name,))])

    assert arm.rewards[1].tolist() == pytest.approx(np.mean([rewards(name) for name in arm.runs[1]], axis=0).tolist())


async def test_a_difference_stands_beside_every_arm_at_every_position(memory: Memory) -> None:
    found = await evaluate(replace(PLAN, packs=12, controls=("no-context", "perfect")), memory)
    main, bare = found.arms[0], found.arms[1]
    assert main.difference is None and bare.difference is not None
    for at, point in enumerate(bare.difference):
        assert point.mean == pytest.approx((main.rewards - bare.rewards)[:, at].mean())
        assert point.low <= point.mean <= point.high
    said = json.loads(json.dumps(found.json(), allow_nan=False))
    assert said["differences"].keys() == said["controls"].keys() == {"no-context", "perfect"}
    assert said["measures"]["no-context"][1]["updates"]["written"] == 0


# ---- what there is no room for ----


def test_all_is_what_the_plan_has_room_for() -> None:
    world = make_world("frozen-lake:small")
    players = ("memoryless", "perfect")
    assert controls_of(replace(PLAN, controls=("all",)), world) == (*OWN, *players)
    one = controls_of(replace(PLAN, pack_size=1, controls=("all",)), world)
    assert one == ("no-context", "attempts", "ralph-sample", "ralph-full", *players)
    assert "foreign" not in controls_of(replace(PLAN, packs=1, controls=("all",)), world)
    assert "ralph-full" not in controls_of(replace(PLAN, packing="ralph-sample", controls=("all",)), world)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"controls": ("frosen",)}, "did you mean frozen"),
        ({"controls": ("foreign",), "packs": 1}, "use --packs 2 or more"),
        ({"controls": ("foreign",), "packs": 5, "packing": "ralph-full"}, "use --packs 6 or more"),
        ({"controls": ("shuffled",), "pack_size": 1}, "use --pack-size 2 or more"),
        ({"controls": ("ralph-full",), "packing": "ralph-sample"}, "is a Ralph loop beside related tasks"),
    ],
)
def test_a_control_without_room_says_so(plan: dict[str, Any], said: str) -> None:
    with pytest.raises((UsageError, UnknownName), match=said):
        controls_of(replace(PLAN, **plan), make_world("frozen-lake:small"))


def test_a_player_is_none_of_a_world_without_players() -> None:
    class Bare:
        name = "bare"

    with pytest.raises(UsageError, match="perfect is a player of the world, and bare has none"):
        controls_of(replace(PLAN, controls=("perfect",)), Bare())
    assert controls_of(replace(PLAN, controls=("all",)), Bare()) == OWN
