//! Speed of products with a 4096 x 4096 matrix: bytes of weights per second at one row,
//! operations per second at many, beside the memory's read bandwidth measured in the same run.
//!
//! `cargo bench -p compute -- bf16` runs a part. The figures are printed by criterion as
//! throughput: GiB/s of packed weights for one row, and "elements" that are floating-point (or
//! integer) operations for many.
#![allow(missing_docs, reason = "criterion's macro makes undocumented items")]
#![allow(clippy::unwrap_used, reason = "a bench that cannot set itself up is to stop")]

use compute::cpu::CpuMatrix;
use compute::{CpuDevice, Device, KernelClass, Precision, Segment, StoredType, WeightSource};
use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::thread;
use std::time::Duration;

const SIZE: usize = 4096;

/// Adds up `words`, as eight streams side by side: a single one does not saturate the memory.
fn sum(words: &[u64]) -> u64 {
    let part = words.len() / 8;
    let streams: [&[u64]; 8] = std::array::from_fn(|i| &words[i * part..(i + 1) * part]);
    let mut sums = [[0_u64; 8]; 8];
    for i in (0..part / 8 * 8).step_by(8) {
        for (sums, stream) in sums.iter_mut().zip(streams) {
            sums.iter_mut().zip(&stream[i..i + 8]).for_each(|(s, w)| *s = s.wrapping_add(*w));
        }
    }
    sums.iter().flatten().fold(0, |sum, s| sum.wrapping_add(*s))
}

/// Reads all of `words` with `threads` threads.
fn read(words: &[u64], threads: usize) -> u64 {
    thread::scope(|scope| {
        let parts: Vec<_> = words
            .chunks(words.len().div_ceil(threads))
            .map(|part| scope.spawn(|| sum(part)))
            .collect();
        parts.into_iter().map(|part| part.join().unwrap()).fold(0, u64::wrapping_add)
    })
}

fn bandwidth(criterion: &mut Criterion) {
    let words: Vec<u64> = (0..32 << 20).collect();
    let mut group = criterion.benchmark_group("read");
    group.sampling_mode(SamplingMode::Flat);
    group.throughput(Throughput::Bytes(words.len() as u64 * 8));
    for threads in [1, 2] {
        group.bench_function(format!("{threads} threads"), |b| {
            b.iter(|| read(black_box(&words), threads));
        });
    }
}

/// Several matrices, so that one row's weights come from memory and not from a cache.
fn matrices(device: &CpuDevice, precision: Precision, count: usize) -> Vec<CpuMatrix> {
    let bytes: Vec<u8> = (0..SIZE * SIZE)
        .flat_map(|i| {
            let value = (i * 7919 % 8191) as f32 / 8191.0 - 0.5;
            ((value.to_bits() >> 16) as u16).to_le_bytes()
        })
        .collect();
    let source = WeightSource::plain(&bytes, StoredType::Bf16, SIZE, 0..SIZE, 0..SIZE);
    (0..count).map(|_| device.pack(&source, precision).unwrap()).collect()
}

fn products(criterion: &mut Criterion, device: &CpuDevice, precision: Precision) {
    let name = format!("{precision:?} {} {} threads", device.class(), device.threads());
    let matrices = matrices(device, precision, 8);
    let mut group = criterion.benchmark_group(name.to_lowercase());
    group.sampling_mode(SamplingMode::Flat);
    for rows in [1, 8, 64, 512] {
        group.throughput(match rows {
            1 => Throughput::Bytes(matrices[0].bytes() as u64),
            _ => Throughput::Elements(2 * (rows * SIZE * SIZE) as u64),
        });
        let mut x = device.tensor(rows, SIZE).unwrap();
        for (i, x) in device.host_mut(&mut x).iter_mut().enumerate() {
            *x = (i * 31 % 1021) as f32 / 1021.0 - 0.5;
        }
        let mut out = device.tensor(rows, SIZE).unwrap();
        let mut turn = matrices.iter().cycle();
        group.bench_function(format!("{rows} rows"), |b| {
            b.iter(|| {
                let segment = Segment {
                    matrix: turn.next().unwrap(),
                    bias: None,
                    from_rows: 0..rows,
                    from_column: 0,
                    to_row: 0,
                    to_column: 0,
                };
                device.matmul(&x, &[segment], &mut out).unwrap();
            });
        });
    }
}

fn all(criterion: &mut Criterion) {
    bandwidth(criterion);
    for class in [KernelClass::Avx512, KernelClass::Avx2] {
        for threads in [1, 2] {
            let Ok(device) = CpuDevice::new(threads, Some(class)) else { continue };
            for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
                products(criterion, &device, precision);
            }
        }
    }
}

fn settings() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
}

criterion_group! {
    name = benches;
    config = settings();
    targets = all
}
criterion_main!(benches);
