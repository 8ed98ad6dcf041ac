//! Operations on rows: against f64 and bit for bit across classes and threads.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod support;

use compute::{CpuDevice, Device, RopeTable, Routes};
use support::*;

/// Runs `f` on every device and returns the plain device's values after comparing bits.
fn same(f: impl Fn(&CpuDevice) -> Vec<f32>) -> Vec<f32> {
    let expected = f(&plain());
    for device in devices() {
        assert_eq!(bits(&f(&device)), bits(&expected), "{device:?}");
    }
    expected
}

/// Sizes: small, odd, and large enough to be shared between threads.
fn sizes() -> Vec<(usize, usize)> {
    if cfg!(miri) {
        return vec![(1, 1), (2, 19)];
    }
    vec![(1, 1), (1, 16), (2, 19), (5, 64), (3, 100), (300, 1024)]
}

#[test]
fn rms_norm_follows_its_order() {
    for (rows, columns) in sizes() {
        let mut numbers = Numbers(columns as u64);
        let (x, weight) = (numbers.take(rows * columns), numbers.take(columns));
        let got = same(|device| {
            let x = tensor(device, columns, &x);
            let mut out = device.tensor(rows, columns).unwrap();
            device.rms_norm(&x, &weight, 1e-5, &mut out).unwrap();
            out.values().to_vec()
        });
        for (x, got) in x.chunks(columns).zip(got.chunks(columns)) {
            let mut lanes = [0_f32; 16];
            for (i, x) in x.iter().enumerate() {
                lanes[i % 16] = x.mul_add(*x, lanes[i % 16]);
            }
            for half in [8, 4, 2, 1] {
                for i in 0..half {
                    lanes[i] += lanes[i + half];
                }
            }
            let factor = 1.0 / (lanes[0] / columns as f32 + 1e-5).sqrt();
            let expected: Vec<f32> = x.iter().zip(&weight).map(|(x, w)| x * factor * w).collect();
            assert_eq!(bits(got), bits(&expected));
            let square: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
            let exact = 1.0 / (square / columns as f64 + 1e-5).sqrt();
            for ((x, w), got) in x.iter().zip(&weight).zip(got) {
                let exact = f64::from(*x) * exact * f64::from(*w);
                assert!((f64::from(*got) - exact).abs() <= exact.abs() * 2e-6);
            }
        }
    }
}

#[test]
fn rope_turns_pairs() {
    let (dim, heads, from) = (20, 3, 7);
    let inv_freq: Vec<f32> = (0..dim / 2).map(|i| 10_f32.powf(-(i as f32) / 3.0)).collect();
    let table = RopeTable::new(dim, &inv_freq, 100).unwrap();
    for rows in [1, 4, if cfg!(miri) { 2 } else { 3000 }] {
        let columns = from + heads * dim + 5;
        let x = Numbers(3).take(rows * columns);
        let positions: Vec<u32> = (0..rows).map(|t| (t * 37 % 100) as u32).collect();
        let got = same(|device| {
            let mut x = tensor(device, columns, &x);
            device.rope(&mut x, from, heads, &positions, &table).unwrap();
            x.values().to_vec()
        });
        for (i, (got, x_i)) in got.iter().zip(&x).enumerate() {
            let (t, column) = (i / columns, i % columns);
            let inside = (from..from + heads * dim).contains(&column);
            if !inside {
                assert_eq!(got.to_bits(), x_i.to_bits());
                continue;
            }
            let j = (column - from) % dim;
            let pair = if j < dim / 2 { i + dim / 2 } else { i - dim / 2 };
            let angle = f64::from(positions[t] as f32 * inv_freq[j % (dim / 2)]);
            let sign = if j < dim / 2 { -1.0 } else { 1.0 };
            let exact =
                f64::from(*x_i) * libm::cos(angle) + sign * f64::from(x[pair]) * libm::sin(angle);
            assert!((f64::from(*got) - exact).abs() < 1e-6);
        }
    }
}

#[test]
fn silu_mul_agrees() {
    for (rows, width) in sizes() {
        let mut x = Numbers(9).take(rows * width * 2);
        x.iter_mut().step_by(3).for_each(|x| *x *= 30.0);
        x[0] = f32::NEG_INFINITY;
        let got = same(|device| {
            let x = tensor(device, width * 2, &x);
            let mut out = device.tensor(rows, width).unwrap();
            device.silu_mul(&x, width, &mut out).unwrap();
            out.values().to_vec()
        });
        assert_eq!(got[0], 0.0);
        for (i, got) in got.iter().enumerate().skip(1) {
            let at = i / width * width * 2 + i % width;
            let (gate, up) = (f64::from(x[at]), f64::from(x[at + width]));
            let exact = gate / (1.0 + libm::exp(-gate)) * up;
            assert!((f64::from(*got) - exact).abs() <= exact.abs() * 5e-7 + 1e-37);
        }
    }
}

#[test]
fn add_gather_and_embed_are_exact() {
    for (rows, columns) in sizes() {
        let mut numbers = Numbers(11);
        let (x, y) = (numbers.take(rows * columns), numbers.take(rows * columns));
        let bias = numbers.take(columns);
        for bias in [None, Some(bias.as_slice())] {
            let got = same(|device| {
                let mut x = tensor(device, columns, &x);
                device.add(&mut x, &tensor(device, columns, &y), bias).unwrap();
                x.values().to_vec()
            });
            for (i, got) in got.iter().enumerate() {
                let y = bias.map_or(y[i], |bias| y[i] + bias[i % columns]);
                assert_eq!(got.to_bits(), (x[i] + y).to_bits());
            }
        }
        let chosen: Vec<u32> = (0..2 * rows + 1).map(|i| (i * 5 % rows) as u32).collect();
        let got = same(|device| {
            let mut out = device.tensor(chosen.len(), columns).unwrap();
            device.gather_rows(&tensor(device, columns, &x), &chosen, &mut out).unwrap();
            out.values().to_vec()
        });
        for (got, row) in got.chunks(columns).zip(&chosen) {
            assert_eq!(got, &x[*row as usize * columns..][..columns]);
        }
    }
}

#[test]
fn experts_are_combined_in_slot_order() {
    let (tokens, chosen, stripes, columns) =
        if cfg!(miri) { (3, 2, 2, 5) } else { (70, 3, 4, 300) };
    let slots = tokens * chosen;
    let mut numbers = Numbers(13);
    let y = numbers.take(stripes * slots * columns);
    let routes = Routes { chosen, experts: vec![0; slots], weights: numbers.take(slots) };
    let mut rows: Vec<u32> = (0..slots as u32).collect();
    for i in (1..slots).rev() {
        rows.swap(i, numbers.below(i + 1));
    }
    let got = same(|device| {
        let mut out = tensor(device, columns, &vec![4.0; stripes * tokens * columns]);
        let y = tensor(device, columns, &y);
        device.combine_experts(&y, &routes, &rows, stripes, &mut out).unwrap();
        out.values().to_vec()
    });
    for (i, got) in got.iter().enumerate() {
        let (s, t, c) = (i / columns / tokens, i / columns % tokens, i % columns);
        let expected = (t * chosen..(t + 1) * chosen).fold(0_f32, |acc, slot| {
            let row = s * slots + rows[slot] as usize;
            routes.weights[slot].mul_add(y[row * columns + c], acc)
        });
        assert_eq!(got.to_bits(), expected.to_bits());
    }
}

#[test]
fn routes_take_the_largest_and_the_lower_id_on_ties() {
    let device = plain();
    let logits = tensor(&device, 5, &[1.0, 3.0, 3.0, -1.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    let routes = device.route(&logits, 2, true).unwrap();
    assert_eq!(routes.experts, [1, 2, 0, 1]);
    assert_eq!(routes.weights, [0.5; 4]);
    let routes = device.route(&logits, 5, false).unwrap();
    assert_eq!(routes.experts, [1, 2, 4, 0, 3, 0, 1, 2, 3, 4]);
    assert_eq!(routes.weights[5..], [0.2; 5]);
    let sum: f64 = [1.0_f64, 3.0, 3.0, -1.0, 3.0].iter().map(|l| l.exp()).sum();
    for (weight, logit) in routes.weights.iter().zip([3.0_f64, 3.0, 3.0, 1.0, -1.0]) {
        assert!((f64::from(*weight) - logit.exp() / sum).abs() < 1e-7);
    }
}

#[test]
fn routes_of_nan_are_defined() {
    let device = plain();
    let logits = tensor(&device, 3, &[1.0, f32::NAN, 2.0, 1.0, f32::NEG_INFINITY, 5.0]);
    let routes = device.route(&logits, 2, true).unwrap();
    assert_eq!(routes.experts, [0, 1, 2, 0]);
    assert!(routes.weights[..2].iter().all(|w| w.is_nan()));
    assert!((routes.weights[2] + routes.weights[3] - 1.0).abs() < 1e-6);
    let empty = device.route(&logits, 0, true).unwrap();
    assert_eq!((empty.chosen, empty.experts.len()), (0, 0));
    let minus = tensor(&device, 2, &[f32::NEG_INFINITY; 2]);
    assert_eq!(device.route(&minus, 2, false).unwrap().experts, [0, 1]);
}
