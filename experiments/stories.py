"""Packs as they were lived: read from a run database, and told to somebody who has never seen one.

A database knows all but one thing, the hidden mapping: the world draws it again from the pack's name.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lab

from cod_agent.context import COMPACT, Trajectory, Turn, parse_update
from cod_agent.environments.draws import randomness
from cod_agent.environments.frozen_lake.maps import MOVES, draw_mapping
from cod_agent.environments.frozen_lake.players import facts_in, lines_of, noted
from cod_agent.environments.frozen_lake.world import WORLD
from cod_agent.environments.players import write_note
from cod_agent.memory import history, read, runs
from cod_agent.memory.readonly import look
from cod_agent.memory.runs import Run
from cod_agent.tasks import Feedback, Outcome

AGENT = "agent"
"""The lane of an evaluation that has a context."""
ENDS = {
    "goal": "It reached the goal",
    "hole": "It fell into a hole",
    "steps": "It ran out of steps",
    "invalid": "Its last answer was malformed",
}
ABOUT = (
    "The packs are the first two of the measurement: that rule chose them, not what happened in them. In a map, `@` is the "
    "agent, `*` the goal, `#` a hole and `.` ice. The agent says which move it wants and presses one of four numbered "
    "directions; which move a direction is, it has to find out, and who knows three knows the fourth. A context is shown as "
    "the agent wrote it, `null` if nothing is in it; what is said about right and wrong is for the reader only."
)


@dataclass(frozen=True, slots=True)
class Chapter:
    """One task as it was lived."""

    outcome: Outcome
    trajectory: Trajectory


@dataclass(frozen=True, slots=True)
class Life:
    """One pack as one agent lived it."""

    index: int
    """Which pack."""
    mapping: dict[str, int]
    """What is hidden: the direction of each move."""
    chapters: list[Chapter]


def lives(file: Path) -> list[Life]:
    """The packs of an evaluation's database, in order."""
    with look(file) as conn:
        found = [_life(conn, runs.find_run(conn, AGENT, one.name)) for one in history.find(conn, AGENT)]
    return sorted(found, key=lambda life: life.index)


def _life(conn: sqlite3.Connection, run: Run) -> Life:
    chapters = []
    for at in range(runs.next_position(conn, run.id)):
        known = read.position(conn, run, at)
        trajectory = read.trajectory(conn, int(known.solve_id or 0), known)
        chapters.append(Chapter(read.outcome(conn, run, at), trajectory))
    data = chapters[0].outcome.task.data
    names = (data["preset"], data["split"], data["seed"], data["pack"])
    drawn = draw_mapping(randomness(WORLD, *names, "directions"))
    return Life(data["pack"], {move: number for number, move in drawn.items()}, chapters)


def facts(context: str) -> set[tuple[str, int]]:
    """The distinct facts of a context: (move, direction)."""
    return {(move, number) for move, number in facts_in(context) if move in MOVES}


def learnt(chapters: Sequence[Chapter]) -> list[set[tuple[str, int]]]:
    """After each task, what the player `perfect` would have noted had it seen what this agent saw.

    It goes by steps that were made and by elimination, never by bumps at an edge, and forgets nothing.
    """
    note, out = "", []
    for chapter in chapters:
        feedback = chapter.outcome.feedback or Feedback()
        asked = COMPACT.update(chapter.outcome.task, note, chapter.trajectory, feedback)
        known = noted(asked[0].content)
        note = parse_update(write_note(lines_of(known)), limit=4000)
        out.append(set(known.items()))
    return out


# ---- keeping and telling ----


def kept(life: Life, model: str) -> lab.Found:
    """A life as plain JSON, with all that `told` tells."""
    return {"pack": life.index, "model": model, "mapping": life.mapping, "tasks": [_task(one) for one in life.chapters]}


def _task(chapter: Chapter) -> lab.Found:
    outcome, first = chapter.outcome, chapter.trajectory.first
    return {
        "map": first.text.split("\n") if first else [],
        "steps": [_step(turn) for turn in chapter.trajectory.turns],
        "end": outcome.feedback.text if outcome.feedback else outcome.reason,
        "reward": outcome.reward,
        "update": outcome.update,
        "reason": outcome.reason,
        "version": outcome.version,
        "context": outcome.context,
    }


def _step(turn: Turn) -> str:
    """`wanted Left, pressed 3, went Up`."""
    answer, happened = turn.answer.removeprefix("Answer: ").strip(), turn.observation.summary or turn.observation.text
    wanted, asked, pressed = answer.rpartition("? ")
    move = happened.partition(":")[0].strip()
    if move not in MOVES and move != "blocked":
        return f'said "{answer}", which is no step'
    went = "went nowhere: that way is the edge" if move == "blocked" else f"went {move}"
    start = f"wanted {wanted}, " if asked else ""
    return f"{start}pressed {pressed.removeprefix('Direction ')}, {went}"


def called(story: lab.Found) -> str:
    """`story-0-embedded-base`: what a page calls it."""
    return re.sub(r"[^a-z0-9]+", "-", f"story-{story['pack']}-{story['model']}".lower())


def told(story: lab.Found) -> str:
    """A life as Markdown: what is hidden, and each task with its map, its steps, its end and the context after it."""
    hidden = ", ".join(
        f"direction {number} is {move}" for move, number in sorted(story["mapping"].items(), key=lambda pair: pair[1])
    )
    parts = [f"**Pack {story['pack']}, lived by `{story['model']}`.** What the agent is not told: {hidden}."]
    for number, task in enumerate(story["tasks"], 1):
        steps = "\n".join(f"{at}. {step}" for at, step in enumerate(task["steps"], 1))
        reward = "lost" if task["reward"] is None else f"{task['reward']:g}"
        end = f"{ENDS.get(task['end'], task['end'])}: reward {reward}."
        parts += [
            f"*Task {number}*",
            _block("\n".join(task["map"])),
            steps,
            f"{end} {_written(task, story['mapping'])}".rstrip(),
        ]
        if task["update"] != "none":
            parts.append(_block(task["context"] or COMPACT.nothing))
    return "\n\n".join(parts)


def _written(task: lab.Found, mapping: dict[str, int]) -> str:
    """What the update made of the context, and how right that is."""
    if task["update"] == "none":
        return "The pack ends here, so no context is written."
    judged = _judged(task["context"], mapping)
    if task["update"] == "kept":
        return f"The update was refused ({task['reason']}), so version {task['version']} stays, {judged}:"
    return f"It writes version {task['version']} of its context, {judged}:"


def _judged(context: str, mapping: dict[str, int]) -> str:
    """`with 3 facts, 2 of them right`."""
    written = facts(context)
    right = len(written & set(mapping.items()))
    if not written:
        return "without a fact"
    if len(written) == 1:
        return f"with one fact, which is {'right' if right else 'wrong'}"
    return f"with {len(written)} facts, {'all' if right == len(written) else right or 'none'} of them right"


def _block(text: str) -> str:
    """A code block, whatever stands in the text."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"
