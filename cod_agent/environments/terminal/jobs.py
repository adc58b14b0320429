"""What a task asks for: nine single jobs and eight that combine them, in words, and as what must be true of the two hosts.

Every job has a thing (a file or an archive), most have a place (a folder), some a new name, permissions or a format. How these
are spoken of is the drawing's affair: by name and path, or by what they mean.

In the compact form a job is five words, `-` for what it does not have:

    VERB THING PLACE DETAIL SIDE        upload invoices/3 invoices - @srv

Source: Terminal of arXiv 2606.20002, for the list of jobs; the wording is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cod_agent.environments.terminal.archives import EXTENSIONS
from cod_agent.environments.terminal.filesystem import Archive, File, Folder, Host, Path
from cod_agent.environments.terminal.habits import stem

SINGLE = ("upload", "download", "rename", "move", "chmod", "delete", "copy", "pack", "mkdir")
COMPOSITE = (
    "pack+upload",
    "download+extract",
    "mkdir+upload",
    "upload+chmod",
    "upload+delete",
    "pack+upload+extract",
    "download+rename",
    "backup+replace",
)
UP = frozenset({"upload", "backup+replace", *(verb for verb in COMPOSITE if "upload" in verb)})
DOWN = frozenset({"download", "download+extract", "download+rename"})
"""From which host to which; the others stay on one."""
MODES = (0o400, 0o440, 0o444, 0o600, 0o640, 0o660, 0o700, 0o750)
FORMATS = ("zip", "tar.gz", "tar.bz2")

_ARCHIVE = "an archive ({detail}) that is called like the file but for the extension"
_WORDS = {
    "upload": "Upload {thing} to {place}.",
    "download": "Download {thing} to {place}.",
    "rename": "On {side}, rename {thing}: its name shall be {detail}.",
    "move": "On {side}, move {thing} to {place}.",
    "chmod": "On {side}, set the permissions of {thing} to {detail}.",
    "delete": "On {side}, delete {thing}.",
    "copy": "On {side}, copy {thing} to {place}.",
    "pack": f"On {{side}}, pack {{thing}} into {_ARCHIVE}, in {{place}}.",
    "mkdir": "On {side}, make a directory {detail} in {place}.",
    "pack+upload": f"Pack {{thing}} into {_ARCHIVE}, and upload it to {{place}}.",
    "download+extract": "Download {thing} to {place} and extract it there; the archive stays.",
    "mkdir+upload": "Make a directory {detail} in {place} and upload {thing} into it.",
    "upload+chmod": "Upload {thing} to {place} and set its permissions there to {detail}.",
    "upload+delete": "Upload {thing} to {place}, and then delete it from this computer.",
    "pack+upload+extract": f"Pack {{thing}} into {_ARCHIVE}, upload it to {{place}} and extract it there; the archive stays.",
    "download+rename": "Download {thing} to {place}; there its name shall be {detail}.",
    "backup+replace": "In {place} lies an older version of {thing}. Keep it there with .bak added to its name, and put this computer's "
    "version in its place.",
}
SIDES = {False: ("this computer", "@pc"), True: ("the server", "@srv")}

Said = tuple[str, str]
"""The same in the natural and in the compact form."""
NOTHING: Said = ("", "-")


@dataclass(frozen=True, slots=True)
class Thing:
    """What a job is about."""

    path: Path
    """Where it lies; of an archive that of the archive."""
    name: str
    """Of the file; of an archive that of the file in it."""
    content: str
    said: Said
    older: str = ""
    """The content that it is to replace."""


@dataclass(frozen=True, slots=True)
class Detail:
    """What else a job says: a new name, permissions or the formats an archive may have."""

    said: Said = NOTHING
    name: str = ""
    mode: int = 0
    formats: tuple[str, ...] = FORMATS


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must be true of one of the hosts."""

    remote: bool
    what: Literal["file", "absent", "folder", "mode", "packed"]
    path: Path
    """Of an archive without the extension."""
    content: str = ""
    mode: int = 0
    formats: tuple[str, ...] = ()

    def holds(self, host: Host) -> bool:
        """Whether it is true of the host."""
        if self.what == "packed":
            return any(self._packed(host, extension) for each in self.formats for extension in EXTENSIONS[each])
        node = host.get(self.path)
        if self.what == "absent":
            return node is None
        if self.what == "folder":
            return isinstance(node, Folder)
        if self.what == "mode":
            return node is not None and node.mode == self.mode
        return isinstance(node, File) and node.content == self.content

    def _packed(self, host: Host, extension: str) -> bool:
        """Whether there is such an archive, in the format that its name says, with the file in it."""
        node = host.get((*self.path[:-1], self.path[-1] + extension))
        if not isinstance(node, File) or not isinstance(node.content, Archive):
            return False
        fits = extension in EXTENSIONS.get(node.content.format, ())
        return fits and any(member.content == self.content for member in node.content.members)


@dataclass(frozen=True, slots=True)
class Job:
    """A task: what it says, and when it is done."""

    verb: str
    remote: bool
    """Where it ends up being true: of what stays on one host, which."""
    said: Said
    checks: tuple[Check, ...]


def make_job(verb: str, remote: bool, thing: Thing, place: tuple[Path, Said], detail: Detail) -> Job:
    """The job of those parts. `remote`: whether the place (or the thing, where there is none) is on the server."""
    at, where = place
    if "{place}" not in _WORDS[verb]:
        where = NOTHING
    natural, compact = SIDES[remote]
    words = _WORDS[verb].format(thing=thing.said[0], place=where[0], detail=detail.said[0], side=natural)
    terse = " ".join((verb, thing.said[1] if "{thing}" in _WORDS[verb] else "-", where[1], detail.said[1], compact))
    return Job(verb, remote, (words, terse), tuple(_checks(verb, remote, thing, at, detail)))


def _checks(verb: str, remote: bool, thing: Thing, at: Path, detail: Detail) -> list[Check]:
    here = not remote if verb in UP | DOWN else remote
    """Where the thing lies at first."""
    moved = verb in ("move", "upload+delete", "rename", "delete")
    found = [Check(here, "absent", thing.path)] if moved else []
    if verb == "chmod":
        return [Check(remote, "mode", thing.path, mode=detail.mode)]
    if verb == "delete":
        return found
    if verb == "mkdir":
        return [Check(remote, "folder", (*at, detail.name))]
    if "pack" in verb or verb == "download+extract":
        found.append(Check(remote, "packed", (*at, stem(thing.name)), thing.content, formats=detail.formats))
        if "extract" not in verb:
            return found
    folder = thing.path[:-1] if verb == "rename" else (*at, detail.name) if verb == "mkdir+upload" else at
    name = detail.name if "rename" in verb else thing.name
    found.append(Check(remote, "file", (*folder, name), thing.content))
    if verb == "upload+chmod":
        found.append(Check(remote, "mode", (*folder, name), mode=detail.mode))
    if verb == "copy":
        found.append(Check(remote, "file", thing.path, thing.content))
    if verb == "backup+replace":
        found.append(Check(remote, "file", (*folder, name + ".bak"), thing.older))
    return found
