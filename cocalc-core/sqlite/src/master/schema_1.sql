-- The life of this database. `stream` is the epoch of the ordered streams:
-- higher for each start of a master on it, and for each database after it.
CREATE TABLE life (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  stream INTEGER NOT NULL
) STRICT;
INSERT INTO life (one, stream) VALUES (1, 0);

CREATE TABLE accounts (
  id TEXT PRIMARY KEY,
  name TEXT NOT NULL,
  admin INTEGER NOT NULL DEFAULT 0 CHECK (admin IN (0, 1)),
  session_epoch INTEGER NOT NULL DEFAULT 1,
  banned INTEGER NOT NULL DEFAULT 0 CHECK (banned IN (0, 1)),
  created INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Bearer tokens of the HTTP API: only the SHA-256 is kept.
CREATE TABLE api_tokens (
  hash BLOB PRIMARY KEY CHECK (length(hash) = 32),
  id TEXT NOT NULL UNIQUE,
  account TEXT NOT NULL REFERENCES accounts (id),
  created INTEGER NOT NULL,
  expires INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX api_tokens_account ON api_tokens (account);

CREATE TABLE peers (
  id TEXT PRIMARY KEY,
  kind TEXT NOT NULL CHECK (kind IN ('host', 'proxy')),
  name TEXT NOT NULL,
  identity TEXT NOT NULL UNIQUE,
  address TEXT NOT NULL,
  capabilities TEXT,
  ssh_host_keys TEXT NOT NULL DEFAULT '[]',
  session TEXT,
  boot_id TEXT,
  last_seen INTEGER,
  cordoned INTEGER NOT NULL DEFAULT 0 CHECK (cordoned IN (0, 1)),
  audit_count INTEGER NOT NULL DEFAULT 0,
  audit_head TEXT NOT NULL DEFAULT '',
  created INTEGER NOT NULL,
  UNIQUE (kind, name)
) STRICT, WITHOUT ROWID;

-- Good for one join: `used_by` is then the peer that joined with it, so that a
-- repeated request of the same peer gets the same answer.
CREATE TABLE join_tokens (
  hash BLOB PRIMARY KEY CHECK (length(hash) = 32),
  kind TEXT NOT NULL CHECK (kind IN ('host', 'proxy')),
  created INTEGER NOT NULL,
  expires INTEGER NOT NULL,
  used_by TEXT REFERENCES peers (id)
) STRICT, WITHOUT ROWID;

-- The map: `host` owns the project in `epoch`. Both change only together,
-- in one transaction that finds `epoch` and `fence` as it expects them.
-- `fence` is the exclusive operation that is under way.
CREATE TABLE projects (
  id TEXT PRIMARY KEY,
  name TEXT NOT NULL,
  owner TEXT NOT NULL REFERENCES accounts (id),
  config TEXT NOT NULL,
  host TEXT NOT NULL REFERENCES peers (id),
  epoch INTEGER NOT NULL CHECK (epoch > 0),
  state TEXT NOT NULL CHECK (state IN
    ('creating', 'stopped', 'starting', 'running', 'stopping', 'moving', 'failed', 'deleted')),
  reason TEXT,
  phases TEXT NOT NULL DEFAULT '[]',
  -- Whether it ever existed on a host: only then can its files be missed.
  made INTEGER NOT NULL DEFAULT 0 CHECK (made IN (0, 1)),
  started INTEGER,
  fence TEXT REFERENCES operations (id) DEFERRABLE INITIALLY DEFERRED,
  acl_version INTEGER NOT NULL DEFAULT 1,
  grace_ms INTEGER,
  proxy_ssh INTEGER NOT NULL DEFAULT 1 CHECK (proxy_ssh IN (0, 1)),
  created INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX projects_host ON projects (host) WHERE state <> 'deleted';
CREATE INDEX projects_fenced ON projects (fence) WHERE fence IS NOT NULL;

CREATE TABLE members (
  project TEXT NOT NULL REFERENCES projects (id),
  account TEXT NOT NULL REFERENCES accounts (id),
  role TEXT NOT NULL CHECK (role IN ('viewer', 'collaborator', 'owner')),
  PRIMARY KEY (project, account)
) STRICT, WITHOUT ROWID;
CREATE INDEX members_account ON members (account, project);

CREATE TABLE ssh_keys (
  id TEXT PRIMARY KEY,
  account TEXT NOT NULL REFERENCES accounts (id),
  project TEXT REFERENCES projects (id),
  key TEXT NOT NULL,
  comment TEXT NOT NULL,
  created INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX ssh_keys_account ON ssh_keys (account);
CREATE INDEX ssh_keys_project ON ssh_keys (project) WHERE project IS NOT NULL;
CREATE UNIQUE INDEX ssh_keys_once ON ssh_keys (account, key, ifnull(project, ''));

CREATE TABLE operations (
  id TEXT PRIMARY KEY,
  project TEXT NOT NULL REFERENCES projects (id),
  account TEXT NOT NULL REFERENCES accounts (id),
  job TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed', 'cancelled')),
  cancel INTEGER NOT NULL DEFAULT 0 CHECK (cancel IN (0, 1)),
  phase TEXT NOT NULL,
  progress TEXT NOT NULL DEFAULT '{}',
  error TEXT,
  created INTEGER NOT NULL,
  updated INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX operations_running ON operations (state) WHERE state = 'running';
CREATE INDEX operations_project ON operations (project, created);
CREATE INDEX operations_account ON operations (account, created);

CREATE TABLE operation_events (
  operation TEXT NOT NULL REFERENCES operations (id),
  seq INTEGER NOT NULL,
  at INTEGER NOT NULL,
  phase TEXT NOT NULL,
  progress TEXT NOT NULL,
  PRIMARY KEY (operation, seq)
) STRICT, WITHOUT ROWID;

-- A move is its operation; the row advances only by compare-and-set on `revision`.
CREATE TABLE moves (
  id TEXT PRIMARY KEY REFERENCES operations (id),
  project TEXT NOT NULL REFERENCES projects (id),
  revision INTEGER NOT NULL,
  state TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE idempotency (
  account TEXT NOT NULL REFERENCES accounts (id),
  key TEXT NOT NULL,
  request BLOB NOT NULL CHECK (length(request) = 32),
  status INTEGER,
  body BLOB,
  created INTEGER NOT NULL,
  PRIMARY KEY (account, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_created ON idempotency (created);
