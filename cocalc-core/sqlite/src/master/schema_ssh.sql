-- What stands in front of a key in `authorized_keys`, as it was written.
ALTER TABLE ssh_keys ADD COLUMN options TEXT NOT NULL DEFAULT '';

-- Whether the project's own `~/.ssh/authorized_keys` opens it.
ALTER TABLE projects ADD COLUMN authorized_keys INTEGER NOT NULL DEFAULT 0 CHECK (authorized_keys IN (0, 1));
