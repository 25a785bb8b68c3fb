-- A host that an operator has said to be dead: it gets no lease, and its projects
-- may be brought up elsewhere from their backups. Who said so, why, and when it
-- was last heard of then.
ALTER TABLE peers ADD COLUMN fenced INTEGER;
ALTER TABLE peers ADD COLUMN fenced_by TEXT REFERENCES accounts (id);
ALTER TABLE peers ADD COLUMN fence_reason TEXT;
ALTER TABLE peers ADD COLUMN fence_heard INTEGER;

-- The recovery of what such a host had, and what became of each project of it.
CREATE TABLE recoveries (
  id TEXT PRIMARY KEY,
  host TEXT NOT NULL REFERENCES peers (id),
  account TEXT NOT NULL REFERENCES accounts (id),
  destinations TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed', 'cancelled')),
  cancel INTEGER NOT NULL DEFAULT 0 CHECK (cancel IN (0, 1)),
  created INTEGER NOT NULL,
  updated INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX recoveries_running ON recoveries (state) WHERE state = 'running';
CREATE INDEX recoveries_host ON recoveries (host, created);

CREATE TABLE recovery_projects (
  recovery TEXT NOT NULL REFERENCES recoveries (id),
  project TEXT NOT NULL REFERENCES projects (id),
  outcome TEXT NOT NULL DEFAULT 'waiting'
    CHECK (outcome IN ('waiting', 'restoring', 'restored', 'no_backup', 'failed', 'passed')),
  operation TEXT REFERENCES operations (id),
  details TEXT NOT NULL DEFAULT '{}',
  PRIMARY KEY (recovery, project)
) STRICT, WITHOUT ROWID;
