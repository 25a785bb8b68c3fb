//! What fuzz targets reach of the private parsers; nothing for other users.

use crate::agent;

/// Reads what a project's first process answers, which its tenant may have made
/// up, and panics if more is taken than may come.
pub async fn answers(bytes: &[u8]) {
    let (mut from, mut buffer) = (bytes, Vec::new());
    while let Ok(frame) = agent::next_frame(&mut from, &mut buffer).await {
        assert!(frame.len() <= agent::ANSWER_BYTES_MAX);
        if let Some(list) = agent::services::parse(&frame) {
            assert!(list.services.iter().all(|service| service.name.len() <= 128));
        }
        let _ = agent::services::parse_output(&frame);
        let _ = agent::process::exit(&frame);
    }
}
