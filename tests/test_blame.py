"""Blame: each line of a context knows the task it came from and whose words it quotes, also through forks and adoptions."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from writers import Writer

from cod_agent import CoDAgent, Memory
from cod_agent.memory import read, runs
from cod_agent.memory.verify import verify
from cod_agent.tasks import Feedback, Observation, Task
from cod_agent.trust.blame import Line, blame, encode, follow, quoted

SIGN = "The sign says: the harbour gate opens only at high tide."


class Harbour:
    """Shows a sign, and is done with the first answer."""

    name = "harbour"

    def start(self, task: Task) -> Harbour:
        return self

    def reset(self) -> Observation:
        return Observation(SIGN)

    def step(self, answer: str) -> Observation:
        return Observation(
            "You wait.", done=True, feedback=Feedback(reward=1.0, text="Low tide comes every six hours.")
        )


def known(memory: Memory, run: str, version: int) -> list[tuple[str, int | None, str, tuple[str, str] | None]]:
    lines = memory.read_sync(lambda conn: blame(conn, read.version_id(conn, "a", run, version)))
    return [(line.text, line.position, line.origin, line.run) for line in lines]


async def lived(memory: Memory, *notes: str, run: str = "life", **more: Any) -> None:
    async with CoDAgent("a", model=Writer(*notes), memory=memory, environment=Harbour(), **more) as agent:
        async for _ in agent.run((Task(id=f"t{at}") for at in range(len(notes))), run=run):
            pass


async def test_lines_keep_their_task_while_they_stand_anywhere(memory: Memory) -> None:
    await lived(memory, "one\ntwo", "two\n  one\nthree", "three\n\ntwo\nfour")
    assert known(memory, "life", 1) == [("one", 0, "model", None), ("two", 0, "model", None)]
    assert known(memory, "life", 2) == [
        ("two", 0, "model", None),
        ("  one", 0, "model", None),
        ("three", 1, "model", None),
    ]
    assert [line[:2] for line in known(memory, "life", 3)] == [("three", 1), ("", 2), ("two", 0), ("four", 2)]
    assert verify(memory.path).ok


async def test_a_line_in_the_words_of_the_environment_says_so(memory: Memory) -> None:
    await lived(
        memory, "Gate: opens only at high  tide.\nLow tide comes every six hours.\nIt is a harbour.", "It is a harbour."
    )
    assert [line[2] for line in known(memory, "life", 1)] == ["environment", "environment", "model"]


async def test_a_line_in_the_words_of_a_tool_or_of_the_application_says_so(memory: Memory) -> None:
    note = "the vault code was changed on monday\nthe customer is called Ada Lovelace\nmine"

    def look() -> str:
        return "Log: the vault code was changed on monday."

    async def solver(task: Task, context: str, tools: Any) -> str:
        await tools[0]()
        return "done"

    async with CoDAgent("a", model=Writer(note), memory=memory, solver=solver, tools=[look]) as agent:
        await agent.feedback(await agent.solve(Task(id="t")), 1.0, "the customer is called Ada Lovelace.")
    assert [line[2] for line in known(memory, "life", 1)] == ["tool", "application", "model"]


async def test_what_came_through_a_fork_or_an_adoption_names_its_run(memory: Memory) -> None:
    await lived(memory, "one", "one\ntwo")
    async with CoDAgent("a", model=Writer("two\none\nthree"), memory=memory, environment=Harbour()) as agent:
        async for _ in agent.run([Task(id="f")], run="fork", fork=("life", 2)):
            pass
    there = ("a", "life")
    assert known(memory, "fork", 0) == [("one", 0, "model", there), ("two", 1, "model", there)]
    assert known(memory, "fork", 1) == [
        ("two", 1, "model", there),
        ("one", 0, "model", there),
        ("three", 0, "model", None),
    ]
    row = memory.read_sync(lambda conn: read.version_id(conn, "a", "fork", 1))
    async with CoDAgent("a", memory=memory, updates=False) as agent:
        opened = await agent._opened("life", None, None)
        await memory.write(lambda conn: runs.adopt(conn, opened, row, {"reason": "test"}))
    assert known(memory, "life", 3) == [
        ("two", 1, "model", None),
        ("one", 0, "model", None),
        ("three", 0, "model", ("a", "fork")),
    ]


async def test_it_is_known_when_the_versions_before_are_gone_and_derived_where_a_file_is_older(memory: Memory) -> None:
    await lived(memory, "one", "one\ntwo", "zero\none\ntwo")
    before = known(memory, "life", 3)
    assert [line[1] for line in before] == [2, 0, 1]
    memory.write_sync(lambda conn: conn.execute("UPDATE contexts SET body = NULL WHERE version IN (1, 2)").rowcount)
    assert known(memory, "life", 3) == before and known(memory, "life", 2) == []


async def test_an_older_file_has_no_lines_and_they_are_derived(memory: Memory) -> None:
    await lived(memory, "one", "one\ntwo", "zero\none\ntwo")

    def older(conn: Any) -> None:
        for row_id, sources in conn.execute("SELECT id, sources FROM contexts WHERE sources <> '[]'").fetchall():
            said = json.loads(sources)
            del said[0]["lines"]
            conn.execute("UPDATE contexts SET sources = ? WHERE id = ?", (json.dumps(said), row_id))

    memory.write_sync(older)
    assert known(memory, "life", 3) == [
        ("zero", 2, "model", None),
        ("one", 0, "model", None),
        ("two", 1, "model", None),
    ]


async def test_what_was_given_is_the_applications(memory: Memory) -> None:
    async with CoDAgent(
        "a", model=Writer(), memory=memory, given=lambda run, at: "from outside", environment=Harbour()
    ) as agent:
        async for _ in agent.run([Task(id="t")]):
            pass
    assert known(memory, "life", 1) == [("from outside", None, "application", None)]


def test_a_quotation_has_twenty_characters_on_end() -> None:
    others = "pull the red lever twice"
    assert quoted("so: pull the   red lever tw", others) == "pull the red lever t"
    assert quoted("pull the red lever", others) == "" and quoted("push the red lever twice!", others) == ""


@given(
    st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=8),
    st.lists(st.sampled_from(["a", "b", "d", ""]), max_size=8),
)
def test_as_many_lines_are_kept_as_both_notes_have(before: list[str], after: list[str]) -> None:
    made = follow([Line(text, 0, "model") for text in before], "\n".join(after), 1, {})
    for text in set(after):
        assert sum(not line.new for line in made if line.text == text) <= before.count(text)
    assert sum(count for count, *_ in encode(made)) == len(made)
    assert {line.position for line in made} <= {0, 1}
