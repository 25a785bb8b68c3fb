//! Randomness that a seed repeats.

/// A small generator (SplitMix64). It spreads load; nothing secret comes from it.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// Starts from `seed`.
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `bound`; 0 if that is 0.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        // The bias of a remainder is far below what load spreading notices.
        usize::try_from(z >> 33).unwrap_or(0).checked_rem(bound).unwrap_or(0)
    }
}
