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
from functools import lru_cache

from cod_agent.environments.answers import tagged
from cod_agent.environments.base import MALFORMED, Form, Split
from cod_agent.environments.drawn import DrawnWorld, Place
from cod_agent.environments.draws import randomness
from cod_agent.environments.frozen_lake.maps import PRESETS, Lake, Preset, draw_lake, draw_mapping, neighbours
from cod_agent.environments.frozen_lake.players import PLAYERS
from cod_agent.errors import UsageError
from cod_agent.tasks import Feedback, Observation

WORLD = "frozen-lake"

RULES = """\
You walk on a frozen lake, from where you stand (P) to the goal (G). F is ice, which holds you; H is a hole, and \
who steps into a hole has lost. The ice is not slippery: a step goes one cell up, down, left or right, and a \
step over the edge leaves you where you are.

You can only name one of four numbered directions, 1, 2, 3 and 4. Each of them is one of the four moves (up, \
down, left, right), a different one each, but which is which is not told. Assume nothing about it beforehand: \
every assignment is equally likely. {lasting} So what you find out by trying also helps in later tasks.

Each turn you see the effect of your last step and the whole map. Rows are counted from the top and columns from \
the left, both from 0. You have {steps} steps to reach the goal.

Answer each turn with exactly one direction between answer tags, for example:
<answer>3</answer>
Anything else ends the task without success."""

_LASTING = "It is the same for all tasks of this series, while the map is a new one each time."
_SHIFTING = "It is the same for many tasks of this series, then dealt anew without a word, while the map is a new one each time."

_COMPACT_ANSWER = re.compile(r"(?:(?:Up|Down|Left|Right)\? )?Direction ([1-4])")
_NATURAL_ANSWER = re.compile(r"(?:Direction\s+)?([1-4])")
_LEGEND = "P you, F ice, H hole, G goal"
_SYMBOLS = {"@": "P", "*": "G", "#": "H", ".": "F"}
_ENDS = {
    "goal": "You reached the goal.",
    "hole": "You fell into a hole.",
    "steps": "You ran out of steps.",
    MALFORMED: "The answer was malformed: exactly one direction, 1 to 4, between answer tags was expected.",
}


def parse_answer(answer: object, form: Form) -> int | None:
    """The direction an answer names, 1 to 4, or None if it is malformed: not exactly one, or not where it belongs."""
    if not isinstance(answer, str):
        return None
    compact = form == "compact"
    found = (
        _COMPACT_ANSWER.fullmatch(answer.strip(" \n")) if compact else _NATURAL_ANSWER.fullmatch(tagged(answer) or "")
    )
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
            return self._end(MALFORMED, "invalid" if self._form == "compact" else "You did not move.")
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
        told = ("invalid" if how == MALFORMED else how) if compact else _ENDS[how]
        feedback = Feedback(reward=float(how == "goal"), text=told, ending=how)
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


class FrozenLake(DrawnWorld[Preset]):
    """The world `frozen-lake`; its presets are tiny (3x3), small (4x4), small-shifting, 5x5, 6x6, paper (4 to 5), paper-hard (6 to 7).

    No map of one split, turned or mirrored, is ever drawn in the other.
    """

    world, presets, players = WORLD, PRESETS, PLAYERS

    def __init__(self, preset: str = "small", seed: int = 0, *, split: Split = "eval", form: Form = "natural") -> None:
        super().__init__(preset, seed, split=split, form=form)

    def rules(self) -> str:
        return RULES.format(steps=self.preset.steps, lasting=_SHIFTING if self.preset.era else _LASTING)

    def session(self, place: Place) -> LakeSession:
        lake, mapping = _drawn(place)
        return LakeSession(lake, mapping, self.preset.steps, self.form)


@lru_cache(1024)
def _drawn(place: Place) -> tuple[Lake, dict[int, str]]:
    """Map and hidden mapping of a task; both are only read, so that sessions may share them."""
    names, preset = (WORLD, place.preset, place.split, place.seed, place.pack), PRESETS[place.preset]
    era = place.index // preset.era if preset.era else 0
    # The first era has no number of its own: packs that never shift are named as they always were.
    hidden = randomness(*names, "directions", *([era] if era else []))
    return draw_lake(randomness(*names, place.index), preset, place.split), draw_mapping(hidden)
