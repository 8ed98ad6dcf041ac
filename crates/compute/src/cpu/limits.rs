//! What a machine can do at most, measured: the yardstick beside every figure of speed.

#![allow(clippy::needless_range_loop, reason = "the loops of a tile, as the products have them")]

use super::arena::Arena;
use super::class::KernelClass;
use super::lanes::{Kernel, LANES, Lanes, Simd};
use super::team::Team;
use crate::DeviceError;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// How long one measurement of a peak runs.
const WINDOW: Duration = Duration::from_millis(60);

/// Measurements of which the median counts.
const REPEATS: usize = 5;

/// Bytes read by a measurement of the bandwidth: many times what any cache holds.
const READ_BYTES: usize = 768 << 20;

/// The most that `threads` threads of this machine do in a second, each median of several
/// measurements. On a shared host these move from minute to minute: measure them beside what they
/// are compared with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MachineLimits {
    /// Threads at work.
    pub threads: usize,
    /// Instruction set of the kernels.
    pub class: KernelClass,
    /// Bytes read from memory.
    pub read: f64,
    /// f32 operations in fused multiply-adds (two each), operands in registers. What `f32` and
    /// `bf16` products can reach.
    pub float: f64,
    /// Integer operations in dot products of bytes with the instructions that `int8` products use,
    /// operands in registers.
    pub int8: f64,
}

impl MachineLimits {
    /// Measures with `threads` threads and a kernel class, or the processor's best. Takes about
    /// two seconds and 768 MiB.
    ///
    /// # Errors
    /// Those of [`super::CpuDevice::new`], `OutOfMemory`.
    pub fn measure(
        threads: usize,
        class: Option<KernelClass>,
    ) -> Result<MachineLimits, DeviceError> {
        let class = class.unwrap_or_else(KernelClass::detect);
        let simd = Simd::new(class).ok_or(DeviceError::UnavailableClass { class })?;
        let team = Team::new(threads)?;
        Ok(MachineLimits {
            threads,
            class,
            read: read(simd, &team)?,
            float: peak(&team, |rounds| simd.run(Float { rounds })),
            int8: peak(&team, |rounds| simd.run(Int8 { rounds })),
        })
    }
}

/// Runs `work` once on every thread; seconds until all are done.
fn seconds(team: &Team, work: impl Fn(usize) + Sync) -> f64 {
    let start = Instant::now();
    team.run(team.threads(), &mut vec![(); team.threads()], |(), task| work(task));
    start.elapsed().as_secs_f64()
}

fn median(mut rates: [f64; REPEATS]) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[REPEATS / 2]
}

fn read(simd: Simd, team: &Team) -> Result<f64, DeviceError> {
    // Where weights are kept, too. Ones, not zeros: untouched zeros may all be the same page.
    let mut values = Arena::default().zeros::<f32>(READ_BYTES / size_of::<f32>())?;
    values.fill(1.0);
    let values = values.as_chunks().0;
    let part = values.len() / team.threads();
    let once = || seconds(team, |task| simd.run(Read { values: &values[task * part..][..part] }));
    once();
    Ok(median([(); REPEATS].map(|()| READ_BYTES as f64 / once())))
}

/// Adds up all values, asking for memory ahead as the products do.
struct Read<'a> {
    values: &'a [[f32; LANES]],
}

/// Vectors per turn of [`Read`].
const TURN: usize = 4;

impl Kernel for Read<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let mut sums = [lanes.splat(0.0); TURN];
        for chunk in self.values.as_chunks::<TURN>().0 {
            lanes.prefetch(chunk, 4096);
            for (sum, values) in sums.iter_mut().zip(chunk) {
                *sum = lanes.add(*sum, lanes.load(values));
            }
        }
        black_box(sums.map(|sum| lanes.sum(sum)));
    }
}

/// Operations per second of a kernel that says how many its `rounds` are.
fn peak(team: &Team, run: impl Fn(u64) -> u64 + Sync) -> f64 {
    let time = |rounds| {
        seconds(team, |_| {
            black_box(run(rounds));
        })
    };
    let mut rounds = 1000;
    while time(rounds) < WINDOW.as_secs_f64() {
        rounds *= 2;
    }
    let operations = (team.threads() as u64 * run(rounds)) as f64;
    median([(); REPEATS].map(|()| operations / time(rounds)))
}

/// Independent sums, as many as a full tile of products has: enough to hide their latency.
#[inline(always)]
fn with_sums<L: Lanes>(lanes: L, float: bool, rounds: u64) -> u64 {
    match (float, L::FLOAT_ROWS) {
        (true, 12..) => float_rounds::<L, 16>(lanes, rounds),
        (true, _) => float_rounds::<L, 6>(lanes, rounds),
        (false, 12..) => int8_rounds::<L, 16>(lanes, rounds),
        (false, _) => int8_rounds::<L, 6>(lanes, rounds),
    }
}

#[inline(always)]
fn float_rounds<L: Lanes, const N: usize>(lanes: L, rounds: u64) -> u64 {
    let (factor, term) = (lanes.splat(black_box(0.999)), lanes.splat(black_box(1e-3)));
    let mut sums = [lanes.splat(black_box(1.0)); N];
    for _ in 0..rounds {
        for n in 0..N {
            sums[n] = lanes.fma(sums[n], factor, term);
        }
    }
    black_box(sums.map(|sum| lanes.sum(sum)));
    rounds * (N * LANES * 2) as u64
}

/// Each sum's factor is another sum, so that no product is the same twice.
#[inline(always)]
fn int8_rounds<L: Lanes, const N: usize>(lanes: L, rounds: u64) -> u64 {
    let factor = lanes.splat_i(black_box(0x0203_0501));
    let mut sums = [lanes.splat_i(black_box(0x0102_0304)); N];
    for _ in 0..rounds {
        for n in 0..N {
            let other = sums[(n + 1) % N];
            sums[n] = if L::PAIRS {
                lanes.dot2(sums[n], other, factor)
            } else {
                lanes.dot4(sums[n], other, factor)
            };
        }
    }
    black_box(sums.map(|sum| lanes.sum(lanes.to_f32(sum))));
    let products = if L::PAIRS { 2 } else { 4 };
    rounds * (N * LANES * products * 2) as u64
}

struct Float {
    rounds: u64,
}

impl Kernel for Float {
    type Output = u64;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> u64 {
        with_sums(lanes, true, self.rounds)
    }
}

struct Int8 {
    rounds: u64,
}

impl Kernel for Int8 {
    type Output = u64;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> u64 {
        with_sums(lanes, false, self.rounds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_counted_by_the_round() {
        for class in KernelClass::ALL.into_iter().filter(|class| class.is_available()) {
            let simd = Simd::new(class).unwrap();
            let (one, two) = (simd.run(Float { rounds: 1 }), simd.run(Float { rounds: 2 }));
            assert_eq!((one % 32, two), (0, 2 * one), "{class}");
            let (one, two) = (simd.run(Int8 { rounds: 1 }), simd.run(Int8 { rounds: 2 }));
            assert_eq!((one % 64, two), (0, 2 * one), "{class}");
        }
    }

    #[test]
    fn a_machine_without_the_class_has_no_limits() {
        for class in KernelClass::ALL.into_iter().filter(|class| !class.is_available()) {
            let error = MachineLimits::measure(1, Some(class)).unwrap_err();
            assert_eq!(error, DeviceError::UnavailableClass { class });
        }
        assert_eq!(MachineLimits::measure(0, None).unwrap_err(), DeviceError::NoThreads);
    }
}
