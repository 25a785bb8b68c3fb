-- Log-ins, by the tag that their tokens carry, that ended not long ago: hosts end
-- what was opened under them.
CREATE TABLE ended_logins (
  account TEXT NOT NULL REFERENCES accounts (id),
  tag TEXT NOT NULL CHECK (length(tag) = 16),
  ended INTEGER NOT NULL,
  PRIMARY KEY (account, tag)
) STRICT, WITHOUT ROWID;
