"""The write gate: what an update wrote is looked at before a task is solved with it.

    CoDAgent(..., gate="quarantine")

Three policies. `open`: what an update writes is in force at once. `quarantine`: what trips a check (`cod_agent.trust.suspicions`), a
limit or a judge of your own is held back, everything else is in force. `review`: every update is held back until somebody decides. A held
version is on record like any other, with its findings; the next task is solved with the version before it, and the next update starts
from that.
`cod_agent.trust.review` decides, or `cod context review`, or canary tasks (`cod_agent.trust.canary`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cod_agent.errors import UnknownName, UsageError
from cod_agent.trust.blame import Line
from cod_agent.trust.suspicions import CHECKS, Check, Finding, Proposal

if TYPE_CHECKING:
    from cod_agent.context import Trajectory
    from cod_agent.tasks import Outcome, Pack, Task

Policy = Literal["open", "quarantine", "review"]
POLICIES: tuple[Policy, ...] = ("open", "quarantine", "review")

MAX_CHANGE = 0.75
"""Share of the old note's lines that may go in one update, under `quarantine`."""
MAX_NEW = 1500
"""Characters of new lines in one update, under `quarantine`."""
SAID = 5
"""Findings that a reason spells out; the version has all of them."""
SMALL = 4
"""A note of fewer lines may change altogether: it is only beginning."""

Judge = Callable[[Proposal], Iterable[Finding] | Awaitable[Iterable[Finding]]]
"""An application's own check, such as a classifier; plain or async. It is asked again where a crash came before the commit."""

Misbehaved = Callable[["Outcome", "Trajectory"], str]
"""What a canary task showed that it must not have, or ""."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of an update."""

    outcome: Literal["live", "held", "refused"]
    findings: tuple[Finding, ...] = ()

    @property
    def reason(self) -> str:
        """In words; "" for an update that is in force."""
        if self.outcome == "live":
            return ""
        said, more = self.findings[:SAID], len(self.findings) - SAID
        words = [*map(str, said), *([f"and {more} more"] if more > 0 else [])]
        return "; ".join(words) or "review: every update waits for a decision"

    def json(self) -> list[list[Any]]:
        """Its findings, as `contexts.sources` keeps them: [kind, why, line, text]."""
        return [[one.kind, one.why, one.line, one.text] for one in self.findings]


class WriteGate:
    """What an update has to pass.

    Args:
        policy: see above.
        checks: which of the built-in checks, under `quarantine` and `review`; all of `cod_agent.trust.suspicions.CHECKS` if not given.
        judge: asked after them; what it finds counts as they do.
        max_change: share of the old note's lines (of `SMALL` or more) that may go in one update. None: `MAX_CHANGE` under
            `quarantine`, no limit otherwise.
        max_new: characters that new lines may have in one update. None: `MAX_NEW` under `quarantine`, no limit otherwise.
            What is beyond a limit is held back; under `open` it is refused, and the last good context stays.
        canaries: what a held version is tried on, beside the version in force (see `cod_agent.trust.canary`): a pack, or tasks of
            the agent's own environment. Their tools are run.
        misbehaved: looks at each canary task that was lived with a held version; what it says refuses the version.

    Raises:
        UnknownName: no such policy.
        UsageError: a limit makes no sense, or there are canaries and nothing is held.
    """

    def __init__(
        self,
        policy: Policy = "quarantine",
        *,
        checks: Sequence[Check] = CHECKS,
        judge: Judge | None = None,
        max_change: float | None = None,
        max_new: int | None = None,
        canaries: Pack | Sequence[Task] = (),
        misbehaved: Misbehaved | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise UnknownName.among("policy of the write gate", str(policy), list(POLICIES))
        if max_change is not None and not 0 <= max_change <= 1:
            raise UsageError(f"max_change is a share of the note's lines, from 0 to 1, not {max_change}")
        if max_new is not None and max_new < 0:
            raise UsageError(f"max_new is a number of characters, not {max_new}")
        if policy == "open" and (len(canaries) or judge is not None):
            raise UsageError(
                "under the policy open nothing is held back to be judged or tried: take quarantine or review"
            )
        self.policy: Policy = policy
        self.canaries, self.misbehaved = canaries, misbehaved
        self._checks, self._judge = (() if policy == "open" else tuple(checks)), judge
        strict = policy == "quarantine"
        self._max_change = MAX_CHANGE if max_change is None and strict else max_change
        self._max_new = MAX_NEW if max_new is None and strict else max_new

    async def decide(self, proposal: Proposal) -> Verdict:
        """What becomes of an update. One that changes nothing is in force, whatever the policy."""
        if proposal.body == proposal.before:
            return Verdict("live")
        findings = [*self._limits(proposal)]
        for check in self._checks:
            findings += check(proposal)
        if self._judge is not None:
            said = self._judge(proposal)
            findings += _findings(await said if isinstance(said, Awaitable) else said)
        if self.policy == "review":
            return Verdict("held", tuple(findings))
        if not findings:
            return Verdict("live")
        return Verdict("refused" if self.policy == "open" else "held", tuple(findings))

    def _limits(self, proposal: Proposal) -> Iterable[Finding]:
        before = [line for line in proposal.before.splitlines() if line.strip()]
        if self._max_change is not None and len(before) >= SMALL:
            gone = len(before) - sum(bool(line.text.strip()) and not line.new for line in proposal.lines)
            if gone > self._max_change * len(before):
                yield Finding(
                    "change", f"{gone} of {len(before)} lines of the note would go, the limit is {self._max_change:.0%}"
                )
        if self._max_new is not None:
            written = sum(len(text) for _, text in proposal.new)
            if written > self._max_new:
                yield Finding("length", f"{written} characters are new, the limit is {self._max_new}")

    def settings(self) -> dict[str, Any]:
        """What a run keeps of it; nothing for a gate that is open."""
        return {} if self.policy == "open" else {"gate": self.policy}


def _findings(said: Any) -> list[Finding]:
    """What a judge gave. Raises: UsageError, where that is something else: the update is decided when it is asked again."""
    found = list(said) if isinstance(said, Iterable) and not isinstance(said, str) else [said]
    if any(not isinstance(one, Finding) for one in found):
        raise UsageError(
            f"the gate's judge gave {said!r:.60}: it gives findings, [Finding(kind, why), ...], and [] for none"
        )
    return found


OPEN_GATE = WriteGate("open")


def gate_of(gate: WriteGate | str | None) -> WriteGate:
    """A gate, or the one of that policy; None is open.

    Raises:
        UnknownName: no such policy.
    """
    if isinstance(gate, WriteGate):
        return gate
    return OPEN_GATE if gate is None or gate == "open" else WriteGate(gate)  # type: ignore[arg-type]


__all__ = ["CHECKS", "Check", "Finding", "Judge", "Line", "Policy", "Proposal", "Verdict", "WriteGate", "gate_of"]
