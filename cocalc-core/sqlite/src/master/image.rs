//! What the names of images mean. Hosts have images, and no say in that.

use std::collections::BTreeMap;

use cocalc_ids::{AccountId, ImageDigest, Timestamp};
use rusqlite::{OptionalExtension as _, params};

use super::{Error, Result, Store};
use crate::{database::parsed, error::Fault};

/// How many names there may be.
const NAMES_MAX: usize = 10_000;

impl Store {
    /// Says what a name means from now on.
    ///
    /// # Errors
    ///
    /// [`Error::TooMany`], or the database failed.
    pub fn name_image(
        &self,
        name: &str,
        digest: ImageDigest,
        account: AccountId,
        now: Timestamp,
    ) -> Result<()> {
        self.database.write("name an image", |db| {
            let sql = "SELECT count(*) FROM image_names WHERE name <> ?1";
            let others: usize = db.query_row(sql, [name], |row| row.get(0))?;
            if others >= NAMES_MAX {
                return Err(Fault::Refused(Error::TooMany { what: "names of images", limit: NAMES_MAX }));
            }
            db.execute(
                "INSERT OR REPLACE INTO image_names (name, digest, account, updated) VALUES (?1, ?2, ?3, ?4)",
                params![name, digest.to_string(), account.to_string(), now.millis()],
            )?;
            Ok(())
        })
    }

    /// What a name means, if anything.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn image_named(&self, name: &str) -> Result<Option<ImageDigest>> {
        self.database.read("find an image by its name", |db| {
            let sql = "SELECT digest FROM image_names WHERE name = ?1";
            Ok(db.prepare_cached(sql)?.query_row([name], |row| parsed(row, 0)).optional()?)
        })
    }

    /// All names, and what they mean.
    ///
    /// # Errors
    ///
    /// The database failed.
    pub fn image_names(&self) -> Result<BTreeMap<String, ImageDigest>> {
        self.database.read("list the names of images", |db| {
            let sql = "SELECT name, digest FROM image_names ORDER BY name";
            let names = db
                .prepare_cached(sql)?
                .query_map([], |row| Ok((row.get(0)?, parsed(row, 1)?)))?
                .collect::<Result<_, _>>()?;
            Ok(names)
        })
    }
}
