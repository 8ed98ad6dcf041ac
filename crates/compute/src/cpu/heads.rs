//! Operations on runs of columns at equal distances: the heads of a row.

use super::elementwise::NormFactor;
use super::lanes::{Kernel, Lanes, Simd};
use super::team::Team;
use super::tensor::CpuTensor;
use crate::check::Check;
use crate::{Columns, DeviceError, RopePairs, RopeTable};
use std::ops::Range;

/// `count` runs of `width` columns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) at: Columns,
    pub(crate) count: usize,
    pub(crate) width: usize,
}

impl Heads {
    /// Whether all lie within `columns`; `apart`: and none overlaps another. Where there is
    /// nothing in them, where they lie does not matter.
    fn check(
        self,
        check: Check,
        what: &'static str,
        columns: usize,
        apart: bool,
    ) -> Result<(), DeviceError> {
        let Some(last) = self.count.checked_sub(1).filter(|_| self.width > 0) else {
            return Ok(());
        };
        if apart && last > 0 {
            check.at_least("stride of the heads", self.at.stride, self.width)?;
        }
        let start = check.product(what, &[last, self.at.stride])?;
        let start = check.fits(what, self.at.first, start, columns)?;
        check.fits(what, start, self.width, columns).map(drop)
    }

    /// The columns of each that has any.
    fn ranges(self) -> impl Iterator<Item = Range<usize>> {
        let count = if self.width > 0 { self.count } else { 0 };
        (0..count).map(move |head| {
            let start = self.at.first + head * self.at.stride;
            start..start + self.width
        })
    }

    /// Elements of a row.
    fn elements(self) -> usize {
        self.count.saturating_mul(self.width)
    }
}

/// See [`crate::Device::rope`]: `(fma(a, cos, -(b * sin)), fma(b, cos, a * sin))` of the pair
/// `(a, b)`.
pub(crate) fn rope(
    (simd, team): (Simd, &Team),
    x: &mut CpuTensor,
    (at, count): (Columns, usize),
    positions: &[u32],
    table: &RopeTable,
) -> Result<(), DeviceError> {
    let check = Check("rope");
    let half = table.dims / 2;
    let heads = Heads { at, count, width: table.dims };
    check.equal("dims % 2", table.dims % 2, 0)?;
    check.equal("sines", table.sin.len(), table.cos.len())?;
    check.equal("positions", positions.len(), x.rows())?;
    heads.check(check, "end of the heads", x.columns(), true)?;
    for &position in positions {
        check.below("position", position as usize, table.positions())?;
    }
    let columns = x.columns();
    team.each(x.values_mut(), columns, heads.elements().saturating_mul(2), |first, part| {
        for (row, &position) in part.chunks_mut(columns).zip(&positions[first..]) {
            let at = position as usize * half;
            let (cos, sin) = (&table.cos[at..at + half], &table.sin[at..at + half]);
            simd.run(Rope { row, heads, pairs: table.pairs, cos, sin });
        }
    });
    Ok(())
}

struct Rope<'a> {
    row: &'a mut [f32],
    heads: Heads,
    pairs: RopePairs,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Kernel for Rope<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, _: L) {
        for range in self.heads.ranges() {
            let head = &mut self.row[range];
            let angles = self.cos.iter().zip(self.sin);
            match self.pairs {
                RopePairs::Halves => {
                    let (low, high) = head.split_at_mut(self.cos.len());
                    let pairs = low.iter_mut().zip(high);
                    pairs.zip(angles).for_each(|((a, b), (cos, sin))| turn(a, b, *cos, *sin));
                }
                RopePairs::Interleaved => {
                    let pairs = head.as_chunks_mut::<2>().0.iter_mut();
                    pairs.zip(angles).for_each(|([a, b], (cos, sin))| turn(a, b, *cos, *sin));
                }
            }
        }
    }
}

#[inline(always)]
fn turn(a: &mut f32, b: &mut f32, cos: f32, sin: f32) {
    let (x, y) = (*a, *b);
    *a = x.mul_add(cos, -(y * sin));
    *b = y.mul_add(cos, x * sin);
}

/// See [`crate::Device::norm_heads`].
pub(crate) fn norm(
    (simd, team): (Simd, &Team),
    x: &mut CpuTensor,
    (at, count): (Columns, usize),
    weight: &[f32],
    eps: f32,
) -> Result<(), DeviceError> {
    let heads = Heads { at, count, width: weight.len() };
    heads.check(Check("norm_heads"), "end of the heads", x.columns(), true)?;
    let columns = x.columns();
    team.each(x.values_mut(), columns, heads.elements(), |_, part| {
        for row in part.chunks_mut(columns) {
            simd.run(Norm { row, heads, weight, eps });
        }
    });
    Ok(())
}

struct Norm<'a> {
    row: &'a mut [f32],
    heads: Heads,
    weight: &'a [f32],
    eps: f32,
}

impl Kernel for Norm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        for range in self.heads.ranges() {
            let head = &mut self.row[range];
            let factor = NormFactor { x: head, eps: self.eps }.run(lanes);
            head.iter_mut().zip(self.weight).for_each(|(x, weight)| *x = *x * factor * weight);
        }
    }
}

/// See [`crate::Device::copy_columns`].
pub(crate) fn copy(
    team: &Team,
    (x, from): (&CpuTensor, Columns),
    (width, count): (usize, usize),
    (out, to): (&mut CpuTensor, Columns),
) -> Result<(), DeviceError> {
    let check = Check("copy_columns");
    let (from, to) = (Heads { at: from, count, width }, Heads { at: to, count, width });
    check.equal("rows of out", out.rows(), x.rows())?;
    from.check(check, "end of the heads of x", x.columns(), false)?;
    to.check(check, "end of the heads of out", out.columns(), true)?;
    let columns = out.columns();
    team.each(out.values_mut(), columns, to.elements() / 4, |first, part| {
        for (i, row) in part.chunks_mut(columns).enumerate() {
            let x = x.row(first + i);
            for (from, to) in from.ranges().zip(to.ranges()) {
                row[to].copy_from_slice(&x[from]);
            }
        }
    });
    Ok(())
}
