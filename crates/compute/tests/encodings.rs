//! Stored matrices: FP8 and MXFP4 from the formats' definitions; steps, transposition, rectangles.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod support;

use compute::{Device, Encoding, Precision, Segment, StoredType, WeightSource};
use support::*;

/// What was packed, row by row. All devices must agree.
fn unpacked(source: &WeightSource<'_>) -> Vec<f32> {
    let read = |device: &compute::CpuDevice, source: &WeightSource<'_>| {
        let matrix = device.pack(source, Precision::F32).unwrap();
        let (rows, columns) = device.matrix_shape(&matrix);
        assert_eq!((rows, columns), (source.rows.len(), source.columns.len()));
        let ids: Vec<Option<u32>> = (0..rows as u32).map(Some).collect();
        let mut out = device.tensor(rows, columns).unwrap();
        device.embed(&matrix, &ids, 0, &mut out).unwrap();
        out.values().to_vec()
    };
    let values = read(&plain(), source);
    for device in devices() {
        assert_eq!(bits(&read(&device, source)), bits(&values), "{device:?}");
    }
    // What is said to be touched is all that is read.
    let mut there = vec![0x5a; source.bytes.len()];
    for run in source.touched().unwrap() {
        there[run.clone()].copy_from_slice(&source.bytes[run]);
    }
    let from_there = read(&plain(), &WeightSource { bytes: &there, ..source.clone() });
    assert_eq!(bits(&from_there), bits(&values));
    values
}

/// Sign, four bits of exponent with bias 7, three of mantissa; no infinities; all ones is NaN.
fn e4m3(code: u8) -> f64 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    match (exponent, code & 7) {
        (15, 7) => f64::NAN,
        (0, _) => sign * mantissa / 8.0 * 2_f64.powi(-6),
        _ => sign * (1.0 + mantissa / 8.0) * 2_f64.powi(exponent - 7),
    }
}

#[test]
fn all_codes_of_fp8() {
    let codes: Vec<u8> = (0..=255).collect();
    let scale = 1_f32.to_le_bytes();
    let got = unpacked(&WeightSource {
        encoding: Encoding::Fp8Blocks { scales: &scale, scale_type: StoredType::F32, block: 256 },
        ..WeightSource::plain(&codes, StoredType::F32, 256, 0..1, 0..256)
    });
    for (code, got) in codes.iter().zip(&got) {
        let exact = e4m3(*code);
        assert!(f64::from(*got) == exact || got.is_nan() && exact.is_nan(), "{code:#x}: {got}");
        assert!(got.is_nan() || got.is_sign_negative() == (*code >= 128), "{code:#x}: {got}");
    }
    // Known values: the largest, the smallest normal and denormal, one.
    assert_eq!([got[0x7e], got[0x08], got[0x01], got[0x38]], [448.0, 0.015625, 0.001953125, 1.0]);
    assert_eq!(got.iter().filter(|v| v.is_nan()).count(), 2);
}

/// Stored bytes, how they are written, what is left of a value that was written so.
type Stored<'a> = (&'a [u8], Encoding<'a>, fn(f32) -> f32);

/// A made-up FP8 matrix with NaN left out, and its value at a stored place.
struct Fp8 {
    rows: usize,
    columns: usize,
    block: usize,
    bytes: Vec<u8>,
    scales: Vec<f32>,
    scale_bytes: Vec<u8>,
}

impl Fp8 {
    fn new(rows: usize, columns: usize, block: usize) -> Fp8 {
        let mut numbers = Numbers((rows + columns) as u64);
        let byte = |numbers: &mut Numbers| (numbers.bits() as u8) & 0xf7;
        let bytes = (0..rows * columns).map(|_| byte(&mut numbers)).collect();
        let scales = numbers.take(rows.div_ceil(block) * columns.div_ceil(block));
        let scale_bytes = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        Fp8 { rows, columns, block, bytes, scales, scale_bytes }
    }

    fn source(&self) -> WeightSource<'_> {
        let (scales, scale_type) = (&self.scale_bytes[..], StoredType::F32);
        WeightSource {
            encoding: Encoding::Fp8Blocks { scales, scale_type, block: self.block },
            ..WeightSource::plain(
                &self.bytes,
                StoredType::F32,
                self.columns,
                0..self.rows,
                0..self.columns,
            )
        }
    }

    fn at(&self, row: usize, column: usize) -> f32 {
        let across = self.columns.div_ceil(self.block);
        let scale = self.scales[row / self.block * across + column / self.block];
        // Both have few enough bits: the product in f64 is exact.
        (e4m3(self.bytes[row * self.columns + column]) * f64::from(scale)) as f32
    }
}

#[test]
fn fp8_blocks_have_their_own_scales() {
    // Partial blocks at both edges; sizes that are shared between threads.
    for (rows, columns, block) in [(5, 7, 3), (130, 259, 128), (4, 4, 128), (3, 9, 1)] {
        if cfg!(miri) && rows > 100 {
            continue;
        }
        let stored = Fp8::new(rows, columns, block);
        let got = unpacked(&stored.source());
        for (i, got) in got.iter().enumerate() {
            assert_eq!(got.to_bits(), stored.at(i / columns, i % columns).to_bits());
        }
    }
}

/// Published checkpoints have scales of each plain type.
#[test]
fn fp8_scales_are_widened() {
    let stored = Fp8::new(7, 5, 2);
    let bf16s = stored.scales.iter().map(|scale| bf16(*scale));
    let f16s = stored.scales.iter().map(|scale| half::f16::from_f32(*scale).to_f32());
    let kept: [(StoredType, Vec<f32>); 2] =
        [(StoredType::Bf16, bf16s.collect()), (StoredType::F16, f16s.collect())];
    for (scale_type, widened) in kept {
        let narrow = |scale: &f32| match scale_type {
            StoredType::Bf16 => half::bf16::from_f32(*scale).to_le_bytes(),
            _ => half::f16::from_f32(*scale).to_le_bytes(),
        };
        let scales: Vec<u8> = stored.scales.iter().flat_map(narrow).collect();
        let encoding = Encoding::Fp8Blocks { scales: &scales, scale_type, block: 2 };
        let got = unpacked(&WeightSource { encoding, ..stored.source() });
        let wide = Fp8 { scales: widened, ..Fp8::new(7, 5, 2) };
        for (i, got) in got.iter().enumerate() {
            assert_eq!(got.to_bits(), wide.at(i / 5, i % 5).to_bits(), "{scale_type:?}");
        }
    }
}

#[test]
fn parts_steps_and_transposition() {
    let stored = Fp8::new(40, 37, 6);
    let whole: Vec<f32> = (0..40 * 37).map(|i| stored.at(i / 37, i % 37)).collect();
    let f32s: Vec<u8> = whole.iter().flat_map(|v| v.to_le_bytes()).collect();
    let half: Vec<half::bf16> = whole.iter().map(|v| half::bf16::from_f32(*v)).collect();
    let bf16s: Vec<u8> = half.iter().flat_map(|v| v.to_le_bytes()).collect();
    let f16s: Vec<u8> = whole.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
    let encodings: [Stored<'_>; 4] = [
        (&stored.bytes, stored.source().encoding, |v| v),
        (&f32s, Encoding::Plain(StoredType::F32), |v| v),
        (&bf16s, Encoding::Plain(StoredType::Bf16), bf16),
        (&f16s, Encoding::Plain(StoredType::F16), |v| half::f16::from_f32(v).to_f32()),
    ];
    for (bytes, encoding, kept) in encodings {
        for (rows, columns, first_row, row_step, transposed) in [
            (2..9, 3..36, 5, 1, false),
            (1..18, 0..37, 3, 2, false),
            (0..37, 0..40, 0, 1, true),
            (3..12, 7..33, 1, 3, true),
            (1..2, 2..3, 36 - 18, 18, true),
            (4..4, 0..9, 1, 1, true),
        ] {
            let source = WeightSource {
                bytes,
                encoding,
                stored_columns: 37,
                rows: rows.clone(),
                columns: columns.clone(),
                first_row,
                row_step,
                transposed,
                paired: None,
            };
            let mut expected = Vec::new();
            for o in rows {
                for i in columns.clone() {
                    let at = first_row + o * row_step;
                    let (row, column) = if transposed { (i, at) } else { (at, i) };
                    expected.push(kept(whole[row * 37 + column]));
                }
            }
            assert_eq!(bits(&unpacked(&source)), bits(&expected), "{source:?}");
        }
    }
}

/// The values of the format's table, as written in its definition: one bit of mantissa, two of
/// exponent with bias 1.
fn e2m1(code: u8) -> f64 {
    let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(code >> 1 & 3), f64::from(code & 1));
    match exponent {
        0 => sign * mantissa / 2.0,
        _ => sign * (1.0 + mantissa / 2.0) * 2_f64.powi(exponent - 1),
    }
}

#[test]
fn all_codes_and_scales_of_mxfp4() {
    // 256 rows of two blocks: all codes twice, low nibble first, in order and in reverse.
    let block: Vec<u8> = (0..8).map(|i| 32 * i + 16 + 2 * i).collect();
    let turned: Vec<u8> = (0..8).map(|i| 16 * (14 - 2 * i) + 15 - 2 * i).collect();
    let row = [block.clone(), block, turned.clone(), turned].concat();
    let bytes = row.repeat(256);
    let scales: Vec<u8> = (0..=255_u8).flat_map(|s| [s, 255 - s]).collect();
    let source = WeightSource {
        encoding: Encoding::Mxfp4 { scales: &scales },
        ..WeightSource::plain(&bytes, StoredType::F32, 64, 0..256, 0..64)
    };
    let got = unpacked(&source);
    for (i, got) in got.iter().enumerate() {
        let (row, column) = (i / 64, i % 64);
        let code = if column < 32 { column % 16 } else { 15 - column % 16 } as u8;
        let scale = scales[row * 2 + column / 32];
        let exact = match scale {
            255 => f64::NAN,
            _ => e2m1(code) * 2_f64.powi(i32::from(scale) - 127),
        };
        let exact = exact as f32;
        assert_eq!(bits(&[*got]), bits(&[exact]), "code {code}, scale {scale}");
    }
    assert_eq!(e2m1(7), 6.0);
    // Every other row, some columns: gate and up rows interleaved.
    let part = WeightSource { rows: 3..100, columns: 5..50, first_row: 1, row_step: 2, ..source };
    let cut = unpacked(&part);
    for (i, cut) in cut.iter().enumerate() {
        let (row, column) = (1 + 2 * (3 + i / 45), 5 + i % 45);
        assert_eq!(bits(&[*cut]), bits(&[got[row * 64 + column]]));
    }
}

/// Every precision packs what the encoding says: as if it had been stored as f32.
#[test]
fn products_do_not_depend_on_the_encoding() {
    let stored = Fp8::new(40, 70, 32);
    let whole: Vec<f32> = (0..40 * 70).map(|i| stored.at(i / 70, i % 70)).collect();
    let x = Numbers(2).take(3 * 70);
    for device in devices() {
        for precision in PRECISIONS {
            let product = |matrix| {
                let mut out = device.tensor(3, 40).unwrap();
                let segment = Segment {
                    matrix: &matrix,
                    bias: None,
                    from_rows: 0..3,
                    from_column: 0,
                    to_row: 0,
                    to_column: 0,
                };
                device.matmul(&tensor(&device, 70, &x), &[segment], &mut out).unwrap();
                bits(out.values())
            };
            let got = product(device.pack(&stored.source(), precision).unwrap());
            assert_eq!(got, product(matrix(&device, 70, &whole, precision)));
        }
    }
}
