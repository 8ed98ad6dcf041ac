//! Tables for rotary embeddings.

use crate::check::filled;
use crate::{DeviceError, RopePairs, RopeTable};

impl RopeTable {
    /// Tabulates `magnitude` times `cos` and `sin` of `position * inv_freq[i]` for positions below
    /// `positions`; rotates `2 * inv_freq.len()` columns of a head. The product of position and
    /// frequency is taken in f32, as the reference models do; its cosine and sine in f64 with an
    /// arithmetic of its own (not the platform's), rounded to f32, then multiplied in f32.
    ///
    /// # Errors
    /// `OutOfMemory` where the table cannot be had.
    pub fn new(
        pairs: RopePairs,
        inv_freq: &[f32],
        magnitude: f32,
        positions: usize,
    ) -> Result<RopeTable, DeviceError> {
        let half = inv_freq.len();
        let mut cos = filled(&[positions, half], 0.0)?;
        let mut sin = filled(&[positions, half], 0.0)?;
        if half > 0 {
            let rows = cos.chunks_mut(half).zip(sin.chunks_mut(half));
            for (position, (cos, sin)) in rows.enumerate() {
                for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(inv_freq) {
                    let (s, c) = libm::sincos(f64::from(position as f32 * frequency));
                    (*cos, *sin) = (c as f32 * magnitude, s as f32 * magnitude);
                }
            }
        }
        Ok(RopeTable { dims: 2 * half, pairs, cos, sin })
    }

    /// Positions in the table.
    pub fn positions(&self) -> usize {
        self.cos.len().checked_div(self.dims / 2).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn angles_are_products_in_f32() {
        let table = RopeTable::new(RopePairs::Halves, &[1.0, 0.1], 1.0, 5).unwrap();
        assert_eq!((table.positions(), table.dims), (5, 4));
        assert_eq!((table.cos[0], table.sin[0]), (1.0, 0.0));
        let angle = f64::from(3.0_f32 * 0.1_f32);
        assert_eq!(table.cos[3 * 2 + 1], libm::cos(angle) as f32);
        assert_eq!(table.sin[3 * 2 + 1], libm::sin(angle) as f32);
        assert_eq!(table.sin[3 * 2], libm::sin(3.0) as f32);
    }

    #[test]
    fn the_magnitude_multiplies_both() {
        let table = RopeTable::new(RopePairs::Interleaved, &[0.7], 1.25, 3).unwrap();
        let angle = f64::from(2.0_f32 * 0.7_f32);
        assert_eq!(table.cos[0], 1.25);
        assert_eq!(table.cos[2], libm::cos(angle) as f32 * 1.25);
        assert_eq!(table.sin[2], libm::sin(angle) as f32 * 1.25);
        assert_eq!(table.pairs, RopePairs::Interleaved);
    }

    #[test]
    fn tables_without_columns_or_memory() {
        let huge = RopeTable::new(RopePairs::Halves, &[1.0, 0.5], 1.0, usize::MAX);
        assert!(matches!(huge, Err(DeviceError::OutOfMemory { .. })));
        assert_eq!(RopeTable::new(RopePairs::Halves, &[], 1.0, 3).unwrap().positions(), 0);
    }
}
