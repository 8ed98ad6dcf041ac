//! The one source of chance of a simulation: a counter under a key, mixed.
//!
//! A draw depends on (seed, stream, count) and on nothing else, so that a run replays on any
//! machine. Streams keep one part's draws from moving another's.

/// A counter-based generator. Two of one seed and stream draw the same numbers.
#[derive(Debug, Clone)]
pub struct Rng {
    key: u64,
    count: u64,
}

/// The finaliser of SplitMix64: every bit of the input moves every bit of the output.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Rng {
    /// The generator of `stream` under `seed`.
    pub fn new(seed: u64, stream: u64) -> Self {
        let key = mix(mix(seed ^ 0x5851_f42d_4c95_7f2d).wrapping_add(mix(stream)));
        Self { key, count: 0 }
    }

    /// A digest `sum` with one more byte folded in.
    pub fn fold(sum: u64, byte: u8) -> u64 {
        mix(sum.rotate_left(8) ^ u64::from(byte))
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.count += 1;
        mix(self.key.wrapping_add(self.count.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    /// A number below `bound`, which is at least 1. The bias of at most 2^-32 is accepted.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(bound.max(1))) >> 64) as u64
    }

    /// A number from `low` up to and including `high`.
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True in `per_mille` of a thousand cases.
    pub fn chance(&mut self, per_mille: u64) -> bool {
        per_mille > 0 && self.below(1000) < per_mille
    }

    /// One of `items`; `None` when there is none.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> Option<&'a T> {
        items.get(self.below(items.len() as u64) as usize)
    }

    /// Puts `items` in a random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_replays_and_streams_differ() {
        let draw = |seed, stream| {
            let mut rng = Rng::new(seed, stream);
            [rng.bits(), rng.bits(), rng.bits()]
        };
        assert_eq!(draw(7, 1), draw(7, 1));
        assert_ne!(draw(7, 1), draw(7, 2));
        assert_ne!(draw(7, 1), draw(8, 1));
    }

    #[test]
    fn draws_stay_in_bounds_and_reach_them() {
        let mut rng = Rng::new(1, 1);
        let drawn: Vec<u64> = (0..1000).map(|_| rng.range(3, 6)).collect();
        assert_eq!((drawn.iter().min(), drawn.iter().max()), (Some(&3), Some(&6)));
        assert!((0..1000).filter(|_| rng.chance(250)).count().abs_diff(250) < 60);
        assert!(!rng.chance(0));
        assert_eq!(rng.pick::<u8>(&[]), None);
    }
}
