"""The commands that look at one host and change it, and those that go from one to the other.

Each is what a shell runs under its name (`shell.Runner`): the shell, the name it was called by and its words, to the lines it prints.
"""

from __future__ import annotations

from collections.abc import Sequence

from cod_agent.environments.terminal.archives import gunzip, gzip, tar, unzip, zip_
from cod_agent.environments.terminal.filesystem import (
    READ,
    WRITE,
    File,
    Folder,
    Host,
    Node,
    Path,
    Refusal,
    size_of,
    walk,
)
from cod_agent.environments.terminal.shell import Runner, Shell, each, needed, options
from cod_agent.environments.terminal.transfer import login, rsync, scp

MOST_ENTRIES = 50
"""Of a listing; what is more is counted."""


def ls(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    flags, words = options(name, args, "alh1tF")
    shown: list[tuple[str, list[tuple[str, Node]]]] = []

    def look(word: str) -> None:
        path = shell.path(word)
        node = shell.host.node(path)
        if isinstance(node, File):
            shown.append(("", [(word, node)]))
            return
        shell.host.allow(node, READ)
        names = [child for child in sorted(node.children) if "a" in flags or child[0] != "."]
        shown.append((word, [(child, node.children[child]) for child in names]))

    errors: list[str] = []
    try:
        each(shell, name, words or ["."], look)
    except Refusal as reason:
        errors = str(reason).split("\n")
    lines = [*errors, *_listed(sorted(shown, key=lambda part: part[0] != ""), "l" in flags, len(words) > 1)]
    if errors:
        raise Refusal("\n".join(lines))
    return lines


def _listed(shown: Sequence[tuple[str, list[tuple[str, Node]]]], long: bool, headed: bool) -> list[str]:
    """Listings under their headings, files that were named before them; at most so many entries in all."""
    lines: list[str] = []
    left = MOST_ENTRIES
    for heading, entries in shown:
        if left <= 0:
            break
        if heading and headed:
            lines.append(f"{heading}:")
        names = [_entry(name, node, long) for name, node in entries[:left]]
        if names:
            lines += names if long else ["  ".join(names)]
        left -= len(entries)
    hidden = sum(len(entries) for _, entries in shown) - MOST_ENTRIES
    return [*lines, f"... {hidden} more entries"] if hidden > 0 else lines


def _entry(name: str, node: Node, long: bool) -> str:
    folder = isinstance(node, Folder)
    shown = (f"'{name}'" if " " in name else name) + ("/" if folder else "")
    if not long:
        return shown
    bits = "".join(letter if node.mode >> 8 - at & 1 else "-" for at, letter in enumerate("rwxrwxrwx"))
    size = size_of(node.content) if isinstance(node, File) else 0
    return f"{'d' if folder else '-'}{bits} {node.owner} {size} {shown}"


def cd(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    if shell.host.windows and args and args[0].lower() == "/d":
        args = args[1:]  # also to another drive, of which there is none here
    if len(args) > 1:
        raise Refusal("cd: too many arguments")
    before = shell.cwd

    def go(word: str) -> None:
        path = shell.before[shell.away] if word == "-" else shell.path(word)
        shell.host.allow(shell.host.folder(path), READ)
        shell.at[shell.away] = path

    each(shell, name, args or [shell.host.shown(shell.host.facts.home)], go)
    shell.before[shell.away] = before
    return []


def pwd(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    return [shell.host.shown(shell.cwd)]


def cat(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    _, words = options(name, args, "n")
    needed(name, words)

    def show(word: str) -> list[str]:
        content = shell.host.read(shell.path(word))
        if not isinstance(content, str):
            raise Refusal("it is an archive: list it with the tool of its format")
        return content.split("\n") if content else []

    return each(shell, name, words, show)


def mkdir(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    flags, words = options(name, args, "pv")
    needed(name, words)
    return each(
        shell,
        name,
        words,
        lambda word: shell.host.make_folder(shell.path(word.rstrip("/") or "/"), parents="p" in flags),
    )


def touch(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    _, words = options(name, args, "acm")
    needed(name, words)

    def make(word: str) -> None:
        if shell.host.get(shell.path(word)) is None:
            shell.host.write(shell.path(word), "")

    return each(shell, name, words, make)


def chmod(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    flags, words = options(name, args, "Rvf")
    needed(name, words, 2)
    digits = words[0]
    if len(digits) not in (3, 4) or any(digit not in "01234567" for digit in digits):
        raise Refusal(f"chmod: invalid mode: '{digits}' (octal ones only, for example 640)")
    mode = int(digits, 8) & 0o777

    def change(word: str) -> None:
        path = shell.path(word)
        nodes = [node for _, node in walk(shell.host.node(path))] if "R" in flags else [shell.host.node(path)]
        if any(node.owner != shell.host.facts.user for node in nodes):
            raise Refusal("Operation not permitted")
        for node in nodes:
            node.mode = mode

    return each(shell, name, words[1:], change)


def _target(host: Host, source: Path, to: Path, many: bool, word: str) -> Path:
    """Where a copy of `source` ends up: in a folder that is there, or under a new name. Raises: Refusal."""
    if isinstance(host.get(to), Folder):
        return (*to, *source[-1:])
    if many or word.endswith("/"):
        raise Refusal(f"target '{word}': {host.words('missing' if host.get(to) is None else 'not a folder')}")
    return to


def cp(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    flags, words = options(name, args, "rRafpv")
    needed(name, words, 2)
    *sources, last = words
    host = shell.host

    def copy(word: str) -> None:
        source = shell.path(word)
        node, to = host.node(source), _target(host, source, shell.path(last), len(sources) > 1, last)
        if to == source:
            raise Refusal("it is the same file")
        if isinstance(node, Folder) and not flags.keys() & {"r", "R", "a"}:
            raise Refusal("it is a directory: -r not specified")
        if to[: len(source)] == source:
            raise Refusal("inside")
        for _, part in walk(node):
            host.allow(part, READ)
        host.put(to, node)

    return each(shell, name, sources, copy)


def mv(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    _, words = options(name, args, "fv")
    needed(name, words, 2)
    *sources, last = words
    if name.lower() in ("ren", "rename") and len(words) == 2 and not set(last) & {"/", "\\"}:
        cut = max(sources[0].rfind("/"), sources[0].rfind("\\")) + 1  # a bare name stays in its folder
        last = sources[0][:cut] + last

    def move(word: str) -> None:
        source = shell.path(word)
        shell.host.node(source)
        to = _target(shell.host, source, shell.path(last), len(sources) > 1, last)
        if to == source:
            raise Refusal("it is the same file")
        if to[: len(source)] == source:
            raise Refusal("inside")
        _stays(shell, source)
        _moved(shell.host, source, to)

    return each(shell, name, sources, move)


def _moved(host: Host, source: Path, to: Path) -> None:
    """A node under its new path; where that is not possible, all is as before."""
    there = host.get(to)
    if there is not None and (isinstance(there, Folder) or isinstance(host.get(source), Folder)):
        raise Refusal("exists")
    node = host.detach(source)
    try:
        if there is not None:
            host.detach(to)
        host.attach(to, node)
    except Refusal:
        host.attach(source, node)
        raise


def _stays(shell: Shell, path: Path) -> None:
    """Raises: Refusal, for a folder that one stands in, or the home directory, or what is above them."""
    if any(kept[: len(path)] == path for kept in (shell.cwd, shell.host.facts.home)):
        raise Refusal("Device or resource busy: it holds the current or the home directory")


def rm(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    flags, words = options(name, args, "rRfvid")
    removal = shell.host.facts.removal
    if removal == "plain" and "f" in flags:
        raise Refusal(f"{name}: -f is switched off on this machine: leave it out")
    if "f" not in flags:
        needed(name, words)

    def remove(word: str) -> None:
        path = shell.path(word)
        if "f" in flags and shell.host.get(path) is None:
            return
        node = shell.host.node(path)
        if removal == "force" and "f" not in flags:
            raise Refusal("it is protected on this machine: use -f")
        if isinstance(node, Folder):
            if not flags.keys() & {"r", "R"}:
                raise Refusal("folder")
            _stays(shell, path)
        for _, part in walk(node):
            if isinstance(part, Folder) and part.children:
                shell.host.allow(part, WRITE)
        shell.host.detach(path)

    return each(shell, name, words, remove)


def echo(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    return [" ".join(args)]


def whoami(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    return [shell.host.facts.user]


def ssh(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    """Log in at the server, or run the words that follow as a line there and come back."""
    if not args:
        raise Refusal("usage: ssh user@host [command]")
    skipped, place = 0, args[0]
    while place.startswith("-") and skipped + 1 < len(args):
        skipped += 2 if place[1:2] in tuple("piol") and len(place) == 2 else 1
        place = args[skipped] if skipped < len(args) else ""
    login(shell, name, place)
    shell.host, shell.at[True] = shell.remote, shell.remote.facts.home
    line = " ".join(args[skipped + 1 :])
    if line:
        shell.chain(line, inside=True)
        shell.host = shell.local
    return []


def exit_(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    if not shell.away:
        raise Refusal(f"{name}: you are not logged in anywhere else")
    shell.host = shell.local
    return ["logout"]


COMMANDS: dict[str, Runner] = {
    "ls": ls,
    "cd": cd,
    "pwd": pwd,
    "cat": cat,
    "mkdir": mkdir,
    "chmod": chmod,
    "cp": cp,
    "mv": mv,
    "rm": rm,
    "touch": touch,
    "echo": echo,
    "whoami": whoami,
    "ssh": ssh,
    "exit": exit_,
    "scp": scp,
    "rsync": rsync,
    "tar": tar,
    "zip": zip_,
    "unzip": unzip,
    "gzip": gzip,
    "gunzip": gunzip,
}


def _switches(run: Runner, *before: str) -> Runner:
    """A Windows command: what it is here, without the switches that begin with a slash."""

    def runner(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
        rest = [word for word in args if not (len(word) == 2 and word[0] == "/" and word[1].isalpha())]
        return run(shell, name, [*before, *rest])

    return runner


ALIASES: dict[str, Runner] = {
    "dir": _switches(ls),
    "type": _switches(cat),
    "copy": _switches(cp),
    "move": _switches(mv),
    "del": _switches(rm),
    "erase": _switches(rm),
    "md": _switches(mkdir, "-p"),
    "rd": _switches(rm, "-r"),
    "rmdir": _switches(rm, "-r"),
    "ren": _switches(mv),
    "rename": _switches(mv),
}
"""What else they are called on Windows."""

ABSENT = frozenset({"chmod", "touch", "rsync", "tar", "gzip", "gunzip"})
"""What Windows does not have."""
