-- What the names of images mean, as administrators said.
CREATE TABLE image_names (
    name TEXT PRIMARY KEY,
    digest TEXT NOT NULL,
    account TEXT NOT NULL,
    updated INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
