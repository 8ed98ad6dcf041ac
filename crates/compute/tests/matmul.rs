//! Products: the exact order of additions, on every class, thread count, batch and size.

#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod support;

use compute::cpu::{CpuMatrix, CpuTensor};
use compute::{CpuDevice, Device, Precision, Segment, StoredType, WeightSource};
use proptest::prelude::*;
use std::ops::Range;
use support::*;

/// A segment that covers all rows and columns.
fn whole<'a>(
    matrix: &'a CpuMatrix,
    rows: usize,
    bias: Option<&'a [f32]>,
) -> Segment<'a, CpuMatrix> {
    Segment { matrix, bias, from_rows: 0..rows, from_column: 0, to_row: 0, to_column: 0 }
}

/// A block of 32 as integers and their scale, in other words than the library's.
fn quantised(block: &[f32]) -> (Vec<i64>, f32) {
    if block.iter().any(|v| !v.is_finite()) {
        return (vec![0; block.len()], f32::NAN);
    }
    let m = block.iter().fold(0_f32, |m, v| m.max(v.abs()));
    if m < 2_f32.powi(-100) {
        return (vec![0; block.len()], 0.0);
    }
    let q = block.iter().map(|v| (v * (127.0 / m)).round_ties_even() as i64);
    (q.collect(), m / 127.0)
}

/// The same in four bits.
fn quantised4(block: &[f32]) -> (Vec<i64>, f32) {
    if block.iter().any(|v| !v.is_finite()) {
        return (vec![0; block.len()], f32::NAN);
    }
    let size = |v: &f32| v.abs();
    let largest = block.iter().map(size).fold(0_f32, f32::max);
    let m = block.iter().copied().find(|v| v.abs() == largest).unwrap_or(0.0);
    if largest < 2_f32.powi(-100) {
        return (vec![0; block.len()], 0.0);
    }
    let q = block.iter().map(|v| ((v * (-8.0 / m) + 8.5).floor() as i64).clamp(0, 15) - 8);
    (q.collect(), m / -8.0)
}

/// One output as the contract says: one accumulator, inner positions in order.
fn expected(x: &[f32], w: &[f32], precision: Precision) -> f32 {
    let pairs = x.iter().zip(w);
    match precision {
        Precision::F32 => pairs.fold(0.0, |acc, (x, w)| w.mul_add(*x, acc)),
        Precision::Bf16 => pairs.fold(0.0, |acc, (x, w)| bf16(*w).mul_add(bf16(*x), acc)),
        Precision::Int8 | Precision::Int4 => {
            x.chunks(32).zip(w.chunks(32)).fold(0.0, |acc, (x, w)| {
                let quantised_weights =
                    if precision == Precision::Int4 { quantised4 } else { quantised };
                let ((x, xs), (w, ws)) = (quantised(x), quantised_weights(w));
                let dot: i64 = x.iter().zip(&w).map(|(x, w)| x * w).sum();
                (ws * xs).mul_add(dot as f32, acc)
            })
        }
    }
}

struct Case {
    inputs: usize,
    outputs: usize,
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Vec<f32>,
}

impl Case {
    fn new(rows: usize, inputs: usize, outputs: usize) -> Case {
        let mut numbers = Numbers((rows * 1_000_000 + inputs * 1000 + outputs) as u64);
        let (x, w) = (numbers.take(rows * inputs), numbers.take(outputs * inputs));
        Case { inputs, outputs, x, w, bias: numbers.take(outputs) }
    }

    fn expected(&self, precision: Precision) -> Vec<f32> {
        let mut out = Vec::new();
        for x in self.x.chunks(self.inputs) {
            for (w, bias) in self.w.chunks(self.inputs).zip(&self.bias) {
                out.push(expected(x, w, precision) + bias);
            }
        }
        out
    }

    fn run(&self, device: &CpuDevice, rows: Range<usize>, precision: Precision) -> Vec<f32> {
        let matrix = matrix(device, self.inputs, &self.w, precision);
        let x = &self.x[rows.start * self.inputs..rows.end * self.inputs];
        let x = tensor(device, self.inputs, x);
        let mut out = device.tensor(rows.len(), self.outputs).unwrap();
        let segment = whole(&matrix, rows.len(), Some(&self.bias));
        device.matmul(&x, &[segment], &mut out).unwrap();
        out.values().to_vec()
    }
}

fn check_sizes(rows: &[usize], inputs: &[usize], outputs: &[usize]) {
    let devices = devices();
    for &rows in rows {
        for &inputs in inputs {
            for &outputs in outputs {
                let case = Case::new(rows, inputs, outputs);
                for precision in PRECISIONS {
                    let expected = bits(&case.expected(precision));
                    for device in &devices {
                        let got = bits(&case.run(device, 0..rows, precision));
                        assert!(
                            got == expected,
                            "{precision:?} {rows} x {inputs} x {outputs} on {device:?}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn every_size_class_and_thread_count_gives_the_order_of_the_contract() {
    if cfg!(miri) {
        return check_sizes(&[1, 3], &[1, 33], &[17]);
    }
    check_sizes(&[1, 2, 3, 7, 16, 33], &[1, 7, 31, 32, 33, 96, 128], &[1, 15, 16, 17, 31, 64]);
}

#[test]
#[cfg_attr(miri, ignore = "large")]
fn large_sizes_too() {
    // More rows than a chunk, more positions than a block, more panels than a job.
    check_sizes(&[1, 2, 33], &[128, 515], &[509]);
    check_sizes(&[205], &[515], &[300]);
}

#[test]
#[cfg_attr(miri, ignore = "large")]
fn a_row_alone_equals_the_row_in_a_batch() {
    let case = Case::new(33, 96, 70);
    for device in devices() {
        for precision in PRECISIONS {
            let together = case.run(&device, 0..33, precision);
            for cut in [1, 2, 5, 12] {
                let starts = (0..33).step_by(cut);
                let parts = starts.map(|r| case.run(&device, r..33.min(r + cut), precision));
                let apart: Vec<f32> = parts.flatten().collect();
                assert_eq!(bits(&apart), bits(&together), "{precision:?} {device:?} by {cut}");
            }
        }
    }
}

#[test]
fn results_are_near_the_true_product() {
    let case = Case::new(3, 96, 20);
    for precision in PRECISIONS {
        let got = case.run(&plain(), 0..3, precision);
        for (i, got) in got.iter().enumerate() {
            let (row, o) = (i / 20, i % 20);
            let pairs = case.x[row * 96..][..96].iter().zip(&case.w[o * 96..][..96]);
            let exact: f64 = pairs.clone().map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            let size: f64 = pairs.map(|(x, w)| (f64::from(*x) * f64::from(*w)).abs()).sum();
            let tolerance = match precision {
                Precision::F32 => 1e-6,
                Precision::Bf16 => 8e-3,
                Precision::Int8 => 2e-2,
                Precision::Int4 => 2e-1,
            };
            let error = (f64::from(*got) - exact - f64::from(case.bias[o])).abs();
            assert!(error <= size.max(1.0) * tolerance, "{precision:?}: {error}");
        }
    }
}

/// The outputs of several segments at once must be those of one at a time.
#[test]
fn segments_write_their_rectangles_only() {
    let mut numbers = Numbers(5);
    let (x, a, b) = (numbers.take(9 * 80), numbers.take(40 * 48), numbers.take(21 * 33));
    for device in devices() {
        for precision in PRECISIONS {
            let (a, b) = (matrix(&device, 48, &a, precision), matrix(&device, 33, &b, precision));
            let x = tensor(&device, 80, &x);
            let segment = |matrix, rows, from_column, to_row, to_column| Segment {
                matrix,
                bias: None,
                from_rows: rows,
                from_column,
                to_row,
                to_column,
            };
            let segments = [
                segment(&a, 0..4, 32, 3, 0),
                segment(&b, 2..9, 5, 1, 41),
                segment(&a, 9..9, 0, 0, 0),
                segment(&b, 4..6, 47, 8, 1),
                segment(&a, 0..1, 32, 0, 0),
            ];
            let fresh = || tensor(&device, 63, &[7.0; 63 * 10]);
            let mut together = fresh();
            device.matmul(&x, &segments, &mut together).unwrap();
            let mut apart = fresh();
            for segment in &segments {
                device.matmul(&x, std::slice::from_ref(segment), &mut apart).unwrap();
            }
            assert_eq!(bits(together.values()), bits(apart.values()));
            let untouched = together.values().iter().filter(|v| **v == 7.0).count();
            assert_eq!(untouched, 63 * 10 - 5 * 40 - 9 * 21);
        }
    }
}

#[test]
fn infinities_and_nan_do_not_spread_to_neighbours() {
    let mut case = Case::new(4, 70, 40);
    case.x[70 + 3] = f32::NAN;
    case.x[140 + 69] = f32::INFINITY;
    case.w[5 * 70 + 40] = f32::NEG_INFINITY;
    for precision in PRECISIONS {
        let expected = bits(&case.expected(precision));
        for device in devices() {
            assert_eq!(bits(&case.run(&device, 0..4, precision)), expected, "{precision:?}");
        }
        let sick = |i: usize| i / 40 == 1 || i / 40 == 2 || i % 40 == 5;
        let mut values = expected.iter().enumerate();
        assert!(values.all(|(i, &v)| sick(i) || f32::from_bits(v).is_finite()));
    }
}

#[test]
fn no_inputs_give_the_bias() {
    let device = plain();
    let source = WeightSource::plain(&[], StoredType::Bf16, 0, 0..3, 0..0);
    for precision in PRECISIONS {
        let matrix = device.pack(&source, precision).unwrap();
        assert_eq!(device.matrix_shape(&matrix), (3, 0));
        let (x, mut out) = (device.tensor(2, 5).unwrap(), tensor(&device, 3, &[9.0; 6]));
        let bias = [1.0, 2.0, 3.0];
        device.matmul(&x, &[whole(&matrix, 2, Some(&bias))], &mut out).unwrap();
        assert_eq!(out.values(), [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]);
    }
}

/// Packs a rectangle of a stored matrix and reads it back with `embed`.
fn read_back(stored: StoredType, bytes: &[u8], precision: Precision) -> CpuTensor {
    let device = plain();
    let source = WeightSource::plain(bytes, stored, 50, 3..43, 7..48);
    let matrix = device.pack(&source, precision).unwrap();
    let rows: Vec<Option<u32>> = (0..40).map(Some).chain([None]).collect();
    let mut out = tensor(&device, 41, &[5.0; 41 * 42]);
    device.embed(&matrix, &rows, 1, &mut out).unwrap();
    assert!(out.values()[..41].iter().all(|v| *v == 5.0));
    assert!(out.values()[41 * 41..].iter().all(|v| *v == 0.0));
    out
}

#[test]
fn stored_types_are_read_as_they_are() {
    let values = Numbers(8).take(45 * 50);
    let taken = |row: usize, column: usize| values[(row + 3) * 50 + column + 7];
    for stored in [StoredType::F32, StoredType::F16, StoredType::Bf16] {
        let kept = |v: f32| match stored {
            StoredType::F32 => v,
            StoredType::F16 => half::f16::from_f32(v).to_f32(),
            StoredType::Bf16 => bf16(v),
        };
        let bytes: Vec<u8> = match stored {
            StoredType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            StoredType::F16 => {
                values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect()
            }
            StoredType::Bf16 => {
                values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
            }
        };
        for precision in PRECISIONS {
            let out = read_back(stored, &bytes, precision);
            for row in 0..40 {
                let line: Vec<f32> = (0..41).map(|c| kept(taken(row, c))).collect();
                for column in 0..41 {
                    let got = out.values()[(row + 1) * 41 + column];
                    let block = &line[column / 32 * 32..41.min((column / 32 + 1) * 32)];
                    let (q, scale) = match precision {
                        Precision::Int4 => quantised4(block),
                        _ => quantised(block),
                    };
                    let expected = match precision {
                        Precision::F32 => line[column],
                        Precision::Bf16 => bf16(line[column]),
                        Precision::Int8 | Precision::Int4 => q[column % 32] as f32 * scale,
                    };
                    assert_eq!(got.to_bits(), expected.to_bits(), "{stored:?} {precision:?}");
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 2 } else { 60 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Any cut of any rows, columns and outputs, against the contract's order.
    #[test]
    fn any_rectangle_agrees(
        rows in 1_usize..20, inputs in 1_usize..90, outputs in 1_usize..75,
        from_column in 0_usize..40, to in (0_usize..3, 0_usize..50), seed: u64,
        p in 0_usize..3,
    ) {
        let mut numbers = Numbers(seed);
        let columns = from_column + inputs + numbers.below(5);
        let (x, w) = (numbers.take(rows * columns), numbers.take(outputs * inputs));
        let width = to.1 + outputs + numbers.below(3);
        for device in devices() {
            let w_packed = matrix(&device, inputs, &w, PRECISIONS[p]);
            let x = tensor(&device, columns, &x);
            let mut out = device.tensor(to.0 + rows, width).unwrap();
            let segment = Segment {
                matrix: &w_packed, bias: None, from_rows: 0..rows,
                from_column, to_row: to.0, to_column: to.1,
            };
            device.matmul(&x, &[segment], &mut out).unwrap();
            for (i, got) in out.values().iter().enumerate() {
                let (row, column) = (i / width, i % width);
                let inside = row >= to.0 && (to.1..to.1 + outputs).contains(&column);
                let value = if inside {
                    let x = &x.values()[(row - to.0) * columns + from_column..][..inputs];
                    expected(x, &w[(column - to.1) * inputs..][..inputs], PRECISIONS[p])
                } else {
                    0.0
                };
                // A padded last position may turn -0 into 0.
                prop_assert!(got.to_bits() == value.to_bits() || (*got == 0.0 && value == 0.0));
            }
        }
    }
}
