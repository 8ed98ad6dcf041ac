//! Register tiles: some rows times one or more panels of 32 outputs, written once for all classes.
//!
//! Loops over a tile count with constants and index plain arrays: the compiler unrolls them and
//! keeps the sums in registers. With iterators it kept them in memory, at half the speed.

#![allow(clippy::needless_range_loop, reason = "see above")]

use super::super::lanes::{Kernel, LANES, Lanes};
use super::super::pack::{Bf16Step, F32Step, Int4Step, Int8Step, PackedStep};
use super::stage::{BYTE_WORDS, PAIR_WORDS};
use super::{Row, tile_height};

/// Inner positions per pass of a many-row job: what a panel holds of them fits the first cache.
const DEPTH_BLOCK: usize = 256;

/// How far ahead weights are asked for, in bytes. The processor's own prefetching leaves a tile of
/// several rows, which reads slowly, waiting at half the memory's bandwidth.
const AHEAD: usize = 8192;

/// A step that kernels can multiply by.
pub(super) trait Step: PackedStep {
    /// Words of a staged row per step.
    fn words<L: Lanes>() -> usize;

    /// Rows in a full tile.
    fn rows<L: Lanes>() -> usize;

    /// `acc[p][r] += x[r] * panels[p]`, positions ascending. `x` is `[steps * words]` of `R` rows.
    fn tile<L: Lanes, const R: usize, const P: usize>(
        lanes: L,
        panels: [&[Self]; P],
        x: &[[u32; R]],
        acc: &mut [[Row; R]; P],
    );
}

/// Accumulators of a tile in registers.
type Sums<V, const R: usize, const P: usize> = [[[V; 2]; R]; P];

#[inline(always)]
fn load_sums<L: Lanes, const R: usize, const P: usize>(
    lanes: L,
    acc: &[[Row; R]; P],
) -> Sums<L::F, R, P> {
    let mut sums = [[[lanes.splat(0.0); 2]; R]; P];
    for p in 0..P {
        for r in 0..R {
            sums[p][r] = [lanes.load(&acc[p][r][0]), lanes.load(&acc[p][r][1])];
        }
    }
    sums
}

#[inline(always)]
fn store_sums<L: Lanes, const R: usize, const P: usize>(
    lanes: L,
    sums: &Sums<L::F, R, P>,
    acc: &mut [[Row; R]; P],
) {
    for p in 0..P {
        for r in 0..R {
            lanes.store(sums[p][r][0], &mut acc[p][r][0]);
            lanes.store(sums[p][r][1], &mut acc[p][r][1]);
        }
    }
}

/// The tile of a floating-point precision; `widen` gives a half of a step's outputs at one of its
/// two positions.
#[inline(always)]
fn float_tile<L: Lanes, S, const R: usize, const P: usize>(
    lanes: L,
    panels: [&[S]; P],
    x: &[[u32; R]],
    acc: &mut [[Row; R]; P],
    widen: impl Fn(&S, usize, usize) -> L::F,
) {
    let mut sums = load_sums(lanes, acc);
    let (x, _) = x.as_chunks::<2>();
    // Slices of one length let the compiler drop the bounds checks below.
    let mut steps = panels;
    for panel in &mut steps {
        *panel = &panel[..x.len()];
    }
    for (s, x) in x.iter().enumerate() {
        for p in 0..P {
            lanes.prefetch(&steps[p][s], AHEAD);
            let step = &steps[p][s];
            if L::NARROW {
                for half in 0..2 {
                    for position in 0..2 {
                        let weights = widen(step, half, position);
                        for r in 0..R {
                            let value = lanes.splat(f32::from_bits(x[position][r]));
                            sums[p][r][half] = lanes.fma(weights, value, sums[p][r][half]);
                        }
                    }
                }
                continue;
            }
            for position in 0..2 {
                let (low, high) = (widen(step, 0, position), widen(step, 1, position));
                for r in 0..R {
                    let value = lanes.splat(f32::from_bits(x[position][r]));
                    sums[p][r][0] = lanes.fma(low, value, sums[p][r][0]);
                    sums[p][r][1] = lanes.fma(high, value, sums[p][r][1]);
                }
            }
        }
    }
    store_sums(lanes, &sums, acc);
}

impl Step for F32Step {
    #[inline(always)]
    fn words<L: Lanes>() -> usize {
        2
    }

    #[inline(always)]
    fn rows<L: Lanes>() -> usize {
        L::FLOAT_ROWS
    }

    #[inline(always)]
    fn tile<L: Lanes, const R: usize, const P: usize>(
        lanes: L,
        panels: [&[Self]; P],
        x: &[[u32; R]],
        acc: &mut [[Row; R]; P],
    ) {
        float_tile(
            lanes,
            panels,
            x,
            acc,
            #[inline(always)]
            |step: &F32Step, half, position| lanes.load(&step.0[position][half]),
        );
    }
}

impl Step for Bf16Step {
    #[inline(always)]
    fn words<L: Lanes>() -> usize {
        2
    }

    #[inline(always)]
    fn rows<L: Lanes>() -> usize {
        L::FLOAT_ROWS
    }

    #[inline(always)]
    fn tile<L: Lanes, const R: usize, const P: usize>(
        lanes: L,
        panels: [&[Self]; P],
        x: &[[u32; R]],
        acc: &mut [[Row; R]; P],
    ) {
        float_tile(
            lanes,
            panels,
            x,
            acc,
            #[inline(always)]
            |step: &Bf16Step, half, position| {
                let (first, second) = lanes.load_bf16_pairs(&step.0[half]);
                if position == 0 { first } else { second }
            },
        );
    }
}

impl Step for Int8Step {
    #[inline(always)]
    fn words<L: Lanes>() -> usize {
        if L::PAIRS { PAIR_WORDS } else { BYTE_WORDS }
    }

    #[inline(always)]
    fn rows<L: Lanes>() -> usize {
        L::INT_ROWS
    }

    #[inline(always)]
    fn tile<L: Lanes, const R: usize, const P: usize>(
        lanes: L,
        panels: [&[Self]; P],
        x: &[[u32; R]],
        acc: &mut [[Row; R]; P],
    ) {
        if L::PAIRS {
            int_tile(
                lanes,
                panels,
                x,
                acc,
                #[inline(always)]
                |block, half, x| (&block.scales[half], int8_pairs(lanes, block, half, x)),
            );
        } else {
            int_tile(
                lanes,
                panels,
                x,
                acc,
                #[inline(always)]
                |block, half, x| (&block.scales[half], int8_dots(lanes, block, half, x)),
            );
        }
    }
}

impl Step for Int4Step {
    #[inline(always)]
    fn words<L: Lanes>() -> usize {
        BYTE_WORDS
    }

    #[inline(always)]
    fn rows<L: Lanes>() -> usize {
        L::INT_ROWS
    }

    #[inline(always)]
    fn tile<L: Lanes, const R: usize, const P: usize>(
        lanes: L,
        panels: [&[Self]; P],
        x: &[[u32; R]],
        acc: &mut [[Row; R]; P],
    ) {
        int_tile(
            lanes,
            panels,
            x,
            acc,
            #[inline(always)]
            |block, half, x| (&block.scales[half], int4_dots(lanes, block, half, x)),
        );
    }
}

/// The tile of an integer precision; `dots` gives a block's scales and products, of one half of
/// the outputs: the sums of all rows then fit the registers.
#[inline(always)]
fn int_tile<'a, L: Lanes, S, const R: usize, const P: usize, const W: usize>(
    lanes: L,
    panels: [&'a [S]; P],
    x: &[[u32; R]],
    acc: &mut [[Row; R]; P],
    dots: impl Fn(&'a S, usize, &[[u32; R]; W]) -> (&'a [f32; LANES], [L::I; R]),
) {
    let mut sums = load_sums(lanes, acc);
    let (x, _) = x.as_chunks::<W>();
    let mut blocks = panels;
    for panel in &mut blocks {
        *panel = &panel[..x.len()];
    }
    for (b, x) in x.iter().enumerate() {
        for p in 0..P {
            let block = &blocks[p][b];
            lanes.prefetch(block, AHEAD);
            for half in 0..2 {
                let (scales, dots) = dots(block, half, x);
                let scales = lanes.load(scales);
                for r in 0..R {
                    let scale = lanes.mul(scales, lanes.splat(f32::from_bits(x[0][r])));
                    let dot = lanes.to_f32(dots[r]);
                    sums[p][r][half] = lanes.fma(scale, dot, sums[p][r][half]);
                }
            }
        }
    }
    store_sums(lanes, &sums, acc);
}

/// Exact integer dot products of a block's half: they start from what undoes the weights' offset.
#[inline(always)]
fn int8_dots<L: Lanes, const R: usize>(
    lanes: L,
    block: &Int8Step,
    half: usize,
    x: &[[u32; R]; BYTE_WORDS],
) -> [L::I; R] {
    let mut dots = [lanes.splat_i(0); R];
    for r in 0..R {
        dots[r] = lanes.splat_i(x[1][r] as i32);
    }
    for g in 0..8 {
        let bytes = lanes.load_bytes(&block.bytes[g][half]);
        for r in 0..R {
            dots[r] = lanes.dot4(dots[r], bytes, lanes.splat_i(x[2 + g][r] as i32));
        }
    }
    dots
}

/// The same where bytes are multiplied as pairs of 16 bits.
#[inline(always)]
fn int8_pairs<L: Lanes, const R: usize>(
    lanes: L,
    block: &Int8Step,
    half: usize,
    x: &[[u32; R]; PAIR_WORDS],
) -> [L::I; R] {
    let mut dots = [lanes.splat_i(0); R];
    for r in 0..R {
        dots[r] = lanes.splat_i(x[1][r] as i32);
    }
    for g in 0..8 {
        let (even, odd) = lanes.pairs(lanes.load_bytes(&block.bytes[g][half]));
        for r in 0..R {
            let [first, second] = [x[2 + 2 * g][r], x[3 + 2 * g][r]];
            dots[r] = lanes.dot2(dots[r], even, lanes.splat_i(first as i32));
            dots[r] = lanes.dot2(dots[r], odd, lanes.splat_i(second as i32));
        }
    }
    dots
}

/// The same of a block of four bits, whose offset is a sixteenth.
#[inline(always)]
fn int4_dots<L: Lanes, const R: usize>(
    lanes: L,
    block: &Int4Step,
    half: usize,
    x: &[[u32; R]; BYTE_WORDS],
) -> [L::I; R] {
    let mut sums = [lanes.no_half_bytes(); R];
    for g in 0..4 {
        let (low, high) = lanes.nibbles(lanes.load_bytes(&block.bytes[g][half]));
        for r in 0..R {
            let first = lanes.splat_i(x[2 + 2 * g][r] as i32);
            let second = lanes.splat_i(x[3 + 2 * g][r] as i32);
            sums[r] = lanes.half_bytes(sums[r], low, first);
            sums[r] = lanes.half_bytes(sums[r], high, second);
        }
    }
    let mut dots = [lanes.splat_i(0); R];
    for r in 0..R {
        dots[r] = lanes.sum_half_bytes(lanes.splat_i(x[1][r] as i32 >> 4), sums[r]);
    }
    dots
}

/// All rows of a job times all its panels.
pub(super) struct Products<'a, S> {
    /// `[group * per_panel]` steps.
    pub(super) panels: &'a [S],
    pub(super) per_panel: usize,
    pub(super) group: usize,
    pub(super) rows: usize,
    /// The job's staged tiles.
    pub(super) stage: &'a [u32],
    /// Tile by tile `[group][height]` rows of accumulators; zeroed here.
    pub(super) acc: &'a mut [Row],
}

impl<S: Step> Kernel for Products<'_, S> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, lanes: L) {
        let max = S::rows::<L>();
        let whole = self.rows / max * max;
        let last = if whole < self.rows { tile_height(max, self.rows - whole) } else { 0 };
        self.acc[..(whole + last) * self.group].fill([[0.0; LANES]; 2]);
        // Few rows read each panel once, straight through; many rows come back to it tile by tile.
        let block = if self.rows <= max { self.per_panel.max(1) } else { DEPTH_BLOCK / S::DEPTH };
        for start in (0..self.per_panel).step_by(block) {
            let steps = start..self.per_panel.min(start + block);
            let mut panel = 0;
            while panel < self.group {
                let wide = side_by_side::<L>(self.rows, self.group - panel);
                for tile in (0..self.rows).step_by(max) {
                    let height = tile_height(max, self.rows - tile);
                    let at = At { tile, panel, steps: (steps.start, steps.end) };
                    match (height, wide) {
                        (1, 4) if L::PANELS >= 4 => self.tile::<L, 1, 4>(lanes, at),
                        (1, 2) if L::PANELS >= 2 => self.tile::<L, 1, 2>(lanes, at),
                        (2, 2) if L::PANELS >= 4 => self.tile::<L, 2, 2>(lanes, at),
                        (1, _) => self.tile::<L, 1, 1>(lanes, at),
                        (2, _) => self.tile::<L, 2, 1>(lanes, at),
                        (3, _) => self.tile::<L, 3, 1>(lanes, at),
                        (4, _) if max >= 4 => self.tile::<L, 4, 1>(lanes, at),
                        (6, _) if max >= 6 => self.tile::<L, 6, 1>(lanes, at),
                        (8, _) if max >= 8 => self.tile::<L, 8, 1>(lanes, at),
                        (12, _) if max >= 12 => self.tile::<L, 12, 1>(lanes, at),
                        _ => unreachable!("no kernel for tiles of {height} rows"),
                    }
                }
                panel += wide;
            }
        }
    }
}

/// How many panels a tile takes at once: enough independent sums to hide their latency.
#[inline(always)]
fn side_by_side<L: Lanes>(rows: usize, panels: usize) -> usize {
    let wanted = match rows {
        1 => L::PANELS,
        2 => L::PANELS / 2,
        _ => 1,
    };
    if panels >= wanted { wanted.max(1) } else { 1 }
}

/// Where a tile stands within its job.
#[derive(Clone, Copy)]
struct At {
    tile: usize,
    panel: usize,
    steps: (usize, usize),
}

impl<S: Step> Products<'_, S> {
    #[inline(always)]
    fn tile<L: Lanes, const R: usize, const P: usize>(&mut self, lanes: L, at: At) {
        let (step, words) = (S::words::<L>(), self.per_panel * S::words::<L>());
        let x = self.stage[at.tile * words..][..R * words].as_chunks::<R>().0;
        let x = &x[at.steps.0 * step..at.steps.1 * step];
        let mut panels = [self.panels; P];
        for (p, panel) in panels.iter_mut().enumerate() {
            let first = (at.panel + p) * self.per_panel;
            *panel = &panel[first + at.steps.0..first + at.steps.1];
        }
        let acc = &mut self.acc[at.tile * self.group + at.panel * R..][..P * R];
        if let [acc] = acc.as_chunks_mut::<R>().0.as_chunks_mut::<P>().0 {
            S::tile(lanes, panels, x, acc);
        }
    }
}
