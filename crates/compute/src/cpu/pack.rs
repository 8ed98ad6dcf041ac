//! Packed weight matrices: panels of 32 outputs, the inner dimension in order within each.
//!
//! A panel is a run of *steps*; a step holds a few inner positions of all 32 outputs so that
//! kernels read memory straight ahead. Outputs and inner positions beyond the matrix are zeros.

use super::arena::{Arena, Block, Plain};
use super::lanes::LANES;
use super::math::{from_bf16, quantise, quantise4, to_bf16};
use super::stored::Reader;
use super::team::{Disjoint, Team};
use crate::check::{Check, filled};
use crate::{DeviceError, Precision, Rounding, WeightSource};

/// Outputs in a panel.
pub(crate) const PANEL: usize = 2 * LANES;

/// Inner positions 2s and 2s + 1 as f32: `[position][half of the outputs][lane]`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct F32Step(pub(crate) [[[f32; LANES]; 2]; 2]);

/// Inner positions 2s (low half of each word) and 2s + 1 (high half) as bfloat16.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Bf16Step(pub(crate) [[u32; LANES]; 2]);

/// A block of 32 inner positions: a scale per output, and `[four positions][half][lane]` bytes
/// with 128 added, because the integer dot products of x86 want one side unsigned.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Int8Step {
    pub(crate) scales: [[f32; LANES]; 2],
    pub(crate) bytes: [[[[u8; 4]; LANES]; 2]; 8],
}

/// A block of 32 inner positions: a scale per output, and `[eight positions][half][lane]` bytes of
/// two: positions 0 to 3 in the low halves, 4 to 7 in the high ones, 8 added to each.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Int4Step {
    pub(crate) scales: [[f32; LANES]; 2],
    pub(crate) bytes: [[[[u8; 4]; LANES]; 2]; 4],
}

/// How the steps of a precision are filled and read back.
pub(crate) trait PackedStep: Plain {
    /// All zeros.
    const ZERO: Self;
    /// Inner positions in a step.
    const DEPTH: usize;
    /// What is lost is worth counting.
    const COUNTED: bool = false;
    /// Sets output `o`'s values of this step; at most `DEPTH`, missing ones stay zero.
    fn set(&mut self, o: usize, values: &[f32]);
    /// Output `o`'s value at inner position `k` of this step.
    fn get(&self, o: usize, k: usize) -> f32;
}

impl PackedStep for F32Step {
    const ZERO: Self = F32Step([[[0.0; LANES]; 2]; 2]);
    const DEPTH: usize = 2;

    #[inline(always)]
    fn set(&mut self, o: usize, values: &[f32]) {
        for (position, &value) in self.0.iter_mut().zip(values) {
            position[o / LANES][o % LANES] = value;
        }
    }

    #[inline(always)]
    fn get(&self, o: usize, k: usize) -> f32 {
        self.0[k][o / LANES][o % LANES]
    }
}

impl PackedStep for Bf16Step {
    const ZERO: Self = Bf16Step([[0; LANES]; 2]);
    const DEPTH: usize = 2;

    #[inline(always)]
    fn set(&mut self, o: usize, values: &[f32]) {
        let low = values.first().map_or(0, |&v| u32::from(to_bf16(v)));
        let high = values.get(1).map_or(0, |&v| u32::from(to_bf16(v)));
        self.0[o / LANES][o % LANES] = high << 16 | low;
    }

    #[inline(always)]
    fn get(&self, o: usize, k: usize) -> f32 {
        from_bf16((self.0[o / LANES][o % LANES] >> (16 * k)) as u16)
    }
}

impl PackedStep for Int8Step {
    const ZERO: Self = Int8Step { scales: [[0.0; LANES]; 2], bytes: [[[[128; 4]; LANES]; 2]; 8] };
    const DEPTH: usize = 32;
    const COUNTED: bool = true;

    #[inline(always)]
    fn set(&mut self, o: usize, values: &[f32]) {
        let mut q = [0; 32];
        self.scales[o / LANES][o % LANES] = quantise(values, &mut q);
        for (group, q) in self.bytes.iter_mut().zip(q.as_chunks::<4>().0) {
            group[o / LANES][o % LANES] = q.map(|q| (q as u8) ^ 0x80);
        }
    }

    #[inline(always)]
    fn get(&self, o: usize, k: usize) -> f32 {
        let byte = self.bytes[k / 4][o / LANES][o % LANES][k % 4];
        f32::from((byte ^ 0x80) as i8) * self.scales[o / LANES][o % LANES]
    }
}

impl PackedStep for Int4Step {
    const ZERO: Self = Int4Step { scales: [[0.0; LANES]; 2], bytes: [[[[0x88; 4]; LANES]; 2]; 4] };
    const DEPTH: usize = 32;
    const COUNTED: bool = true;

    #[inline(always)]
    fn set(&mut self, o: usize, values: &[f32]) {
        let mut q = [8; 32];
        self.scales[o / LANES][o % LANES] = quantise4(values, &mut q);
        for (group, q) in self.bytes.iter_mut().zip(q.as_chunks::<8>().0) {
            for (j, byte) in group[o / LANES][o % LANES].iter_mut().enumerate() {
                *byte = q[j] | q[j + 4] << 4;
            }
        }
    }

    #[inline(always)]
    fn get(&self, o: usize, k: usize) -> f32 {
        let byte = self.bytes[k / 8][o / LANES][o % LANES][k % 4];
        let q = byte >> (k % 8 / 4 * 4) & 15;
        (f32::from(q) - 8.0) * self.scales[o / LANES][o % LANES]
    }
}

/// A packed matrix `[outputs, inputs]`.
#[derive(Debug)]
pub struct CpuMatrix {
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) panels: Panels,
    pub(crate) rounding: Rounding,
}

/// The panels of a matrix, one after the other, `inputs.div_ceil(DEPTH)` steps each.
#[derive(Debug)]
pub(crate) enum Panels {
    F32(Block<F32Step>),
    Bf16(Block<Bf16Step>),
    Int8(Block<Int8Step>),
    Int4(Block<Int4Step>),
}

impl CpuMatrix {
    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Number of inputs.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// What the weights are kept in.
    pub fn precision(&self) -> Precision {
        match self.panels {
            Panels::F32(_) => Precision::F32,
            Panels::Bf16(_) => Precision::Bf16,
            Panels::Int8(_) => Precision::Int8,
            Panels::Int4(_) => Precision::Int4,
        }
    }

    /// Bytes of memory that the weights take, padding included.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(steps) => size_of_val(&**steps),
            Panels::Bf16(steps) => size_of_val(&**steps),
            Panels::Int8(steps) => size_of_val(&**steps),
            Panels::Int4(steps) => size_of_val(&**steps),
        }
    }

    /// Row `o` as f32. `o` must be below `outputs`, `out` hold `inputs` values.
    pub(crate) fn read_row(&self, o: usize, out: &mut [f32]) {
        match &self.panels {
            Panels::F32(steps) => read_row(steps, self.inputs, o, out),
            Panels::Bf16(steps) => read_row(steps, self.inputs, o, out),
            Panels::Int8(steps) => read_row(steps, self.inputs, o, out),
            Panels::Int4(steps) => read_row(steps, self.inputs, o, out),
        }
    }
}

fn read_row<S: PackedStep>(steps: &[S], inputs: usize, o: usize, out: &mut [f32]) {
    let per_panel = inputs.div_ceil(S::DEPTH);
    let panel = &steps[o / PANEL * per_panel..][..per_panel];
    for (step, values) in panel.iter().zip(out.chunks_mut(S::DEPTH)) {
        for (k, value) in values.iter_mut().enumerate() {
            *value = step.get(o % PANEL, k);
        }
    }
}

/// See [`crate::Device::pack`].
pub(crate) fn pack(
    on: (&Team, &Arena),
    source: &WeightSource<'_>,
    precision: Precision,
) -> Result<CpuMatrix, DeviceError> {
    let reader = Reader::new(source)?;
    let (outputs, inputs) = (source.rows.len(), source.columns.len());
    let mut rounding = Rounding::default();
    let lost = &mut rounding;
    let panels = match precision {
        Precision::F32 => Panels::F32(fill(on, &reader, lost)?),
        Precision::Bf16 => Panels::Bf16(fill(on, &reader, lost)?),
        Precision::Int8 => Panels::Int8(fill(on, &reader, lost)?),
        Precision::Int4 => Panels::Int4(fill(on, &reader, lost)?),
    };
    Ok(CpuMatrix { outputs, inputs, panels, rounding })
}

/// A thread's line of values, and what it lost so far.
#[derive(Clone, Default)]
struct Hand {
    line: Vec<f32>,
    rounding: Rounding,
}

fn fill<S: PackedStep>(
    (team, arena): (&Team, &Arena),
    reader: &Reader<'_>,
    rounding: &mut Rounding,
) -> Result<Block<S>, DeviceError> {
    let per_panel = reader.columns.div_ceil(S::DEPTH);
    let count = Check("pack").product("steps", &[reader.rows.div_ceil(PANEL), per_panel])?;
    let mut steps = arena.zeros(count)?;
    if per_panel == 0 {
        return Ok(steps);
    }
    let (panels, shared) = (steps.len() / per_panel, Disjoint::new(&mut steps));
    let hands = team.hands(reader.rows.saturating_mul(reader.columns));
    let mut hands = vec![Hand::default(); hands];
    for hand in &mut hands {
        hand.line = filled(&[reader.columns], 0.0)?;
    }
    team.run(panels, &mut hands, |Hand { line, rounding }, panel| {
        // SAFETY: each panel is one task.
        let steps = unsafe { shared.slice(panel * per_panel, per_panel) };
        // Here and not before: so each thread is the first to touch what it fills.
        steps.fill(S::ZERO);
        for o in 0..PANEL.min(reader.rows - panel * PANEL) {
            reader.read(panel * PANEL + o, line);
            for (step, values) in steps.iter_mut().zip(line.chunks(S::DEPTH)) {
                step.set(o, values);
                if S::COUNTED {
                    *rounding += lost(step, o, values);
                }
            }
        }
    });
    hands.iter().for_each(|hand| *rounding += hand.rounding);
    Ok(steps)
}

/// What output `o` of a step lost of these values.
fn lost<S: PackedStep>(step: &S, o: usize, values: &[f32]) -> Rounding {
    let (mut weights, mut errors) = (0.0f32, 0.0f32);
    for (k, value) in values.iter().enumerate() {
        let error = value - step.get(o, k);
        weights += value * value;
        errors += error * error;
    }
    Rounding { weights: weights.into(), errors: errors.into() }
}
