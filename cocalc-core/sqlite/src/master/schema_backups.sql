-- How a project stands with its backups, as its host says, in JSON.
ALTER TABLE projects ADD COLUMN backup TEXT;

-- The repository of a project's backups: its key, wrapped by a key of the master
-- that is not in here; when it was last tidied up, checked and tried out; what
-- was found then; and when it is to be erased, once its project is deleted. The
-- row is there before anything is encrypted with the key, and goes with the
-- repository.
CREATE TABLE backup_repositories (
  project TEXT PRIMARY KEY REFERENCES projects (id),
  wrapped TEXT NOT NULL,
  created INTEGER NOT NULL,
  used INTEGER NOT NULL DEFAULT 0 CHECK (used IN (0, 1)),
  pruned INTEGER,
  checked INTEGER,
  drilled INTEGER,
  damage TEXT,
  erase_at INTEGER
) STRICT, WITHOUT ROWID;
