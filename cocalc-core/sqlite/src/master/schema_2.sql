-- Hosts that once had a project which is deleted, or about to be, and have not
-- said yet that they have nothing of it any more.
CREATE TABLE leftovers (
  host TEXT NOT NULL REFERENCES peers (id),
  project TEXT NOT NULL REFERENCES projects (id),
  PRIMARY KEY (host, project)
) STRICT, WITHOUT ROWID;
CREATE INDEX moves_project ON moves (project);
