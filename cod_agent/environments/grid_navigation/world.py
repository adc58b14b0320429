"""Grid Navigation as an environment: a field of hidden costs that a pack shares, and trips over it with a rook's moves.

What an agent pays for in one task it knows in the next, if it remembers: start, goal and rounds are drawn anew, the field is not.
The reward is 1 minus the mean cost of the cells entered (over 100) if the last of exactly so many moves ends at the goal, else 0.

Some presets remember themselves: what was seen stays on the map of the run's later tasks (`Observation.carried`). The others
begin every task with an empty map, so that the context is what carries.

Two forms say the same thing. The natural one explains itself; the compact one, for the shipped tiny policies, is

    @a1 *c3 2         the world: you are at a1 (top left), the goal is c3, two rounds are left
    a1: 5             costs that are seen, in tens
    c1                the agent: where to
    b1: 3             the world: what is seen now and was not before
    c1: 0
    @c1 *c3 1

A malformed answer or a move that is none ends the episode with reward 0, as in the published environment.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Any

from cod_agent.environments.answers import tagged
from cod_agent.environments.base import MALFORMED, Form, Split
from cod_agent.environments.drawn import DrawnWorld, Place, carried_number, not_carried
from cod_agent.environments.draws import randomness
from cod_agent.environments.grid_navigation.fields import (
    PRESETS,
    Field,
    Preset,
    Trip,
    around,
    draw_field,
    draw_trip,
    name_of,
    way,
)
from cod_agent.environments.grid_navigation.players import PLAYERS
from cod_agent.errors import UsageError
from cod_agent.tasks import Feedback, Observation, Task

WORLD = "grid-navigation"

RULES = """\
You cross a square field of cells, from where you stand to a goal. Entering a cell costs something, from 0 to 99. \
Nobody tells you the costs beforehand: {seeing}

You move as a rook does in chess: along your row or along your column, as far as you like, but not over the edge. You enter \
every cell on the way and the cell where you stop, and you pay for each of them, every time you enter it. Where you \
start costs nothing. In every round you make exactly one move, and you cannot stay where you are. You may cross the \
goal at any time, but after the last round you must stand exactly on it.

If you do, your reward is 1 - (mean cost of the cells you entered) / 100; else it is 0. It is the mean that counts, \
not the sum: a long way over cheap cells is better than a short one over dear cells.

The field is the same for all tasks of this series; start, goal and the number of rounds are new each time. {lasting}

Each turn you see what you know of the map. Rows are counted from the top and columns from the left, both from 0.

Answer each turn with the cell you move to, its row and its column, between answer tags, for example:
<answer>2,5</answer>
Anything else, or a move that is not allowed, ends the task with reward 0."""

_ENTERED = "you see the cost of a cell only when you enter it or start from it."
_NEAR = (
    "you see the costs within a distance of {radius} of where you start and of every cell you enter, diagonally too."
)
_REMEMBERS = "What you have seen stays on your map in later tasks."
_FORGETS = "Your map is empty again with every task, so what you write down about the costs helps in later tasks."

_COMPACT_ANSWER = re.compile(r"([a-z])([1-9][0-9]?)")
_NATURAL_ANSWER = re.compile(r"([0-9]{1,2})\s*,\s*([0-9]{1,2})|\(\s*([0-9]{1,2})\s*,\s*([0-9]{1,2})\s*\)")
_ENDS = {
    "goal": "You are at the goal after the last round.",
    "missed": "You are not at the goal after the last round.",
    "illegal": "That is no move: another cell of your row or your column, inside the field, was expected.",
    MALFORMED: "The answer was malformed: one cell, as row,column, between answer tags was expected.",
}


def parse_answer(answer: object, form: Form) -> tuple[int, int] | None:
    """The (row, column) an answer names, whether or not there is such a cell, or None if it is malformed."""
    if not isinstance(answer, str):
        return None
    if form == "compact":
        found = _COMPACT_ANSWER.fullmatch(answer.strip(" \n"))
        return (int(found[2]) - 1, ord(found[1]) - ord("a")) if found else None
    found = _NATURAL_ANSWER.fullmatch(tagged(answer) or "")
    return (int(found[1] or found[3]), int(found[2] or found[4])) if found else None


class GridSession:
    """One trip over one field; all state of the task is here.

    Args:
        radius: how far one sees.
        seen: cells whose costs are visible from the beginning.
        carries: the number under which the run is to remember what was seen; None: the field forgets.
    """

    def __init__(
        self,
        field: Field,
        trip: Trip,
        *,
        radius: int,
        form: Form,
        seen: Collection[int] = (),
        carries: int | None = None,
    ) -> None:
        self._field, self._trip, self._form = field, trip, form
        self._near, self._before, self._carries = around(field.size, radius), frozenset(seen), carries
        self._begin()

    def _begin(self) -> None:
        self._at, self._round, self._over = self._trip.start, 0, False
        self._seen, self._entered, self._spent = set(self._before), 0, 0
        self._untold: list[int] = self._look([self._at])

    def reset(self) -> Observation:
        """Go to the start and look around."""
        self._begin()
        if self._form == "compact":
            return Observation("\n".join([self._where(), *self._lines(sorted(self._seen))]))
        return Observation(f"{self._heading()}\n\n{self._map()}")

    def step(self, answer: str) -> Observation:
        """Take one move; whatever is malformed or no move ends the episode with reward 0.

        Raises:
            UsageError: the episode was already over.
        """
        if self._over:
            raise UsageError("this trip is behind you: the episode is over, start the task again to make it once more")
        named, size = parse_answer(answer, self._form), self._field.size
        if named is None:
            return self._refused(MALFORMED)
        cells = way(size, self._at, named[0] * size + named[1]) if max(named) < size else None
        if cells is None:
            return self._refused("illegal")
        before, self._at, self._round = self._at, cells[-1], self._round + 1
        self._entered += len(cells)
        self._spent += sum(self._field.costs[cell] for cell in cells)
        new = self._look(cells)
        summary = self._summary(before, cells, new)
        if self._round == self._trip.rounds:
            text = self._told(new) if self._form == "compact" else summary
            return self._end("goal" if self._at == self._trip.goal else "missed", text, summary)
        text = self._told(new) if self._form == "compact" else f"{self._heading()} {summary}\n\n{self._map()}"
        return Observation(text, summary)

    def _look(self, cells: Iterable[int]) -> list[int]:
        """See what is near `cells`; those that were not seen before, in order."""
        new = sorted({near for cell in cells for near in self._near[cell]} - self._seen)
        self._seen.update(new)
        return new

    def _refused(self, how: str) -> Observation:
        if self._form == "natural":
            return self._end(how, "You did not move.", "You did not move.")
        return self._end(how, "invalid" if how == MALFORMED else how, self._summary(self._at, range(0), []))

    def _end(self, how: str, text: str, summary: str) -> Observation:
        self._over = True
        reward = 1 - self._spent / (100 * self._entered) if how == "goal" else 0.0
        compact = self._form == "compact"
        told = ("invalid" if how == MALFORMED else how) if compact else self._judgement(how)
        carried = {"field": self._carries, "seen": sorted(self._seen)} if self._carries is not None else None
        feedback = Feedback(reward=reward, text=told, ending=how)
        return Observation(
            text if compact else f"{text} {_ENDS[how]}", summary, done=True, feedback=feedback, carried=carried
        )

    # ---- the compact form ----

    def _name(self, cell: int) -> str:
        return name_of(*divmod(cell, self._field.size))

    def _where(self) -> str:
        return f"@{self._name(self._at)} *{self._name(self._trip.goal)} {self._trip.rounds - self._round}"

    def _lines(self, cells: Iterable[int]) -> list[str]:
        return [f"{self._name(cell)}: {self._field.costs[cell] // 10}" for cell in cells]

    def _told(self, new: list[int]) -> str:
        return "\n".join([*self._lines(new), self._where()])

    # ---- the natural form ----

    def _place(self, cell: int) -> str:
        row, column = divmod(cell, self._field.size)
        return f"({row}, {column})"

    def _heading(self) -> str:
        places = f"You are at (row, column) {self._place(self._at)}, the goal is {self._place(self._trip.goal)}."
        return f"Round {self._round + 1} of {self._trip.rounds}. {places}"

    def _map(self) -> str:
        size, costs = self._field.size, self._field.costs
        shown = [f"{costs[cell]:2}" if cell in self._seen else "??" for cell in range(size**2)]
        rows = (f"{row:2} | {' '.join(shown[row * size : (row + 1) * size])}" for row in range(size))
        columns = " ".join(f"{column:2}" for column in range(size))
        return "\n".join(["What you know of the costs (?? you do not know):", f"     {columns}", *rows])

    def _judgement(self, how: str) -> str:
        if not self._entered:
            return f"{_ENDS[how]}\n\n{self._map()}"
        mean = f"The {self._entered} cells you entered cost {self._spent / self._entered:.1f} on average."
        return f"{_ENDS[how]} {mean}\n\n{self._map()}"

    def _costs(self, cells: Iterable[int]) -> str:
        return ", ".join(f"{self._place(cell)} {self._field.costs[cell]}" for cell in cells)

    # ---- both ----

    def _summary(self, before: int, cells: range, new: list[int]) -> str:
        """What an update reads of a move: in the compact form all that no summary has told yet."""
        if self._form == "compact":
            untold, self._untold = sorted([*self._untold, *new]), []
            return "\n".join(self._lines(untold)) or "known"
        beside = [cell for cell in new if cell not in cells]
        moved = f"You moved from {self._place(before)} to {self._place(cells[-1])} and paid for {self._costs(cells)}."
        return f"{moved} You also saw {self._costs(beside)}." if beside else moved


class GridNavigation(DrawnWorld[Preset]):
    """The world `grid-navigation`; its presets are tiny (3x3), small (6x6), paper, paper-27b, paper-hard, paper-large, paper-forgets
    and paper-hard-forgets.

    No field of one split, turned or mirrored, is ever drawn in the other.
    """

    world, presets, players = WORLD, PRESETS, PLAYERS

    def __init__(self, preset: str = "small", seed: int = 0, *, split: Split = "eval", form: Form = "natural") -> None:
        super().__init__(preset, seed, split=split, form=form)
        self.remembers = self.preset.remembers

    def rules(self) -> str:
        radius = self.preset.radius
        seeing = _NEAR.format(radius=radius) if radius else _ENTERED
        return RULES.format(seeing=seeing, lasting=_REMEMBERS if self.remembers else _FORGETS)

    def start(self, task: Task, carried: Any = None) -> GridSession:
        """A session of `task`.

        Args:
            carried: what the last observation of the run's task before carried; of another field it says nothing.

        Raises:
            UsageError: the task is not one of this world and preset, or `carried` is nothing that a session of it gave.
        """
        place = self.place(task)
        return self._session(place, carried if self.remembers else None)

    def session(self, place: Place) -> GridSession:
        return self._session(place, None)

    def _session(self, place: Place, carried: Any) -> GridSession:
        field, trip = _drawn(place)
        number = carried_number(WORLD, place.preset, place.split, place.seed, place.pack)
        seen = _checked(carried, number, field) if carried is not None else ()
        return GridSession(
            field,
            trip,
            radius=self.preset.radius,
            form=self.form,
            seen=seen,
            carries=number if self.remembers else None,
        )


def _checked(carried: Any, number: int, field: Field) -> Collection[int]:
    """The cells that a run's environment has seen of the field of that number. Raises: UsageError."""
    if isinstance(carried, dict) and carried.keys() == {"field", "seen"} and type(carried["field"]) is int:
        seen = carried["seen"]
        if carried["field"] != number:
            return ()
        if isinstance(seen, list) and all(type(cell) is int and 0 <= cell < field.size**2 for cell in seen):
            return seen
    raise not_carried("grid-navigation")


@lru_cache(1024)
def _drawn(place: Place) -> tuple[Field, Trip]:
    """Field and trip of a task; both are only read, so that sessions may share them. A preset that forgets has the packs of the one
    that remembers."""
    names, preset = (
        (WORLD, place.preset.removesuffix("-forgets"), place.split, place.seed, place.pack),
        PRESETS[place.preset],
    )
    field = _field(names, place.preset)
    return field, draw_trip(randomness(*names, place.index), field.size, preset)


@lru_cache(1024)
def _field(names: tuple[str, str, Split, int, int], preset: str) -> Field:
    return draw_field(randomness(*names, "field"), PRESETS[preset], names[2])
