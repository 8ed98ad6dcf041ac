//! Tensors in ordinary memory.

use crate::DeviceError;
use crate::check::{filled, resize};

/// f32 `[rows, columns]`, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct CpuTensor {
    rows: usize,
    columns: usize,
    values: Vec<f32>,
}

impl CpuTensor {
    pub(crate) fn zeroed(rows: usize, columns: usize) -> Result<Self, DeviceError> {
        Ok(CpuTensor { rows, columns, values: filled(&[rows, columns], 0.0)? })
    }

    /// Changes the shape; values are unspecified. On an error nothing has changed.
    pub(crate) fn reshape(&mut self, rows: usize, columns: usize) -> Result<(), DeviceError> {
        match rows.checked_mul(columns) {
            Some(len) => resize(&mut self.values, len, 0.0)?,
            None => return Err(DeviceError::OutOfMemory { bytes: u64::MAX }),
        }
        (self.rows, self.columns) = (rows, columns);
        Ok(())
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// All values, `[rows * columns]`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// All values, to be changed.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values
    }

    /// Row `row`; panics beyond the end.
    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.columns..][..self.columns]
    }
}
