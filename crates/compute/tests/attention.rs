//! Attention over the paged cache: the exact order, chunks, windows, neighbours, against f64.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod support;

use compute::{AttendSpan, CacheShape, CacheValue, CpuDevice, Device, HeadMap, Precision};
use support::*;

const BLOCK: usize = 4;

/// A made-up call: `[T, ...]` of queries, keys, values where they are no prefixes.
struct Setup {
    dim: usize,
    value: CacheValue,
    kv_heads: usize,
    map: HeadMap,
    precision: Precision,
    /// By sequence: its rows.
    sequences: Vec<Vec<f32>>,
}

impl Setup {
    fn new(dim: usize, kv_of_query: &[usize], window: Option<usize>, lengths: &[usize]) -> Setup {
        Setup::of(dim, CacheValue::Own(dim), kv_of_query, window, lengths)
    }

    fn of(
        dim: usize,
        value: CacheValue,
        kv_of_query: &[usize],
        window: Option<usize>,
        lengths: &[usize],
    ) -> Setup {
        let kv_heads = kv_of_query.iter().max().unwrap() + 1;
        let map = HeadMap {
            kv_of_query: kv_of_query.to_vec(),
            window,
            scale: 0.37,
            softcap: None,
            sinks: vec![],
        };
        let mut numbers = Numbers((dim * 100 + lengths.len()) as u64);
        let (precision, sequences) = (Precision::F32, Vec::new());
        let mut setup = Setup { dim, value, kv_heads, map, precision, sequences };
        let width = setup.width();
        setup.sequences = lengths.iter().map(|len| numbers.take(len * width)).collect();
        setup
    }

    /// Caps scores and adds sinks around their size.
    fn with_cap_and_sinks(mut self, cap: Option<f32>, sinks: bool) -> Setup {
        self.map.softcap = cap;
        if sinks {
            self.map.sinks = Numbers(4).take(self.heads());
        }
        self
    }

    fn heads(&self) -> usize {
        self.map.kv_of_query.len()
    }

    fn value_dim(&self) -> usize {
        match self.value {
            CacheValue::Own(dim) | CacheValue::PrefixOfKey(dim) => dim,
        }
    }

    fn width(&self) -> usize {
        let values = match self.value {
            CacheValue::Own(dim) => dim,
            CacheValue::PrefixOfKey(_) => 0,
        };
        (self.heads() + self.kv_heads) * self.dim + self.kv_heads * values
    }

    /// Head `h` of the queries (0), keys (1) or values (2) of a row.
    fn part(&self, sequence: usize, row: usize, kind: usize, h: usize) -> &[f32] {
        let row = &self.sequences[sequence][row * self.width()..][..self.width()];
        let keys = self.heads() * self.dim;
        match (kind, self.value) {
            (0, _) => &row[h * self.dim..][..self.dim],
            (1, _) => &row[keys + h * self.dim..][..self.dim],
            (_, CacheValue::PrefixOfKey(dim)) => &row[keys + h * self.dim..][..dim],
            (_, CacheValue::Own(dim)) => &row[keys + self.kv_heads * self.dim + h * dim..][..dim],
        }
    }

    /// Runs all sequences together, `chunk` rows of each per call. Blocks are dealt out so that
    /// neighbours in a sequence are no neighbours in the cache.
    fn run(&self, device: &CpuDevice, chunk: usize) -> Vec<Vec<f32>> {
        let lengths: Vec<usize> = self.sequences.iter().map(|s| s.len() / self.width()).collect();
        let longest = *lengths.iter().max().unwrap();
        let per_sequence = longest.div_ceil(BLOCK);
        let count = self.sequences.len();
        let tables: Vec<Vec<u32>> = (0..count)
            .map(|s| {
                (0..per_sequence).map(|b| ((per_sequence - 1 - b) * count + s) as u32).collect()
            })
            .collect();
        let mut cache = device
            .cache(CacheShape {
                layers: 2,
                blocks: per_sequence * count,
                block_tokens: BLOCK,
                kv_heads: self.kv_heads,
                key_dim: self.dim,
                value: self.value,
                precision: self.precision,
            })
            .unwrap();
        let mut outs = vec![Vec::new(); count];
        for start in (0..longest).step_by(chunk) {
            let (mut spans, mut x) = (Vec::new(), Vec::new());
            for s in 0..count {
                let end = lengths[s].min(start + chunk);
                if start < end {
                    let first = x.len() / self.width();
                    let rows = first..first + end - start;
                    spans.push(AttendSpan { rows, start, blocks: &tables[s] });
                    x.extend(&self.sequences[s][start * self.width()..end * self.width()]);
                }
            }
            let x = tensor(device, self.width(), &x);
            let key = self.heads() * self.dim;
            let value = key + self.kv_heads * self.dim;
            device.store_kv(&mut cache, 1, &x, key, value, &spans).unwrap();
            let columns = self.heads() * self.value_dim();
            let mut out = device.tensor(x.rows(), columns).unwrap();
            device.attend(&cache, 1, &x, &self.map, &spans, &mut out).unwrap();
            let running = (0..count).filter(|s| start < lengths[*s]);
            for (s, span) in running.zip(&spans) {
                let rows = span.rows.start * columns..span.rows.end * columns;
                outs[s].extend(&out.values()[rows]);
            }
        }
        outs
    }

    fn first(&self, position: usize) -> usize {
        self.map.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }

    /// Plain attention in f64, for a row and a head.
    fn exact(&self, s: usize, row: usize, head: usize) -> Vec<f64> {
        let kept = |v: &f32| match self.precision {
            Precision::F32 => f64::from(*v),
            _ => f64::from(bf16(*v)),
        };
        let kv = self.map.kv_of_query[head];
        let positions = self.first(row)..row + 1;
        let scores: Vec<f64> = positions
            .clone()
            .map(|p| {
                let pairs = self.part(s, row, 0, head).iter().zip(self.part(s, p, 1, kv));
                let dot = pairs.map(|(q, k)| f64::from(*q) * kept(k)).sum::<f64>();
                let score = dot * f64::from(self.map.scale);
                self.map
                    .softcap
                    .map_or(score, |cap| f64::from(cap) * libm::tanh(score / f64::from(cap)))
            })
            .collect();
        let sink = self.map.sinks.get(head).map_or(f64::NEG_INFINITY, |s| f64::from(*s));
        let max = scores.iter().fold(sink, |m, s| m.max(*s));
        let e: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = e.iter().sum::<f64>() + (sink - max).exp();
        (0..self.value_dim())
            .map(|d| {
                let parts = positions.clone().zip(&e);
                parts.map(|(p, e)| e * kept(&self.part(s, p, 2, kv)[d])).sum::<f64>() / sum
            })
            .collect()
    }

    fn check_against_f64(&self, device: &CpuDevice) {
        for (s, out) in self.run(device, 5).iter().enumerate() {
            for (i, got) in out.chunks(self.value_dim()).enumerate() {
                let exact = self.exact(s, i / self.heads(), i % self.heads());
                for (got, exact) in got.iter().zip(exact) {
                    let error = (f64::from(*got) - exact).abs();
                    assert!(error < 5e-6, "row {i}: {got} is not {exact}");
                }
            }
        }
    }
}

fn setups() -> Vec<Setup> {
    if cfg!(miri) {
        return vec![
            Setup::new(18, &[0, 0, 1], Some(3), &[6, 2]),
            Setup::of(18, CacheValue::PrefixOfKey(17), &[0, 0], None, &[6, 2])
                .with_cap_and_sinks(Some(2.0), true),
        ];
    }
    let prefix = CacheValue::PrefixOfKey;
    vec![
        Setup::new(64, &[0, 0, 0, 0, 1, 1, 1, 1], None, &[37, 9]),
        Setup::new(16, &[0, 0, 0, 0, 0, 0], Some(7), &[30]),
        Setup::new(80, &[0, 1, 2], None, &[3, 21, 1]),
        Setup::new(10, &[1, 0, 0, 1, 2], Some(1), &[11, 4]),
        Setup::new(33, &[0, 0, 0, 1, 1, 1], Some(100), &[45, 20]),
        Setup::new(128, &[0], Some(16), &[50]),
        // Caps, sinks, values of another width than keys.
        Setup::new(64, &[0, 0, 1, 1], None, &[70, 3]).with_cap_and_sinks(None, true),
        Setup::new(33, &[0; 8], Some(9), &[40]).with_cap_and_sinks(Some(1.5), true),
        Setup::new(16, &[0, 1], None, &[30, 8]).with_cap_and_sinks(Some(50.0), false),
        Setup::of(24, CacheValue::Own(40), &[0, 0, 1, 1], None, &[20, 70]),
        // Values that are prefixes: several passages, whole and partial vectors.
        Setup::of(96, prefix(64), &[0; 16], None, &[200, 5, 65]),
        Setup::of(40, prefix(23), &[0, 0, 0, 1, 1, 1], Some(90), &[150, 64]),
        Setup::of(20, prefix(20), &[0; 5], None, &[129]).with_cap_and_sinks(Some(4.0), true),
    ]
}

#[test]
fn attention_is_near_f64() {
    for mut setup in setups() {
        for precision in [Precision::F32, Precision::Bf16] {
            setup.precision = precision;
            setup.check_against_f64(&plain());
        }
    }
}

#[test]
fn chunks_neighbours_threads_and_classes_change_no_bit() {
    for mut setup in setups() {
        for precision in PRECISIONS {
            setup.precision = precision;
            let expected: Vec<_> = setup.run(&plain(), 1).iter().map(|o| bits(o)).collect();
            for device in devices() {
                for chunk in [1, 3, 7, 64] {
                    let got: Vec<_> = setup.run(&device, chunk).iter().map(|o| bits(o)).collect();
                    assert_eq!(got, expected, "{device:?} in chunks of {chunk}");
                }
            }
            // Alone.
            for (sequence, expected) in setup.sequences.iter().zip(&expected) {
                let sequences = vec![sequence.clone()];
                let alone = Setup { sequences, map: setup.map.clone(), ..setup };
                let got = alone.run(&CpuDevice::new(2, None).unwrap(), 6);
                assert_eq!(bits(&got[0]), *expected);
            }
        }
    }
}

#[test]
fn nan_and_infinite_scores_stay_in_their_row() {
    let mut setup = Setup::new(16, &[0, 0], None, &[9, 5]);
    let width = setup.width();
    setup.sequences[0][4 * width] = f32::NAN;
    setup.sequences[0][6 * width + 16] = f32::INFINITY;
    let expected: Vec<_> = setup.run(&plain(), 9).iter().map(|o| bits(o)).collect();
    for device in devices() {
        let got: Vec<_> = setup.run(&device, 2).iter().map(|o| bits(o)).collect();
        assert_eq!(got, expected);
    }
    for (i, value) in expected[0].iter().enumerate() {
        let (row, head) = (i / 32, i / 16 % 2);
        let sick = (row, head) == (4, 0) || (row, head) == (6, 1);
        assert_eq!(f32::from_bits(*value).is_nan(), sick, "row {row} head {head}");
    }
    assert!(expected[1].iter().all(|v| f32::from_bits(*v).is_finite()));
}

/// With every score far below its sink, nothing of the values is left, and nothing overflows.
#[test]
fn a_sink_takes_what_scores_leave() {
    for value in [CacheValue::Own(16), CacheValue::PrefixOfKey(16)] {
        let mut setup = Setup::of(16, value, &[0, 0, 0], None, &[70]);
        let width = setup.width();
        // Queries of head 0 against keys: -256, head 1: -2.56e36, head 2: 0.
        for row in setup.sequences[0].chunks_mut(width) {
            row[..16].fill(-1.0);
            row[16..32].fill(-1e34);
            row[32..48].fill(0.0);
            row[48..].fill(16.0);
        }
        setup.map.scale = 1.0;
        setup.map.sinks = vec![-200.0, 0.0, f32::NEG_INFINITY];
        for device in devices() {
            let out = setup.run(&device, 7).swap_remove(0);
            for (i, head) in out.chunks(16).enumerate() {
                let positions = (i / 3 + 1) as f64;
                let e = libm::exp(-56.0) * positions;
                let expected = [16.0 * e / (1.0 + e), 0.0, 16.0][i % 3];
                for got in head {
                    let error = (f64::from(*got) - expected).abs();
                    assert!(error <= expected * 1e-6, "{got} is not {expected}");
                }
            }
        }
    }
}

/// The whole of a key as its value is the same as that value kept apart, but for rounding; and the
/// same to the bit while one passage suffices.
#[test]
fn prefixes_are_values() {
    let apart = Setup::new(32, &[0; 4], None, &[64]);
    let mut prefix = Setup::of(32, CacheValue::PrefixOfKey(32), &[0; 4], None, &[64]);
    let mut same = Setup::new(32, &[0; 4], None, &[64]);
    for row in 0..64 {
        let line = &apart.sequences[0][row * apart.width()..][..160];
        prefix.sequences[0][row * 160..][..160].copy_from_slice(line);
        let to = &mut same.sequences[0][row * apart.width()..][..192];
        to[..160].copy_from_slice(line);
        to[160..].copy_from_slice(&line[128..]);
    }
    for device in devices() {
        assert_eq!(bits(&prefix.run(&device, 9)[0]), bits(&same.run(&device, 64)[0]));
    }
}

#[test]
fn rows_of_no_span_become_zeros() {
    let device = plain();
    let shape = CacheShape {
        layers: 1,
        blocks: 2,
        block_tokens: 2,
        kv_heads: 1,
        key_dim: 4,
        value: CacheValue::Own(4),
        precision: Precision::Bf16,
    };
    let mut cache = device.cache(shape).unwrap();
    let x = tensor(&device, 12, &[1.0; 36]);
    let mut out = tensor(&device, 4, &[9.0; 12]);
    let spans = [AttendSpan { rows: 1..2, start: 3, blocks: &[7, 1] }];
    let map =
        HeadMap { kv_of_query: vec![0], window: Some(2), scale: 1.0, softcap: None, sinks: vec![] };
    // Block 7 does not exist, but no position in it is touched.
    device.store_kv(&mut cache, 0, &x, 4, 8, &spans).unwrap();
    device.attend(&cache, 0, &x, &map, &spans, &mut out).unwrap();
    assert_eq!(out.values()[..4], [0.0; 4]);
    assert_eq!(out.values()[8..], [0.0; 4]);
    assert!(out.values()[4..8].iter().all(|v| *v > 0.0 && *v < 1.0));
}
