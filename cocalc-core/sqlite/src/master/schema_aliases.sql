-- Other names of projects, each of one. A project that is deleted has none.
CREATE TABLE project_aliases (
    alias TEXT PRIMARY KEY,
    project TEXT NOT NULL UNIQUE REFERENCES projects (id)
) STRICT, WITHOUT ROWID;
