"""FrozenLake-Obscure as an environment: four numbered directions, and which is which is hidden but shared by a pack.

What an agent finds out in one task (by walking) helps in the next ones (by remembering), and nothing else does: maps
are drawn anew for every task. The ice is not slippery. Success is worth 1, everything else 0.

Two forms say the same thing. The natural one explains itself; the compact one, for the shipped tiny policies, is

    @.#*          the player, ice, a hole, the goal
    ....
    Left? Direction 3                 the agent: what it wants, then the number it presses
    Left: Direction 3                 the world: what really happened, or `blocked: Direction 3` at an edge
    ...                               and the map as it is now

A malformed answer ends the episode with reward 0, as in the published environment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from cod_agent.environments.base import SPLITS, Form, Recovery, Split
from cod_agent.environments.frozen_lake import players
from cod_agent.environments.frozen_lake.maps import (
    PRESETS,
    Lake,
    Preset,
    draw_lake,
    draw_mapping,
    neighbours,
    preset_called,
    randomness,
)
from cod_agent.errors import UnknownName, UsageError
from cod_agent.tasks import Feedback, Observation, Pack, Task

WORLD = "frozen-lake"

RULES = """\
You walk on a frozen lake, from where you stand (P) to the goal (G). F is ice, which holds you; H is a hole, and \
who steps into a hole has lost. The ice is not slippery: a step goes one cell up, down, left or right, and a \
step over the edge leaves you where you are.

You can only name one of four numbered directions, 1, 2, 3 and 4. Each of them is one of the four moves (up, \
down, left, right), a different one each, but which is which is not told. Assume nothing about it beforehand: \
every assignment is equally likely. It is the same for all tasks of this series, while the map is a new one each \
time. So what you find out by trying also helps in later tasks.

Each turn you see the effect of your last step and the whole map. Rows are counted from the top and columns from \
the left, both from 0. You have {steps} steps to reach the goal.

Answer each turn with exactly one direction between answer tags, for example:
<answer>3</answer>
Anything else ends the task without success."""

_COMPACT_ANSWER = re.compile(r"(?:(?:Up|Down|Left|Right)\? )?Direction ([1-4])")
_NATURAL_ANSWER = re.compile(r"(?:Direction\s+)?([1-4])")
_TAG, _END_TAG = "<answer>", "</answer>"
_LEGEND = "P you, F ice, H hole, G goal"
_SYMBOLS = {"@": "P", "*": "G", "#": "H", ".": "F"}
_ENDS = {
    "goal": "You reached the goal.",
    "hole": "You fell into a hole.",
    "steps": "You ran out of steps.",
    "invalid": "The answer was malformed: exactly one direction, 1 to 4, between answer tags was expected.",
}


def parse_answer(answer: object, form: Form) -> int | None:
    """The direction an answer names, 1 to 4, or None if it is malformed: not exactly one, or not where it belongs."""
    if not isinstance(answer, str):
        return None
    if form == "compact":
        found = _COMPACT_ANSWER.fullmatch(answer.strip(" \n"))
    else:
        said = answer.rpartition("</think>")[2]
        if said.count(_TAG) != 1 or said.count(_END_TAG) != 1:
            return None
        found = _NATURAL_ANSWER.fullmatch(said.partition(_TAG)[2].partition(_END_TAG)[0].strip())
    return int(found[1]) if found else None


class LakeSession:
    """One walk over one lake; all state of the task is here."""

    def __init__(self, lake: Lake, mapping: dict[int, str], steps: int, form: Form) -> None:
        self._lake, self._mapping, self._limit, self._form = lake, mapping, steps, form
        self._at, self._step, self._over = lake.start, 0, False

    def reset(self) -> Observation:
        """Put the player at the start and look."""
        self._at, self._step, self._over = self._lake.start, 0, False
        return Observation(self._view(""))

    def step(self, answer: str) -> Observation:
        """Take one step; whatever is malformed ends the episode with reward 0.

        Raises:
            UsageError: the episode was already over.
        """
        if self._over:
            raise UsageError("this lake is behind you: the episode is over, start the task again to walk it once more")
        direction = parse_answer(answer, self._form)
        if direction is None:
            return self._end("invalid", "invalid" if self._form == "compact" else "You did not move.")
        before, self._step = self._at, self._step + 1
        move = self._mapping[direction]
        self._at = neighbours(self._lake.size)[before].get(move, before)
        effect = self._effect(direction, move, before)
        if self._at == self._lake.goal:
            return self._end("goal", effect)
        if self._at in self._lake.holes:
            return self._end("hole", effect)
        if self._step >= self._limit:
            return self._end("steps", effect)
        return Observation(self._view(effect), effect)

    def _end(self, how: str, effect: str) -> Observation:
        self._over = True
        compact = self._form == "compact"
        text = effect if compact else f"{effect} {_ENDS[how]}"
        feedback = Feedback(reward=float(how == "goal"), text=how if compact else _ENDS[how])
        return Observation(text, effect, done=True, feedback=feedback)

    def _effect(self, direction: int, move: str, before: int) -> str:
        if self._form == "compact":
            return f"{move if self._at != before else 'blocked'}: Direction {direction}"
        if self._at == before:
            return f"Direction {direction} left you at {self._place(before)}: that way is the edge."
        return f"Direction {direction} took you from {self._place(before)} to {self._place(self._at)}."

    def _view(self, effect: str) -> str:
        size, cells = self._lake.size, self._lake.cells(self._at)
        rows = [cells[start : start + size] for start in range(0, size**2, size)]
        if self._form == "compact":
            return "\n".join([effect, *rows] if effect else rows)
        drawn = "\n".join("\t".join(_SYMBOLS[cell] for cell in row) for row in rows)
        heading = f"Step {self._step + 1} of {self._limit}. {effect or 'You have not moved yet.'}"
        places = f"You are at (row, column) {self._place(self._at)}, the goal is at {self._place(self._lake.goal)}."
        return f"{heading}\n\nThe map ({_LEGEND}):\n{drawn}\n\n{places}"

    def _place(self, cell: int) -> str:
        row, column = divmod(cell, self._lake.size)
        return f"({row}, {column})"


class FrozenLake:
    """The world `frozen-lake`: an `Environment` and the packs to live in it.

    Args:
        preset: tiny (3x3), small (4x4), 5x5, 6x6, paper (4 to 5), paper-hard (6 to 7).
        seed: which packs; any whole number. Equal seeds of the two splits have nothing in common.
        split: train or eval; no map of one, turned or mirrored, is ever drawn in the other.
        form: natural (sentences) or compact (what the shipped tiny policies speak).

    Raises:
        UnknownName: no such preset, split or form.
    """

    recovery: Recovery = "deterministic"
    players = players.PLAYERS

    def __init__(self, preset: str = "small", seed: int = 0, *, split: Split = "eval", form: Form = "natural") -> None:
        self.preset: Preset = preset_called(preset)
        if split not in SPLITS:
            raise UnknownName.among("split", str(split), list(SPLITS))
        if form not in ("natural", "compact"):
            raise UnknownName.among("form", str(form), ["natural", "compact"])
        self.name, self.form, self.seed, self.split = f"{WORLD}:{preset}", form, int(seed), split
        self._preset = preset

    def pack(self, n: int, index: int = 0) -> Pack:
        """The `index`-th pack of `n` tasks. A longer pack of the same index begins with the tasks of a shorter one.

        Raises:
            UsageError: `n` is not positive, or `index` negative.
        """
        if n < 1 or index < 0:
            raise UsageError(f"a pack has at least one task and an index from 0 on, not n={n}, index={index}")
        name = f"{self.name}/{self.split}/{self.seed}/{index}"
        origin = {"preset": self._preset, "split": self.split, "seed": self.seed, "pack": index}
        prompt = "" if self.form == "compact" else RULES.format(steps=self.preset.steps)
        tasks = tuple(Task(id=f"{name}/{i}", prompt=prompt, data={**origin, "index": i}) for i in range(n))
        return Pack(name, tasks, self, origin)

    def packs(self, count: int, n: int) -> Iterator[Pack]:
        """The first `count` packs of `n` tasks."""
        return (self.pack(n, index) for index in range(count))

    def start(self, task: Task) -> LakeSession:
        """A walk over the lake of `task`.

        Raises:
            UsageError: the task is not one of this world and preset.
        """
        data: dict[str, Any] = task.data
        numbers = all(isinstance(data.get(key), int) for key in ("seed", "pack", "index"))
        if not numbers or data.get("preset") != self._preset or data.get("split") not in SPLITS:
            raise UsageError(f"{task.id!r} is no task of {self.name}: make tasks with FrozenLake.pack(n, index)")
        lake, mapping = _drawn(data["preset"], data["split"], data["seed"], data["pack"], data["index"])
        return LakeSession(lake, mapping, self.preset.steps, self.form)


@lru_cache(1024)
def _drawn(preset: str, split: Split, seed: int, pack: int, index: int) -> tuple[Lake, dict[int, str]]:
    """Map and hidden mapping of a task; both are only read, so that sessions may share them."""
    names = (WORLD, preset, split, seed, pack)
    return draw_lake(randomness(*names, index), PRESETS[preset], split), draw_mapping(randomness(*names, "directions"))
