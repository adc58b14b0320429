"""Packing and unpacking: tar, zip, gzip. An archive is a value (`Archive`), not bytes; the formats differ in name and in tool."""

from __future__ import annotations

from collections.abc import Sequence

from cod_agent.environments.terminal.filesystem import (
    LARGEST_ARCHIVE,
    MOST_NODES,
    READ,
    Archive,
    File,
    Folder,
    Host,
    Member,
    Path,
    Refusal,
    walk,
)
from cod_agent.environments.terminal.shell import Shell, each, needed, options

EXTENSIONS = {"zip": (".zip",), "tar.gz": (".tar.gz", ".tgz"), "tar.bz2": (".tar.bz2", ".tbz2"), "tar": (".tar",)}
"""By which a format's files are known; the first is the usual one."""


def tar(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    if args and not args[0].startswith("-"):
        args = ["-" + args[0], *args[1:]]
    flags, words = options(name, args, "cxtzjvpkh", valued="fC")
    if "f" not in flags:
        raise Refusal("tar: no archive is named: use -f")
    if len(flags.keys() & {"c", "x", "t"}) != 1:
        raise Refusal("tar: you must specify one of -c, -x and -t")
    host, at = shell.host, shell.cwd
    if "C" in flags:
        at = shell.path(flags["C"])
        if not isinstance(host.get(at), Folder):
            raise Refusal(f"tar: {flags['C']}: Cannot open: {host.words('missing')}")
    asked = "tar.gz" if "z" in flags else "tar.bz2" if "j" in flags else "tar"
    if "c" in flags:
        if not words:
            raise Refusal("tar: cowardly refusing to create an empty archive")
        members = list[Member]()
        for word in words:
            members += _collected(shell, name, word, at, deep=True)
            if len(members) > MOST_NODES:
                raise Refusal(f"tar: {word}: {host.words('full')}")
        _written(shell, name, flags["f"], Archive(asked, tuple(members)))
        return []
    archive = _opened(shell, name, flags["f"])
    if not archive.format.startswith("tar") or ("z" in flags or "j" in flags) and archive.format != asked:
        raise Refusal(f"tar: {flags['f']}: this is not in {asked} format")
    chosen = _chosen(name, archive, words)
    if "t" in flags:
        return ["/".join(member.path) for member in chosen]
    return _extracted(shell, name, chosen, at, over=True)


def zip_(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    flags, words = options(name, args, "rjq123456789vu")
    needed(name, words)
    if len(words) < 2:
        raise Refusal("zip: error: nothing to do")
    target = words[0] if "." in words[0].replace("\\", "/").rpartition("/")[2] else words[0] + ".zip"
    there = shell.host.get(shell.path(target))
    members: dict[Path, Member] = {}
    if isinstance(there, File):
        members = {member.path: member for member in _opened(shell, name, target, "zip").members}
    for word in words[1:]:
        for member in _collected(shell, name, word, shell.cwd, deep="r" in flags):
            path = member.path[-1:] if "j" in flags else member.path
            if "j" not in flags or member.content is not None:
                members[path] = Member(path, member.content, member.mode)
    _written(shell, name, target, Archive("zip", tuple(members.values())))
    return (
        [] if "q" in flags else [f"  adding: {word}" for word in words[1:]]
    )  # not all below it: that would be an ls -R


def unzip(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    flags, words = options(name, args, "oqjnl", valued="d")
    needed(name, words)
    archive = _opened(shell, name, words[0], "zip")
    chosen = _chosen(name, archive, words[1:])
    if "l" in flags:
        return ["/".join(member.path) for member in chosen]
    at = shell.path(flags["d"]) if "d" in flags else shell.cwd
    if "j" in flags:
        chosen = [Member(m.path[-1:], m.content, m.mode) for m in chosen if m.content is not None]
    lines = _extracted(shell, name, chosen, at, over="o" in flags)
    return lines if "q" in flags else [*lines, *(f"  inflating: {'/'.join(member.path)}" for member in chosen)]


def gzip(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    flags, words = options(name, args, "kfdv123456789")
    needed(name, words)

    def pack(word: str) -> None:
        path = shell.path(word)
        content, node = shell.host.read(path), shell.host.node(path)
        if isinstance(content, Archive) and content.format != "zip" and content.format != "tar":
            raise Refusal("it is packed already -- unchanged")
        if isinstance(content, Archive) and content.format == "tar":
            packed = Archive("tar.gz", content.members)
        else:
            packed = Archive("gz", (Member(path[-1:], content, node.mode),))
        _replaced(shell, path, (*path[:-1], path[-1] + ".gz"), packed, flags)

    return (
        gunzip(shell, name, [word for word in args if word != "-d"]) if "d" in flags else each(shell, name, words, pack)
    )


def gunzip(shell: Shell, name: str, args: Sequence[str]) -> list[str]:
    flags, words = options(name, args, "kfdv")
    needed(name, words)

    def unpack(word: str) -> None:
        path = shell.path(word)
        content = shell.host.read(path)
        last = path[-1]
        to = last[:-3] if last.endswith(".gz") else last[:-4] + ".tar" if last.endswith(".tgz") else ""
        if not to:
            raise Refusal("unknown suffix -- ignored")
        if not isinstance(content, Archive) or content.format not in ("gz", "tar.gz"):
            raise Refusal("not in gzip format")
        inner = Archive("tar", content.members) if content.format == "tar.gz" else content.members[0].content or ""
        _replaced(shell, path, (*path[:-1], to), inner, flags)

    return each(shell, name, words, unpack)


def _replaced(shell: Shell, path: Path, to: Path, content: str | Archive, flags: dict[str, str]) -> None:
    """The content under a new name; the old file is removed unless it is to be kept."""
    if shell.host.get(to) is not None and "f" not in flags:
        raise Refusal("exists")
    _room(content)
    mode = shell.host.node(path).mode
    shell.host.write(to, content, mode)
    if "k" not in flags:
        shell.host.detach(path)


def _room(content: str | Archive) -> None:
    if isinstance(content, Archive) and content.size > LARGEST_ARCHIVE:
        raise Refusal("full")


def _opened(shell: Shell, name: str, word: str, format: str = "") -> Archive:
    """The archive of that name, of any format or the one that is wanted. Raises: Refusal."""
    try:
        content = shell.host.read(shell.path(word))
    except Refusal as reason:
        raise Refusal(f"{name}: cannot find or open {word}: {shell.host.words(reason)}") from None
    if not isinstance(content, Archive) or (format and content.format != format):
        raise Refusal(f"{name}: {word}: this does not look like {'a ' + format if format else 'an'} archive")
    return content


def _written(shell: Shell, name: str, word: str, archive: Archive) -> None:
    try:
        _room(archive)
        shell.host.write(shell.path(word), archive)
    except Refusal as reason:
        raise Refusal(f"{name}: {word}: {shell.host.words(reason)}") from None


def _collected(shell: Shell, name: str, word: str, at: Path, *, deep: bool) -> list[Member]:
    """What goes into an archive for an operand: under the path as it was written, without what is above."""
    host = shell.host
    try:
        node = host.node(host.path(word, at))
        shown = tuple(part for part in _parts(host, word) if part not in ("", ".", ".."))
        members = []
        for below, part in walk(node):
            host.allow(part, READ)
            inside = shown + below
            if inside:
                members.append(Member(inside, part.content if isinstance(part, File) else None, part.mode))
            if not deep:
                break
        return members
    except Refusal as reason:
        raise Refusal(f"{name}: {word}: {host.words(reason)}") from None


def _parts(host: Host, word: str) -> list[str]:
    if host.windows:
        word = word.replace("\\", "/")
        word = word[2:] if word[1:2] == ":" else word
    return word.split("/")


def _chosen(name: str, archive: Archive, words: Sequence[str]) -> list[Member]:
    """The members of those names, all if none is named. Raises: Refusal."""
    if not words:
        return list(archive.members)
    wanted = {tuple(part for part in word.split("/") if part not in ("", ".")) for word in words}
    found = [
        member
        for member in archive.members
        if any(member.path[:depth] in wanted for depth in range(len(member.path) + 1))
    ]
    if not found:
        raise Refusal(f"{name}: {words[0]}: not found in the archive")
    return found


def _extracted(shell: Shell, name: str, members: Sequence[Member], at: Path, *, over: bool) -> list[str]:
    host = shell.host
    for member in members:
        path = (*at, *member.path)
        try:
            if member.content is None:
                host.make_folder(path, parents=True)
                continue
            host.make_folder(path[:-1], parents=True)
            if host.get(path) is not None and not over:
                raise Refusal("it is there already: -o overwrites it")
            host.write(path, member.content, member.mode)
        except Refusal as reason:
            raise Refusal(f"{name}: {'/'.join(member.path)}: {host.words(reason)}") from None
    return []
