"""`Journal`: the file. All methods block, and are called in one thread at a time."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from ullm.errors import ResourceUnavailable
from ullm.logs import get_logger

SCHEMA = 2
"""Version of the tables; a file of another one is set aside."""

log = get_logger(__name__)


class JournalFull(Exception):
    """The file cannot grow: the disk or the limit of its size is reached. Says which."""


@dataclass
class SavedAnswer:
    """One answer as it is in the file.

    Args:
        owner: digest of the key that asked for it; empty without keys.
        expires: time after which it is removed, in seconds since 1970.
        head: what it takes to make the rest again; the journal does not look inside.
        token_ids: the tokens so far.
        notes: what else is known by now, each of them encoded; the journal does not look inside.
        end: how it ended; None while it has not.
    """

    id: str
    owner: str
    expires: float
    head: bytes
    token_ids: list[int] = field(default_factory=list)
    notes: list[msgspec.Raw] = field(default_factory=list)
    end: bytes | None = None


class NewTokens(NamedTuple):
    """Tokens of an answer that are new, at least one, and what is known with them.

    Args:
        first: number of its tokens before these.
        notes: values for msgpack; see `SavedAnswer`.
    """

    id: str
    first: int
    token_ids: Sequence[int]
    notes: Sequence[object] = ()


class Journal:
    """Answers in an SQLite file in WAL mode: what was committed survives the end of the process.

    A file that is damaged, or of another version, is set aside and said once; it never stops a start.

    Args:
        path: readable and writable by its user only.
        max_bytes: size beyond which nothing is written.

    Raises:
        ConfigError: another process has it open, or the folder cannot be written to.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path, self._max_bytes = path, max_bytes
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._connection = self._open()
        except sqlite3.OperationalError as error:
            raise ResourceUnavailable(f"--journal {path}: {error}") from None
        except sqlite3.DatabaseError as error:
            self._set_aside(str(error))
        except OSError as error:
            raise ResourceUnavailable(f"--journal {path}: {error.strerror or error}") from None

    def _open(self) -> sqlite3.Connection:
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = sqlite3.connect(self._path, timeout=0.5, check_same_thread=False, isolation_level=None)
        try:
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, SCHEMA):
                raise sqlite3.DatabaseError(f"of version {version}, not {SCHEMA}")
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS answers (id TEXT PRIMARY KEY, owner TEXT NOT NULL, "
                "expires REAL NOT NULL, head BLOB NOT NULL, end BLOB) WITHOUT ROWID"
            )
            connection.execute(
                "CREATE TABLE IF NOT EXISTS tokens (id TEXT NOT NULL, first INTEGER NOT NULL, "
                "ids BLOB NOT NULL, notes BLOB NOT NULL, PRIMARY KEY (id, first)) WITHOUT ROWID"
            )
            connection.execute(f"PRAGMA user_version={SCHEMA}")
            connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
        page_size = connection.execute("PRAGMA page_size").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={max(64, self._max_bytes // page_size)}")
        return connection

    def _set_aside(self, cause: str) -> None:
        aside = self._path.with_name(f"{self._path.name}.damaged-{int(time.time())}")
        self._path.replace(aside)
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        log.warning("the journal cannot be used; it was set aside", cause=cause, file=str(aside))
        self._connection = self._open()

    def load(self) -> list[SavedAnswer]:
        """Return all answers that have not expired, and remove the others."""
        with self._transaction():
            now = (time.time(),)
            expired = self._connection.execute("SELECT id FROM answers WHERE expires < ?", now).fetchall()
            self._remove(id for (id,) in expired)
        rows = self._connection.execute("SELECT id, owner, expires, head, end FROM answers").fetchall()
        answers = {row[0]: SavedAnswer(row[0], row[1], row[2], row[3], end=row[4]) for row in rows}
        for id, first, ids, notes in self._connection.execute(
            "SELECT id, first, ids, notes FROM tokens ORDER BY id, first"
        ):
            answer = answers.get(id)
            if answer is not None and first == len(answer.token_ids):  # else it follows a gap
                answer.token_ids += _token_ids(ids)
                answer.notes += _notes(notes)
        return list(answers.values())

    def write(
        self,
        begun: Iterable[SavedAnswer] = (),
        tokens: Iterable[NewTokens] = (),
        ended: Iterable[tuple[str, bytes]] = (),
        removed: Iterable[str] = (),
    ) -> None:
        """Write what is new, as a whole or not at all.

        Raises:
            JournalFull: there is no room.
        """
        try:
            with self._transaction():
                execute = self._connection.execute
                for each in begun:
                    values = (each.id, each.owner, each.expires, each.head)
                    execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, NULL)", values)
                for new in tokens:
                    row = (new.id, new.first, _packed(new.token_ids), _packed(new.notes))
                    execute("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?, ?)", row)
                for id, end in ended:
                    execute("UPDATE answers SET end = ? WHERE id = ?", (end, id))
                    self._join(id)
                self._remove(removed)
        except sqlite3.OperationalError as error:  # full, or an error of the disk
            raise JournalFull(f"{self._path}: {error}") from None

    def _join(self, id: str) -> None:
        """Put the tokens of an answer, of which there will be no more, into one row: many cost more room."""
        query = "SELECT first, ids, notes FROM tokens WHERE id = ? ORDER BY first"
        rows = self._connection.execute(query, (id,)).fetchall()
        token_ids: list[int] = []
        notes: list[msgspec.Raw] = []
        for first, its_ids, its_notes in rows:
            if first == len(token_ids):  # else it follows a gap
                token_ids += _token_ids(its_ids)
                notes += _notes(its_notes)
        if len(rows) > 1:
            values = (id, _packed(token_ids), _packed(notes))
            self._connection.execute("DELETE FROM tokens WHERE id = ?", (id,))
            self._connection.execute("INSERT INTO tokens VALUES (?, 0, ?, ?)", values)

    def _remove(self, ids: Iterable[str]) -> None:
        for id in ids:
            self._connection.execute("DELETE FROM answers WHERE id = ?", (id,))
            self._connection.execute("DELETE FROM tokens WHERE id = ?", (id,))

    def _transaction(self) -> _Transaction:
        return _Transaction(self._connection)

    def close(self) -> None:
        """Close the file; what was written is in it."""
        self._connection.close()


def _packed(values: Sequence[object]) -> bytes:
    return msgspec.msgpack.encode(list(values))


def _token_ids(packed: bytes) -> list[int]:
    return msgspec.msgpack.decode(packed, type=list[int])


def _notes(packed: bytes) -> list[msgspec.Raw]:
    return msgspec.msgpack.decode(packed, type=list[msgspec.Raw])


class _Transaction:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            try:
                self._connection.execute("COMMIT")
                return
            except sqlite3.OperationalError:
                self._roll_back()
                raise
        self._roll_back()

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
