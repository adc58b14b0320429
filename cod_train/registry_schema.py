"""The tables of registry.db, as an append-only list of migrations, and how the file is opened.

A released migration is never edited: add one below it. `user_version` holds their number. What must never happen is forbidden by
the tables themselves: a checkpoint's row changes in nothing but its state, its state only along the arrows of `NEXT`, at most one
is promoted, and history and verdicts are only added to.

The file is in rollback-journal mode: it is small and seldom written, needs no files beside it at rest, and old SQLite versions
(`cod_agent.memory.database.wal_fault`) can do it no harm.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from cod_agent.errors import NotADatabase, SchemaTooNew, UsageError
from cod_agent.memory import schema as runs
from cod_agent.memory.database import BUSY_SECONDS

APPLICATION_ID = 0x436F4472
"""'CoDr' in the file's header: a registry of checkpoints."""

NEXT = {
    "candidate": ("promoted", "rejected"),
    "promoted": ("retired", "rejected"),
    "retired": ("promoted",),
    "rejected": (),
}
"""The states a checkpoint may take from each."""

_V1 = """
CREATE TABLE checkpoints (
  id INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  parent_id INTEGER REFERENCES checkpoints (id),
  kind TEXT NOT NULL CHECK (kind IN ('full', 'adapter')),
  folder TEXT NOT NULL,
  base TEXT,
  digest TEXT NOT NULL,
  files TEXT NOT NULL,
  gguf TEXT,
  gguf_weights TEXT NOT NULL,
  template TEXT NOT NULL,
  probe TEXT NOT NULL,
  config TEXT NOT NULL,
  code TEXT NOT NULL,
  created REAL NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('candidate', 'promoted', 'retired', 'rejected'))
) STRICT;
CREATE UNIQUE INDEX one_promoted ON checkpoints (state) WHERE state = 'promoted';

CREATE TABLE training_runs (
  checkpoint_id INTEGER NOT NULL REFERENCES checkpoints (id),
  seq INTEGER NOT NULL,
  file TEXT NOT NULL,
  agent TEXT NOT NULL,
  run TEXT NOT NULL,
  chain TEXT NOT NULL,
  tasks INTEGER NOT NULL,
  PRIMARY KEY (checkpoint_id, seq)
) STRICT, WITHOUT ROWID;

CREATE TABLE verdicts (
  id INTEGER PRIMARY KEY,
  candidate_id INTEGER NOT NULL REFERENCES checkpoints (id),
  incumbent_id INTEGER REFERENCES checkpoints (id),
  promoted INTEGER NOT NULL CHECK (promoted IN (0, 1)),
  said TEXT NOT NULL,
  created REAL NOT NULL
) STRICT;

CREATE TABLE history (
  id INTEGER PRIMARY KEY,
  checkpoint_id INTEGER NOT NULL REFERENCES checkpoints (id),
  act TEXT NOT NULL CHECK (act IN ('add', 'promote', 'reject', 'rollback')),
  before TEXT,
  after TEXT NOT NULL,
  why TEXT NOT NULL,
  verdict_id INTEGER REFERENCES verdicts (id),
  created REAL NOT NULL
) STRICT;

CREATE TABLE seeds (
  seed INTEGER PRIMARY KEY AUTOINCREMENT,
  given REAL NOT NULL
) STRICT;
INSERT INTO seeds (seed, given) VALUES (1000000, 0);

CREATE TRIGGER only_the_state_changes BEFORE UPDATE OF id, name, parent_id, kind, folder, base, digest, files, gguf, gguf_weights, template,
  probe, config, code, created ON checkpoints BEGIN SELECT RAISE(ABORT, 'a checkpoint is never edited'); END;
CREATE TRIGGER states_follow_the_arrows BEFORE UPDATE OF state ON checkpoints WHEN NOT (
  (OLD.state = 'candidate' AND NEW.state IN ('promoted', 'rejected')) OR
  (OLD.state = 'promoted' AND NEW.state IN ('retired', 'rejected')) OR
  (OLD.state = 'retired' AND NEW.state = 'promoted')) BEGIN SELECT RAISE(ABORT, 'no such change of state'); END;
CREATE TRIGGER checkpoints_stay BEFORE DELETE ON checkpoints BEGIN SELECT RAISE(ABORT, 'checkpoints stay'); END;
CREATE TRIGGER runs_stay BEFORE DELETE ON training_runs BEGIN SELECT RAISE(ABORT, 'lineage stays'); END;
CREATE TRIGGER runs_stand BEFORE UPDATE ON training_runs BEGIN SELECT RAISE(ABORT, 'lineage stands'); END;
CREATE TRIGGER history_stays BEFORE DELETE ON history BEGIN SELECT RAISE(ABORT, 'history stays'); END;
CREATE TRIGGER history_stands BEFORE UPDATE ON history BEGIN SELECT RAISE(ABORT, 'history stands'); END;
CREATE TRIGGER verdicts_stay BEFORE DELETE ON verdicts BEGIN SELECT RAISE(ABORT, 'verdicts stay'); END;
CREATE TRIGGER verdicts_stand BEFORE UPDATE ON verdicts BEGIN SELECT RAISE(ABORT, 'verdicts stand'); END;
"""

MIGRATIONS: tuple[str, ...] = (_V1,)


def connect(path: Path, *, create: bool) -> sqlite3.Connection:
    """A connection to the registry at `path`, at the current schema.

    Raises:
        UsageError: there is none, and it should not be made.
        NotADatabase: the file is something else; SchemaTooNew: of a later version.
        sqlite3.Error: it cannot be opened or written.
    """
    if path.is_dir():
        raise NotADatabase(f"{path} is a directory: name the registry's file")
    if not path.is_file() and not create:
        raise UsageError(f"there is no registry {path}: begin one with `cod checkpoint add`, or give --registry")
    if path.is_file() and 0 < path.stat().st_size < 512:  # SQLite would take it for an empty file
        raise NotADatabase(f"{path} is no registry of checkpoints: check the path")
    path.parent.mkdir(parents=True, exist_ok=True)
    conn = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        if not _check(conn, path):
            _migrate(conn, path)
        conn.execute(
            "PRAGMA synchronous = EXTRA"
        )  # a commit is on disk with the name of its journal gone from the folder
        conn.execute("PRAGMA foreign_keys = ON")
        conn.row_factory = sqlite3.Row
    except BaseException:
        conn.close()
        raise
    return conn


def _check(conn: sqlite3.Connection, path: Path) -> bool:
    """Whether the file is current. Raises: NotADatabase, SchemaTooNew."""
    application = conn.execute("PRAGMA application_id").fetchone()[0]
    version = conn.execute("PRAGMA user_version").fetchone()[0]
    if application == runs.APPLICATION_ID:
        raise NotADatabase(f"{path} is a run database, not a registry of checkpoints: give --registry another file")
    if application != APPLICATION_ID:
        if application or version or conn.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise NotADatabase(f"{path} is a SQLite database of another program: give --registry another file")
        return False
    if version > len(MIGRATIONS):
        raise SchemaTooNew(
            f"{path} has schema {version}, this version of connect-the-dots knows up to {len(MIGRATIONS)}: upgrade it "
            "(pip install -U connect-the-dots) to open the file"
        )
    return bool(version == len(MIGRATIONS))


def _migrate(conn: sqlite3.Connection, path: Path) -> None:
    """Bring the file to the current schema by sqlite-utils' migrations: one transaction, whoever else opens it at the same time."""
    conn.execute("BEGIN IMMEDIATE")
    try:
        if not _check(conn, path):  # another process may have been first
            runs.migrate(conn, "cod_train", APPLICATION_ID, MIGRATIONS)
        conn.execute("COMMIT")
    except BaseException:
        conn.rollback()
        raise
