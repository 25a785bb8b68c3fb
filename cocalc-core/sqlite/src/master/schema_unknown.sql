-- Why it is not known now what the project does; NULL if it is. `state` is then the
-- last one that was known.
ALTER TABLE projects ADD COLUMN unknown TEXT;
