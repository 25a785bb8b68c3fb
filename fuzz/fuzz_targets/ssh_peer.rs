//! What proxies and hosts say to each other about SSH, and what tools in projects say:
//! nothing panics, and what was read is what it would be sent as.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tokio::runtime::{Builder, Runtime};

static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().enable_time().build().expect("a runtime"));

fuzz_target!(|bytes: &[u8]| {
    RUNTIME.block_on(async {
        cocalc_ssh::fuzzing::peer(bytes).await;
        cocalc_ssh::fuzzing::tool(bytes).await;
    });
});
