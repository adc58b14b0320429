"""What a scripted player knows of the two computers: read from what the terminal printed, and from its note, in which it is

account anna                          who one is on the server
spool /data/inbox                     where the server takes files from elsewhere
removal force                         or plain
tool zip                              or tar
name MAR_INVOICES_V2.csv              how files are called
srv invoices /srv/alpha/bay           where the files of a subject lie
pc? /home/ben/kelp/lark ...           folders that were not looked into
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cod_agent.environments.terminal.habits import Habit, read_name, stem
from cod_agent.environments.terminal.places import SUBJECTS

SIDE = {False: "pc", True: "srv"}
_NAMED = frozenset(SUBJECTS)
_PROMPT = r"(?:[a-z]+@[a-z0-9.]+:[^\s$]*\$|C:\\[^\s>]*>)"
_LINE = re.compile(rf"^({_PROMPT}) (.*)$", re.MULTILINE)
_LAST = re.compile(rf"(?:^|\n)({_PROMPT})$")
_HEADING = re.compile(r"^((?:/|C:\\)[^\s:]*):$")
_FACT = re.compile(r"^(account|spool|removal|tool|name|pc\??|srv\??) (\S.*)$", re.MULTILINE)
_ACCOUNT = re.compile(r"^The account on the server \S+ is ([a-z]+)\.$", re.MULTILINE)
_SPOOL = re.compile(r"takes files from elsewhere in (/\S+) only$", re.MULTILINE)
_PACKED = {".zip": "zip", ".tar.gz": "tar"}


@dataclass(frozen=True, slots=True)
class Entered:
    """A line that was entered: at which prompt, and what it printed."""

    prompt: str
    line: str
    output: str

    @property
    def away(self) -> bool:
        """Whether it was on the server."""
        return "@192." in self.prompt


def entered_in(text: str) -> Iterator[Entered]:
    """The lines entered according to the prompt of an update."""
    found = list(_LINE.finditer(text))
    for here, after in zip(found, [*found[1:], None], strict=True):
        yield Entered(here[1], here[2], text[here.end() : after.start() if after else len(text)].strip("\n"))


def prompt_in(text: str) -> str:
    """The prompt that a compact observation ends with, "" if it ends with none."""
    found = _LAST.search(text)
    return found[1] if found else ""


def join(folder: str, name: str) -> str:
    """A path in the spelling of the folder's."""
    return folder + ("\\" if "\\" in folder else "/") + name


@dataclass(slots=True)
class Known:
    """What is known; empty where nothing is."""

    account: str = ""
    spool: str = ""
    removal: str = ""
    tool: str = ""
    habit: Habit | None = None
    example: str = ""
    """A name that shows the habit."""
    shelves: dict[bool, dict[str, str]] = field(default_factory=lambda: {False: {}, True: {}})
    """Side (True: the server) -> subject -> folder."""
    unseen: dict[bool, dict[str, None]] = field(default_factory=lambda: {False: {}, True: {}})
    """Folders that are known and were not looked into."""
    files: dict[bool, dict[str, str]] = field(default_factory=lambda: {False: {}, True: {}})
    """Name -> folder, of all files that were listed in this task."""

    @classmethod
    def of(cls, note: str, lines: Iterable[Entered]) -> Known:
        """From a note and what happened since."""
        known = cls()
        known._recall(note)
        for entered in lines:
            known._learn(entered)
        return known

    def text(self) -> str:
        """As a note."""
        plain = {
            "account": self.account,
            "spool": self.spool,
            "removal": self.removal,
            "tool": self.tool,
            "name": self.example,
        }
        lines = [f"{word} {value}" for word, value in plain.items() if value]
        for side, name in SIDE.items():
            lines += [f"{name} {subject} {folder}" for subject, folder in self.shelves[side].items()]
            lines += [f"{name}? {' '.join(self.unseen[side])}"] if self.unseen[side] else []
        return "\n".join(lines)

    def _recall(self, note: str) -> None:
        for word, value in _FACT.findall(note):
            side = word.startswith("srv")
            if word == "name":
                self._named(value)
            elif word.endswith("?"):
                self.unseen[side].update(dict.fromkeys(value.split()))
            elif word in ("pc", "srv"):
                subject, _, folder = value.partition(" ")
                self.shelves[side][subject] = folder
            else:
                setattr(self, word, value)

    def _named(self, name: str) -> str:
        """The subject of a file, "" if it is of none; its name shows the habit."""
        found = read_name(name, _NAMED)
        if found is None:
            return ""
        self.habit, self.example = found[0], name
        return found[1]

    def _learn(self, entered: Entered) -> None:
        output, side = entered.output, entered.away
        if side:
            self.account = entered.prompt.partition("@")[0]
        word = entered.line.partition(" ")[0]
        told = _ACCOUNT.search(output) if word == "cat" else None
        refused = _SPOOL.search(output) if word == "scp" else None
        self.account = told[1] if told else self.account
        self.spool = refused[1] if refused else self.spool
        if word in ("zip", "tar"):
            failed = "command not found" in output
            self.tool = word if not output else ("tar" if word == "zip" else "zip") if failed else self.tool
        if word == "rm":
            forced = entered.line.startswith("rm -f ")
            self.removal = "force" if forced != bool(output) else "plain"
        if word == "ls":
            self._listed(side, output.split("\n"))

    def _listed(self, side: bool, lines: list[str]) -> None:
        folder = ""
        for at, line in enumerate(lines):
            heading = _HEADING.match(line)
            if heading or line.endswith(":"):
                folder = heading[1] if heading else ""
                continue
            if not folder or line.startswith("... "):
                continue
            names = line.split("  ")
            cut = lines[at + 1 : at + 2] and lines[at + 1].startswith("... ")
            self._looked(side, folder, names, bool(cut))

    def _looked(self, side: bool, folder: str, names: list[str], cut: bool) -> None:
        """What a folder holds; `cut`: and something else that was not shown."""
        files = [name for name in names if not name.endswith("/")]
        if not files and not cut and folder not in self.unseen[side]:
            new = (join(folder, name[:-1]) for name in names)
            self.unseen[side].update(dict.fromkeys(each for each in new if each not in self.shelves[side].values()))
        for name in files:
            self.files[side][name] = folder
            packed = next((end for end in _PACKED if name.endswith(end)), "")
            if packed and self.habit and read_name(f"{name.removesuffix(packed)}.{self.habit.extension}", _NAMED):
                self.tool = _PACKED[packed]
            subject = self._named(name)
            if subject:
                self.shelves[side][subject] = folder
        if not cut:
            self.unseen[side].pop(folder, None)


def archive_of(name: str, format: str) -> str:
    """What the archive of a file is called."""
    return f"{stem(name)}.{format}"
