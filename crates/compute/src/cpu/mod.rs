//! The CPU device: own threads, own kernels, the same bits in every kernel class.

mod arena;
mod attention;
mod cache;
mod class;
mod elementwise;
mod exponential;
mod heads;
mod int4;
mod lanes;
mod limits;
mod math;
mod matmul;
mod pack;
mod route;
mod stored;
mod team;
mod tensor;

pub use cache::CpuCache;
pub use class::KernelClass;
pub use exponential::exp_weights;
pub use limits::MachineLimits;
pub use pack::CpuMatrix;
pub(crate) use stored::touched;
pub use tensor::CpuTensor;

use crate::device::{
    Activation, AttendSpan, CacheShape, Columns, Device, DeviceError, HeadMap, Precision,
    RopeTable, Rounding, Routes, Routing, Segment, WeightSource,
};
use arena::Arena;
use lanes::Simd;
use std::fmt;
use std::sync::Arc;
use team::Team;

/// A CPU. Clones share its threads.
#[derive(Clone)]
pub struct CpuDevice {
    shared: Arc<Shared>,
}

struct Shared {
    class: KernelClass,
    simd: Simd,
    team: Team,
    arena: Arena,
    pool: matmul::StagePool,
}

impl CpuDevice {
    /// A device of `threads` threads, the calling one included (with one, no other is started),
    /// and of kernel class `class`, or the processor's best.
    ///
    /// # Errors
    /// `NoThreads`, `Threads`, or `UnavailableClass` where the processor lacks `class`.
    pub fn new(threads: usize, class: Option<KernelClass>) -> Result<CpuDevice, DeviceError> {
        let class = class.unwrap_or_else(KernelClass::detect);
        let simd = Simd::new(class).ok_or(DeviceError::UnavailableClass { class })?;
        Self::with(threads, class, simd)
    }

    fn with(threads: usize, class: KernelClass, simd: Simd) -> Result<CpuDevice, DeviceError> {
        let team = Team::new(threads)?;
        let (arena, pool) = Default::default();
        Ok(CpuDevice { shared: Arc::new(Shared { class, simd, team, arena, pool }) })
    }

    /// The kernel class in use.
    pub fn class(&self) -> KernelClass {
        self.shared.class
    }

    /// Threads that work on an operation.
    pub fn threads(&self) -> usize {
        self.shared.team.threads()
    }

    fn hands(&self) -> (Simd, &Team) {
        (self.shared.simd, &self.shared.team)
    }
}

impl fmt::Debug for CpuDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = f.debug_struct("CpuDevice");
        text.field("class", &self.class()).field("threads", &self.threads()).finish()
    }
}

impl Device for CpuDevice {
    type Tensor = CpuTensor;
    type Matrix = CpuMatrix;
    type Cache = CpuCache;

    fn tensor(&self, rows: usize, columns: usize) -> Result<CpuTensor, DeviceError> {
        CpuTensor::zeroed(rows, columns)
    }

    fn reshape(
        &self,
        tensor: &mut CpuTensor,
        rows: usize,
        columns: usize,
    ) -> Result<(), DeviceError> {
        tensor.reshape(rows, columns)
    }

    fn host<'a>(&self, tensor: &'a CpuTensor) -> &'a [f32] {
        tensor.values()
    }

    fn host_mut<'a>(&self, tensor: &'a mut CpuTensor) -> &'a mut [f32] {
        tensor.values_mut()
    }

    fn share(&self, values: &mut [f32], cost: usize, work: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        self.shared.team.each(values, 1, cost, work);
    }

    fn pack(
        &self,
        source: &WeightSource<'_>,
        precision: Precision,
    ) -> Result<CpuMatrix, DeviceError> {
        pack::pack((&self.shared.team, &self.shared.arena), source, precision)
    }

    fn rounding(&self, matrix: &CpuMatrix) -> Rounding {
        matrix.rounding
    }

    fn matrix_shape(&self, matrix: &CpuMatrix) -> (usize, usize) {
        (matrix.outputs(), matrix.inputs())
    }

    fn cache(&self, shape: CacheShape) -> Result<CpuCache, DeviceError> {
        CpuCache::new(&self.shared.arena, shape)
    }

    fn embed(
        &self,
        table: &CpuMatrix,
        rows: &[Option<u32>],
        to_row: usize,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        elementwise::embed(&self.shared.team, table, rows, to_row, out)
    }

    fn rms_norm(
        &self,
        x: &CpuTensor,
        weight: &[f32],
        eps: f32,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        elementwise::rms_norm(self.hands(), x, weight, eps, out)
    }

    fn matmul(
        &self,
        x: &CpuTensor,
        segments: &[Segment<'_, CpuMatrix>],
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        let Shared { simd, team, pool, .. } = &*self.shared;
        matmul::matmul(matmul::Context { simd: *simd, team, pool }, x, segments, out)
    }

    fn rope(
        &self,
        x: &mut CpuTensor,
        from_column: usize,
        heads: usize,
        stride: usize,
        positions: &[u32],
        table: &RopeTable,
    ) -> Result<(), DeviceError> {
        let at = Columns { first: from_column, stride };
        heads::rope(self.hands(), x, (at, heads), positions, table)
    }

    fn norm_heads(
        &self,
        x: &mut CpuTensor,
        from_column: usize,
        heads: usize,
        stride: usize,
        weight: &[f32],
        eps: f32,
    ) -> Result<(), DeviceError> {
        let at = Columns { first: from_column, stride };
        heads::norm(self.hands(), x, (at, heads), weight, eps)
    }

    fn copy_columns(
        &self,
        x: &CpuTensor,
        from: Columns,
        width: usize,
        heads: usize,
        out: &mut CpuTensor,
        to: Columns,
    ) -> Result<(), DeviceError> {
        heads::copy(&self.shared.team, (x, from), (width, heads), (out, to))
    }

    fn store_kv(
        &self,
        cache: &mut CpuCache,
        layer: usize,
        x: &CpuTensor,
        key_column: usize,
        value_column: usize,
        spans: &[AttendSpan<'_>],
    ) -> Result<(), DeviceError> {
        cache.store(layer, x, (key_column, value_column), spans)
    }

    fn attend(
        &self,
        cache: &CpuCache,
        layer: usize,
        x: &CpuTensor,
        map: &HeadMap,
        spans: &[AttendSpan<'_>],
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        attention::attend(self.hands(), cache, layer, x, (map, spans), out)
    }

    fn gate(
        &self,
        x: &CpuTensor,
        width: usize,
        activation: Activation,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        elementwise::gate(self.hands(), x, width, activation, out)
    }

    fn route(&self, logits: &CpuTensor, routing: &Routing<'_>) -> Result<Routes, DeviceError> {
        route::route(logits, routing)
    }

    fn gather_rows(
        &self,
        x: &CpuTensor,
        rows: &[u32],
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        elementwise::gather_rows(&self.shared.team, x, rows, out)
    }

    fn combine_experts(
        &self,
        y: &CpuTensor,
        routes: &Routes,
        rows: &[u32],
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        elementwise::combine_experts(self.hands(), y, (routes, rows), out)
    }

    fn add(
        &self,
        x: &mut CpuTensor,
        y: &CpuTensor,
        bias: Option<&[f32]>,
    ) -> Result<(), DeviceError> {
        elementwise::add(&self.shared.team, x, y, bias)
    }

    fn add_gated(
        &self,
        x: &mut CpuTensor,
        y: &CpuTensor,
        gates: &CpuTensor,
        copies: usize,
    ) -> Result<(), DeviceError> {
        elementwise::add_gated(self.hands(), x, y, gates, copies)
    }

    fn scale(&self, x: &mut CpuTensor, factor: f32) -> Result<(), DeviceError> {
        elementwise::scale(&self.shared.team, x, factor);
        Ok(())
    }

    fn softcap(&self, x: &mut CpuTensor, cap: f32) -> Result<(), DeviceError> {
        elementwise::softcap(self.hands(), x, cap);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StoredType;

    /// `values` is `[outputs, 70]`.
    fn product(device: &CpuDevice, rows: usize, values: &[u8]) -> Vec<u32> {
        let source =
            WeightSource::plain(values, StoredType::Bf16, 70, 0..values.len() / 140, 0..70);
        let matrix = device.pack(&source, Precision::Int8).unwrap();
        let mut x = device.tensor(rows, 70).unwrap();
        for (i, x) in x.values_mut().iter_mut().enumerate() {
            *x = (i * i % 1013) as f32 - 500.0;
        }
        let mut out = device.tensor(rows, matrix.outputs()).unwrap();
        let segment = Segment {
            matrix: &matrix,
            bias: None,
            from_rows: 0..rows,
            from_column: 0,
            to_row: 0,
            to_column: 0,
        };
        device.matmul(&x, &[segment], &mut out).unwrap();
        out.values().iter().map(|v| v.to_bits()).collect()
    }

    #[test]
    fn vnni_changes_no_bit() {
        let values: Vec<u8> = (0..40 * 70)
            .flat_map(|i: u32| ((i * 7919 % 65_000) as u16 & 0xbfff).to_le_bytes())
            .collect();
        let portable = CpuDevice::new(1, Some(KernelClass::Portable)).unwrap();
        for class in KernelClass::ALL.into_iter().filter(|class| class.is_available()) {
            let simd = Simd::new(class).unwrap().without_vnni();
            let device = CpuDevice::with(1, class, simd).unwrap();
            for rows in [1, 2, 5, 11] {
                let expected = product(&portable, rows, &values);
                assert_eq!(product(&device, rows, &values), expected, "{class}");
            }
        }
    }

    #[test]
    fn a_class_that_is_missing_is_an_error() {
        for class in KernelClass::ALL.into_iter().filter(|class| !class.is_available()) {
            let error = CpuDevice::new(1, Some(class)).unwrap_err();
            assert_eq!(error, DeviceError::UnavailableClass { class });
        }
        assert_eq!(CpuDevice::new(0, None).unwrap_err(), DeviceError::NoThreads);
        assert_eq!(CpuDevice::new(2, None).unwrap().threads(), 2);
    }
}
