"""The shell: a line of text becomes commands, words, and what they do to two simulated hosts. No real command is ever run.

A line is split by its quotes and by `&&` and `;`, its words are expanded (`~`, `$VAR`, on Windows `%VAR%`, and `*` and `?` in the last
part of a path), and each command is a function of this package, found by its name. Pipes, redirections and whatever else a real shell
could do are refused with words.

What in a word was not quoted and has a meaning is marked by a character that no line may contain (lines are printable text).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cod_agent.environments.terminal.filesystem import Folder, Host, Path, Refusal

MOST_WORDS = 60
"""Of a command, expanded."""
MOST_LINES, LONGEST_LINE, LONGEST_OUTPUT = 70, 2000, 6000
"""Of an output; what is more is cut."""

STAR, ONE, HOME, VARIABLE, PERCENT = "\ue000", "\ue001", "\ue002", "\ue003", "\ue004"
_MEANING = {"*": STAR, "?": ONE, "$": VARIABLE}
_PLAIN = str.maketrans({STAR: "*", ONE: "?", HOME: "~", VARIABLE: "$", PERCENT: "%"})
_REFUSED = {
    "|": "pipes are not part of this shell",
    ">": "redirections are not part of this shell",
    "<": "redirections are not part of this shell",
    "&": "jobs in the background are not part of this shell: join commands with && or ;, not with one &",
    "`": "substitution of commands is not part of this shell",
    "(": "subshells are not part of this shell",
    ")": "subshells are not part of this shell",
}

_REFUSED_UNIX = {"{": "braces are not expanded by this shell", "[": "sets of characters are not expanded by this shell"}

_RUN = re.compile(r"[A-Za-z0-9_./:@=+,-]+")
"""What means itself; only here to be quick."""

Link = Literal["", "&&", ";"]
Command = tuple[Link, list[str]]
"""What stands before it, and its words with marks."""


def split(line: str, *, windows: bool) -> list[Command]:
    """The commands of a line. Raises: Refusal, for what this shell does not know."""
    commands: list[Command] = [("", [])]
    word: str | None = None
    quote, at = "", 0
    while at < len(line):
        here, step = line[at], 1
        if quote:
            if here == quote:
                quote = ""
            elif here == "\\" and quote == '"' and not windows and line[at + 1 : at + 2] in ('"', "\\", "$", "`"):
                word, step = (word or "") + line[at + 1], 2
            else:
                word = (word or "") + _marked(here, quote == '"', windows, glob=False)
        elif here == '"' or (here == "'" and not windows):
            quote, word = here, word or ""
        elif here == "\\" and not windows:
            if at + 1 == len(line):
                raise Refusal("nothing follows the last backslash")
            word, step = (word or "") + line[at + 1], 2
        elif here.isspace() or here == ";" or line.startswith("&&", at):
            if word is not None:
                commands[-1][1].append(word)
                word = None
            if not here.isspace():
                if not commands[-1][1]:
                    raise Refusal(f"syntax error near unexpected token '{here}'")
                step = 1 if here == ";" else 2
                commands.append((";" if here == ";" else "&&", []))
        elif here in _REFUSED:
            raise Refusal(_REFUSED[here])
        elif here in _REFUSED_UNIX and not windows and not (word or "").endswith(VARIABLE):
            raise Refusal(_REFUSED_UNIX[here])
        elif here == "~" and word is None:
            word = HOME
        else:
            run = _RUN.match(line, at)
            word = (word or "") + (run[0] if run else _marked(here, True, windows, glob=True))
            step = len(run[0]) if run else 1
        at += step
    if quote:
        raise Refusal(f"unexpected end of the line while looking for a matching {quote}")
    if word is not None:
        commands[-1][1].append(word)
    if not commands[-1][1] and commands[-1][0] == "&&":
        raise Refusal("syntax error: nothing follows &&")
    return [command for command in commands if command[1]]


def _marked(letter: str, active: bool, windows: bool, *, glob: bool) -> str:
    if not active or (letter in "*?" and not glob) or (letter == "$" and windows):
        return letter
    return PERCENT if letter == "%" and windows else _MEANING.get(letter, letter)


def plain(word: str) -> str:
    """A word without marks, as it was written."""
    return word.translate(_PLAIN)


def matches(pattern: str, name: str) -> bool:
    """Whether a name fits a pattern with marks. In time no more than the product of their lengths."""
    at = here = 0
    star, tried = -1, 0  # where the last star stands, and up to where in the name it reaches
    while here < len(name):
        if at < len(pattern) and pattern[at] in (ONE, name[here]):
            at, here = at + 1, here + 1
        elif at < len(pattern) and pattern[at] == STAR:
            star, tried, at = at, here, at + 1
        elif star >= 0:
            tried += 1
            at, here = star + 1, tried
        else:
            return False
    return all(mark == STAR for mark in pattern[at:])


@dataclass(slots=True)
class Result:
    """What came of a line."""

    lines: list[str] = field(default_factory=list)
    ok: bool = True
    """Of the last command."""
    count: int = 0
    """How many commands were run, those handed to `ssh` too."""

    @property
    def text(self) -> str:
        """The output, cut."""
        most = MOST_LINES
        lines = [line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + " ..." for line in self.lines[:most]]
        text = "\n".join(lines if len(self.lines) <= most else [*lines, f"... {len(self.lines) - most} more lines"])
        return text if len(text) <= LONGEST_OUTPUT else text[:LONGEST_OUTPUT] + " ..."


class Shell:
    """Where one is, on two hosts. Commands change it and the hosts.

    Args:
        commands: name -> what runs it: (shell, name, words) to lines of output; a `Refusal` of whole lines if it fails.
    """

    def __init__(self, local: Host, remote: Host, commands: Mapping[str, Runner]) -> None:
        self.local, self.remote, self._commands = local, remote, commands
        self.host = local
        self.at: dict[bool, Path] = {False: local.facts.home, True: remote.facts.home}
        self.before: dict[bool, Path] = dict(self.at)
        self._most, self._done, self._result = 0, _never, Result()

    @property
    def away(self) -> bool:
        """Whether one is logged in at the server."""
        return self.host is self.remote

    @property
    def cwd(self) -> Path:
        return self.at[self.away]

    def path(self, text: str) -> Path:
        """A path on the present host. Raises: Refusal."""
        return self.host.path(text, self.cwd)

    @property
    def prompt(self) -> str:
        facts, at = self.host.facts, self.cwd
        if self.host.windows:
            return f"{self.host.shown(at)}>"
        inside = at[: len(facts.home)] == facts.home
        where = "/".join(["~", *at[len(facts.home) :]]) if inside else self.host.shown(at)
        return f"{facts.user}@{facts.name}:{where}$"

    def run(self, line: str, most: int, done: Callable[[], bool]) -> Result:
        """Run a line: at most so many commands, and none any more once it is done."""
        self._most, self._done, self._result = most, done, Result()
        self.chain(line)
        return self._result

    def chain(self, line: str, *, inside: bool = False) -> None:
        """The commands of a line, one after the other; `&&` goes on only after success. `inside`: only while one is at the server."""
        result = self._result
        try:
            commands = split(line, windows=self.host.windows)
        except Refusal as reason:
            result.lines.append(f"shell: {reason}")
            result.ok, result.count = False, result.count + 1
            return
        for link, words in commands:
            if self._done() or (inside and not self.away):
                return
            if link == "&&" and not result.ok:
                continue
            if result.count >= self._most:
                result.lines.append("shell: the rest of the line was not run: it has too many commands")
                return
            result.count += 1
            self._command(words)

    def _command(self, words: list[str]) -> None:
        result = self._result
        try:
            name, *args = self._expanded(words)
            result.ok = True  # unless the commands that one hands to the server fail
            result.lines += self._runner(name)(self, name, args)
        except Refusal as reason:
            result.lines += str(reason).split("\n")
            result.ok = False

    def _runner(self, name: str) -> Runner:
        run = self._commands.get(name.lower() if self.host.windows else name)
        if run is None or name.lower() in self.host.facts.missing:
            if self.host.windows:
                raise Refusal(f"'{name}' is not recognized as an internal or external command.")
            raise Refusal(f"{name}: command not found")
        return run

    # ---- expansion ----

    def _expanded(self, words: list[str]) -> list[str]:
        out: list[str] = []
        for word in words:
            out += self._globbed(self._variables(word))
            if len(out) > MOST_WORDS:
                raise Refusal("shell: Argument list too long")
        return out

    def _variables(self, word: str) -> str:
        home = self.host.shown(self.host.facts.home)
        if word == HOME or word.startswith((HOME + "/", HOME + "\\")):
            word = home + word[1:]
        values = {"HOME": home, "USER": self.host.facts.user, "PWD": self.host.shown(self.cwd)}
        if self.host.windows:
            return _percents(word, {"USERPROFILE": home, "USERNAME": self.host.facts.user, **values})
        head, *rest = word.split(VARIABLE)
        return head + "".join(_dollar(part, values) for part in rest)

    def _globbed(self, word: str) -> list[str]:
        return globbed(self.host, self.cwd, word)


Runner = Callable[[Shell, str, Sequence[str]], list[str]]


def _never() -> bool:
    return False


def globbed(host: Host, at: Path, word: str) -> list[str]:
    """The paths that a word with marks names, seen from the folder `at`; itself, if nothing fits.

    Raises:
        Refusal: a mark stands before the last part of the path.
    """
    folder, name = _last(word, host.windows)
    if STAR in folder or ONE in folder:
        raise Refusal(f"shell: {plain(word)}: * and ? work in the last part of a path only")
    if STAR in name or ONE in name:
        try:
            found = host.get(host.path(plain(folder) or ".", at))
        except Refusal:
            found = None
        names = sorted(found.children) if isinstance(found, Folder) else []
        hits = [plain(folder) + child for child in names if child[0] != "." and matches(name, child)]
        if hits:
            return hits
    return [plain(word)]


def _last(word: str, windows: bool) -> tuple[str, str]:
    """The folder part of a word, with its last separator, and the name."""
    cut = max(word.rfind("/"), word.rfind("\\") if windows else -1) + 1
    return word[:cut], word[cut:]


def _dollar(part: str, values: Mapping[str, str]) -> str:
    """What follows a `$`, with the variable it begins with put in; one that is not set is empty, as in every shell."""
    if part.startswith("{") and "}" in part:
        name, _, rest = part[1:].partition("}")
        return values.get(name, "") + rest
    end = 0
    while end < len(part) and part[end].isascii() and (part[end].isalnum() or part[end] == "_"):
        end += 1
    return values.get(part[:end], "") + part[end:] if end else "$" + part


def _percents(word: str, values: Mapping[str, str]) -> str:
    pieces = word.split(PERCENT)
    out, at = pieces[0], 1
    while at < len(pieces):
        known = values.get(pieces[at].upper())
        if known is not None and at + 1 < len(pieces):
            out, at = out + known + pieces[at + 1], at + 2
        else:
            out, at = f"{out}%{pieces[at]}", at + 1
    return out


def options(name: str, words: Sequence[str], known: str, valued: str = "") -> tuple[dict[str, str], list[str]]:
    """The single-letter options among a command's words, and the rest.

    Args:
        known: letters that stand alone.
        valued: letters that are followed by a value, in the same word or the next.

    Raises:
        Refusal: there is an option that the command does not have, or a value is missing.
    """
    found: dict[str, str] = {}
    rest: list[str] = []
    left = list(reversed(words))
    while left:
        word = left.pop()
        if word == "--":
            return found, [*rest, *reversed(left)]
        if word.startswith("--"):
            raise Refusal(f"{name}: unrecognized option '{word}'")
        if len(word) < 2 or word[0] != "-":
            rest.append(word)
            continue
        for at, letter in enumerate(word[1:], 2):
            if letter in valued:
                if not word[at:] and not left:
                    raise Refusal(f"{name}: option requires an argument -- '{letter}'")
                found[letter] = word[at:] or left.pop()
                break
            if letter not in known:
                raise Refusal(f"{name}: invalid option -- '{letter}'")
            found[letter] = ""
    return found, rest


_PHRASES = {"ls": "cannot access", "rm": "cannot remove", "cp": "cannot copy", "mv": "cannot move"} | {
    "mkdir": "cannot create directory",
    "chmod": "cannot access",
    "touch": "cannot touch",
}


def complaint(host: Host, name: str, word: str, reason: Refusal) -> Refusal:
    """The whole line in which a command says why it did nothing to an operand."""
    if str(reason).startswith(f"{name}: "):
        return reason
    phrase = _PHRASES.get(name) if host.facts.system == "linux" else None
    said = f"{phrase} '{word}'" if phrase else word
    return Refusal(f"{name}: {said}: {host.words(reason)}")


def each(shell: Shell, name: str, words: Sequence[str], act: Callable[[str], Sequence[str] | None]) -> list[str]:
    """What came of every operand, as real tools do it: an error at one does not stop the others. Raises: Refusal, if one failed."""
    lines: list[str] = []
    failed = False
    for word in words:
        try:
            lines += act(word) or ()
        except Refusal as reason:
            lines.append(str(complaint(shell.host, name, word, reason)))
            failed = True
    if failed:
        raise Refusal("\n".join(lines))
    return lines


def needed(name: str, words: Sequence[str], least: int = 1) -> None:
    """Raises: Refusal, if a command has too few operands."""
    if len(words) < least:
        raise Refusal(f"{name}: missing {'operand' if not words or least == 1 else 'destination'}")
