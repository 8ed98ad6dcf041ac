//! The classes of instruction sets that kernels are compiled for.

use super::lanes::Simd;
use crate::DeviceError;
use std::fmt;
use std::str::FromStr;

/// Which instructions the kernels use. All classes give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KernelClass {
    /// What every processor has; fused multiply-adds may run in software.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, VL and DQ (VNNI where found: its bits are the same).
    Avx512,
}

impl KernelClass {
    /// All classes, slowest first.
    pub const ALL: [KernelClass; 3] =
        [KernelClass::Portable, KernelClass::Avx2, KernelClass::Avx512];

    /// The fastest class of this processor.
    pub fn detect() -> KernelClass {
        let found = Self::ALL.into_iter().rev().find(|class| class.is_available());
        found.unwrap_or(KernelClass::Portable)
    }

    /// Whether this processor has the class.
    pub fn is_available(self) -> bool {
        Simd::new(self).is_some()
    }
}

impl fmt::Display for KernelClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            KernelClass::Portable => "portable",
            KernelClass::Avx2 => "avx2",
            KernelClass::Avx512 => "avx512",
        })
    }
}

impl FromStr for KernelClass {
    type Err = DeviceError;

    fn from_str(name: &str) -> Result<Self, DeviceError> {
        Self::ALL
            .into_iter()
            .find(|class| class.to_string() == name)
            .ok_or_else(|| DeviceError::UnknownClass { name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for class in KernelClass::ALL {
            assert_eq!(class.to_string().parse::<KernelClass>(), Ok(class));
        }
        let unknown = "sse".parse::<KernelClass>();
        assert_eq!(unknown, Err(DeviceError::UnknownClass { name: "sse".into() }));
    }

    #[test]
    fn the_detected_class_is_available() {
        assert!(KernelClass::detect().is_available());
        assert!(KernelClass::Portable.is_available());
    }
}
