//! Operations that work on rows one by one.

use super::lanes::{Kernel, LANES, Lanes, Simd};
use super::math::{clamped_swiglu, gelu_tanh, sigmoid, silu, soft_capped};
use super::pack::CpuMatrix;
use super::team::Team;
use super::tensor::CpuTensor;
use crate::check::Check;
use crate::{Activation, DeviceError, ELSEWHERE, Routes};

/// See [`crate::Device::embed`].
pub(crate) fn embed(
    team: &Team,
    table: &CpuMatrix,
    rows: &[Option<u32>],
    to_row: usize,
    out: &mut CpuTensor,
) -> Result<(), DeviceError> {
    let check = Check("embed");
    let columns = table.inputs();
    check.equal("columns of out", out.columns(), columns)?;
    let end = check.fits("end of the rows", to_row, rows.len(), out.rows())?;
    for row in rows.iter().flatten() {
        check.below("row", *row as usize, table.outputs())?;
    }
    let out = &mut out.values_mut()[to_row * columns..end * columns];
    team.each(out, columns, columns * 4, |first, part| {
        for (to, row) in part.chunks_mut(columns).zip(&rows[first..]) {
            match row {
                Some(row) => table.read_row(*row as usize, to),
                None => to.fill(0.0),
            }
        }
    });
    Ok(())
}

/// See [`crate::Device::rms_norm`]. The squares are added like an attention score: element `i` in
/// lane `i % 16`, then the lanes by a fixed tree. The row is multiplied by `1 / sqrt(..)`, then by
/// the weight.
pub(crate) fn rms_norm(
    (simd, team): (Simd, &Team),
    x: &CpuTensor,
    weight: &[f32],
    eps: f32,
    out: &mut CpuTensor,
) -> Result<(), DeviceError> {
    let check = Check("rms_norm");
    let columns = x.columns();
    check.equal("weight", weight.len(), columns)?;
    check.equal("rows of out", out.rows(), x.rows())?;
    check.equal("columns of out", out.columns(), columns)?;
    team.each(out.values_mut(), columns, columns, |first, part| {
        for (i, out) in part.chunks_mut(columns).enumerate() {
            simd.run(RmsNorm { x: x.row(first + i), weight, eps, out });
        }
    });
    Ok(())
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let factor = NormFactor { x: self.x, eps: self.eps }.run(lanes);
        for ((out, x), weight) in self.out.iter_mut().zip(self.x).zip(self.weight) {
            *out = x * factor * weight;
        }
    }
}

/// `1 / sqrt(mean of the squares + eps)`.
pub(super) struct NormFactor<'a> {
    pub(super) x: &'a [f32],
    pub(super) eps: f32,
}

impl Kernel for NormFactor<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> f32 {
        let (whole, rest) = self.x.as_chunks::<LANES>();
        let mut last = [0.0; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let mut sum = lanes.splat(0.0);
        for chunk in whole.iter().chain([&last]) {
            let values = lanes.load(chunk);
            sum = lanes.fma(values, values, sum);
        }
        let mean = lanes.sum(sum) / self.x.len() as f32;
        1.0 / (mean + self.eps).sqrt()
    }
}

/// See [`crate::Device::gate`].
pub(crate) fn gate(
    (simd, team): (Simd, &Team),
    x: &CpuTensor,
    width: usize,
    activation: Activation,
    out: &mut CpuTensor,
) -> Result<(), DeviceError> {
    let check = Check("gate");
    check.equal("columns of x", x.columns(), check.product("width of x", &[width, 2])?)?;
    check.equal("rows of out", out.rows(), x.rows())?;
    check.equal("columns of out", out.columns(), width)?;
    team.each(out.values_mut(), width, width.saturating_mul(8), |first, part| {
        for (i, out) in part.chunks_mut(width).enumerate() {
            let (gate, up) = x.row(first + i).split_at(width);
            simd.run(Gate { gate, up, activation, out });
        }
    });
    Ok(())
}

struct Gate<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    activation: Activation,
    out: &'a mut [f32],
}

impl Gate<'_> {
    #[inline(always)]
    fn each(self, f: impl Fn(f32, f32) -> f32) {
        for ((out, gate), up) in self.out.iter_mut().zip(self.gate).zip(self.up) {
            *out = f(*gate, *up);
        }
    }
}

impl Kernel for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        match self.activation {
            Activation::Silu => self.each(|g, u| silu(g) * u),
            Activation::GeluTanh => self.each(|g, u| gelu_tanh(g) * u),
            Activation::ClampedSwiglu { alpha, limit } => {
                self.each(|g, u| clamped_swiglu(g, u, alpha, limit));
            }
        }
    }
}

/// See [`crate::Device::gather_rows`].
pub(crate) fn gather_rows(
    team: &Team,
    x: &CpuTensor,
    rows: &[u32],
    out: &mut CpuTensor,
) -> Result<(), DeviceError> {
    let check = Check("gather_rows");
    let columns = x.columns();
    check.equal("rows of out", out.rows(), rows.len())?;
    check.equal("columns of out", out.columns(), columns)?;
    for &row in rows {
        check.below("row", row as usize, x.rows())?;
    }
    team.each(out.values_mut(), columns, columns / 4, |first, part| {
        for (to, &row) in part.chunks_mut(columns).zip(&rows[first..]) {
            to.copy_from_slice(x.row(row as usize));
        }
    });
    Ok(())
}

/// See [`crate::Device::combine_experts`].
pub(crate) fn combine_experts(
    (simd, team): (Simd, &Team),
    y: &CpuTensor,
    (routes, rows): (&Routes, &[u32]),
    out: &mut CpuTensor,
) -> Result<(), DeviceError> {
    let check = Check("combine_experts");
    let (chosen, slots, columns) = (routes.chosen, routes.weights.len(), y.columns());
    check.at_least("chosen", chosen, 1)?;
    check.equal("weights beyond whole rows", slots % chosen, 0)?;
    check.equal("rows % slots", rows.len().checked_rem(slots).unwrap_or(rows.len()), 0)?;
    let tokens = slots / chosen;
    check.equal("rows of out", out.rows(), rows.len() / chosen)?;
    check.equal("columns of out", out.columns(), columns)?;
    for &row in rows.iter().filter(|row| **row != ELSEWHERE) {
        check.below("row", row as usize, y.rows())?;
    }
    team.each(out.values_mut(), columns, columns * chosen, |first, part| {
        for (i, out) in part.chunks_mut(columns).enumerate() {
            let token = (first + i) % tokens;
            out.fill(0.0);
            let rows = &rows[(first + i) * chosen..][..chosen];
            for (&row, &weight) in rows.iter().zip(&routes.weights[token * chosen..]) {
                if row != ELSEWHERE {
                    simd.run(AddScaled { y: y.row(row as usize), weight, out });
                }
            }
        }
    });
    Ok(())
}

struct AddScaled<'a> {
    y: &'a [f32],
    weight: f32,
    out: &'a mut [f32],
}

impl Kernel for AddScaled<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        for (out, y) in self.out.iter_mut().zip(self.y) {
            *out = self.weight.mul_add(*y, *out);
        }
    }
}

/// See [`crate::Device::add`].
pub(crate) fn add(
    team: &Team,
    x: &mut CpuTensor,
    y: &CpuTensor,
    bias: Option<&[f32]>,
) -> Result<(), DeviceError> {
    let check = Check("add");
    let columns = x.columns();
    check.equal("rows of y", y.rows(), x.rows())?;
    check.equal("columns of y", y.columns(), columns)?;
    if let Some(bias) = bias {
        check.equal("bias", bias.len(), columns)?;
    }
    team.each(x.values_mut(), columns, columns / 2, |first, part| {
        for (i, x) in part.chunks_mut(columns).enumerate() {
            let pairs = x.iter_mut().zip(y.row(first + i));
            match bias {
                Some(bias) => pairs.zip(bias).for_each(|((x, y), bias)| *x += y + bias),
                None => pairs.for_each(|(x, y)| *x += y),
            }
        }
    });
    Ok(())
}

/// See [`crate::Device::add_gated`].
pub(crate) fn add_gated(
    (simd, team): (Simd, &Team),
    x: &mut CpuTensor,
    y: &CpuTensor,
    gates: &CpuTensor,
    copies: usize,
) -> Result<(), DeviceError> {
    let check = Check("add_gated");
    let (columns, tokens) = (x.columns(), gates.rows());
    check.equal("columns of gates", gates.columns(), 1)?;
    check.equal("rows of x", x.rows(), check.product("rows of x", &[copies, tokens])?)?;
    check.equal("rows of y", y.rows(), x.rows())?;
    check.equal("columns of y", y.columns(), columns)?;
    team.each(x.values_mut(), columns, columns, |first, part| {
        for (i, out) in part.chunks_mut(columns).enumerate() {
            let weight = sigmoid(gates.values()[(first + i) % tokens]);
            simd.run(AddScaled { y: y.row(first + i), weight, out });
        }
    });
    Ok(())
}

/// See [`crate::Device::scale`].
pub(crate) fn scale(team: &Team, x: &mut CpuTensor, factor: f32) {
    team.each(x.values_mut(), 1, 1, |_, part| part.iter_mut().for_each(|x| *x *= factor));
}

/// See [`crate::Device::softcap`].
pub(crate) fn softcap((simd, team): (Simd, &Team), x: &mut CpuTensor, cap: f32) {
    team.each(x.values_mut(), 1, 16, |_, values| simd.run(SoftCap { values, cap }));
}

/// Caps each of `values`.
pub(super) struct SoftCap<'a> {
    pub(super) values: &'a mut [f32],
    pub(super) cap: f32,
}

impl Kernel for SoftCap<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        self.values.iter_mut().for_each(|x| *x = soft_capped(*x, self.cap));
    }
}
