//! Tables for rotary embeddings.

use crate::check::{Check, filled};
use crate::{DeviceError, RopeTable};

impl RopeTable {
    /// Tabulates `cos` and `sin` of `position * inv_freq[i]` for positions below `positions`.
    /// The product is taken in f32, as the reference models do; its cosine and sine in f64 with
    /// an arithmetic of its own (not the platform's), rounded to f32.
    ///
    /// # Errors
    /// `Shape` where `head_dim` is odd or `inv_freq` does not hold `head_dim / 2` values,
    /// `OutOfMemory` where the table cannot be had.
    pub fn new(
        head_dim: usize,
        inv_freq: &[f32],
        positions: usize,
    ) -> Result<RopeTable, DeviceError> {
        let check = Check("rope_table");
        check.equal("head_dim % 2", head_dim % 2, 0)?;
        check.equal("inv_freq", inv_freq.len(), head_dim / 2)?;
        let mut cos = filled(&[positions, head_dim / 2], 0.0)?;
        let mut sin = filled(&[positions, head_dim / 2], 0.0)?;
        if head_dim > 0 {
            let rows = cos.chunks_mut(head_dim / 2).zip(sin.chunks_mut(head_dim / 2));
            for (position, (cos, sin)) in rows.enumerate() {
                for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(inv_freq) {
                    let (s, c) = libm::sincos(f64::from(position as f32 * frequency));
                    (*cos, *sin) = (c as f32, s as f32);
                }
            }
        }
        Ok(RopeTable { head_dim, cos, sin })
    }

    /// Positions in the table.
    pub fn positions(&self) -> usize {
        self.cos.len().checked_div(self.head_dim / 2).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn angles_are_products_in_f32() {
        let table = RopeTable::new(4, &[1.0, 0.1], 5).unwrap();
        assert_eq!(table.positions(), 5);
        assert_eq!((table.cos[0], table.sin[0]), (1.0, 0.0));
        let angle = f64::from(3.0_f32 * 0.1_f32);
        assert_eq!(table.cos[3 * 2 + 1], libm::cos(angle) as f32);
        assert_eq!(table.sin[3 * 2 + 1], libm::sin(angle) as f32);
        assert_eq!(table.sin[3 * 2], libm::sin(3.0) as f32);
    }

    #[test]
    fn misfits_are_errors() {
        assert!(RopeTable::new(3, &[1.0], 1).is_err());
        assert!(RopeTable::new(4, &[1.0], 1).is_err());
        let huge = RopeTable::new(4, &[1.0, 0.5], usize::MAX);
        assert!(matches!(huge, Err(DeviceError::OutOfMemory { .. })));
        assert_eq!(RopeTable::new(0, &[], 3).unwrap().positions(), 0);
    }
}
