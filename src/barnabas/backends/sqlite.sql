-- Schema 4. Offsets, positions and jobs of all processes that share the file.

-- Names to small numbers: consumer groups and tables.
CREATE TABLE names (id INTEGER PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL, UNIQUE (kind, name));

-- One row a partition, and one a queue (partition -1; `next` counts what was enqueued, so a change of it is a signal).
-- Partition -2: a consumer group, whose `next` counts changes of its membership.
CREATE TABLE heads (
    gid INTEGER PRIMARY KEY, topic TEXT NOT NULL, partition INTEGER NOT NULL,
    next INTEGER NOT NULL DEFAULT 0, first INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0,
    UNIQUE (topic, partition)
);

-- Messages, a batch a row: id = gid << 40 | offset of the first; data = msgpack [keys, values, headers or nil, timestamps].
CREATE TABLE records (id INTEGER PRIMARY KEY, count INTEGER NOT NULL, time REAL NOT NULL, data BLOB NOT NULL);

-- How far a group is in a partition, and which member has it. open = JSON {done: [[from, to]], attempts: {}, crashes: {}}.
CREATE TABLE positions (
    id INTEGER PRIMARY KEY, grp INTEGER NOT NULL, gid INTEGER NOT NULL, offset INTEGER NOT NULL, open TEXT,
    member INTEGER, epoch INTEGER NOT NULL DEFAULT 0, UNIQUE (grp, gid)
);
CREATE TABLE members (id INTEGER PRIMARY KEY AUTOINCREMENT, grp INTEGER NOT NULL, process INTEGER NOT NULL, topics TEXT NOT NULL);
CREATE TABLE processes (id INTEGER PRIMARY KEY AUTOINCREMENT, pid INTEGER NOT NULL, started REAL NOT NULL, info TEXT);

CREATE TABLE cells (tbl INTEGER NOT NULL, key NOT NULL, value BLOB NOT NULL, PRIMARY KEY (tbl, key)) WITHOUT ROWID;

-- Locks of unique jobs that outlive their job. Others are columns of it: `lock` while it is stored; `run` is the limit
-- (a lock of runs is one) of which it waits for a slot in state 2, and is the next to have one in state 0.
CREATE TABLE locks (key TEXT PRIMARY KEY, jid TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX locks_until ON locks (until);

-- Slots of limits: since when (`at`) a job, or a token by hand, has one; until when a start counts, NULL: as long as it runs.
CREATE TABLE slots (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, at REAL NOT NULL, until REAL, job NOT NULL, jid TEXT NOT NULL, owner INTEGER
);
CREATE INDEX slots_key ON slots (key, at);
CREATE INDEX slots_until ON slots (until) WHERE until IS NOT NULL;
CREATE INDEX slots_owner ON slots (owner) WHERE owner IS NOT NULL;

-- state: 0 ready, 1 in work (of process `owner`), 2 scheduled, 3 to be retried (both at `at`), 4 dead (since `died`). rank: the
-- lower, the sooner.
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY, queue INTEGER NOT NULL, state INTEGER NOT NULL, at REAL, owner INTEGER,
    crashes INTEGER NOT NULL DEFAULT 0, died REAL, note TEXT, jid TEXT NOT NULL, payload BLOB NOT NULL,
    lock TEXT, run TEXT, rank INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX jobs_ready ON jobs (queue, rank, id) WHERE state = 0;
CREATE INDEX jobs_owned ON jobs (owner) WHERE owner IS NOT NULL;
CREATE INDEX jobs_due ON jobs (at) WHERE at IS NOT NULL;
CREATE INDEX jobs_dead ON jobs (died) WHERE died IS NOT NULL;
CREATE UNIQUE INDEX jobs_lock ON jobs (lock) WHERE lock IS NOT NULL;
CREATE INDEX jobs_run ON jobs (run, state, id) WHERE run IS NOT NULL;

PRAGMA user_version = 4;
