"""The published format: a JSON Lines file of consultations cut from real ones, each with what the doctor did next.

    {"cid": "17_3", "session_id": "17", "diagn": "Common cold", "messages": [{"role": "user", "content": "I cough."}, ...],
     "decision_truth": "continue", "info_truth": "Symptom: fever, Symptom quality: dry cough"}

`decision_truth` is continue or stop; `info_truth` is what the rest of the real consultation brought out. Other fields do not matter.
Consultations of one diagnosis belong together, and to one split: about a quarter of all diagnoses is for evaluation.

Source: the data preparation of Learn2Ask (arXiv 2510.25441) as it is published with Trinity-RFT.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cod_agent.environments.base import Split
from cod_agent.environments.draws import below, of_eval, randomness
from cod_agent.environments.learn2ask.verdicts import Line, Verdict, worst
from cod_agent.errors import UsageError

SUFFIX = ".jsonl"
_DECISIONS = ("continue", "stop")
_WORD = re.compile(r"\w{4,}")
_STEM = 6
"""Letters by which words are compared, so that `coughing` is `cough`."""


@dataclass(frozen=True)
class LogCase:
    """One consultation of a file."""

    diagnosis: str
    lines: tuple[Line, ...]
    missing: tuple[str, ...]
    """Items of `info_truth`, `Kind: what`; none where it was time to stop."""

    @property
    def reference(self) -> tuple[str, ...]:
        return self.missing

    def by_words(self, question: str) -> Verdict:
        """Direct if it has a word of a missing item, related if it has one of the item's kind."""
        said, kinds, items = _words(question), set[str](), set[str]()
        for item in self.missing:
            kind, _, what = item.rpartition(":")
            kinds |= _words(kind)
            items |= _words(what)
        content = worst(["direct" if said & items else "related" if said & kinds else "irrelevant"])
        return Verdict(content, question.count("?") + question.count("？"))

    def gives_away(self, feedback: str, question: str) -> bool:
        known = _words(" ".join([question, *(said for _, said in self.lines)]))
        return bool((_words(" ".join(item.rpartition(":")[2] for item in self.missing)) - known) & _words(feedback))


@dataclass(frozen=True)
class Log:
    """A file of consultations."""

    path: str
    digest: str
    """SHA-256 of its bytes."""
    cases: tuple[LogCase, ...]
    """In the order of the file."""

    @cached_property
    def _of_eval(self) -> frozenset[str]:
        """The diagnoses of the eval split."""
        return frozenset(name for name in {case.diagnosis for case in self.cases} if of_eval(f"diagnosis:{name}"))

    def at(self, split: Split, seed: int, pack: int, index: int) -> LogCase:
        """The consultation at a place. A pack has those of one diagnosis in the order of the file, from a drawn one on, and after the
        last the first again.

        Raises:
            UsageError: no diagnosis of the file belongs to that split.
        """
        ours = [case for case in self.cases if (case.diagnosis in self._of_eval) == (split == "eval")]
        if not ours:
            raise UsageError(f"no diagnosis in {self.path} belongs to the split {split}: give a file with more of them")
        first = ours[below(randomness("learn2ask", self.digest, split, seed, pack), len(ours))]
        akin = [case for case in ours if case.diagnosis == first.diagnosis]
        place = next(number for number, case in enumerate(akin) if case is first)
        return akin[(place + index) % len(akin)]


def read_log(path: str) -> Log:
    """A file of the published format.

    Raises:
        UsageError: it cannot be read, or a line is not as it should be; the message names file, line and field.
    """
    try:
        raw = Path(path).expanduser().read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # there is no such user's home; no file has such a name
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{path!r} cannot be read ({why}): name a JSON Lines file") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}, line {line}: no UTF-8 text ({error.reason})") from None
    lines = enumerate(text.split("\n"), 1)
    cases = tuple(_case(f"{path}, line {number}", line) for number, line in lines if line.strip())
    if not cases:
        raise UsageError(f"{path} has no consultations: one JSON object a line is expected")
    return Log(path, hashlib.sha256(raw).hexdigest(), cases)


def _case(where: str, line: str) -> LogCase:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: no JSON ({error})") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where}: an object is expected, not {type(row).__name__}")
    _text(where, row, "cid")
    diagnosis, decision, info = (_text(where, row, field) for field in ("diagn", "decision_truth", "info_truth"))
    if decision not in _DECISIONS:
        raise UsageError(f"{where}: decision_truth is continue or stop, not {decision!r:.60}")
    missing = tuple(item for item in map(str.strip, info.split(",")) if item) if decision == "continue" else ()
    if decision == "continue" and not missing:
        raise UsageError(f"{where}: info_truth is empty where decision_truth is continue: leave such lines out")
    return LogCase(diagnosis, _lines(where, row.get("messages")), missing)


def _text(where: str, row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        said = "is missing" if field not in row else f"is a text, not {type(value).__name__}"
        raise UsageError(f"{where}: {field} {said}")
    if any("\ud800" <= sign <= "\udfff" for sign in value):
        raise UsageError(f"{where}: {field} is no text, half of a sign (a lone surrogate) is in it")
    return value


def _lines(where: str, messages: Any) -> tuple[Line, ...]:
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: messages is a list with at least one message")
    lines: list[Line] = []
    for number, said in enumerate(messages):
        content = said.get("content") if isinstance(said, dict) else None
        role = said.get("role") if isinstance(said, dict) else None
        if not isinstance(content, str) or role not in ("user", "assistant"):
            raise UsageError(
                f"{where}: messages[{number}] needs a role, user or assistant, and a content, which is a text"
            )
        lines.append(("Patient" if role == "user" else "Doctor", content))
    return tuple(lines)


def _words(text: str) -> set[str]:
    return {word[:_STEM] for word in _WORD.findall(text.lower())}
