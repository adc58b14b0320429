"""Copying between the two hosts. It begins at the local one, as the server cannot reach back."""

from __future__ import annotations

from collections.abc import Sequence

from cod_agent.environments.terminal.filesystem import READ, Folder, Host, Path, Refusal, walk
from cod_agent.environments.terminal.shell import ONE, STAR, Shell, each, globbed, needed, options

MOST_SENT = 8
"""Files and folders that one transfer takes: else it would show in one command what lies on the server."""

_GLOBS = str.maketrans({"*": STAR, "?": ONE})


def login(shell: Shell, name: str, place: str) -> None:
    """Raises: Refusal, if `user@host` is no way to the server from here."""
    user, _, host = place.rpartition("@")
    if shell.away:
        raise Refusal(
            f"{name}: connect to host {host}: the server cannot reach other hosts: do that from your computer"
        )
    facts = shell.remote.facts
    if host != facts.name:
        raise Refusal(f"{name}: connect to host {host} port 22: No route to host")
    if (user or shell.local.facts.user) != facts.user:
        raise Refusal(f"{user or shell.local.facts.user}@{host}: Permission denied (publickey).")


def scp(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    flags, words = options(name, args, "rpqCv", valued="Pio")
    needed(name, words, 2)
    return _transfer(shell, name, words, recursive="r" in flags, contents=False)


def rsync(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    """As `scp`, but a source that ends with a slash stands for what is in it, and a folder to put things in is made."""
    flags, words = options(name, args, "arvzhPptuq", valued="e")
    needed(name, words, 2)
    return _transfer(shell, name, words, recursive=bool(flags.keys() & {"a", "r"}), contents=True)


def _is_remote(shell: Shell, word: str) -> bool:
    """Whether a word is HOST:PATH; `C:` is a drive."""
    head, colon, _ = word.partition(":")
    return bool(colon) and "/" not in head and (len(head) > 1 or not shell.local.windows)


def _transfer(shell: Shell, name: str, words: Sequence[str], *, recursive: bool, contents: bool) -> list[str]:
    *sources, last = words
    up = _on_server(shell, last)
    if shell.away:
        raise Refusal(f"{name}: the server cannot reach other hosts: do that from your computer")
    if any(_on_server(shell, word) == up for word in sources):
        raise Refusal(f"{name}: exactly one side must be on the server, as user@host:path")
    giver, taker = (shell.local, shell.remote) if up else (shell.remote, shell.local)
    (written,) = _there(shell, name, last, globs=False) if up else (last,)
    to = taker.path(written, shell.at[up])
    sent = 0

    def copy(word: str) -> None:
        nonlocal sent
        path = giver.path(word, shell.at[not up])
        node = giver.node(path)
        if isinstance(node, Folder) and not recursive:
            raise Refusal(f"{name}: {word}: not a regular file (-r copies directories)")
        for _, part in walk(node):
            giver.allow(part, READ)
            sent += 1
        if sent > MOST_SENT:
            raise Refusal(f"{name}: {word}: refused: a transfer takes {MOST_SENT} files and folders at most")
        whole = contents and isinstance(node, Folder) and word.endswith("/")
        target = (
            to if whole else _placed(taker, path, to, slash=written.endswith("/"), many=len(texts) > 1, make=contents)
        )
        _taken(taker, name, target)
        if contents and taker.get(target[:-1]) is None:
            taker.make_folder(target[:-1])
        taker.put(target, node)

    texts = sources if up else [text for word in sources for text in _there(shell, name, word, globs=True)]
    return each(shell, name, texts, copy)


def _on_server(shell: Shell, word: str) -> bool:
    """Whether a word is HOST:PATH; `C:` is a drive."""
    head, colon, _ = word.partition(":")
    return bool(colon) and "/" not in head and (len(head) > 1 or not shell.local.windows)


def _there(shell: Shell, name: str, word: str, *, globs: bool) -> list[str]:
    """The paths that `user@host:path` names on the server, seen from one's home there. Raises: Refusal, if one may not log in."""
    place, _, text = word.partition(":")
    login(shell, name, place)
    shell.at[True] = home = shell.remote.facts.home
    if text in ("", "~"):
        text = "."
    text = text.removeprefix("~/")
    return globbed(shell.remote, home, text.translate(_GLOBS)) if globs else [text]


def _placed(host: Host, source: Path, to: Path, *, slash: bool, many: bool, make: bool) -> Path:
    """Where a copy of `source` ends up: in a folder that is there (or, with `make`, is to be), or under a new name."""
    there = host.get(to)
    if isinstance(there, Folder) or (make and there is None and (slash or many)):
        return (*to, *source[-1:])
    if many or slash:
        raise Refusal("missing" if there is None else "not a folder")
    return to


def _taken(host: Host, name: str, target: Path) -> None:
    """Raises: Refusal, if the host does not take files from elsewhere there."""
    spool = host.facts.spool
    if spool is not None and target[: len(spool)] != spool:
        where = host.shown(spool)
        raise Refusal(f"{name}: {host.shown(target)}: refused: this host takes files from elsewhere in {where} only")
