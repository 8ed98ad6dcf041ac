//! Made-up data and devices for the tests.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]
#![allow(dead_code, reason = "every test file uses its own part")]

use compute::cpu::{CpuMatrix, CpuTensor};
use compute::{CpuDevice, Device, KernelClass, Precision, StoredType, WeightSource};

/// All precisions.
pub(crate) const PRECISIONS: [Precision; 4] =
    [Precision::F32, Precision::Bf16, Precision::Int8, Precision::Int4];

/// A repeatable sequence of numbers.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    /// 32 mixed bits.
    pub(crate) fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        let x = self.0 ^ (self.0 >> 33);
        (x.wrapping_mul(0xff51_afd7_ed55_8ccd) >> 32) as u32
    }

    /// Between -1 and 1, of different magnitudes, so that the order of additions shows.
    pub(crate) fn next(&mut self) -> f32 {
        let value = self.bits() as f32 / 2_147_483_648.0 - 1.0;
        value * [1.0, 0.25, 0.01, 3.0][self.bits() as usize % 4]
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.bits() as usize % limit
    }

    /// Many.
    pub(crate) fn take(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }
}

/// Devices of every class that this processor has, with one and with two threads.
pub(crate) fn devices() -> Vec<CpuDevice> {
    let mut devices = Vec::new();
    for class in KernelClass::ALL {
        if !class.is_available() {
            println!("kernel class {class} is not available here: skipped");
            continue;
        }
        for threads in [1, 2] {
            devices.push(CpuDevice::new(threads, Some(class)).unwrap());
        }
    }
    devices
}

/// A device of the portable class with one thread.
pub(crate) fn plain() -> CpuDevice {
    CpuDevice::new(1, Some(KernelClass::Portable)).unwrap()
}

/// A tensor of given values.
pub(crate) fn tensor(device: &CpuDevice, columns: usize, values: &[f32]) -> CpuTensor {
    let rows = values.len().checked_div(columns).unwrap_or(0);
    let mut tensor = device.tensor(rows, columns).unwrap();
    device.host_mut(&mut tensor).copy_from_slice(values);
    tensor
}

/// A packed matrix of f32 values `[outputs, inputs]`.
pub(crate) fn matrix(device: &CpuDevice, inputs: usize, values: &[f32], p: Precision) -> CpuMatrix {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let source =
        WeightSource::plain(&bytes, StoredType::F32, inputs, 0..values.len() / inputs, 0..inputs);
    device.pack(&source, p).unwrap()
}

/// Bits, with one pattern for every NaN (a NaN's payload is no part of the contract).
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| if v.is_nan() { 0x7fc0_0000 } else { v.to_bits() }).collect()
}

/// The nearest bfloat16, by another's arithmetic.
pub(crate) fn bf16(x: f32) -> f32 {
    half::bf16::from_f32(x).to_f32()
}
