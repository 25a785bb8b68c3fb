-- The secrets of projects, each wrapped by the master's key.
CREATE TABLE project_secrets (
    project TEXT NOT NULL REFERENCES projects (id),
    name TEXT NOT NULL,
    wrapped TEXT NOT NULL,
    updated INTEGER NOT NULL,
    PRIMARY KEY (project, name)
) STRICT, WITHOUT ROWID;
