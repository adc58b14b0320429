"""What a policy is cloned from: lives of scripted players, as token sequences with weighted targets.

Every prompt is made by `cod_agent.context.COMPACT` and answered in a real session of the train split, so the policy
learns on the bytes the runtime will show it. Three things differ from plain imitation:

- Targets are the player's whole choice, not its draw: where it would choose evenly among answers, each next token has the
  share of those that go on with it.
- Some turns are *off path*: a random answer without a target, so that the policy also sees where mistakes lead.
- A life may begin with part of the truth as its note, so that every state of the note is practised.

Observations after an answer are targets too, with a smaller weight: who can predict the next map has understood this
one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any, cast

from transformers import PreTrainedTokenizerFast

from cod_agent.context import COMPACT, Message, Trajectory, Turn, message, parse_update
from cod_agent.environments import make_world
from cod_agent.environments.drawn import DrawnWorld
from cod_agent.environments.draws import below, randomness
from cod_agent.environments.players import write_note
from cod_agent.tasks import Feedback, Pack, Task
from cod_train.supervised import Sample
from cod_train.tiny.courses import course_of
from cod_train.tiny.tokenizer import ASSISTANT, END, USER

LAKES = ("frozen-lake:small", "frozen-lake:small", "frozen-lake:small", "frozen-lake:tiny")
"""What the first policies were taught, packs in turn."""

_NOTE_LIMIT = 4000


@dataclass(frozen=True, slots=True)
class Teacher:
    """Who is imitated."""

    remember: bool = True
    """Whether it reads and writes notes; otherwise every note is `null`."""
    off_path: float = 0.1
    """Probability that a turn is answered at random, without a target."""
    head_start: float = 0.4
    """Probability that a life begins with a random part of the truth as its note (only who remembers)."""
    noise: float = 0.0
    """Probability that an answer is random *and imitated*: how a policy is made weak on purpose."""
    forget: float = 0.0
    """Probability, for each line of a new note, that it is left out; imitated too."""
    garble: float = 0.0
    """Probability, for each line left, that it says something else; imitated too."""
    world_weight: float = 0.3
    """Weight of a token of an observation as target; tokens of answers weigh 1."""


class Scribe:
    """Writes lives down as samples."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, teacher: Teacher) -> None:
        self.teacher = teacher
        backend = tokenizer.backend_tokenizer
        self._encode = lru_cache(1 << 16)(lambda text: tuple(backend.encode(text, add_special_tokens=False).ids))
        self._user, self._assistant, self._end = (backend.token_to_id(special) for special in (USER, ASSISTANT, END))

    def life(self, pack: Pack, dice: Random) -> Iterator[Sample]:
        """The episodes of one life through `pack`, a sample each: solve, update, solve, ..., solve."""
        note = self._first_note(pack, dice)
        for position, task in enumerate(pack):
            sample, trajectory, feedback = self._solve(pack, task, note, dice)
            yield sample
            if position < len(pack) - 1:
                prompt = COMPACT.update(task, note, trajectory, feedback)
                answer = self._new_note(pack, prompt[0].content, dice)
                note = parse_update(answer, _NOTE_LIMIT)
                sample = Sample([], [])
                self._hear(sample, prompt[0].content, 0.0)
                self._say(sample, [Counter({token: 1.0}) for token in self._encode(answer)], self._encode(answer))
                yield sample

    def drill(self, prompt: str, answer: str) -> Sample:
        """One question with its answer."""
        sample, said = Sample([], []), self._encode(answer)
        self._hear(sample, prompt, 0.0)
        self._say(sample, [Counter({token: 1.0}) for token in said], said)
        return sample

    def _solve(self, pack: Pack, task: Task, note: str, dice: Random) -> tuple[Sample, Trajectory, Feedback]:
        session, sample = cast(DrawnWorld[Any], pack.environment).start(task), Sample([], [])
        turns: list[Turn] = []
        first = observation = session.reset()
        messages: list[Message] = COMPACT.solve(task, note, first)
        self._hear(sample, messages[0].content, 0.0)
        while True:
            answer, targets = self._answer(pack, messages, dice)
            self._say(sample, targets, self._encode(answer))
            observation = session.step(answer)
            turns.append(Turn(answer, observation))
            if observation.feedback:
                return sample, Trajectory(first, tuple(turns)), observation.feedback
            self._hear(sample, observation.text, self.teacher.world_weight)
            messages += [message("assistant", ("model", answer)), message("user", ("environment", observation.text))]

    def _answer(self, pack: Pack, messages: list[Message], dice: Random) -> tuple[str, list[Counter[int]]]:
        """An answer, and the targets of its tokens."""
        teacher, course, drawn = self.teacher, course_of(pack.environment.name), dice.random()
        if drawn < teacher.noise + teacher.off_path:
            answer = course.wild(messages, dice)
            imitated = drawn < teacher.noise
            return answer, [Counter({token: 1.0} if imitated else {}) for token in self._encode(answer)]
        choices = course.choices(messages, remember=teacher.remember)
        answer = choices[below(dice, len(choices))]
        said, spelt = self._encode(answer), [self._encode(choice) for choice in choices]
        alike = [[other for other in spelt if other[:at] == said[:at]] for at in range(len(said))]
        return answer, [_even(Counter(other[at] for other in others)) for at, others in enumerate(alike)]

    def _new_note(self, pack: Pack, prompt: str, dice: Random) -> str:
        if not self.teacher.remember:
            return write_note("")
        course = course_of(pack.environment.name)
        lines = [line for line in course.noted(prompt).splitlines() if dice.random() >= self.teacher.forget]
        lines = [course.garbled(line, dice) if dice.random() < self.teacher.garble else line for line in lines]
        return write_note("\n".join(lines))

    def _first_note(self, pack: Pack, dice: Random) -> str:
        if not self.teacher.remember or dice.random() >= self.teacher.head_start:
            return ""
        truth, odds = course_of(pack.environment.name).truth(pack, dice), dice.random()
        return parse_update(write_note("\n".join(line for line in truth if dice.random() < odds)), _NOTE_LIMIT)

    def _hear(self, sample: Sample, text: str, weight: float) -> None:
        tokens = self._encode(text)
        sample.ids += [self._user, *tokens, self._assistant]
        if weight:
            before = len(sample.ids) - len(tokens) - 2
            sample.targets += [(before + i, token, weight) for i, token in enumerate(tokens)]

    def _say(self, sample: Sample, targets: list[Counter[int]], said: tuple[int, ...]) -> None:
        before = len(sample.ids) - 1
        for i, target in enumerate([*targets, Counter({self._end: 1.0})]):
            sample.targets += [(before + i, token, weight) for token, weight in target.items()]
        sample.ids += [*said, self._end]


def _even(counts: Counter[int]) -> Counter[int]:
    total = sum(counts.values())
    return Counter({token: count / total for token, count in counts.items()})


def lives(scribe: Scribe, seed: int, step: int, packs: int, worlds: Sequence[str] = LAKES) -> list[Sample]:
    """The samples of one training step; a function of its arguments, so that training resumes exactly."""
    dice = randomness("clone", seed, step)
    made: list[Any] = [make_world(world, seed=seed, split="train", form="compact") for world in worlds]
    return [sample for i in range(packs) for sample in scribe.life(made[i % len(made)].pack(4, step * packs + i), dice)]


def drills(scribe: Scribe, dice: Random, count: int, worlds: Sequence[str]) -> list[Sample]:
    """Tasks whose notes have the answer, of those of `worlds` whose course has some, in turn."""
    made = [course.drill for course in map(course_of, dict.fromkeys(worlds)) if course.drill]
    return [scribe.drill(*made[at % len(made)](dice)) for at in range(count)]


def induction(
    tokenizer: PreTrainedTokenizerFast, dice: Random, count: int = 24, worlds: Sequence[str] = LAKES
) -> list[Sample]:
    """Random pairs of tokens, then the same pairs in another order: each second token is to be recalled.

    A few hundred of these teach looking things up before the task needs it; half of the short ones look like notes.
    """
    courses = [course_of(world) for world in dict.fromkeys(worlds)]
    words = [
        [
            [tokenizer.encode(word, add_special_tokens=False)[0] for word in words]
            for words in (course.keys, course.values)
        ]
        for course in courses
    ]
    length = 3 + below(dice, 8)
    out = []
    for at in range(count):
        facts, codes = words[at % len(words)]
        like_notes = length <= min(len(facts), len(codes)) and dice.random() < 0.5
        keys = _sample(dice, facts if like_notes else range(4, len(tokenizer)), length)
        values = _sample(dice, codes if like_notes else range(4, len(tokenizer)), length)
        pairs = list(zip(keys, values, strict=True))
        again = _sample(dice, pairs, length)
        ids = [token for pair in (*pairs, *again) for token in pair]
        targets = [(i, ids[i + 1], 1.0) for i in range(2 * length, 4 * length, 2)]
        out.append(Sample(ids, targets))
    return out


def _sample(dice: Random, items: Iterable[Any], n: int) -> list[Any]:
    pool = list(items)
    return [pool.pop(below(dice, len(pool))) for _ in range(n)]
