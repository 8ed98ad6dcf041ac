//! Operations that work on rows one by one.

use super::lanes::{Kernel, LANES, Lanes, Simd};
use super::math::silu;
use super::pack::CpuMatrix;
use super::team::Team;
use super::tensor::CpuTensor;
use crate::check::Check;
use crate::{DeviceError, RopeTable, Routes};

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
        let (whole, rest) = self.x.as_chunks::<LANES>();
        let mut last = [0.0; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let mut sum = lanes.splat(0.0);
        for chunk in whole.iter().chain([&last]) {
            let values = lanes.load(chunk);
            sum = lanes.fma(values, values, sum);
        }
        let mean = lanes.sum(sum) / self.x.len() as f32;
        let factor = 1.0 / (mean + self.eps).sqrt();
        for ((out, x), weight) in self.out.iter_mut().zip(self.x).zip(self.weight) {
            *out = x * factor * weight;
        }
    }
}

/// See [`crate::Device::rope`]: `(fma(a, cos, -(b * sin)), fma(b, cos, a * sin))`.
pub(crate) fn rope(
    (simd, team): (Simd, &Team),
    x: &mut CpuTensor,
    (from_column, heads): (usize, usize),
    positions: &[u32],
    table: &RopeTable,
) -> Result<(), DeviceError> {
    let check = Check("rope");
    let half = table.head_dim / 2;
    check.equal("head_dim % 2", table.head_dim % 2, 0)?;
    check.equal("sines", table.sin.len(), table.cos.len())?;
    check.equal("positions", positions.len(), x.rows())?;
    let width = check.product("width of the heads", &[heads, table.head_dim])?;
    check.fits("end of the heads", from_column, width, x.columns())?;
    for &position in positions {
        check.below("position", position as usize, table.positions())?;
    }
    if width == 0 {
        return Ok(());
    }
    let columns = x.columns();
    team.each(x.values_mut(), columns, width * 2, |first, part| {
        for (row, &position) in part.chunks_mut(columns).zip(&positions[first..]) {
            let at = position as usize * half;
            let (cos, sin) = (&table.cos[at..at + half], &table.sin[at..at + half]);
            simd.run(Rope { heads: &mut row[from_column..from_column + width], cos, sin });
        }
    });
    Ok(())
}

struct Rope<'a> {
    heads: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Kernel for Rope<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        let half = self.cos.len();
        for head in self.heads.chunks_exact_mut(half * 2) {
            let (low, high) = head.split_at_mut(half);
            for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(self.cos).zip(self.sin) {
                let (x, y) = (*a, *b);
                *a = x.mul_add(*cos, -(y * sin));
                *b = y.mul_add(*cos, x * sin);
            }
        }
    }
}

/// See [`crate::Device::silu_mul`].
pub(crate) fn silu_mul(
    (simd, team): (Simd, &Team),
    x: &CpuTensor,
    width: usize,
    out: &mut CpuTensor,
) -> Result<(), DeviceError> {
    let check = Check("silu_mul");
    check.equal("columns of x", x.columns(), check.product("width of x", &[width, 2])?)?;
    check.equal("rows of out", out.rows(), x.rows())?;
    check.equal("columns of out", out.columns(), width)?;
    team.each(out.values_mut(), width, width.saturating_mul(8), |first, part| {
        for (i, out) in part.chunks_mut(width).enumerate() {
            let (gate, up) = x.row(first + i).split_at(width);
            simd.run(SiluMul { gate, up, out });
        }
    });
    Ok(())
}

struct SiluMul<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        for ((out, gate), up) in self.out.iter_mut().zip(self.gate).zip(self.up) {
            *out = silu(*gate) * up;
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
    stripes: usize,
    out: &mut CpuTensor,
) -> Result<(), DeviceError> {
    let check = Check("combine_experts");
    let (chosen, slots, columns) = (routes.chosen, routes.weights.len(), y.columns());
    check.at_least("chosen", chosen, 1)?;
    check.equal("weights beyond whole rows", slots % chosen, 0)?;
    check.equal("rows", rows.len(), slots)?;
    let tokens = slots / chosen;
    check.equal("rows of y", y.rows(), check.product("rows of y", &[stripes, slots])?)?;
    check.equal("rows of out", out.rows(), check.product("rows of out", &[stripes, tokens])?)?;
    check.equal("columns of out", out.columns(), columns)?;
    for &row in rows {
        check.below("row", row as usize, slots)?;
    }
    team.each(out.values_mut(), columns, columns * chosen, |first, part| {
        for (i, out) in part.chunks_mut(columns).enumerate() {
            let (stripe, token) = ((first + i) / tokens, (first + i) % tokens);
            out.fill(0.0);
            let own = token * chosen..(token + 1) * chosen;
            for (&row, &weight) in rows[own.clone()].iter().zip(&routes.weights[own]) {
                let y = y.row(stripe * slots + row as usize);
                simd.run(AddScaled { y, weight, out });
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
