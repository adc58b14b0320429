"""A host's files: a tree in memory, with the paths, owners and limits of three systems. Nothing here touches a real file.

A path is the tuple of names from the root on; what a person writes (`~/a/../b`, `C:\\Users\\anna`) becomes one by `Host.path`. What a host
refuses is a `Refusal`, whose words are those of its system. Contents never change in place, so trees may share them.

Bounds keep every command quick, whatever it asks for: how many files and folders a host has room for, how deep they lie, how long a
name is, and how much an archive holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

System = Literal["linux", "macos", "windows"]
Removal = Literal["", "force", "plain"]
"""force: nothing is removed without -f; plain: nothing with -f."""
Path = tuple[str, ...]

MOST_NODES, MOST_DEPTH, LONGEST_NAME, LARGEST_ARCHIVE = 400, 16, 80, 100_000
READ, WRITE = 4, 2

_REASONS = {
    "missing": ("No such file or directory", "The system cannot find the path specified."),
    "denied": ("Permission denied", "Access is denied."),
    "exists": ("File exists", "A subdirectory or file already exists."),
    "folder": ("Is a directory", "Access is denied: it is a directory."),
    "not a folder": ("Not a directory", "The directory name is invalid."),
    "full": ("No space left on device", "There is not enough space on the disk."),
    "too long": ("File name too long", "The filename or extension is too long."),
    "drive": ("No such file or directory", "The system cannot find the drive specified."),
    "inside": ("cannot put a directory into itself", "The destination folder is a subfolder of the source folder."),
}


class Refusal(Exception):
    """A host or a command refuses; `str()` is one of the reasons above, or a whole line of words."""


@dataclass(frozen=True, slots=True)
class Member:
    """What an archive holds under a name."""

    path: Path
    content: Content | None
    """None: a folder."""
    mode: int


@dataclass(frozen=True, slots=True)
class Archive:
    """The content of a packed file."""

    format: str
    """zip, tar, tar.gz, tar.bz2 or gz."""
    members: tuple[Member, ...]
    size: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", 20 + sum(20 + size_of(member.content or "") for member in self.members))


Content = str | Archive


@dataclass(slots=True)
class File:
    content: Content
    owner: str
    mode: int = 0o644


@dataclass(slots=True)
class Folder:
    owner: str
    children: dict[str, Node] = field(default_factory=dict)
    mode: int = 0o755


Node = File | Folder


def size_of(content: Content) -> int:
    """Of a content, in characters."""
    return len(content) if isinstance(content, str) else content.size


def walk(node: Node, path: Path = ()) -> Iterator[tuple[Path, Node]]:
    """A node and everything below it, folders before what they hold."""
    yield path, node
    if isinstance(node, Folder):
        for name in sorted(node.children):
            yield from walk(node.children[name], (*path, name))


def clone(node: Node, owner: str | None = None) -> Node:
    """A copy that shares nothing but contents; `owner` None: it keeps its owners."""
    if isinstance(node, File):
        return File(node.content, owner or node.owner, node.mode)
    children = {name: clone(child, owner) for name, child in node.children.items()}
    return Folder(owner or node.owner, children, node.mode)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a host is, and what is peculiar about it."""

    system: System
    name: str
    """As in the prompt; of the server its address."""
    user: str
    """Who is logged in there, or may log in."""
    home: Path
    missing: frozenset[str] = frozenset()
    """Commands that are not installed."""
    spool: Path | None = None
    """The one folder that takes files from other hosts; None: every folder does."""
    removal: Removal = ""


class Host:
    """A computer: its facts and its tree.

    Args:
        root: the tree; it belongs to the host from here on.
        count: how many nodes it has, where that is known.
    """

    def __init__(self, facts: Facts, root: Folder, count: int = 0) -> None:
        self.facts, self.root = facts, root
        self.count = count or sum(1 for _ in walk(root))

    def copy(self) -> Host:
        """The same host with a tree of its own."""
        children = {name: clone(child) for name, child in self.root.children.items()}
        return Host(self.facts, Folder(self.root.owner, children, self.root.mode), self.count)

    @property
    def windows(self) -> bool:
        return self.facts.system == "windows"

    # ---- paths ----

    def path(self, text: str, at: Path) -> Path:
        """What `text` names, seen from the folder `at`. Raises: Refusal, if there can be no such path."""
        if self.windows:
            text = text.replace("\\", "/")
            if text[1:2] == ":":
                if text[0] not in "cC":
                    raise Refusal("drive")
                text = "/" + text[2:].lstrip("/")
        parts = [] if text.startswith("/") else list(at)
        for part in text.split("/"):
            if part == "..":
                del parts[-1:]
            elif part not in ("", "."):
                parts.append(part)
        if len(parts) > MOST_DEPTH or any(len(part) > LONGEST_NAME for part in parts):
            raise Refusal("too long")
        return tuple(self._spelled(parts)) if self.windows else tuple(parts)

    def _spelled(self, parts: list[str]) -> list[str]:
        """On Windows names are found in any case; as far as they exist, the spelling is that of the tree."""
        node: Node | None = self.root
        out: list[str] = []
        for part in parts:
            names = node.children if isinstance(node, Folder) else {}
            found = part if part in names else next((name for name in names if name.lower() == part.lower()), part)
            out.append(found)
            node = names.get(found)
        return out

    def shown(self, path: Path) -> str:
        """A path as the system writes it."""
        return "C:\\" + "\\".join(path) if self.windows else "/" + "/".join(path)

    def words(self, reason: object) -> str:
        """A refusal in the system's words."""
        said = _REASONS.get(str(reason))
        return said[self.windows] if said else str(reason)

    # ---- looking ----

    def get(self, path: Path) -> Node | None:
        """What lies at a path, None if nothing does."""
        node: Node | None = self.root
        for name in path:
            node = node.children.get(name) if isinstance(node, Folder) else None
        return node

    def node(self, path: Path) -> Node:
        """What lies at a path. Raises: Refusal."""
        found = self.get(path)
        if found is None:
            raise Refusal("missing")
        return found

    def folder(self, path: Path) -> Folder:
        """The folder at a path. Raises: Refusal."""
        found = self.node(path)
        if not isinstance(found, Folder):
            raise Refusal("not a folder")
        return found

    def read(self, path: Path) -> Content:
        """A file's content. Raises: Refusal."""
        found = self.node(path)
        if isinstance(found, Folder):
            raise Refusal("folder")
        self.allow(found, READ)
        return found.content

    def allow(self, node: Node, what: int) -> None:
        """Raises: Refusal, if the user may not do that to the node. On Windows everything is one's own that root does not own."""
        mine = node.owner == self.facts.user
        bits = (7 if mine else 5) if self.windows else node.mode >> 6 if mine else node.mode
        if not bits & what:
            raise Refusal("denied")

    # ---- changing ----

    def _parent(self, path: Path) -> Folder:
        if not path:
            raise Refusal("exists")
        parent = self.folder(path[:-1])
        self.allow(parent, WRITE)
        return parent

    def write(self, path: Path, content: Content, mode: int = 0o644) -> None:
        """Make a file, or write over one. Raises: Refusal."""
        found = self.get(path)
        if isinstance(found, Folder):
            raise Refusal("folder")
        if found is not None:
            self.allow(found, WRITE)
            found.content = content
        else:
            self.attach(path, File(content, self.facts.user, mode))

    def make_folder(self, path: Path, *, parents: bool = False) -> None:
        """Make a folder, with `parents` also those above it and none that is there. Raises: Refusal."""
        for depth in range(1 if parents else len(path), len(path) + 1):
            found = self.get(path[:depth])
            if found is None:
                self.attach(path[:depth], Folder(self.facts.user))
            elif not parents or isinstance(found, File):
                raise Refusal("exists")

    def attach(self, path: Path, node: Node) -> None:
        """Put a node where there is none. Raises: Refusal."""
        parent, below = self._parent(path), [len(under) for under, _ in walk(node)]
        if path[-1] in parent.children:
            raise Refusal("exists")
        if self.count + len(below) > MOST_NODES:
            raise Refusal("full")
        if len(path) + max(below) > MOST_DEPTH:
            raise Refusal("too long")
        parent.children[path[-1]] = node
        self.count += len(below)

    def put(self, path: Path, node: Node) -> None:
        """A copy of a node at a path, the user's own: files are written over, folders are merged. Raises: Refusal."""
        found = self.get(path)
        if found is None:
            self.attach(path, clone(node, self.facts.user))
        elif isinstance(node, File):
            self.write(path, node.content)
        elif isinstance(found, File):
            raise Refusal("not a folder")
        else:
            for name, child in sorted(node.children.items()):
                self.put((*path, name), child)

    def detach(self, path: Path) -> Node:
        """Take a node away, with all below it. Raises: Refusal."""
        node, parent = self.node(path), self._parent(path)
        del parent.children[path[-1]]
        self.count -= sum(1 for _ in walk(node))
        return node
