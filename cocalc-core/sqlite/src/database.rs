//! The file that a store lives in.

use std::{
    fmt,
    fs::OpenOptions,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    str::FromStr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rusqlite::{Connection, OpenFlags, Row, Transaction, TransactionBehavior, types::Type};
use serde::de::DeserializeOwned;

use crate::error::{Error, Fault};

/// How long a statement waits for a lock that another process holds, for
/// instance an operator's backup.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// What survives when the machine loses power.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Durability {
    /// Every transaction that returned: `synchronous=FULL`. For who owns what,
    /// journals, and positions in the stream.
    #[default]
    Full,
    /// Everything if only the process dies; the last transactions may be lost
    /// with the machine: `synchronous=NORMAL`. For sessions and used tokens.
    Normal,
}

/// A SQLite file: WAL, one writer, one reader that doesn't wait for it.
///
/// The calls block; async callers use their runtime's blocking threads.
pub struct Database {
    writer: Mutex<Connection>,
    reader: Mutex<Connection>,
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database").finish_non_exhaustive()
    }
}

impl Database {
    /// Opens `path`, or creates it with mode 0600, and brings its schema up to
    /// `migrations.len()`. Migration *n* (from 1) is `migrations[n - 1]`: SQL
    /// that leads from schema *n* - 1 to *n*. Published migrations never
    /// change; new ones go to the end. Each is applied in one transaction.
    ///
    /// # Errors
    ///
    /// Files that cannot be opened, are no databases, or have a schema newer
    /// than `migrations`; migrations that fail, which leave the file as it was.
    pub fn open(path: &Path, durability: Durability, migrations: &[&str]) -> Result<Self, Error> {
        let refused =
            |source: Box<dyn std::error::Error + Send + Sync>| Error::Open { path: path.into(), source };
        create_private(path).map_err(|error| refused(error.into()))?;
        let mut writer = connect(path, durability, false).map_err(|error| refused(error.into()))?;
        migrate(&mut writer, path, migrations)?;
        let reader = connect(path, durability, true).map_err(|error| refused(error.into()))?;
        Ok(Self { writer: Mutex::new(writer), reader: Mutex::new(reader) })
    }

    /// Reads through the whole file and checks that it is sound.
    ///
    /// # Errors
    ///
    /// [`Damaged`](Error::Damaged), naming the first thing that is wrong.
    pub fn check(&self) -> Result<(), Error> {
        self.read("check the database", |connection| {
            let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
            if verdict == "ok" { Ok(()) } else { Err(Fault::Refused(Error::Damaged { what: verdict })) }
        })
    }

    /// Runs `body` on a consistent view of what was last committed.
    pub(crate) fn read<T, E: From<Error>>(
        &self,
        operation: &'static str,
        body: impl FnOnce(&Connection) -> Result<T, Fault<E>>,
    ) -> Result<T, E> {
        let mut connection = lock(&self.reader);
        let run = || {
            // One deferred transaction, so that several statements see one state.
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Deferred)?;
            let value = body(&transaction)?;
            transaction.finish()?;
            Ok(value)
        };
        run().map_err(|fault: Fault<E>| fault.fold(operation))
    }

    /// Runs `body` in one transaction: all of it is committed if it returns
    /// `Ok`, nothing otherwise. No other writer runs in between.
    pub(crate) fn write<T, E: From<Error>>(
        &self,
        operation: &'static str,
        body: impl FnOnce(&Transaction<'_>) -> Result<T, Fault<E>>,
    ) -> Result<T, E> {
        let mut connection = lock(&self.writer);
        let run = || {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let value = body(&transaction)?;
            transaction.commit()?;
            Ok(value)
        };
        run().map_err(|fault: Fault<E>| fault.fold(operation))
    }
}

/// A panic in a body rolled its transaction back, so the connection is sound.
fn lock(connection: &Mutex<Connection>) -> MutexGuard<'_, Connection> {
    connection.lock().unwrap_or_else(PoisonError::into_inner)
}

/// SQLite gives the WAL and its index the mode of the main file, so making
/// that one private keeps all three private.
fn create_private(path: &Path) -> std::io::Result<()> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    let mode = file.metadata()?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(std::io::Error::new(
            std::io::ErrorKind::PermissionDenied,
            format!("its mode is {:o}, others than its owner may read it; expected 600", mode & 0o777),
        ));
    }
    Ok(())
}

fn connect(path: &Path, durability: Durability, read_only: bool) -> rusqlite::Result<Connection> {
    // Never CREATE here: the file exists, and nothing else may be made by a
    // mistyped path. NO_MUTEX: each connection has a mutex of ours.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_EXRESCODE;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| {
        let mode: String = row.get(0)?;
        if mode == "wal" { Ok(()) } else { Err(rusqlite::Error::InvalidQuery) }
    })?;
    let synchronous = match durability {
        Durability::Full => "FULL",
        Durability::Normal => "NORMAL",
    };
    connection.pragma_update(None, "synchronous", synchronous)?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    connection.pragma_update(None, "mmap_size", 0)?;
    connection.pragma_update(None, "query_only", read_only)?;
    connection.set_prepared_statement_cache_capacity(128);
    Ok(connection)
}

fn migrate(connection: &mut Connection, path: &Path, migrations: &[&str]) -> Result<(), Error> {
    let refused = |source: rusqlite::Error| Error::Open { path: path.into(), source: source.into() };
    let found: i64 =
        connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(refused)?;
    let found = usize::try_from(found)
        .map_err(|_| Error::Damaged { what: format!("schema version {found} of {}", path.display()) })?;
    if found > migrations.len() {
        return Err(Error::NewerSchema { path: path.into(), found, known: migrations.len() });
    }
    for (version, sql) in migrations.iter().enumerate().skip(found).map(|(index, sql)| (index + 1, sql)) {
        let apply = |connection: &mut Connection| {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            transaction.execute_batch(sql)?;
            transaction.pragma_update(None, "user_version", version)?;
            transaction.commit()
        };
        apply(connection).map_err(|source| Error::Migration {
            path: path.into(),
            version,
            source: source.into(),
        })?;
    }
    Ok(())
}

/// A column that holds the one spelling of an id, name or epoch.
pub(crate) fn parsed<T>(row: &Row<'_>, column: usize) -> rusqlite::Result<T>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    let text = row.get_ref(column)?.as_str()?;
    text.parse().map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::<T::Err>::new(error))
    })
}

/// A column that holds such a text, or nothing.
pub(crate) fn parsed_opt<T>(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<T>>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    match row.get_ref(column)?.as_str_or_null()? {
        None => Ok(None),
        Some(_) => parsed(row, column).map(Some),
    }
}

/// A column that holds JSON.
pub(crate) fn json<T: DeserializeOwned>(row: &Row<'_>, column: usize) -> rusqlite::Result<T> {
    let text = row.get_ref(column)?.as_str()?;
    serde_json::from_str(text)
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: &str = "CREATE TABLE fact (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;";
    const SECOND: &str = "ALTER TABLE fact ADD COLUMN note TEXT NOT NULL DEFAULT '';";

    fn insert(database: &Database, name: &str, value: i64) -> Result<(), Error> {
        database.write("insert", |transaction| {
            transaction.execute("INSERT INTO fact (name, value) VALUES (?1, ?2)", (name, value))?;
            Ok(())
        })
    }

    fn count(database: &Database) -> i64 {
        let count: Result<i64, Error> = database.read("count", |connection| {
            Ok(connection.query_row("SELECT count(*) FROM fact", [], |row| row.get(0))?)
        });
        count.unwrap()
    }

    #[test]
    fn migrates_forward_and_refuses_what_is_newer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let database = Database::open(&path, Durability::Full, &[FIRST]).unwrap();
        insert(&database, "a", 1).unwrap();
        drop(database);
        let database = Database::open(&path, Durability::Normal, &[FIRST, SECOND]).unwrap();
        let note: Result<String, Error> = database.read("read", |connection| {
            Ok(connection.query_row("SELECT note FROM fact", [], |row| row.get(0))?)
        });
        assert_eq!(note.unwrap(), "");
        drop(database);
        let error = Database::open(&path, Durability::Full, &[FIRST]).unwrap_err();
        assert!(matches!(error, Error::NewerSchema { found: 2, known: 1, .. }), "{error}");
    }

    #[test]
    fn a_failed_migration_leaves_the_file_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        drop(Database::open(&path, Durability::Full, &[FIRST]).unwrap());
        let broken = "CREATE TABLE other (x INTEGER) STRICT; INSERT INTO missing VALUES (1);";
        let error = Database::open(&path, Durability::Full, &[FIRST, broken]).unwrap_err();
        assert!(matches!(error, Error::Migration { version: 2, .. }), "{error}");
        let again = ["", "CREATE TABLE other (x INTEGER) STRICT;"];
        // `other` must not exist from the failed attempt.
        Database::open(&path, Durability::Full, &again).unwrap();
    }

    #[test]
    fn the_file_is_private_and_an_open_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let database = Database::open(&path, Durability::Full, &[FIRST]).unwrap();
        insert(&database, "a", 1).unwrap();
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let mode = entry.unwrap().metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0);
        }
        drop(database);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = Database::open(&path, Durability::Full, &[FIRST]).unwrap_err();
        assert!(matches!(error, Error::Open { .. }), "{error}");
    }

    #[test]
    fn a_refused_transaction_writes_nothing_and_the_reader_cannot_write() {
        let dir = tempfile::tempdir().unwrap();
        let database = Database::open(&dir.path().join("db"), Durability::Full, &[FIRST]).unwrap();
        let refused: Result<(), Error> = database.write("refuse", |transaction| {
            transaction.execute("INSERT INTO fact VALUES ('a', 1)", [])?;
            Err(Fault::Refused(Error::Damaged { what: "on purpose".into() }))
        });
        assert!(matches!(refused, Err(Error::Damaged { .. })));
        assert_eq!(count(&database), 0);
        let written: Result<usize, Error> = database
            .read("write", |connection| Ok(connection.execute("INSERT INTO fact VALUES ('a', 1)", [])?));
        assert!(matches!(written, Err(Error::Failed { .. })));
        insert(&database, "a", 1).unwrap();
        // A duplicate key fails, and the connection goes on.
        assert!(insert(&database, "a", 2).is_err());
        insert(&database, "b", 2).unwrap();
        assert_eq!(count(&database), 2);
        database.check().unwrap();
    }

    #[test]
    fn what_is_no_database_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        std::fs::write(&path, vec![7; 8192]).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let error = Database::open(&path, Durability::Full, &[FIRST]).unwrap_err();
        assert!(matches!(error, Error::Open { .. }), "{error}");
    }
}
