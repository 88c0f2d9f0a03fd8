"""The server's book of members: whose name belongs to which key, who is invited, who was revoked. One SQLite file.

Any process of the server's user may read and write it; SQLite lets one write at a time. Knows neither the network nor how
Flower is reached: numbers of Flower's nodes are written down here by whoever registers them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from edgelam_fl.errors import ConfigError, EnvironmentProblem, Refused, nearest
from edgelam_fl.names import why_no_name
from edgelam_fl.trust.identity import DEVICE, HOST, Identity, peer_of, public_key

MEMBERS = "EDGELAM_MEMBERS"  # environment of a ServerApp: folder of the book; unset: anybody may join
MEMBERS_FILE = "members.sqlite"
_LONGEST_PATH_BYTES = 511  # of SQLite
_BUSY_S = 10.0  # how long a write waits for another one
_KEPT_S = 30 * 86400.0  # how long a closed invite is remembered, so that its token gets the right answer
# A name differs from another in more than its case. leaving: Flower's numbers of nodes that Flower is to forget.
_TABLES = """
CREATE TABLE IF NOT EXISTS members (
    name TEXT PRIMARY KEY COLLATE NOCASE, role TEXT NOT NULL, public_key BLOB NOT NULL UNIQUE,
    certificate BLOB NOT NULL DEFAULT '', flower_id TEXT NOT NULL DEFAULT '',
    since REAL NOT NULL, seen REAL NOT NULL, revoked REAL
);
CREATE TABLE IF NOT EXISTS serials (
    serial TEXT PRIMARY KEY, name TEXT NOT NULL COLLATE NOCASE, revoked INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS invites (
    token_hash TEXT PRIMARY KEY, name TEXT NOT NULL COLLATE NOCASE, role TEXT NOT NULL, expires REAL NOT NULL,
    withdrawn INTEGER NOT NULL DEFAULT 0, used_by BLOB
);
CREATE TABLE IF NOT EXISTS leaving (flower_id TEXT PRIMARY KEY);
"""


@dataclass(frozen=True)
class KnownNode:
    """One node of the federation, as the server's book has it. Times are seconds since 1970."""

    name: str
    role: str
    public_key: bytes
    """PEM."""
    certificate: bytes
    """The latest one, PEM; empty until it is signed."""
    flower_id: int | None
    """The number of its node at Flower; None until Flower knows its key."""
    since: float
    seen: float
    """When it last asked for a certificate, which a running node does every few hours."""
    revoked: float | None
    """None: a member."""


class Members:
    """The members, invites and revocations of one federation."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._file = folder / MEMBERS_FILE
        self._clock = clock
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self._file, os.O_CREAT | os.O_RDWR, 0o600))
        try:
            with closing(self._open()) as database:
                database.executescript(_TABLES)
        except sqlite3.Error as error:
            raise EnvironmentProblem(
                f"the book of members cannot be opened ({error}): {self._file}. SQLite takes a path of at most "
                f"{_LONGEST_PATH_BYTES} bytes, and this one has {len(os.fsencode(self._file.absolute()))}; if that is not it, the "
                f"file is damaged or its disk is full"
            ) from error

    def invite(self, name: str, role: str, valid_s: float) -> str:
        """Returns a new token that lets one node join under `name`; an earlier invite for the name is withdrawn.

        Raises ConfigError for a name or role that no node may have, and for a member's name.
        """
        if problem := why_no_name(name):
            raise ConfigError(f"NAME {name!r} {problem}")
        if role not in (DEVICE, HOST):
            raise ConfigError(f"--role {role!r} must be {DEVICE} or {HOST}")
        token, now = secrets.token_urlsafe(16), self._clock()
        with self._writing() as database:
            if (member := _find(database, name)) and member.revoked is None:
                raise ConfigError(
                    f"{member.name} is a member already, since {day(member.since)}; invite another name, or end its "
                    f"membership first if the machine lost its keys: edgelam revoke {member.name}"
                )
            database.execute("DELETE FROM invites WHERE expires < ?", (now - _KEPT_S,))
            database.execute("UPDATE invites SET withdrawn = 1 WHERE name = ? AND used_by IS NULL", (name,))
            database.execute(
                "INSERT INTO invites (token_hash, name, role, expires) VALUES (?, ?, ?, ?)",
                (_hashed(token), name, role, now + valid_s),
            )
        return token

    def claim(self, token: str, name: str, public: bytes) -> KnownNode:
        """Makes `public` (a key, PEM) the key of `name`, by an invite's token, which is used up.

        The same key may claim again, as a node does whose answer was lost on the way. Raises Refused if the token is not, or no
        longer, good for this.
        """
        now = self._clock()
        with self._writing() as database:
            invite = _invite_of(database, token, name)
            member = _find(database, invite["name"])
            if invite["used_by"] is not None:
                if (
                    invite["used_by"] != public
                    or member is None
                    or member.public_key != public
                    or member.revoked is not None
                ):
                    raise Refused(f"this join command has been used already; it lets one node in, once. {_again(name)}")
                return member
            if invite["withdrawn"]:
                raise Refused(f"this join command was withdrawn on the server. {_again(name)}")
            if invite["expires"] < now:
                raise Refused(
                    f"this join command has expired: it was good until {day(invite['expires'])}. {_again(name)}"
                )
            if member is not None and member.revoked is None:
                raise Refused(f"the name {member.name} belongs to another node; ask for an invite with another name")
            if database.execute("SELECT 1 FROM members WHERE public_key = ?", (public,)).fetchone():
                raise Refused("this key belongs to another name, or was revoked; join with a new key")
            database.execute("UPDATE invites SET used_by = ? WHERE token_hash = ?", (public, invite["token_hash"]))
            _enter(database, invite["name"], invite["role"], public, now)
        return self.find(name)

    def add(self, identity: Identity) -> None:
        """Enters a member whose key was made on this machine, as for local runs. Raises ConfigError if its name is in use."""
        with self._writing() as database:
            if (member := _find(database, identity.name)) and member.revoked is None:
                raise ConfigError(f"{identity.name} is a member already; choose another name")
            _enter(database, identity.name, identity.role, public_key(identity.key), self._clock())
            _certify(database, identity.name, identity.certificate)

    def certify(self, member: KnownNode, certificate: bytes) -> None:
        """Writes down the certificate that a member was given. Raises Refused if the member was revoked in the meantime."""
        with self._writing() as database:
            now = _find(database, member.name)
            if now is None or now.revoked is not None or now.public_key != member.public_key:
                raise Refused(revoked_words(member.name))
            _certify(database, member.name, certificate)

    def note_seen(self, name: str) -> None:
        """Writes down that the member was here just now."""
        with self._writing() as database:
            database.execute("UPDATE members SET seen = ? WHERE name = ?", (self._clock(), name))

    def note_registered(self, member: KnownNode, flower_id: int) -> None:
        """Writes down the number that Flower gave the member's node; if the member was revoked meanwhile, as leaving."""
        with self._writing() as database:
            database.execute(
                "UPDATE members SET flower_id = ? WHERE public_key = ?", (str(flower_id), member.public_key)
            )
            now = _find(database, member.name)
            if now is None or now.revoked is not None or now.public_key != member.public_key:
                database.execute("INSERT OR IGNORE INTO leaving VALUES (?)", (str(flower_id),))

    def note_unregistered(self, flower_id: int) -> None:
        """Writes down that Flower has forgotten a node."""
        with self._writing() as database:
            database.execute("DELETE FROM leaving WHERE flower_id = ?", (str(flower_id),))

    def revoke(self, name: str) -> bool:
        """Ends a membership, with all certificates of the name, and withdraws its open invites; returns whether there was a member.

        Raises ConfigError if there is nothing to revoke under this name.
        """
        with self._writing() as database:
            withdrawn = database.execute(
                "UPDATE invites SET withdrawn = 1 WHERE name = ? AND used_by IS NULL AND withdrawn = 0", (name,)
            ).rowcount
            member = _find(database, name)
            if member is None and not withdrawn:
                names = [row["name"] for row in database.execute("SELECT name FROM members WHERE revoked IS NULL")]
                hint = nearest(name, names) if names else "this federation has no members"
                raise ConfigError(f"no member and no open invite has the name {name!r}; {hint}")
            if member is None or member.revoked is not None:
                if member is not None and not withdrawn:
                    raise ConfigError(f"{member.name} was revoked already, on {day(member.revoked or 0.0)}")
                return False
            database.execute("UPDATE members SET revoked = ? WHERE name = ?", (self._clock(), name))
            database.execute("UPDATE serials SET revoked = 1 WHERE name = ?", (name,))
            if member.flower_id is not None:
                database.execute("INSERT OR IGNORE INTO leaving VALUES (?)", (str(member.flower_id),))
            return True

    def find(self, name: str) -> KnownNode:
        """Returns the member of a name, revoked or not. Raises Refused if there is none."""
        with closing(self._open()) as database:
            member = _find(database, name)
        if member is None:
            raise Refused(f"{name} is no member of this federation. {_again(name)}")
        return member

    def all(self) -> list[KnownNode]:
        """Returns all members by name, the revoked ones too."""
        with closing(self._open()) as database:
            return [_member(row) for row in database.execute("SELECT * FROM members ORDER BY name")]

    def leaving(self) -> list[int]:
        """Returns the numbers of revoked members' nodes that Flower has not forgotten yet."""
        with closing(self._open()) as database:
            return [int(row["flower_id"]) for row in database.execute("SELECT flower_id FROM leaving")]

    def revoked_serials(self) -> frozenset[str]:
        """Returns the numbers of all certificates that are no longer good, as `Peer.serial` has them."""
        with closing(self._open()) as database:
            return frozenset(row["serial"] for row in database.execute("SELECT serial FROM serials WHERE revoked"))

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._file, timeout=_BUSY_S, isolation_level=None)
        database.row_factory = sqlite3.Row
        return database

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Lets the block change the book alone: all of its changes or, if the block raises, none."""
        with closing(self._open()) as database:
            database.execute("BEGIN IMMEDIATE")
            with database:
                yield database


def revoked_words(name: str) -> str:
    """Returns what a revoked member is told."""
    return f"the membership of {name} was ended on the server. {_again(name)}"


def day(seconds: float) -> str:
    """Returns a time in seconds since 1970 as words for messages."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _again(name: str) -> str:
    return f"Ask for a new one: edgelam invite {name}, on the server"


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _invite_of(database: sqlite3.Connection, token: str, name: str) -> sqlite3.Row:
    hashed, found = _hashed(token), None
    for invite in database.execute("SELECT * FROM invites WHERE name = ?", (name,)).fetchall():
        if hmac.compare_digest(invite["token_hash"], hashed):
            found = invite
    if found is None:
        raise Refused(
            f"this server has no such invite for {name}: the join command is another federation's, older than 30 days, or not whole. {_again(name)}"
        )
    return found


def _find(database: sqlite3.Connection, name: str) -> KnownNode | None:
    row = database.execute("SELECT * FROM members WHERE name = ?", (name,)).fetchone()
    return _member(row) if row else None


def _enter(database: sqlite3.Connection, name: str, role: str, public: bytes, now: float) -> None:
    """Writes a new member down, in the place of a revoked one of its name."""
    database.execute(
        "INSERT OR REPLACE INTO members (name, role, public_key, since, seen) VALUES (?, ?, ?, ?, ?)",
        (name, role, public, now, now),
    )


def _certify(database: sqlite3.Connection, name: str, certificate: bytes) -> None:
    database.execute("UPDATE members SET certificate = ? WHERE name = ?", (certificate, name))
    database.execute("INSERT INTO serials (serial, name) VALUES (?, ?)", (peer_of(certificate).serial, name))


def _member(row: sqlite3.Row) -> KnownNode:
    return KnownNode(
        row["name"], row["role"], bytes(row["public_key"]), bytes(row["certificate"] or b""),
        int(row["flower_id"]) if row["flower_id"] else None, row["since"], row["seen"], row["revoked"],
    )  # fmt: skip
