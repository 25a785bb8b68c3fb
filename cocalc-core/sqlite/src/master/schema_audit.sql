-- Where the audit chains of hosts and proxies were: the last head of each day
-- (days since 1970, by the master's clock), as the peer signed it. `peer` is
-- host:<id> or proxy:<id>.
CREATE TABLE audit_heads (
  peer TEXT NOT NULL,
  day INTEGER NOT NULL,
  count INTEGER NOT NULL,
  hash TEXT NOT NULL,
  time INTEGER NOT NULL,
  received INTEGER NOT NULL,
  identity TEXT NOT NULL,
  signature TEXT NOT NULL,
  PRIMARY KEY (peer, day)
) STRICT, WITHOUT ROWID;

-- The last head of a peer that contradicts an earlier one, also signed.
CREATE TABLE audit_contradictions (
  peer TEXT PRIMARY KEY,
  count INTEGER NOT NULL,
  hash TEXT NOT NULL,
  time INTEGER NOT NULL,
  received INTEGER NOT NULL,
  identity TEXT NOT NULL,
  signature TEXT NOT NULL
) STRICT, WITHOUT ROWID;
