-- Receipts of revocations: who holds what was revoked, and what became of it
-- there. `hold_ms` is the longest lease and grace that the holder may know.
CREATE TABLE receipts (
  id TEXT PRIMARY KEY,
  account TEXT NOT NULL REFERENCES accounts (id),
  change TEXT NOT NULL,
  subject TEXT NOT NULL,
  created INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX receipts_created ON receipts (created);

CREATE TABLE receipt_holders (
  receipt TEXT NOT NULL REFERENCES receipts (id) ON DELETE CASCADE,
  peer TEXT NOT NULL,
  kind TEXT NOT NULL CHECK (kind IN ('host', 'proxy')),
  hold_ms INTEGER NOT NULL,
  outcome TEXT CHECK (outcome IN ('acknowledged', 'expired')),
  millis INTEGER,
  PRIMARY KEY (receipt, peer)
) STRICT, WITHOUT ROWID;
CREATE INDEX receipt_holders_open ON receipt_holders (receipt) WHERE outcome IS NULL;

-- The ports whose apps viewers may see. `grace_known_ms` is the longest grace
-- that a host may still know, if that is not the project's own of now.
ALTER TABLE projects ADD COLUMN viewable_ports TEXT NOT NULL DEFAULT '[]';
ALTER TABLE projects ADD COLUMN grace_known_ms INTEGER;

-- What an API key is limited to, as JSON; NULL: all that its account may. A
-- log-in ends with the session epoch in which it began.
ALTER TABLE api_tokens ADD COLUMN name TEXT NOT NULL DEFAULT '';
ALTER TABLE api_tokens ADD COLUMN limits TEXT;
ALTER TABLE api_tokens ADD COLUMN session_epoch INTEGER;

-- Local accounts log in with a name and a password, of which argon2id keeps
-- only what verifies it.
CREATE TABLE passwords (
  account TEXT PRIMARY KEY REFERENCES accounts (id),
  login TEXT NOT NULL UNIQUE,
  hash TEXT NOT NULL,
  changed INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Accounts that somebody else vouches for: the provider's name for the person.
CREATE TABLE identities (
  provider TEXT NOT NULL,
  subject TEXT NOT NULL,
  account TEXT NOT NULL REFERENCES accounts (id),
  created INTEGER NOT NULL,
  PRIMARY KEY (provider, subject)
) STRICT, WITHOUT ROWID;
CREATE INDEX identities_account ON identities (account);

-- A peer that was withdrawn stays known by name, and is let in no more. A join
-- token with a `peer` gives that peer another key.
ALTER TABLE peers ADD COLUMN withdrawn INTEGER;
ALTER TABLE join_tokens ADD COLUMN peer TEXT REFERENCES peers (id);
