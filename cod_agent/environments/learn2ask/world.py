"""Learn2Ask as an environment: ask the patient one question, or stop because nothing that is wanted is missing.

A task is one turn: a dialogue so far, and the doctor's next step. What a clinic wants to know, its protocol, is hidden and shared by a
pack; it decides whether asking or stopping is right, and which questions are good. So what came of earlier patients helps with the
next one, and nothing else does. A wrong decision is worth 0; a right one as much as its content and its form are (`verdicts.reward`).

Two forms say the same thing. The natural one shows the dialogue; the compact one, for the shipped tiny policies, is

    cough 10 | b d f                  the complaint, how many topics there are, and which came up
    ask c                             the agent: a topic, or `stop`
    ask c | b d f                     the world, and the feedback: direct, related, irrelevant or late; stopped or early

A question in the natural form is judged by words, or by a model: `learn2ask:small@openai:NAME`. Instead of a preset, the path of a file
of the published format may stand there (`logs`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import cast

from cod_agent.environments.answers import tagged
from cod_agent.environments.base import MALFORMED, Form, Split
from cod_agent.environments.drawn import DrawnWorld, Place, PlainSession
from cod_agent.environments.draws import randomness
from cod_agent.environments.learn2ask.clinic import PRESETS, ClinicCase, Preset, Protocol, draw_case, draw_protocol
from cod_agent.environments.learn2ask.judging import TRIES, ModelJudge, Unjudged
from cod_agent.environments.learn2ask.logs import SUFFIX, Log, read_log
from cod_agent.environments.learn2ask.players import PLAYERS
from cod_agent.environments.learn2ask.topics import TOPICS
from cod_agent.environments.learn2ask.verdicts import WORTH, Case, Verdict, reward
from cod_agent.errors import UsageError
from cod_agent.tasks import Feedback, Observation, Pack, Task

WORLD = "learn2ask"
STOP = "<stop />"
UNJUDGED = "unjudged"
"""The ending of an episode whose question got no verdict: its reward is lost."""
LONGEST = 1000
"""Characters of a question; what is longer is malformed."""
NAN = float("nan")

_RULES = """\
You are a doctor and talk to a patient online. You read what was said so far, and then do one of two things: ask the patient one \
question, or stop, because all that is wanted is known.

{wanted}

If something that is wanted was not asked for yet, asking is right, and if nothing is missing, stopping is. A wrong decision is worth \
nothing. A question is worth most if it is direct: it asks for something that is missing. It is worth less if it is only related to that, \
and least if it is irrelevant. Ask one question and no more: several are worth less, and the least fitting of them counts. Offer the \
patient two or three options to choose from.

Answer with your question between answer tags, for example:
<answer>Do you have a fever: none, a slight one, or a high one?</answer>
To stop, answer exactly:
<answer>{stop}</answer>
Anything else ends the task without success."""

_PROTOCOL = """\
What is wanted is a protocol: {low} to {high} of the topics below. It is not told, and it is {same}, whatever the complaint is. All else \
that was asked does not matter. Two topics on one line are related.
{topics}"""

_LOGGED = """\
What is wanted is what experienced doctors asked for in consultations like this one. Patients that you see in this series have the same \
illness, so what is worth knowing is much the same."""

_SHARED = "the same for all patients of this series, so what you find out also helps with later ones"
_EACH = "another one for every patient"

_STOPPING = re.compile(r"<? ?/?stop ?/? ?>?[.!]?", re.IGNORECASE)
"""Other spellings of the sign: the decision counts, the form does not."""
_COMPACT = re.compile(r"stop|ask ([a-z](?: [a-z]){0,25})")
_SAID = {
    "direct": "Asking was right, and this was missing: the question was direct.",
    "related": "Asking was right. The question was related to something that is missing, but did not ask for it.",
    "irrelevant": "Asking was right. But the question was irrelevant to what is missing.",
    "late": "Stopping would have been right: nothing that is wanted was missing.",
    "stopped": "Stopping was right: nothing that is wanted was missing.",
    "early": "Asking would have been right: something that is wanted was missing.",
    UNJUDGED: f"The question was not judged: in {TRIES} tries the judge said nothing that is a verdict. The reward is lost.",
}


class _Consultation:
    """One patient; all state of the task is here."""

    def __init__(self, case: Case, preset: Preset, form: Form) -> None:
        self._case, self._preset, self._over = case, preset, False
        self._coded = case if form == "compact" and isinstance(case, ClinicCase) else None
        """The case, if it is spoken of in the compact form."""

    def reset(self) -> Observation:
        """Read the dialogue."""
        self._over = False
        if (case := self._coded) is not None:
            return Observation(f"{case.complaint} {case.topics} | {_letters(case.covered)}")
        return Observation("\n".join(f"{who}: {said}" for who, said in self._case.lines))

    def _taken(self, answer: object) -> Observation | str:
        """How it ended, or the question that a judge has to see.

        Raises:
            UsageError: the episode was already over.
        """
        if self._over:
            raise UsageError("this patient has gone: the episode is over, start the task again to try once more")
        if self._coded is not None:
            return self._decoded(answer, self._coded)
        said = tagged(answer)
        if not said:
            return self._malformed(
                "Exactly one pair of answer tags was expected, with a question or with the sign to stop."
            )
        if STOP in said or _STOPPING.fullmatch(said):
            return self._stopped(1.0 if said == STOP else 0.0)
        if len(said) > LONGEST:
            return self._malformed(f"The question had more than {LONGEST:,} characters.")
        return said if self._case.missing else self._end("late", 0.0)

    def _decoded(self, answer: object, case: ClinicCase) -> Observation:
        found = _COMPACT.fullmatch(answer.strip(" \n")) if isinstance(answer, str) else None
        letters = (found[1] or "").split() if found else []
        asked = frozenset(ord(letter) - ord("a") for letter in letters)
        if found is None or len(asked) < len(letters) or any(topic >= case.topics for topic in asked):
            return self._malformed("invalid")
        if not asked:
            return self._stopped(1.0)
        did = f"ask {_letters(asked)}"
        return self._judged(case.by_topics(asked), did) if case.missing else self._end("late", 0.0, did)

    def _stopped(self, form: float) -> Observation:
        if self._case.missing:
            return self._end("early", 0.0, "stop")
        extra = "" if form else f"But the answer was to be exactly {STOP}."
        return self._end("stopped", reward(self._preset.scoring, 1.0, form), "stop", extra=extra)

    def _judged(self, verdict: Verdict | Unjudged, did: str = "") -> Observation:
        if isinstance(verdict, Unjudged):
            return self._end(UNJUDGED, NAN, record=verdict.record)
        worth = reward(self._preset.scoring, WORTH[verdict.content], verdict.form)
        several = "s" if verdict.questions > 1 else ""
        counted = "" if verdict.questions == 1 else f"It was {verdict.questions or 'no'} question{several}."
        extra = f"{counted} {verdict.feedback}".strip()
        return self._end(verdict.content, worth, did, ending="asked", extra=extra, record=verdict.record)

    def _malformed(self, reason: str) -> Observation:
        self._over = True
        text = reason if self._coded is not None else f"The answer was malformed. {reason}"
        return Observation(text, done=True, feedback=Feedback(reward=0.0, text=text, ending=MALFORMED))

    def _end(
        self, how: str, worth: float, did: str = "", *, ending: str = "", extra: str = "", record: str = ""
    ) -> Observation:
        """The last observation. A judge's own words are on record with it, and not in what an update reads."""
        self._over = True
        given = worth / self._preset.unit
        if self._coded is not None:
            summary, told = f"{did} | {_letters(self._coded.covered)}", how
        else:
            summary = told = f"{_SAID[how]} {extra}".rstrip()
        text = f"{summary}\n\nThe judge: {record}" if record else summary
        return Observation(text, summary, done=True, feedback=Feedback(reward=given, text=told, ending=ending or how))


class Consultation(_Consultation):
    """One patient, with questions judged by what can be said of them without a model."""

    def step(self, answer: str) -> Observation:
        """Ask or stop; whatever is malformed ends the episode with reward 0.

        Raises:
            UsageError: the episode was already over.
        """
        found = self._taken(answer)
        return self._judged(self._case.by_words(found)) if isinstance(found, str) else found


class JudgedConsultation(_Consultation):
    """One patient, with questions judged by a model."""

    def __init__(self, case: Case, preset: Preset, form: Form, judge: ModelJudge) -> None:
        super().__init__(case, preset, form)
        self._judge = judge

    async def step(self, answer: str) -> Observation:
        """Ask or stop, as above. A question without a verdict ends the episode with reward NaN.

        Raises:
            UsageError: the episode was already over.
            ModelError: the judge did not answer; the task stays open.
        """
        found = self._taken(answer)
        return self._judged(await self._judge.verdict(self._case, found)) if isinstance(found, str) else found


class Learn2Ask(DrawnWorld[Preset]):
    """The world `learn2ask`; its presets are small and paper-shared (one protocol a pack), and paper, which has one a task, with the four
    published rewards.

    Args:
        preset: a preset or the path of a `.jsonl` file; then, after an @, the model that judges questions of the natural form.

    Raises:
        UnknownName: no such preset, split, form or model.
        UsageError: the file is not as it should be.
    """

    world, presets, players = WORLD, PRESETS, PLAYERS

    def __init__(self, preset: str = "small", seed: int = 0, *, split: Split = "eval", form: Form = "natural") -> None:
        data, judge = _parts(preset)
        file = data.endswith(SUFFIX)
        # Files have no other form than the natural one; as worlds of one form do, they keep to it, whatever is asked for.
        super().__init__("paper" if file else data, seed, split=split, form="natural" if file else form)
        self._log: Log | None = None
        if file:
            self._log, self._preset = read_log(data), data
            self.players = {}  # type: ignore[misc]  # nobody plays what only people understand
        self.name = f"{WORLD}:{preset}"
        self.highest_reward = reward(self.preset.scoring, 1.0, 1.0) / self.preset.unit
        self._judge = ModelJudge(judge) if judge is not None and self.form == "natural" else None

    def rules(self) -> str:
        if self._log is not None:
            return _RULES.format(wanted=_LOGGED, stop=STOP)
        (low, high), count = self.preset.wanted, self.preset.topics
        pairs = [f"- {one.name}; {other.name}" for one, other in zip(TOPICS[:count:2], TOPICS[1:count:2], strict=True)]
        same = _SHARED if self.preset.shared else _EACH
        wanted = _PROTOCOL.format(low=low, high=high, same=same, topics="\n".join(pairs))
        return _RULES.format(wanted=wanted, stop=STOP)

    def pack(self, n: int, index: int = 0) -> Pack:
        """The `index`-th pack of `n` tasks; see `DrawnWorld.pack`. Of a file, tasks carry the SHA-256."""
        pack = super().pack(n, index)
        if self._log is None:
            return pack
        file = {"file": self._log.digest}
        tasks = tuple(task.model_copy(update={"data": {**task.data, **file}}) for task in pack)
        return Pack(pack.id, tasks, self, {**pack.data, **file})

    def place(self, task: Task) -> Place:
        if self._log is not None and task.data.get("file") not in (None, self._log.digest):
            raise UsageError(f"{self._log.path} is not the file that {task.id!r} was made of: it changed since")
        return super().place(task)

    def session(self, place: Place) -> PlainSession:
        log = self._log
        case = log.at(place.split, place.seed, place.pack, place.index) if log is not None else _drawn(place)
        if self._judge is None:
            return Consultation(case, self.preset, self.form)
        # Its step is to be awaited. Those who play worlds directly have the compact form, in which there is no judge.
        return cast("PlainSession", JudgedConsultation(case, self.preset, self.form, self._judge))


def _parts(named: str) -> tuple[str, str | None]:
    """The preset or path, and the judge if there is one. Paths and models may have an @ in them."""
    before, at, judge = named.partition("@")
    if before not in PRESETS and SUFFIX in named:
        before, at, judge = named.partition(f"{SUFFIX}@")
        before = before + SUFFIX if at else named
    return before, judge if at else None


def _letters(topics: Iterable[int]) -> str:
    return " ".join(chr(ord("a") + topic) for topic in sorted(topics))


def _drawn(place: Place) -> ClinicCase:
    preset, names = PRESETS[place.preset], (WORLD, place.preset, place.split, place.seed, place.pack)
    protocol = _protocol(place.preset, place.split, place.seed, place.pack, 0 if preset.shared else place.index)
    return draw_case(randomness(*names, place.index), preset, protocol)


@lru_cache(4096)
def _protocol(preset: str, split: Split, seed: int, pack: int, index: int) -> Protocol:
    """Of a pack, or of one of its tasks where they share none."""
    return draw_protocol(randomness(WORLD, preset, split, seed, pack, "protocol", index), PRESETS[preset], split)
