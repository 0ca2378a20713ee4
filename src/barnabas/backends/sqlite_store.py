"""The writing half of a SQLite file: how messages, jobs and cells become rows, inside a transaction."""

from collections.abc import Iterable, Sequence
from typing import Any
from zlib import crc32

import apsw
import msgspec

from barnabas.backends.shares import by_target, noted
from barnabas.backends.sqlite_read import SHIFT, SqliteReader, one
from barnabas.errors import UnknownTopic
from barnabas.jobs.beyond import BATCHES
from barnabas.jobs.unique import answer, ousted
from barnabas.message import LockedJob, Member, Outgoing, OutgoingJob

DEFAULT_PARTITIONS = 6
BATCH_COUNT, BATCH_BYTES = 1000, 256 * 1024  # the most a record holds
_encode = msgspec.msgpack.Encoder().encode


class SqliteStore(SqliteReader):
    """What is put into one file. What it learns of the file by doing so holds once the transaction is committed."""

    _spin: int  # where the next message without a key goes
    _names: dict[tuple[str, str], int]
    _moved: dict[int, int]  # heads that the transaction moved

    def _store(self, db: apsw.Connection, outgoing: Iterable[Outgoing | OutgoingJob]) -> list[tuple[Any, Any]]:
        """Insert messages and jobs; returns the futures to resolve after the commit, and with what."""
        messages, jobs = by_target(outgoing)
        stored: list[tuple[Any, Any]] = []
        if messages:
            self._store_messages(db, messages, stored)
        if jobs:
            self._store_jobs(db, jobs, stored)
        return stored

    def _store_messages(self, db: apsw.Connection, messages: list[Outgoing], stored: list[tuple[Any, Any]]) -> None:
        by_gid: dict[int, list[Outgoing]] = {}
        last, gids, count = None, [], 0
        for out in messages:
            topic, partition, key = out[0], out[1], out[2]
            if topic is not last:  # most come many of a topic
                last, gids = topic, self.parts.get(topic.name) or self._create(db, topic)
                count = len(gids)
            if partition is None:
                if key is None:
                    self._spin += 1
                    partition = self._spin % count
                else:
                    partition = crc32(key.encode() if type(key) is str else key) % count  # type: ignore[arg-type]
            elif not 0 <= partition < count:
                stored.append((out[6], UnknownTopic(f"topic {topic.name!r} has no partition {partition}; it has {count}")))
                continue
            rows = by_gid.get(gids[partition])
            if rows is None:
                by_gid[gids[partition]] = rows = []
            rows.append(out)
        for gid, rows in by_gid.items():
            self._append(db, gid, rows, stored)

    def _append(self, db: apsw.Connection, gid: int, rows: list[Outgoing], stored: list[tuple[Any, Any]]) -> None:
        """Append rows to one partition, as records of at most BATCH_COUNT rows and about BATCH_BYTES."""
        count, size, records = len(rows), 0, []
        while rows:
            batch = rows[:BATCH_COUNT]
            data = self._pack(batch)
            while len(data) > BATCH_BYTES and len(batch) > 1:
                batch = batch[: max(1, len(batch) * BATCH_BYTES // len(data))]
                data = self._pack(batch)
            rows = rows[len(batch) :]
            records.append((batch, data))
            size += len(data)
        grown = "UPDATE heads SET next = next + ?, bytes = bytes + ? WHERE gid = ? RETURNING next"
        self._moved[gid] = one(db, grown, (count, size, gid))[0]
        base = self._moved[gid] - count
        for batch, data in records:
            _, _, _, _, _, times, futures = zip(*batch, strict=True)
            db.execute("INSERT INTO records VALUES (?, ?, ?, ?)", (gid << SHIFT | base, len(batch), float(max(times)), data))
            if any(futures):  # (a Future is always true)
                partition = self.parts[batch[0][0].name].index(gid)
                for offset, out in enumerate(batch, base):
                    if out[6] is not None:
                        stored.append((out[6], (out[0], partition, offset, out[2], out[3], out[4], out[5])))
            base += len(batch)

    def _pack(self, batch: list[Outgoing]) -> bytes:
        _, _, keys, values, headers, times, _ = zip(*batch, strict=True)
        return _encode((keys, values, headers if any(headers) else None, times))

    def _store_jobs(self, db: apsw.Connection, jobs: list[Any], stored: list[tuple[Any, Any]]) -> None:
        now = self.clock.now()
        rows: list[tuple[Any, ...]] = []
        counts: dict[int, int] = {}
        joining: dict[str, list[str]] = {}
        notes: dict[tuple[str, Any], bytes | None] = {}

        def insert(rows: list[tuple[Any, ...]]) -> None:
            if not ranked:
                db.executemany("INSERT INTO jobs (queue, state, at, jid, payload) VALUES (?, ?, ?, ?, ?)", rows)
            else:
                sql = "INSERT INTO jobs (queue, state, at, jid, payload, rank) VALUES (?, ?, ?, ?, ?, ?)"
                db.executemany(sql, [(*row, 0)[:6] for row in rows])

        ranked = False
        for job in jobs:
            queue, payload, at, jid, future = job
            if type(job) is Member:
                joining.setdefault(job.batch, []).append(jid)
            if not queue and type(job) is Member:
                continue
            if not queue:
                notes.update([noted(jid, payload, at or 0.0)])
                if future is not None:
                    stored.append((future, jid))
                continue
            qid = self.queue_ids.get(queue)
            if qid is None:
                qid = self._create_queue(db, queue)
            locked = type(job) is LockedJob and job.lock is not None
            if locked:
                insert(rows)  # in the order of sending
                rows = []
                if self._unlocked(db, job, now, qid, stored):
                    continue
            later = at is not None and at > now
            rows.append((qid, 2 if later else 0, at if later else None, jid, payload))
            if type(job) is not OutgoingJob and job.priority:
                rows[-1], ranked = (*rows[-1], -job.priority), True
            if locked:
                insert([rows.pop()])
                if job.lock.until is None:
                    db.execute("UPDATE jobs SET lock = ? WHERE id = last_insert_rowid()", (job.lock.key,))
                else:
                    db.execute("INSERT INTO locks VALUES (?, ?, ?)", (job.lock.key, jid, job.lock.until))
            counts[qid] = counts.get(qid, 0) + 1
            if future is not None:
                stored.append((future, jid))
        insert(rows)
        for qid, n in counts.items():
            self._moved[qid] = one(db, "UPDATE heads SET next = next + ? WHERE gid = ? RETURNING next", (n, qid))[0]
        for batch, jids in joining.items():
            self._join_batch(db, batch, jids)
        if notes:
            self._keep(db, notes)

    # Batches: a cell for each member that says how it stands, and one with the three counts.

    def _join_batch(self, db: apsw.Connection, id: str, jids: list[str]) -> None:
        tbl, before = self.name_id(db, "table", BATCHES), db.total_changes()
        db.executemany("INSERT OR IGNORE INTO cells VALUES (?, ?, 'open')", [(tbl, f"{id}/{jid}") for jid in jids])
        self._recount(db, tbl, id, db.total_changes() - before, 0, 0)

    def _recount(self, db: apsw.Connection, tbl: int, id: str, *more: int) -> tuple[int, ...]:
        row = one(db, "SELECT value FROM cells WHERE tbl = ? AND key = ?", (tbl, id))
        counts = tuple(map(sum, zip(msgspec.json.decode(row[0]) if row else (0, 0, 0), more, strict=True)))
        if any(more):
            db.execute("INSERT OR REPLACE INTO cells VALUES (?, ?, ?)", (tbl, id, msgspec.json.encode(counts)))
        return counts

    def leave(self, db: apsw.Connection, how: str, id: str, ended: Sequence[tuple[int, str]], process: int = -1) -> list[str]:
        """Members of a batch have ended (with the jobs of these numbers, if `process` still has them); the batch, if that is
        worth a look."""
        tbl, counts = self.name_id(db, "table", BATCHES), {"open": 0, "done": 0, "dead": 0}
        sql = "UPDATE cells SET value = ? WHERE tbl = ? AND key = ? AND value = ?"
        for state in ("open", "dead") if how == "done" else ("open",):
            if state == "open" or self._recount(db, tbl, id, 0, 0, 0)[2]:
                before = db.total_changes()
                if process < 0:
                    db.executemany(sql, [(how, tbl, f"{id}/{jid}", state) for _, jid in ended])
                else:
                    rows = [(how, tbl, f"{id}/{jid}", state, number, process) for number, jid in ended]
                    db.executemany(f"{sql} AND EXISTS (SELECT 1 FROM jobs WHERE id = ? AND owner = ?)", rows)
                counts[state] -= db.total_changes() - before
                counts[how] += db.total_changes() - before
        left = self._recount(db, tbl, id, *counts.values())
        return [id] if not left[0] or counts["dead"] > 0 else []

    def _unlocked(self, db: apsw.Connection, job: LockedJob, now: float, qid: int, stored: list[tuple[Any, Any]]) -> bool:
        """Whether another job has its lock; what becomes of this one is done then."""
        claim = job.lock
        db.execute("DELETE FROM locks WHERE until <= ?", (now,))
        if claim.on_conflict == "replace":
            sql = "DELETE FROM jobs WHERE lock = ? AND state <> 1 AND jid <> ? RETURNING CAST(payload AS BLOB)"
            replaced: list[Any] = db.execute(sql, (claim.key, job.jid)).fetchall()
            self._store_jobs(db, [note for (first,) in replaced for note in ousted(job, now, first)], stored)
        sql = "SELECT jid FROM jobs WHERE lock = :key UNION ALL SELECT jid FROM locks WHERE key = :key"
        found: Any = db.execute(sql, {"key": claim.key}).fetchone()
        if found is None:
            return False
        if found[0] != job.jid and claim.on_conflict == "reject":
            sql = "INSERT INTO jobs (queue, state, died, note, jid, payload) VALUES (?, 4, ?, 'not unique', ?, ?)"
            db.execute(sql, (qid, now, job.jid, claim.buried))
            self._store_jobs(db, ousted(job, now), stored)
        stored.append((job.future, job.jid if found[0] == job.jid else answer(job, found[0])))
        return True

    def _create(self, db: apsw.Connection, topic: Any) -> list[int]:
        """Create a topic's partitions where they are missing. Keeps what another process created meanwhile."""
        found = [r[0] for r in db.execute("SELECT gid FROM heads WHERE topic = ? AND partition >= 0 ORDER BY gid", (topic.name,))]
        parent = topic.parent  # of a dead-letter or retry topic: that has as many partitions
        most = len(self.parts[parent.name]) if parent is not None and parent.name in self.parts else DEFAULT_PARTITIONS
        for partition in range(0 if found else topic.partitions or most):
            db.execute("INSERT INTO heads (topic, partition) VALUES (?, ?)", (topic.name, partition))
            found.append(db.last_insert_rowid())
        self.parts = {**self.parts, topic.name: found}
        return found

    def _create_queue(self, db: apsw.Connection, queue: str) -> int:
        row = one(db, "SELECT gid FROM heads WHERE topic = ? AND partition = -1", (queue,))
        if row is None:
            db.execute("INSERT INTO heads (topic, partition) VALUES (?, -1)", (queue,))
            row = (db.last_insert_rowid(),)
        self.queue_ids = {**self.queue_ids, queue: row[0]}
        return int(row[0])

    def name_id(self, db: apsw.Connection, kind: str, name: str) -> int:
        """The number of a group or table, given out at its first use."""
        known = self._names.get((kind, name))
        if known is None:
            db.execute("INSERT OR IGNORE INTO names (kind, name) VALUES (?, ?)", (kind, name))
            known = one(db, "SELECT id FROM names WHERE kind = ? AND name = ?", (kind, name))[0]
            self._names = {**self._names, (kind, name): known}
        return known

    def store(
        self, db: apsw.Connection, outputs: Iterable[Any], cells: dict[tuple[str, Any], bytes | None]
    ) -> list[tuple[Any, Any]]:
        """Inside a settlement's transaction: what its handlers sent and wrote."""
        stored = self._store(db, outputs)
        self._keep(db, cells)
        return stored

    def _keep(self, db: apsw.Connection, cells: dict[tuple[str, Any], bytes | None]) -> None:
        upsert, drop = [], []
        for (table, key), data in cells.items():
            tbl = self.name_id(db, "table", table)
            if data is None:
                drop.append((tbl, key))
            else:
                upsert.append((tbl, key, data))
        if upsert:
            db.executemany("INSERT INTO cells VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", upsert)
        if drop:
            db.executemany("DELETE FROM cells WHERE tbl = ? AND key = ?", drop)
