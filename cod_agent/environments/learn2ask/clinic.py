"""Where the consultations come from: presets, the protocol of a clinic, and dialogues in which it is covered or not.

A protocol is a set of topics. It is complete when all of them came up in the dialogue. A dialogue covers so many topics; with a fixed
chance they are any that hold the whole protocol, otherwise any that do not. So neither their number nor how a dialogue reads says
whether something is missing: only the protocol does. A quarter of all protocols belongs to the eval split.

Source: the task and its reward are those of Learn2Ask (arXiv 2510.25441, also in arXiv 2606.20002); the data are not, see `topics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import TypeVar

from cod_agent.environments.base import Split
from cod_agent.environments.draws import below, between, of_eval, shuffled
from cod_agent.environments.learn2ask.topics import ASIDES, COMPLAINTS, TOPICS, akin, named
from cod_agent.environments.learn2ask.verdicts import Content, Line, Scoring, Verdict, worst

T = TypeVar("T")

STOPPING = 0.35
"""How often nothing is missing."""


@dataclass(frozen=True, slots=True)
class Preset:
    """What kind of clinic a world has. Ranges are inclusive; numbers in them are drawn."""

    topics: int
    """How many of `TOPICS` there are, from the first on. No two kinds of clinic have the same number: players know the kind by it."""
    wanted: tuple[int, int]
    """Topics of a protocol."""
    covered: tuple[int, int]
    """Topics that came up in a dialogue; no fewer than a protocol has."""
    shared: bool = True
    """Whether all tasks of a pack have one protocol."""
    scoring: Scoring = "default"
    unit: float = 4.0
    """What the published reward is divided by."""


def _paper(scoring: Scoring = "default") -> Preset:
    return Preset(topics=12, wanted=(3, 6), covered=(6, 9), shared=False, scoring=scoring, unit=1.0)


PRESETS: dict[str, Preset] = {
    "small": Preset(topics=10, wanted=(3, 5), covered=(5, 7)),
    "paper": _paper(),
    "paper-additive": _paper("additive"),
    "paper-content": _paper("content"),
    "paper-action": _paper("action"),
    "paper-shared": Preset(topics=14, wanted=(3, 6), covered=(6, 9)),
}

Protocol = frozenset[int]
"""Topics, by number."""


@dataclass(frozen=True)
class ClinicCase:
    """One patient of a clinic."""

    complaint: str
    topics: int
    """How many there are."""
    protocol: Protocol
    covered: tuple[int, ...]
    """As they came up."""
    lines: tuple[Line, ...]

    @cached_property
    def open(self) -> Protocol:
        """The topics of the protocol that did not come up."""
        return self.protocol.difference(self.covered)

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(TOPICS[topic].name for topic in sorted(self.open))

    @property
    def reference(self) -> tuple[str, ...]:
        return tuple(f"{TOPICS[topic].name} (near it: {TOPICS[akin(topic)].name})" for topic in sorted(self.open))

    def content(self, topic: int) -> Content:
        """What a question about a topic is."""
        if topic in self.open:
            return "direct"
        return "related" if akin(topic) in self.open else "irrelevant"

    def by_topics(self, asked: Protocol) -> Verdict:
        """Of a question that names its topics."""
        return Verdict(worst(map(self.content, asked)), len(asked))

    def by_words(self, question: str) -> Verdict:
        """Topics are found by words, questions counted by their marks and topics."""
        asked = frozenset(topic for topic in named(question) if topic < self.topics)
        return Verdict(worst(map(self.content, asked)), max(question.count("?") + question.count("？"), len(asked)))

    def gives_away(self, feedback: str, question: str) -> bool:
        return bool(named(feedback) & self.open.union(map(akin, self.open)) - named(question))


def canonical(protocol: Protocol) -> str:
    """What decides the split of a protocol."""
    return "protocol:" + " ".join(TOPICS[topic].name for topic in sorted(protocol))


def draw_protocol(rng: Random, preset: Preset, split: Split) -> Protocol:
    """A protocol of the split: any number of topics in the range, then any topics."""
    while True:
        size = between(rng, *preset.wanted)
        protocol = frozenset(shuffled(rng, range(preset.topics))[:size])
        if of_eval(canonical(protocol)) == (split == "eval"):
            return protocol


def draw_case(rng: Random, preset: Preset, protocol: Protocol) -> ClinicCase:
    """A patient of a clinic with that protocol."""
    names = list(COMPLAINTS)
    complaint, stop, size = names[below(rng, len(names))], rng.random() < STOPPING, between(rng, *preset.covered)
    covered = sorted(protocol)
    if stop:
        others = [topic for topic in range(preset.topics) if topic not in protocol]
        covered += shuffled(rng, others)[: size - len(covered)]
    else:
        while protocol.issubset(covered):
            covered = shuffled(rng, range(preset.topics))[:size]
    covered = shuffled(rng, covered)
    return ClinicCase(complaint, preset.topics, protocol, tuple(covered), _dialogue(rng, complaint, covered))


def _dialogue(rng: Random, complaint: str, covered: list[int]) -> tuple[Line, ...]:
    opening = _any(rng, COMPLAINTS[complaint])
    lines: list[Line] = [("Patient", f"{opening} {_any(rng, ASIDES)}" if rng.random() < 0.5 else opening)]
    for topic in covered:
        question, answers = _any(rng, TOPICS[topic].exchanges)
        lines += [("Doctor", question), ("Patient", _any(rng, answers))]
    return tuple(lines)


def _any(rng: Random, of: tuple[T, ...]) -> T:
    return of[below(rng, len(of))]
