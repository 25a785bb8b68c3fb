//! Moves a project between two stores of one's own, as two hosts would.

use std::sync::Arc;

use cocalc_core::{
    BoxError,
    ids::{ProjectId, SnapshotName},
    storage::{SendOptions, Storage, VolumeOptions},
};
use own_storage::Shelves;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), BoxError> {
    let (alpha, beta) = (Shelves::default(), Shelves::default());
    let project = ProjectId::random();
    alpha.create(project, &VolumeOptions::default()).await?;
    alpha.edit(project, |files| files.insert("home/notes.txt".to_owned(), b"hello".to_vec()))?;

    // From here on, only the trait: this is what a host holds.
    let (source, target): (Arc<dyn Storage>, Arc<dyn Storage>) = (Arc::new(alpha), Arc::new(beta.clone()));
    let (last, former): (SnapshotName, SnapshotName) = ("move-final".parse()?, "former".parse()?);
    let taken = source.set_aside(project, &last).await?;
    let sent = source.send(project, &last, &SendOptions::whole()).await?;
    let arrived = target.receive(&sent.header, sent.reader).await?;
    if arrived.origin != taken.origin {
        return Err("the receipt is for another snapshot".into());
    }
    target.restore(project, &last, &former).await?;

    let notes = beta.edit(project, |files| files.get("home/notes.txt").cloned())?;
    println!("project {project} moved; its notes say {:?}", String::from_utf8(notes.unwrap_or_default())?);
    Ok(())
}
