"""The registry: which checkpoints there are, what each came from, and which one is promoted.

    candidate ──> promoted ──> retired ──> promoted ──> ...
        │             │
        └─> rejected <┘

`registry.db` is the one source of truth about what should be served. A checkpoint never changes but for its state; at most one is
promoted; every change of state is kept in `history` with its reason. What a checkpoint is stands in `checkpoint_files`, what it says in
`probe`, the tables in `registry_schema`.

A checkpoint is named by its weights: `NAME@` and twelve digits of the SHA-256 over everything that is served. Servers answer to that
name only, so a recorded call always tells which checkpoint gave it.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cod_agent import policies
from cod_agent.errors import UnknownName, UsageError
from cod_agent.memory.hashing import canonical, text_hash
from cod_agent.models.gguf import fingerprint
from cod_train.checkpoint_files import Contents, check_like, check_servable, contents
from cod_train.checkpoint_records import DIGITS, Change, Checkpoint, KeptVerdict, State, standing_promotions, weights_of
from cod_train.lineage import TrainingRun, code_version, default_name, read_runs, trained_where
from cod_train.probe import FILE, Probe, probe_of
from cod_train.registry_file import RegistryFile
from cod_train.registry_schema import NEXT

_NAME = re.compile(r"[A-Za-z0-9._-]+")


class Registry(RegistryFile):
    """The checkpoints of one registry.db; open it as a context manager. Threads may share it, and processes the file.

    Args:
        path: the file.
        create: make it if it is not there.

    Raises:
        UsageError: there is none. NotADatabase: the file is something else, or damaged. SchemaTooNew: of a later version.
    """

    # ---- what there is ----

    def get(self, name: str) -> Checkpoint:
        """A checkpoint by its name, the name of its weights, or its GGUF file's fingerprint.

        Raises:
            UnknownName: there is none.
        """
        found = self._select("c.name = ?", name) or self._of_weights(name)
        if not found:
            raise UnknownName.among("checkpoint", name, [one.name for one in self.all()])
        return found[0]

    def of_weights(self, weights: str) -> Checkpoint | None:
        """The checkpoint behind the weights that a call has on record; None for weights from elsewhere.

        Known are `NAME@DIGEST/FINGERPRINT` (served by vLLM or our own server), a GGUF file's fingerprint (the embedded engine) and
        `TRAINING/step-N` (a training's own rollouts).
        """
        found = self._of_weights(weights)
        return found[0] if found else None

    def all(self) -> list[Checkpoint]:
        """Every checkpoint, oldest first."""
        return self._select("true")

    def promoted(self) -> Checkpoint | None:
        """The one that should be served."""
        found = self._select("c.state = 'promoted'")
        return found[0] if found else None

    def lineage(self, name: str) -> list[Checkpoint]:
        """The checkpoint, then what it was trained from, then what that was trained from."""
        out = [self.get(name)]
        while (parent := out[-1].parent) is not None:
            out.append(self.get(parent))
        return out

    def training_runs(self, name: str) -> list[TrainingRun]:
        """The recorded runs it was trained on, in the order they were given."""
        sql = (
            "SELECT * FROM training_runs WHERE checkpoint_id = (SELECT id FROM checkpoints WHERE name = ?) ORDER BY seq"
        )
        return [
            TrainingRun(self.absolute(row["file"]), row["agent"], row["run"], row["chain"], row["tasks"])
            for row in self.rows(sql, self.get(name).name)
        ]

    def history(self, name: str | None = None) -> list[Change]:
        """Every change of state, oldest first; of one checkpoint if named."""
        sql = (
            "SELECT c.name, h.* FROM history h JOIN checkpoints c ON c.id = h.checkpoint_id "
            "WHERE ?1 IS NULL OR c.name = ?1 ORDER BY h.id"
        )
        return [
            Change(row["name"], row["act"], row["before"], row["after"], row["why"], row["verdict_id"], row["created"])
            for row in self.rows(sql, name and self.get(name).name)
        ]

    def verdicts(self, name: str | None = None) -> list[KeptVerdict]:
        """What the gate said, oldest first; of one candidate if named."""
        sql = (
            "SELECT v.*, c.name AS candidate, i.name AS incumbent FROM verdicts v JOIN checkpoints c ON c.id = v.candidate_id "
            "LEFT JOIN checkpoints i ON i.id = v.incumbent_id WHERE ?1 IS NULL OR c.name = ?1 ORDER BY v.id"
        )
        return [
            KeptVerdict(
                row["id"],
                row["candidate"],
                row["incumbent"],
                bool(row["promoted"]),
                json.loads(row["said"]),
                row["created"],
            )
            for row in self.rows(sql, name and self.get(name).name)
        ]

    def files(self, name: str) -> dict[str, str]:
        """SHA-256 of each served file of a checkpoint and of its probe, by name, as it was when it was added."""
        (row,) = self.rows("SELECT files, probe FROM checkpoints WHERE name = ?", self.get(name).name)
        return {**json.loads(row["files"]), FILE: row["probe"]}

    # ---- adding one ----

    def add(
        self,
        folder: Path,
        *,
        name: str | None = None,
        parent: str | None = None,
        data: Sequence[Path] = (),
        config: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """Register what lies in `folder` as a candidate. The same name with the same weights again gives the one that is there.

        Its probe is made if it has none. The files of a shipped policy are copied beside the registry, because an upgrade of the
        package may replace them.

        Args:
            folder: a Hugging Face folder, or a PEFT folder whose base is a folder here.
            name: letters, digits, `.`, `_` and `-`; the folder's if not given.
            parent: what it was trained from; the promoted one if not given.
            data: run databases it was trained on.
            config: anything JSON can hold about how it was made. `training` and `step` say which of a training's weights these are.

        Raises:
            UsageError: it could not serve, or is not of its parent's architecture, tokenizer and chat template, or the name is taken.
            UnknownName: there is no such parent.
            MissingExtra: it has no probe, and torch is not installed to make one.
        """
        name = name or default_name(folder)
        if not _NAME.fullmatch(name) or not any(map(str.isalnum, name)):
            raise UsageError(f"{name!r} is no name for a checkpoint: letters, digits, '.', '_' and '-'")
        held = contents(self._kept(folder, name))
        if (known := self._known(name, held.digest)) is not None:
            return known
        above = self.get(parent) if parent is not None else self.promoted()
        check_servable(held.folder, held.base)
        if above is not None:
            check_like(held.folder, held.base, above.folder, above.base)
        runs = read_runs(data)
        row = {
            **self._row(name, held, probe_of(held.folder, held.base, held.digest)),
            "config": canonical({**trained_where(held.folder), **(config or {})}),
        }

        def insert(conn: sqlite3.Connection) -> None:
            if self._known(name, held.digest) is not None:  # another process was first
                return
            values = {**row, "parent_id": above and self._id(above.name)}
            marks = ", ".join(f":{key}" for key in values)
            made = conn.execute(f"INSERT INTO checkpoints ({', '.join(values)}) VALUES ({marks})", values).lastrowid
            lived = [
                (made, at, self.stored(run.file), run.agent, run.run, run.chain, run.tasks)
                for at, run in enumerate(runs)
            ]
            conn.executemany("INSERT INTO training_runs VALUES (?, ?, ?, ?, ?, ?, ?)", lived)
            self._note(conn, made, "add", None, "candidate", "added", None)

        self.write(insert)
        return self.get(name)

    # ---- states ----

    def promote(self, name: str, why: str, verdict: int | None = None) -> None:
        """Have it served from now on; what was promoted is retired. One transaction.

        Raises:
            UsageError: it is promoted already or rejected; or the verdict is about another candidate, or another incumbent than is
                promoted now.
        """
        self.write(lambda conn: self._promote(conn, name, why, verdict))

    def reject(self, name: str, why: str, verdict: int | None = None) -> None:
        """Never have a candidate served. (The promoted one is rejected by `rollback`, which says what serves instead.)

        Raises:
            UsageError: it is no candidate.
        """
        self.write(lambda conn: self._reject(conn, name, why, verdict))

    def rollback(self, why: str, *, to: State = "retired", only: str | None = None) -> Checkpoint:
        """Take the last promotion back: what was promoted before it is promoted again, and returned. Again goes further back.

        Args:
            to: what becomes of the promoted one: `retired`, or `rejected`.
            only: take it back only while this one is promoted; otherwise nothing is changed and what is promoted now is returned.

        Raises:
            UsageError: nothing is promoted, or nothing was before it.
        """

        def back(conn: sqlite3.Connection) -> None:
            now = self.promoted()
            if only is not None and now is not None and now.name != only:
                return
            earlier = standing_promotions(self.history())[:-1]
            before = [name for name in earlier if self.get(name).state == "retired"]
            if now is None or not before:
                what = "nothing is promoted" if now is None else f"nothing was promoted before {now.name}"
                raise UsageError(f"there is nothing to go back to: {what}")
            self._change(conn, now, "rollback", to, why, None)
            self._change(conn, self.get(before[-1]), "rollback", "promoted", why, None)

        self.write(back)
        if (found := self.promoted()) is None:
            raise UsageError("there is nothing to go back to: nothing is promoted")
        return found

    def keep_verdict(self, candidate: str, incumbent: str | None, promoted: bool, said: Mapping[str, Any]) -> int:
        """Keep what the gate said; its number."""
        return self.write(lambda conn: self._keep(conn, candidate, incumbent, promoted, said))

    def decide(self, candidate: str, incumbent: str | None, promoted: bool, said: Mapping[str, Any], why: str) -> int:
        """Keep a verdict and carry it out, in one transaction; its number.

        Raises:
            UsageError: as `promote` and `reject`; nothing is kept then.
        """

        def job(conn: sqlite3.Connection) -> int:
            number = self._keep(conn, candidate, incumbent, promoted, said)
            if promoted:
                self._promote(conn, candidate, why, number)
            else:
                self._reject(conn, candidate, why, number)
            return number

        return self.write(job)

    def fresh_seed(self) -> int:
        """A seed that this registry has never given out; it never will again."""
        sql = "INSERT INTO seeds (given) VALUES (?)"
        return self.write(lambda conn: int(conn.execute(sql, (time.time(),)).lastrowid or 0))

    # ---- inside ----

    def _row(self, name: str, held: Contents, probe: Probe) -> dict[str, Any]:
        return {
            "name": name,
            "kind": held.kind,
            "folder": self.stored(held.folder),
            "base": held.base and self.stored(held.base),
            "digest": held.digest,
            "files": canonical(held.files),
            "gguf": held.gguf and self.stored(held.gguf),
            "gguf_weights": fingerprint(held.gguf) if held.gguf is not None else "",
            "template": held.template,
            "probe": text_hash(probe.text()),
            "code": code_version(),
            "created": time.time(),
            "state": "candidate",
        }

    def _promote(self, conn: sqlite3.Connection, name: str, why: str, verdict: int | None) -> None:
        found, now = self.get(name), self.promoted()
        if verdict is not None:
            said = next((one for one in self.verdicts(name) if one.id == verdict), None)
            if said is None or not said.promoted:
                raise UsageError(f"verdict {verdict} does not promote {name}")
            if said.incumbent != (now and now.name):
                raise UsageError(
                    f"{name} was compared with {said.incumbent or 'nothing'}, but {now.name if now else 'nothing'} is promoted "
                    "now: compare it with that"
                )
        if now is not None and now.name != name:
            self._change(conn, now, "promote", "retired", f"{name} is promoted", None)
        self._change(conn, found, "promote", "promoted", why, verdict)

    def _reject(self, conn: sqlite3.Connection, name: str, why: str, verdict: int | None) -> None:
        found = self.get(name)
        if found.state == "promoted":  # or nothing would be, and the next were compared with nothing
            raise UsageError(f"{found.name} is promoted: `cod rollback` takes that back")
        self._change(conn, found, "reject", "rejected", why, verdict)

    def _change(
        self, conn: sqlite3.Connection, found: Checkpoint, act: str, to: State, why: str, verdict: int | None
    ) -> None:
        if to not in NEXT[found.state]:
            further = " or ".join(NEXT[found.state]) or "nothing else any more"
            raise UsageError(f"{found.name} is {found.state} and cannot become {to}: it can become {further}")
        number = self._id(found.name)
        conn.execute("UPDATE checkpoints SET state = ? WHERE id = ?", (to, number))
        self._note(conn, number, act, found.state, to, why, verdict)

    def _note(
        self,
        conn: sqlite3.Connection,
        number: int | None,
        act: str,
        before: State | None,
        after: State,
        why: str,
        verdict: int | None,
    ) -> None:
        sql = "INSERT INTO history (checkpoint_id, act, before, after, why, verdict_id, created) VALUES (?, ?, ?, ?, ?, ?, ?)"
        conn.execute(sql, (number, act, before, after, why, verdict, time.time()))

    def _keep(
        self, conn: sqlite3.Connection, candidate: str, incumbent: str | None, promoted: bool, said: Mapping[str, Any]
    ) -> int:
        sql = "INSERT INTO verdicts (candidate_id, incumbent_id, promoted, said, created) VALUES (?, ?, ?, ?, ?)"
        above = self._id(incumbent) if incumbent is not None else None
        row = (self._id(candidate), above, int(promoted), json.dumps(said, ensure_ascii=False), time.time())
        return int(conn.execute(sql, row).lastrowid or 0)

    def _id(self, name: str) -> int:
        rows = self.rows("SELECT id FROM checkpoints WHERE name = ?", self.get(name).name)
        return int(rows[0]["id"])

    def _known(self, name: str, digest: str) -> Checkpoint | None:
        """The one of that name. Raises: UsageError: it has other weights."""
        found = self._select("c.name = ?", name)
        if found and found[0].digest != digest:
            raise UsageError(f"{name} is another checkpoint ({found[0].weights}): give this one another --name")
        return found[0] if found else None

    def _of_weights(self, weights: str) -> list[Checkpoint]:
        where = (
            f"c.name || '@' || substr(c.digest, 1, {DIGITS}) = ?1 OR (c.gguf_weights <> '' AND c.gguf_weights = ?2) "
            "OR json_extract(c.config, '$.training') || '/step-' || json_extract(c.config, '$.step') = ?2"
        )
        found = self._select(where, weights.partition("/")[0], weights)
        # One file may be registered under two names: what serves speaks for itself, then the newest.
        return sorted(reversed(found), key=lambda one: one.state != "promoted")

    def _select(self, where: str, *values: Any) -> list[Checkpoint]:
        sql = (
            "SELECT c.*, p.name AS parent FROM checkpoints c LEFT JOIN checkpoints p ON p.id = c.parent_id "
            f"WHERE {where} ORDER BY c.id"
        )
        return [self._checkpoint(row) for row in self.rows(sql, *values)]

    def _checkpoint(self, row: sqlite3.Row) -> Checkpoint:
        same = ("name", "parent", "state", "kind", "digest", "gguf_weights", "template", "code", "created")
        return Checkpoint(
            **{key: row[key] for key in same},
            folder=self.absolute(row["folder"]),
            base=self.absolute(row["base"]) if row["base"] is not None else None,
            gguf=self.absolute(row["gguf"]) if row["gguf"] is not None else None,
            config=json.loads(row["config"]),
        )

    def _kept(self, folder: Path, name: str) -> Path:
        """`folder`, or the copy of a shipped policy beside the registry."""
        folder = folder.resolve()
        if folder.parent != Path(policies.__file__).resolve().parent:
            return folder
        kept = self.path.parent / "checkpoints" / name
        if kept.is_dir():
            if contents(kept).digest != contents(folder).digest:
                raise UsageError(f"{kept} is there and holds other weights than {folder.name}: give another --name")
            return kept
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=kept.parent))
        try:
            shutil.copytree(folder, part, dirs_exist_ok=True)
            part.chmod(0o755)  # mkdtemp's is private
            with contextlib.suppress(OSError):  # another process was first
                part.rename(kept)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return kept


__all__ = ["Change", "Checkpoint", "KeptVerdict", "Registry", "State", "TrainingRun", "weights_of"]
