//! Products of activations with packed matrices.
//!
//! Every output has one f32 accumulator that walks the inner dimension in order, one fused
//! multiply-add per position (per block of 32 in `Int8`). Tiles of rows and panels and blocks of
//! the inner dimension exist only to reuse what was loaded: between blocks an accumulator rests in
//! memory, which costs it no bit.
//!
//! A call is planned (shapes checked, work cut into jobs), its activations are staged (converted
//! once and laid out as tiles), then jobs run in any order.

mod kernel;
mod stage;

use super::lanes::{LANES, Simd};
use super::pack::{Bf16Step, CpuMatrix, F32Step, Int4Step, Int8Step, PANEL, Panels};
use super::team::{Disjoint, Team};
use super::tensor::CpuTensor;
use crate::check::{Check, filled};
use crate::{DeviceError, Precision, Segment};
use std::ops::Range;
use std::sync::Mutex;

/// Accumulators of one row within a panel.
type Row = [[f32; LANES]; 2];

/// Rows that share a pass over some panels: a multiple of every tile height, small enough for
/// their staged activations to stay in the second-level cache.
const CHUNK: usize = 192;

/// How many tile rows to run for `rows` remaining ones: the fewest that a kernel exists for.
/// Superfluous rows are zeros and are thrown away.
fn tile_height(max: usize, rows: usize) -> usize {
    let wanted = rows.min(max);
    [1, 2, 3, 4, 6, 8, 12].into_iter().find(|&height| height >= wanted).unwrap_or(max)
}

/// Staging memory that is kept between calls, because fresh pages cost more than the copy.
pub(crate) type StagePool = Mutex<Vec<Vec<u32>>>;

/// What a call works with.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) simd: Simd,
    pub(crate) team: &'a Team,
    pub(crate) pool: &'a StagePool,
}

/// Some rows of a segment times some panels of its matrix.
struct Job {
    segment: usize,
    /// Rows within the segment.
    rows: Range<usize>,
    panels: Range<usize>,
    /// Where the staged rows begin.
    stage: usize,
}

/// All products of `segments`, see [`crate::Device::matmul`].
pub(crate) fn matmul(
    context: Context<'_>,
    x: &CpuTensor,
    segments: &[Segment<'_, CpuMatrix>],
    out: &mut CpuTensor,
) -> Result<(), DeviceError> {
    validate(x, segments, out)?;
    let operations = segments.iter().fold(0_usize, |sum, s| {
        sum.saturating_add(s.from_rows.len() * s.matrix.inputs.max(1) * s.matrix.outputs)
    });
    if operations == 0 {
        return Ok(());
    }
    let hands = context.team.hands(operations);
    let plan = stage::Plan::new(context.simd, segments);
    let mut staged = match context.pool.lock() {
        Ok(mut pool) => pool.pop().unwrap_or_default(),
        Err(_) => Vec::new(),
    };
    plan.run(context, x, &mut staged)?;
    run_jobs(context, hands, segments, &plan, &staged, out)?;
    if let Ok(mut pool) = context.pool.lock() {
        pool.push(staged);
    }
    Ok(())
}

fn run_jobs(
    context: Context<'_>,
    hands: usize,
    segments: &[Segment<'_, CpuMatrix>],
    plan: &stage::Plan,
    staged: &[u32],
    out: &mut CpuTensor,
) -> Result<(), DeviceError> {
    let jobs = cut(segments, plan, hands);
    let rows = jobs.iter().map(|job| (job.rows.len() + LANES) * job.panels.len()).max();
    let mut scratches = Vec::new();
    for _ in 0..hands {
        scratches.push(filled(&[rows.unwrap_or(0)], [[0.0; LANES]; 2])?);
    }
    let columns = out.columns();
    let shared = Disjoint::new(out.values_mut());
    context.team.run(jobs.len(), &mut scratches, |acc, job| {
        let (job, segment) = (&jobs[job], &segments[jobs[job].segment]);
        let stage = &staged[job.stage..];
        match &segment.matrix.panels {
            Panels::F32(steps) => {
                products::<F32Step>(context.simd, steps, segment, job, stage, acc)
            }
            Panels::Bf16(steps) => {
                products::<Bf16Step>(context.simd, steps, segment, job, stage, acc)
            }
            Panels::Int8(steps) => {
                products::<Int8Step>(context.simd, steps, segment, job, stage, acc)
            }
            Panels::Int4(steps) => {
                products::<Int4Step>(context.simd, steps, segment, job, stage, acc)
            }
        }
        write(context.simd, segment, job, acc, (&shared, columns));
    });
    Ok(())
}

fn products<S: kernel::Step>(
    simd: Simd,
    steps: &[S],
    segment: &Segment<'_, CpuMatrix>,
    job: &Job,
    stage: &[u32],
    acc: &mut [Row],
) {
    let per_panel = segment.matrix.inputs.div_ceil(S::DEPTH);
    let panels = &steps[job.panels.start * per_panel..job.panels.end * per_panel];
    let (rows, group) = (job.rows.len(), job.panels.len());
    simd.run(kernel::Products { panels, per_panel, group, rows, stage, acc });
}

/// Copies a job's accumulators to where they belong, adding the bias.
fn write(
    simd: Simd,
    segment: &Segment<'_, CpuMatrix>,
    job: &Job,
    acc: &[Row],
    (out, columns): (&Disjoint<'_, f32>, usize),
) {
    let max = stage::tile_rows(simd, segment.matrix.precision());
    let outputs = segment.matrix.outputs;
    for row in 0..job.rows.len() {
        let (tile, at) = (row / max * max, row % max);
        let height = tile_height(max, job.rows.len() - tile);
        for (p, panel) in job.panels.clone().enumerate() {
            let sums = acc[tile * job.panels.len() + p * height + at].as_flattened();
            let first = panel * PANEL;
            let width = PANEL.min(outputs - first);
            let to = (segment.to_row + job.rows.start + row) * columns + segment.to_column + first;
            // SAFETY: jobs of a segment do not overlap, and segments were checked not to.
            let to = unsafe { out.slice(to, width) };
            match segment.bias {
                Some(bias) => {
                    let bias = &bias[first..first + width];
                    to.iter_mut().zip(sums).zip(bias).for_each(|((to, sum), b)| *to = sum + b);
                }
                None => to.copy_from_slice(&sums[..width]),
            }
        }
    }
}

/// Cuts the work into jobs that occupy `hands` threads evenly.
fn cut(segments: &[Segment<'_, CpuMatrix>], plan: &stage::Plan, hands: usize) -> Vec<Job> {
    let mut jobs = Vec::new();
    for (index, segment) in segments.iter().enumerate() {
        let (rows, panels) = (segment.from_rows.len(), segment.matrix.outputs.div_ceil(PANEL));
        let chunks = rows.div_ceil(CHUNK);
        let wide = rows > LANES && panels * chunks >= hands * 64;
        let group = if hands == 1 || wide { 8 } else { 4 };
        for chunk in 0..chunks {
            for panel in (0..panels).step_by(group) {
                jobs.push(Job {
                    segment: index,
                    rows: chunk * CHUNK..rows.min((chunk + 1) * CHUNK),
                    panels: panel..panels.min(panel + group),
                    stage: plan.offset(index, chunk * CHUNK),
                });
            }
        }
    }
    jobs
}

fn validate(
    x: &CpuTensor,
    segments: &[Segment<'_, CpuMatrix>],
    out: &CpuTensor,
) -> Result<(), DeviceError> {
    let check = Check("matmul");
    for segment in segments {
        let (rows, matrix) = (&segment.from_rows, segment.matrix);
        check.at_most("start of from_rows", rows.start, rows.end)?;
        check.at_most("end of from_rows", rows.end, x.rows())?;
        check.fits("end of the inputs", segment.from_column, matrix.inputs, x.columns())?;
        check.fits("end of the output rows", segment.to_row, rows.len(), out.rows())?;
        check.fits("end of the outputs", segment.to_column, matrix.outputs, out.columns())?;
        if let Some(bias) = segment.bias {
            check.equal("bias", bias.len(), matrix.outputs)?;
        }
    }
    check.equal("segments that overlap in out", overlaps(segments), 0)
}

/// How many segments overlap an earlier one in the output (a sweep over output rows).
fn overlaps(segments: &[Segment<'_, CpuMatrix>]) -> usize {
    let mut boxes: Vec<_> = segments
        .iter()
        .filter(|s| !s.from_rows.is_empty() && s.matrix.outputs > 0)
        .map(|s| {
            let columns = s.to_column..s.to_column + s.matrix.outputs;
            (s.to_row..s.to_row + s.from_rows.len(), columns)
        })
        .collect();
    boxes.sort_by_key(|(rows, _)| rows.start);
    let mut open: Vec<&(Range<usize>, Range<usize>)> = Vec::new();
    let mut count = 0;
    for one in &boxes {
        open.retain(|(rows, _)| rows.end > one.0.start);
        let meets = |other: &Range<usize>| other.start < one.1.end && one.1.start < other.end;
        count += usize::from(open.iter().any(|(_, columns)| meets(columns)));
        open.push(one);
    }
    count
}

/// How a precision takes activations, as a number to sort by.
fn rank(precision: Precision) -> u8 {
    match precision {
        Precision::F32 => 0,
        Precision::Bf16 => 1,
        Precision::Int8 => 2,
        Precision::Int4 => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{StoredType, WeightSource};

    fn matrix(outputs: usize) -> CpuMatrix {
        let bytes = vec![0; outputs * 8];
        let source = WeightSource::plain(&bytes, StoredType::F32, 2, 0..outputs, 0..2);
        let (team, arena) = (Team::new(1).unwrap(), super::super::arena::Arena::default());
        super::super::pack::pack((&team, &arena), &source, Precision::F32).unwrap()
    }

    #[test]
    fn overlapping_segments_are_counted() {
        let matrix = matrix(4);
        let at = |to_row, to_column, rows| Segment {
            matrix: &matrix,
            bias: None,
            from_rows: 0..rows,
            from_column: 0,
            to_row,
            to_column,
        };
        assert_eq!(overlaps(&[at(0, 0, 3), at(3, 0, 2), at(0, 4, 5)]), 0);
        assert_eq!(overlaps(&[at(0, 0, 3), at(2, 3, 2)]), 1);
        assert_eq!(overlaps(&[at(4, 0, 1), at(0, 0, 9), at(8, 1, 1)]), 2);
        assert_eq!(overlaps(&[at(0, 0, 3), at(1, 0, 0)]), 0);
    }

    #[test]
    fn tiles_waste_few_rows() {
        assert_eq!(
            [1, 2, 3, 5, 7, 9, 12, 40].map(|r| tile_height(12, r)),
            [1, 2, 3, 6, 8, 12, 12, 12]
        );
        assert_eq!([1, 2, 3, 40].map(|r| tile_height(3, r)), [1, 2, 3, 3]);
        for max in [1, 2, 3, 4, 6, 8, 12] {
            assert_eq!(CHUNK % max, 0);
        }
    }
}
