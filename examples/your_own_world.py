"""A world of your own: a market whose prices are hidden, and the same for all tasks of a pack.

    cod eval your_own_world:Market --model scripted:perfect --controls none --packs 64

docs/environments/your-own.md builds it step by step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cod_agent import Feedback, Message, Observation
from cod_agent.environments import Form, Split
from cod_agent.environments.answers import tagged
from cod_agent.environments.base import MALFORMED
from cod_agent.environments.drawn import DrawnWorld, Place
from cod_agent.environments.draws import below, between, of_eval, randomness
from cod_agent.environments.players import after_note, note_in, players_of


@dataclass(frozen=True)
class Stall:
    """What kind of market."""

    fruits: tuple[str, ...]
    dearest: int
    """Most that a kilo costs, in euros."""


def prices_at(place: Place, stall: Stall) -> dict[str, int]:
    """What is hidden: the price of each fruit, the same for a pack. A list of prices belongs to one split only."""
    hidden = randomness("market", place.preset, place.split, place.seed, place.pack, "prices")
    while True:
        prices = {fruit: between(hidden, 1, stall.dearest) for fruit in stall.fruits}
        if of_eval(str(prices)) == (place.split == "eval"):
            return prices


class Sale:
    """One question, one answer; all state of the task is here."""

    def __init__(self, fruit: str, kilos: int, price: int, form: Form) -> None:
        self.fruit, self.kilos, self.price, self.compact = fruit, kilos, price, form == "compact"

    def reset(self) -> Observation:
        return Observation(
            f"{self.fruit} {self.kilos}" if self.compact else f"{self.kilos} kg of {self.fruit}, please."
        )

    def step(self, answer: str) -> Observation:
        said = answer if self.compact else tagged(answer)
        euros = said.strip() if isinstance(said, str) else ""
        if not re.fullmatch("[0-9]{1,4}", euros):
            return self.over("malformed", "", MALFORMED)
        seen = f"{self.fruit}: {self.price}" if self.compact else f"A kilo of {self.fruit} costs {self.price} euros."
        right = int(euros) == self.kilos * self.price
        return self.over("sold" if right else "refused", seen, "sold" if right else "refused")

    def over(self, told: str, seen: str, ending: str) -> Observation:
        feedback = Feedback(reward=float(ending == "sold"), text=told, ending=ending)
        return Observation(seen, seen, done=True, feedback=feedback)


def facts(text: str) -> dict[str, str]:
    """Every line `FRUIT: PRICE`."""
    return dict(re.findall(r"^([a-z]+): ([0-9]+)$", text, re.MULTILINE))


def choices(messages: Sequence[Message], *, remember: bool = True) -> list[str]:
    """What a player may answer: the price it knows, or any."""
    prompt = messages[0].content
    fruit, kilos = after_note(prompt).split()
    known = facts(note_in(prompt)) if remember else {}
    prices = [known[fruit]] if fruit in known else range(1, 10)
    return [str(int(kilos) * int(price)) for price in prices]


def noted(prompt: str) -> str:
    """What the remembering player notes: what it knew, and what it saw."""
    known = {**facts(note_in(prompt)), **facts(after_note(prompt))}
    return "\n".join(f"{fruit}: {price}" for fruit, price in known.items())


class Market(DrawnWorld[Stall]):
    """The world; `fair` has more fruits to know."""

    world = "market"
    presets = {
        "small": Stall(("apples", "melons", "plums"), 9),
        "fair": Stall(("figs", "kiwis", "limes", "pears", "quinces"), 9),
    }
    players = players_of(choices, noted)

    def __init__(self, preset: str = "small", seed: int = 0, *, split: Split = "eval", form: Form = "natural") -> None:
        super().__init__(preset, seed, split=split, form=form)

    def rules(self) -> str:
        return (
            "You sell fruit by weight. What a kilo costs is a whole number of euros from 1 to 9, and is not told beforehand; it is the "
            "same for all customers of this series. Name the price of what is asked for, as <answer>12</answer>."
        )

    def session(self, place: Place) -> Sale:
        own = randomness(self.world, place.preset, place.split, place.seed, place.pack, place.index)
        fruit = self.preset.fruits[below(own, len(self.preset.fruits))]
        return Sale(fruit, between(own, 2, 6), prices_at(place, self.preset)[fruit], self.form)
