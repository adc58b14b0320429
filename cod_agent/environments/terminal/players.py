"""Scripted players of the terminal: a careful clerk, who takes notes or does not.

Both do a job as somebody does who knows the commands: look for what they need to know, one thing after another and only when it is
needed, then do it in the fewest commands. The plan is made anew every turn from what is known by then, and what was done already is
skipped. Where it takes a guess (how things are removed, what packs), either guess is as good. That is a good player, not an upper
bound: it never looks around for the sake of later tasks.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from cod_agent.context import Message
from cod_agent.environments.players import after_note, not_compact, note_in, players_of
from cod_agent.environments.terminal.jobs import DOWN, UP
from cod_agent.environments.terminal.notes import Entered, Known, archive_of, entered_in, join, prompt_in
from cod_agent.environments.terminal.places import LOGIN
from cod_agent.errors import UsageError

MOST_FOLDERS = 16
"""Looked into at once: a listing shows 50 entries."""

_JOB = re.compile(r"^([a-z+]+) (\S+) (\S+) (\S+) @(pc|srv)\n(linux|macos|windows) (?:([a-z]+)@)?([0-9.]+) [0-9]+\n\S+$")

Step = tuple[bool, tuple[str, ...]]
"""On which side (True: the server), and what to enter there: any of these."""
Plan = Generator[Step, None, str]


@dataclass(frozen=True, slots=True)
class Asked:
    """A job as the compact form tells it."""

    verb: str
    thing: str
    place: str
    detail: str
    remote: bool
    system: str
    account: str
    """"" where one has to find out."""
    server: str


def read_job(text: str) -> Asked:
    """The job a compact first observation tells.

    Raises:
        UsageError: there is none.
    """
    found = _JOB.match(text)
    if found is None:
        raise not_compact("terminal")
    verb, thing, place, detail, side, system, account, server = found.groups()
    return Asked(verb, thing, place, detail, side == "srv", system, account or "", server)


class _Clerk:
    """Plans for a job, from what is known."""

    def __init__(self, job: Asked, known: Known) -> None:
        self.job, self.known = job, known
        self.shared = not job.account
        self.home = "~\\" if job.system == "windows" else "~/"
        self.account = f"{job.account or known.account}@{job.server}"
        self.source = not job.remote if job.verb in UP | DOWN else job.remote

    def plan(self) -> Plan:
        """What to do, in order; it ends where it would take what is not known."""
        job, verb = self.job, self.job.verb
        if self.shared and not self.known.account and (job.remote or verb in DOWN):
            yield False, (f"cat {self.home}{LOGIN}",)
        thing = "" if verb == "mkdir" else (yield from self._thing())
        folder, name = _split(thing)
        if verb in UP:
            return (yield from self._up(folder, name))
        at = "" if job.place == "-" else (yield from self._place())
        if verb in DOWN:
            to = self._new() if verb == "download+rename" else name
            yield False, (f"scp {self.account}:{thing} {join(at, to)}",)
            if verb == "download+extract":
                yield False, (_extract(at, name),)
        elif verb == "rename":
            yield job.remote, (f"mv {thing} {join(folder, self._new())}",)
        elif verb in ("move", "copy"):
            yield job.remote, (f"{'mv' if verb == 'move' else 'cp'} {thing} {at}",)
        elif verb == "chmod":
            yield job.remote, (f"chmod {job.detail} {thing}",)
        elif verb == "delete":
            yield job.remote, self._remove(thing)
        elif verb == "pack":
            yield job.remote, self._pack(folder, name, at)[1]
        elif verb == "mkdir":
            yield job.remote, (f"mkdir {join(at, job.detail)}",)
        return ""

    def _up(self, folder: str, name: str) -> Plan:
        """Jobs that end on the server: first all that is to be done here, then what is to be done there."""
        job, verb = self.job, self.job.verb
        sent = name
        if verb.startswith("pack"):
            sent, commands = self._pack(folder, name, folder)
            yield False, commands
        first = f"scp {join(folder, sent)} {self.account}:"
        if self.shared:
            yield False, (f"{first}{self.known.spool or '/srv'}/",)
            if verb == "upload+delete":
                yield False, self._remove(join(folder, name))
        at = yield from self._place()
        to = join(at, job.detail) if verb == "mkdir+upload" else at
        if verb == "mkdir+upload":
            yield True, (f"mkdir {to}",)
        if verb == "backup+replace":
            yield True, (f"cp {join(at, name)} {join(at, name)}.bak",)
        if self.shared:
            yield True, (f"mv {join(self.known.spool, sent)} {to}/",)
        else:
            yield False, (f"{first}{to}/",)
        if verb == "upload+delete" and not self.shared:
            yield False, self._remove(join(folder, name))
        if verb == "upload+chmod":
            yield True, (f"chmod {job.detail} {join(at, name)}",)
        if verb.endswith("extract"):
            yield True, (_extract(at, sent),)
        return ""

    def _thing(self) -> Plan:
        """The path of what the job is about."""
        thing, known = self.job.thing, self.known
        if not self.shared:
            while thing not in known.files[self.source]:
                yield self.source, (self._look(self.source),)
            return join(known.files[self.source][thing], thing)
        subject, _, month = thing.partition("/")
        folder = yield from self._shelf(self.source, subject)
        name = self._called(subject, month)
        archive = archive_of(name, "zip" if known.tool == "zip" else "tar.gz")
        return join(folder, archive if self.job.verb == "download+extract" else name)

    def _place(self) -> Plan:
        """The path of the folder that the job names."""
        if self.shared:
            return (yield from self._shelf(self.job.remote, self.job.place))
        return self.job.place

    def _shelf(self, side: bool, subject: str) -> Plan:
        """The folder of a subject's files, which may have to be found first."""
        while subject not in self.known.shelves[side] or self.known.habit is None:
            yield side, (self._look(side),)
        return self.known.shelves[side][subject]

    def _look(self, side: bool) -> str:
        """What shows the most of what was not seen yet."""
        unseen = list(self.known.unseen[side])[:MOST_FOLDERS]
        if unseen:
            return f"ls . {' '.join(unseen)}"
        if self.shared and side:
            return "ls /srv/*"
        return f"ls {'~/' if side else self.home}*"

    def _called(self, subject: str, month: str) -> str:
        return self.known.habit.name(subject, int(month)) if self.known.habit else ""

    def _new(self) -> str:
        """The name that the job says."""
        subject, _, month = self.job.detail.partition("/")
        return self._called(subject, month) if month else subject

    def _pack(self, folder: str, name: str, at: str) -> tuple[str, tuple[str, ...]]:
        """What the archive is called, and how it is made; where no tool is known, any may be there."""
        known = self.known.tool or ("zip" if self.job.system == "windows" else "")
        any_of = {"zip": ("zip",), "tar": ("tar.gz",)}.get(known, ("zip", "tar.gz"))
        formats = any_of if self.job.detail == "any" else (self.job.detail,)
        ways = tuple(_packing(folder, name, join(at, archive_of(name, format)), format) for format in formats)
        return archive_of(name, formats[0]), ways

    def _remove(self, path: str) -> tuple[str, ...]:
        """Where nothing is known, either way may do."""
        ways = {"force": f"rm -f {path}", "plain": f"rm {path}"}
        known = ways.get(self.known.removal)
        return (known,) if known else tuple(ways.values())


def _packing(folder: str, name: str, archive: str, format: str) -> str:
    if format == "zip":
        return f"zip -jq {archive} {join(folder, name)}"
    return f"tar -c{'j' if format == 'tar.bz2' else 'z'}f {archive} -C {folder} {name}"


def _extract(at: str, archive: str) -> str:
    packed = join(at, archive)
    return f"unzip -q {packed} -d {at}" if archive.endswith(".zip") else f"tar -xf {packed} -C {at}"


def _split(path: str) -> tuple[str, str]:
    """Folder and name."""
    cut = max(path.rfind("/"), path.rfind("\\"))
    return path[:cut], path[cut + 1 :]


def choices(messages: Sequence[Message], *, remember: bool = True) -> list[str]:
    """What a player may enter in a solve episode: equally good lines.

    Raises:
        UsageError: the world does not speak its compact form.
    """
    seen = [said.content for said in messages if said.role == "user"]
    if not seen:
        raise UsageError("a player needs a prompt: there is no user message")
    first = after_note(seen[0])
    job, shown = read_job(first), [first, *seen[1:]]
    answers = [said.content for said in messages if said.role == "assistant"]
    entered = [
        Entered(prompt_in(before), answer, after[: len(after) - len(prompt_in(after))].strip("\n"))
        for before, answer, after in zip(shown, answers, shown[1:], strict=False)
    ]
    away = "@192." in prompt_in(shown[-1])
    lines = _next(job, note_in(seen[0]) if remember else "", entered, away)
    if remember and set(lines) & {each.line for each in entered if each.output}:
        lines = _next(job, "", entered, away)  # what the note says did not work: it is of somewhere else
    return lines


def _next(job: Asked, note: str, entered: Sequence[Entered], away: bool) -> list[str]:
    known = Known.of(note, entered)
    clerk = _Clerk(job, known)
    done = {each.line for each in entered if not each.output}
    for side, commands in clerk.plan():
        if done & set(commands):
            continue
        if side == away:
            return list(commands)
        return [f"ssh {clerk.account}" if side else "exit"]
    return ["pwd"]  # all was done, and still it is not enough


def noted(prompt: str) -> str:
    """The note of a perfect player after a task: the note before it, and what was seen."""
    happened = after_note(prompt).rpartition("\n")[0]  # the last line is the judgement
    return Known.of(note_in(prompt), entered_in(happened)).text()


PLAYERS = players_of(choices, noted)
