-- How a project stands with its backups, as its host says, in JSON.
ALTER TABLE projects ADD COLUMN backup TEXT;

-- The keys of repositories, each wrapped by a key of the master that is not in
-- here; empty until it is made. `name` is a project, or `shard-N`, which many
-- share. `projects` counts those that ever were in it.
CREATE TABLE backup_keys (
  name TEXT PRIMARY KEY,
  wrapped TEXT NOT NULL,
  projects INTEGER NOT NULL,
  created INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- In which repository the backups of a project are; when that was last tidied
-- up, checked and tried out; what was found then; and when they are to be
-- erased, once the project is deleted. The row is there before anything is
-- backed up, and goes with the backups.
CREATE TABLE backup_repositories (
  project TEXT PRIMARY KEY REFERENCES projects (id),
  name TEXT NOT NULL REFERENCES backup_keys (name),
  created INTEGER NOT NULL,
  used INTEGER NOT NULL DEFAULT 0 CHECK (used IN (0, 1)),
  pruned INTEGER,
  checked INTEGER,
  drilled INTEGER,
  damage TEXT,
  erase_at INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX backup_repositories_name ON backup_repositories (name);
CREATE INDEX backup_repositories_pruned ON backup_repositories (ifnull(pruned, created)) WHERE used = 1 AND erase_at IS NULL;
CREATE INDEX backup_repositories_checked ON backup_repositories (ifnull(checked, created)) WHERE used = 1 AND erase_at IS NULL;
CREATE INDEX backup_repositories_drilled ON backup_repositories (ifnull(drilled, created)) WHERE used = 1 AND erase_at IS NULL;
CREATE INDEX backup_repositories_erased ON backup_repositories (erase_at) WHERE erase_at IS NOT NULL;
CREATE INDEX backup_repositories_damaged ON backup_repositories (project) WHERE damage IS NOT NULL;
