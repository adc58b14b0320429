"""The tables, as an append-only list of migrations. docs/memory.md describes every column.

A released migration is never edited: add one below it. `user_version` holds their number, so that opening a current file
costs one pragma, and a file of a later version is recognised and left alone.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from cod_agent.errors import NotADatabase, SchemaTooNew
from cod_agent.memory.rows import guard_function

APPLICATION_ID = 0x436F4474
"""'CoDt' in the file's header: a run database of this project."""

_V1 = """
CREATE TABLE runs (
  id INTEGER PRIMARY KEY,
  agent TEXT NOT NULL,
  name TEXT NOT NULL,
  environment TEXT,
  pack TEXT,
  length INTEGER,
  model TEXT NOT NULL,
  settings TEXT NOT NULL,
  created REAL NOT NULL,
  UNIQUE (agent, name)
) STRICT;

CREATE TABLE contexts (
  id INTEGER PRIMARY KEY,
  run_id INTEGER NOT NULL REFERENCES runs (id),
  version INTEGER NOT NULL,
  parent_id INTEGER REFERENCES contexts (id),
  episode_id INTEGER REFERENCES episodes (id),
  body TEXT,
  hash TEXT NOT NULL,
  weights TEXT NOT NULL DEFAULT '',
  sources TEXT NOT NULL,
  created REAL NOT NULL,
  UNIQUE (run_id, version)
) STRICT;

CREATE TABLE tasks (
  id INTEGER PRIMARY KEY,
  run_id INTEGER NOT NULL REFERENCES runs (id),
  position INTEGER NOT NULL,
  name TEXT NOT NULL,
  fingerprint TEXT NOT NULL,
  body TEXT,
  state TEXT NOT NULL CHECK (state IN ('open', 'solved', 'judged', 'updated', 'closed')),
  answer TEXT,
  reward REAL,
  feedback TEXT,
  reason TEXT NOT NULL DEFAULT '',
  UNIQUE (run_id, position)
) STRICT;

CREATE TABLE episodes (
  id INTEGER PRIMARY KEY,
  run_id INTEGER NOT NULL REFERENCES runs (id),
  position INTEGER NOT NULL,
  kind TEXT NOT NULL CHECK (kind IN ('solve', 'update')),
  context_id INTEGER NOT NULL REFERENCES contexts (id),
  state TEXT NOT NULL CHECK (state IN ('live', 'done', 'refused', 'aborted')),
  reason TEXT NOT NULL DEFAULT '',
  digest TEXT,
  started REAL NOT NULL,
  finished REAL,
  UNIQUE (run_id, position, kind)
) STRICT;

CREATE TABLE heads (
  id INTEGER PRIMARY KEY,
  hash BLOB NOT NULL UNIQUE,
  body TEXT
) STRICT;

CREATE TABLE messages (
  id INTEGER PRIMARY KEY,
  parent_id INTEGER REFERENCES messages (id),
  hash BLOB NOT NULL UNIQUE,
  body TEXT,
  labels TEXT NOT NULL
) STRICT;

CREATE TABLE calls (
  id INTEGER PRIMARY KEY,
  episode_id INTEGER NOT NULL REFERENCES episodes (id),
  request BLOB NOT NULL,
  occurrence INTEGER NOT NULL,
  head_id INTEGER NOT NULL REFERENCES heads (id),
  prompt_id INTEGER REFERENCES messages (id),
  style TEXT NOT NULL,
  answer_id INTEGER REFERENCES messages (id),
  envelope TEXT,
  envelope_crc INTEGER NOT NULL,
  finish_reason TEXT NOT NULL,
  model TEXT NOT NULL,
  weights TEXT NOT NULL,
  prompt_base_id INTEGER REFERENCES calls (id),
  prompt_shared INTEGER,
  prompt_ids BLOB,
  sampled_ids BLOB,
  logprobs BLOB,
  on_policy INTEGER NOT NULL,
  inexact TEXT NOT NULL,
  prompt_tokens INTEGER,
  sampled_tokens INTEGER,
  hash BLOB NOT NULL,
  started REAL NOT NULL,
  seconds REAL NOT NULL,
  UNIQUE (episode_id, request, occurrence)
) STRICT;

CREATE TABLE effects (
  id INTEGER PRIMARY KEY,
  episode_id INTEGER NOT NULL REFERENCES episodes (id),
  kind TEXT NOT NULL CHECK (kind IN ('observe', 'act', 'tool')),
  name TEXT NOT NULL,
  request BLOB NOT NULL,
  occurrence INTEGER NOT NULL,
  arguments TEXT,
  call_id INTEGER REFERENCES calls (id),
  result TEXT,
  snapshot TEXT,
  hash BLOB NOT NULL,
  started REAL NOT NULL,
  seconds REAL NOT NULL,
  UNIQUE (episode_id, request, occurrence)
) STRICT;

CREATE VIEW steps AS
  SELECT x.id, x.episode_id, x.kind, x.name, x.request, x.occurrence, x.call_id,
    CASE
      WHEN x.call_id IS NULL THEN x.arguments
      WHEN x.arguments IS NOT NULL THEN ''
      WHEN json_valid(m.body) THEN json_quote(json_extract(m.body, '$.content'))
    END AS arguments,
    x.result, x.snapshot, x.hash, x.started, x.seconds
  FROM effects x LEFT JOIN calls c ON c.id = x.call_id LEFT JOIN messages m ON m.id = c.answer_id;

CREATE TABLE attempts (
  id INTEGER PRIMARY KEY,
  episode_id INTEGER NOT NULL REFERENCES episodes (id),
  kind TEXT NOT NULL CHECK (kind IN ('call', 'tool')),
  request BLOB NOT NULL,
  occurrence INTEGER NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('started', 'failed')),
  detail TEXT NOT NULL,
  started REAL NOT NULL,
  seconds REAL
) STRICT;
CREATE INDEX attempts_by_episode ON attempts (episode_id, request);

CREATE TABLE commits (
  run_id INTEGER NOT NULL REFERENCES runs (id),
  seq INTEGER NOT NULL,
  what TEXT NOT NULL CHECK (what IN ('began', 'solved', 'judged', 'updated', 'kept', 'closed')),
  position INTEGER,
  hash TEXT NOT NULL,
  chain TEXT NOT NULL,
  created REAL NOT NULL,
  PRIMARY KEY (run_id, seq)
) STRICT, WITHOUT ROWID;

CREATE TABLE leases (
  run_id INTEGER PRIMARY KEY REFERENCES runs (id),
  owner TEXT NOT NULL,
  host TEXT NOT NULL,
  pid INTEGER NOT NULL,
  expires REAL NOT NULL
) STRICT;
"""

_V2 = """
ALTER TABLE leases ADD COLUMN steady REAL;

ALTER TABLE contexts ADD COLUMN held TEXT NOT NULL DEFAULT '';
ALTER TABLE contexts ADD COLUMN decided TEXT NOT NULL DEFAULT '' CHECK (decided IN ('', 'adopted', 'refused'));

CREATE TABLE new_commits (
  run_id INTEGER NOT NULL REFERENCES runs (id),
  seq INTEGER NOT NULL,
  what TEXT NOT NULL CHECK (what IN (
    'began', 'solved', 'judged', 'updated', 'kept', 'closed', 'adopted', 'refused', 'forgot', 'pruned')),
  position INTEGER,
  detail TEXT,
  hash TEXT NOT NULL,
  chain TEXT NOT NULL,
  created REAL NOT NULL,
  guard INTEGER NOT NULL,
  PRIMARY KEY (run_id, seq)
) STRICT, WITHOUT ROWID;
INSERT INTO new_commits SELECT run_id, seq, what, position, NULL, hash, chain, created, 0 FROM commits;
DROP TABLE commits;
ALTER TABLE new_commits RENAME TO commits;

CREATE TABLE tombstones (
  id INTEGER PRIMARY KEY,
  run_id INTEGER NOT NULL REFERENCES runs (id),
  seq INTEGER NOT NULL,
  part TEXT NOT NULL CHECK (part IN (
    'head', 'message', 'call', 'effect', 'asked', 'task', 'answer', 'feedback', 'context')),
  row_id INTEGER NOT NULL,
  hash TEXT NOT NULL,
  UNIQUE (part, row_id, run_id, seq)
) STRICT;

ALTER TABLE runs ADD COLUMN guard INTEGER NOT NULL DEFAULT 0;
ALTER TABLE contexts ADD COLUMN guard INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tasks ADD COLUMN guard INTEGER NOT NULL DEFAULT 0;
ALTER TABLE episodes ADD COLUMN guard INTEGER NOT NULL DEFAULT 0;
ALTER TABLE messages ADD COLUMN guard INTEGER NOT NULL DEFAULT 0;
ALTER TABLE calls ADD COLUMN guard INTEGER NOT NULL DEFAULT 0;
ALTER TABLE effects ADD COLUMN guard INTEGER NOT NULL DEFAULT 0;
ALTER TABLE attempts ADD COLUMN guard INTEGER NOT NULL DEFAULT 0;

UPDATE runs SET guard = guard('agent name environment pack length model settings created',
  agent, name, environment, pack, length, model, settings, created);
UPDATE contexts SET guard = guard('run_id version parent_id episode_id body hash weights sources held decided created',
  run_id, version, parent_id, episode_id, body, hash, weights, sources, held, decided, created);
UPDATE tasks SET guard = guard('run_id position name fingerprint body state answer reward feedback reason',
  run_id, position, name, fingerprint, body, state, answer, reward, feedback, reason);
UPDATE episodes SET guard = guard('run_id position kind context_id state reason digest started finished',
  run_id, position, kind, context_id, state, reason, digest, started, finished);
UPDATE messages SET guard = guard('parent_id hash body labels', parent_id, hash, body, labels);
UPDATE calls SET guard = guard('episode_id request occurrence head_id prompt_id style answer_id envelope envelope_crc finish_reason '
  || ' model weights prompt_base_id prompt_shared prompt_ids sampled_ids logprobs on_policy inexact '
  || ' prompt_tokens sampled_tokens hash started seconds',
  episode_id, request, occurrence, head_id, prompt_id, style, answer_id, envelope, envelope_crc,
  finish_reason, model, weights, prompt_base_id, prompt_shared, prompt_ids, sampled_ids, logprobs,
  on_policy, inexact, prompt_tokens, sampled_tokens, hash, started, seconds);
UPDATE effects SET guard = guard('episode_id kind name request occurrence arguments call_id result snapshot hash started seconds',
  episode_id, kind, name, request, occurrence, arguments, call_id, result, snapshot, hash, started, seconds);
UPDATE attempts SET guard = guard('episode_id kind request occurrence state detail started seconds',
  episode_id, kind, request, occurrence, state, detail, started, seconds);
UPDATE commits SET guard = guard('run_id seq what position detail hash chain created',
  run_id, seq, what, position, detail, hash, chain, created);

CREATE INDEX contexts_by_episode ON contexts (episode_id);
CREATE INDEX contexts_in_force ON contexts (run_id, version) WHERE held = '';
CREATE INDEX tasks_to_do ON tasks (run_id, state, position) WHERE state IN ('open', 'judged');
"""

MIGRATIONS: tuple[str, ...] = (_V1, _V2)


def check(conn: sqlite3.Connection, path: str) -> bool:
    """Whether the file is current; False: it wants `migrate`.

    Raises:
        NotADatabase: another program's database.
        SchemaTooNew: written by a later version.
    """
    application = conn.execute("PRAGMA application_id").fetchone()[0]
    version = conn.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        # A process that died while it made the file leaves the migrations' own table, which comes first.
        foreign = "SELECT count(*) FROM sqlite_master WHERE tbl_name <> '_sqlite_migrations'"
        if application or version or conn.execute(foreign).fetchone()[0]:
            raise NotADatabase(f"{path} is a SQLite database of another program: choose another file for the memory")
        return False
    if version > len(MIGRATIONS):
        raise SchemaTooNew(
            f"{path} has schema {version}, this version of connect-the-dots knows up to {len(MIGRATIONS)}: upgrade it "
            "(pip install -U connect-the-dots) to open the file"
        )
    return bool(version == len(MIGRATIONS))


def migrate(
    conn: sqlite3.Connection,
    name: str = "cod_agent",
    application: int = APPLICATION_ID,
    migrations: Sequence[str] | None = None,
) -> None:
    """Bring a file to its current schema, by sqlite-utils' migrations: in one transaction, each once, each on record.

    Args:
        name: under which sqlite-utils keeps what was applied.
        application: the number in the file's header that says whose it is.
        migrations: statements, each ended by a semicolon at the end of a line; those of a run database if not given.
    """
    from sqlite_utils import Database, Migrations

    conn.create_function("guard", -1, guard_function, deterministic=True)
    steps = Migrations(name)
    for number, sql in enumerate(MIGRATIONS if migrations is None else migrations, 1):

        def step(db: Database, sql: str = sql, number: int = number) -> None:
            for statement in filter(str.strip, sql.split(";\n")):
                db.conn.execute(statement)
            db.conn.execute(f"PRAGMA application_id = {application}")
            db.conn.execute(f"PRAGMA user_version = {number}")

        step.__name__ = f"v{number}"
        steps()(step)
    database = Database(conn)
    with database.atomic():  # all or nothing, with the table and the index sqlite-utils keeps its record in
        steps.apply(database)
