//! The storage suite holds the model to its promises, and catches backends
//! that break them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests report by panicking, in helpers too")]

use std::sync::Arc;

use cocalc_core::{
    ids::{ProjectId, SnapshotName},
    memory::storage::MemoryStorage,
    storage::{SendOptions, Storage, VolumeOptions},
};
use cocalc_testkit::{
    faults::{Call, Fault, FaultyStorage},
    storage::{MemoryHarness, agrees_with_model, regressions, scripts, storage},
};
use proptest::prelude::*;
use tokio::io::AsyncReadExt as _;

#[tokio::test]
async fn memory_keeps_the_contract() {
    storage(&MemoryHarness::new()).await;
}

#[tokio::test]
async fn a_faulty_storage_without_faults_keeps_the_contract() {
    storage(&MemoryHarness::wrapping(|store| Arc::new(FaultyStorage::new(Arc::new(store))))).await;
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]

    #[test]
    fn memory_agrees_with_the_model(script in scripts(40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(agrees_with_model(&MemoryHarness::new(), &script));
    }
}

#[tokio::test]
async fn memory_agrees_with_the_model_where_others_did_not() {
    for (about, script) in regressions() {
        println!("{about}");
        agrees_with_model(&MemoryHarness::new(), &script).await;
    }
}

#[tokio::test]
async fn ordered_faults_come_once() {
    let memory = MemoryStorage::new();
    let store = FaultyStorage::new(Arc::new(memory.clone()));
    let (project, options) = (ProjectId::random(), VolumeOptions::default());
    store.order(Call::Create, Fault::Before);
    store.order(Call::Create, Fault::After);
    assert!(store.create(project, &options).await.is_err());
    assert!(memory.volume(project).await.is_err(), "before: nothing was done");
    assert!(store.create(project, &options).await.is_err());
    assert!(memory.volume(project).await.is_ok(), "after: it was done");
    assert!(store.pending().is_empty());

    let name: SnapshotName = "s".parse().unwrap();
    store.snapshot(project, &name).await.unwrap();
    store.order(Call::Send, Fault::CutAfter(10));
    let mut sent = store.send(project, &name, &SendOptions::whole()).await.unwrap();
    let mut bytes = Vec::new();
    assert!(sent.reader.read_to_end(&mut bytes).await.is_err());
    assert_eq!(bytes.len(), 10);
    assert_eq!(store.seen(), [Call::Create, Call::Create, Call::Snapshot, Call::Send]);
}
