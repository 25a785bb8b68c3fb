//! Randomness of the system, for names that nobody may guess.

/// The characters of conat's random names: no digit or letter that looks like
/// another.
const ALPHABET: &[u8; 32] = b"23456789ABCDEFGHJKLMNPQRSTUVWXYZ";

/// A random name of `length` characters, five bits each.
pub(crate) fn name(length: usize) -> String {
    let mut bytes = vec![0; length];
    fill(&mut bytes);
    bytes.iter().map(|byte| char::from(ALPHABET[usize::from(byte & 31)])).collect()
}

/// A random number.
pub(crate) fn number() -> u64 {
    let mut bytes = [0; 8];
    fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

fn fill(bytes: &mut [u8]) {
    if let Err(error) = getrandom::fill(bytes) {
        // Linux has had it since 3.17; names that can be guessed would be
        // worse than none.
        panic!("the system has no randomness: {error}");
    }
}
