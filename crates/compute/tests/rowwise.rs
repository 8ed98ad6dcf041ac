//! Operations on rows: against f64 and bit for bit across classes and threads.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod support;

use compute::{Activation, Columns, CpuDevice, Device, ELSEWHERE, RopePairs, RopeTable, Routes};
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
    // Partial heads too: dims of stride columns.
    for (dims, heads, from, stride) in [(20, 3, 7, 20), (6, 4, 2, 11), (64, 2, 0, 64), (2, 1, 3, 0)]
    {
        for pairs in [RopePairs::Halves, RopePairs::Interleaved] {
            check_rope(pairs, (dims, heads), (from, stride));
        }
    }
}

fn check_rope(pairs: RopePairs, (dims, heads): (usize, usize), (from, stride): (usize, usize)) {
    let (half, magnitude) = (dims / 2, 1.3);
    let inv_freq: Vec<f32> = (0..half).map(|i| 10_f32.powf(-(i as f32) / 3.0)).collect();
    let table = RopeTable::new(pairs, &inv_freq, magnitude, 100).unwrap();
    for rows in [1, 4, if cfg!(miri) { 2 } else { 1500 }] {
        let columns = from + (heads - 1) * stride + dims + 5;
        let x = Numbers(3).take(rows * columns);
        let positions: Vec<u32> = (0..rows).map(|t| (t * 37 % 100) as u32).collect();
        let got = same(|device| {
            let mut x = tensor(device, columns, &x);
            device.rope(&mut x, from, heads, stride, &positions, &table).unwrap();
            x.values().to_vec()
        });
        for (i, (got, x_i)) in got.iter().zip(&x).enumerate() {
            let (t, column) = (i / columns, i % columns);
            let mut starts = (0..heads).map(|h| from + h * stride);
            let Some(start) = starts.find(|s| (*s..s + dims).contains(&column)) else {
                assert_eq!(got.to_bits(), x_i.to_bits());
                continue;
            };
            let j = column - start;
            let (angle, first, partner) = match pairs {
                RopePairs::Halves if j < half => (j, true, i + half),
                RopePairs::Halves => (j - half, false, i - half),
                RopePairs::Interleaved => (j / 2, j % 2 == 0, i + 1 - j % 2 * 2),
            };
            let angle = f64::from(positions[t] as f32 * inv_freq[angle]);
            let sign = if first { -1.0 } else { 1.0 };
            let exact = f64::from(*x_i) * libm::cos(angle)
                + sign * f64::from(x[partner]) * libm::sin(angle);
            assert!((f64::from(*got) - exact * f64::from(magnitude)).abs() < 2e-6);
        }
    }
}

#[test]
fn heads_are_normed_like_rows() {
    for (rows, dim, heads, from, stride) in
        [(1, 16, 2, 0, 16), (3, 19, 3, 4, 24), (if cfg!(miri) { 2 } else { 700 }, 128, 4, 1, 130)]
    {
        let columns = from + heads * stride + 2;
        let mut numbers = Numbers(dim as u64);
        let (x, weight) = (numbers.take(rows * columns), numbers.take(dim));
        let got = same(|device| {
            let mut x = tensor(device, columns, &x);
            device.norm_heads(&mut x, from, heads, stride, &weight, 1e-6).unwrap();
            x.values().to_vec()
        });
        let device = plain();
        let mut expected = x.clone();
        for t in 0..rows {
            for h in 0..heads {
                let start = t * columns + from + h * stride;
                let head = tensor(&device, dim, &x[start..start + dim]);
                let mut out = device.tensor(1, dim).unwrap();
                device.rms_norm(&head, &weight, 1e-6, &mut out).unwrap();
                expected[start..start + dim].copy_from_slice(out.values());
                let square: f64 = head.values().iter().map(|x| f64::from(*x).powi(2)).sum();
                let exact = f64::from(head.values()[2]) * f64::from(weight[2])
                    / (square / dim as f64 + 1e-6).sqrt();
                assert!((f64::from(got[start + 2]) - exact).abs() <= exact.abs() * 2e-6);
            }
        }
        assert_eq!(bits(&got), bits(&expected));
    }
}

#[test]
fn columns_are_copied_and_others_kept() {
    let at = |first, stride| Columns { first, stride };
    for (rows, width, heads, from, to) in [
        (1, 1, 1, at(0, 0), at(2, 0)),
        (4, 5, 3, at(2, 7), at(1, 5)),
        (3, 6, 2, at(3, 2), at(0, 9)),
        (if cfg!(miri) { 2 } else { 900 }, 200, 4, at(5, 0), at(8, 210)),
    ] {
        let (x_columns, columns) = (from.first + heads * from.stride + width, to.first + 850);
        let x = Numbers(1).take(rows * x_columns);
        let got = same(|device| {
            let x = tensor(device, x_columns, &x);
            let mut out = tensor(device, columns, &vec![-9.0; rows * columns]);
            device.copy_columns(&x, from, width, heads, &mut out, to).unwrap();
            out.values().to_vec()
        });
        let mut expected = vec![-9.0; rows * columns];
        for (t, expected) in expected.chunks_mut(columns).enumerate() {
            for h in 0..heads {
                for c in 0..width {
                    let from = t * x_columns + from.first + h * from.stride + c;
                    expected[to.first + h * to.stride + c] = x[from];
                }
            }
        }
        assert_eq!(got, expected);
    }
}

/// In f64, from the definitions.
fn exact_gate(activation: Activation, g: f64, u: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + libm::exp(-x));
    match activation {
        Activation::Silu => g * sigmoid(g) * u,
        Activation::GeluTanh => {
            let root = (2.0 / std::f64::consts::PI).sqrt();
            0.5 * g * (1.0 + libm::tanh(root * (g + 0.044715 * g.powi(3)))) * u
        }
        Activation::ClampedSwiglu { alpha, limit } => {
            let limit = f64::from(limit);
            let (g, u) = (g.min(limit), u.clamp(-limit, limit));
            (u + 1.0) * g * sigmoid(f64::from(alpha) * g)
        }
    }
}

#[test]
fn gates_agree() {
    let clamped = Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 };
    for (rows, width) in sizes() {
        let mut x = Numbers(9).take(rows * width * 2);
        x.iter_mut().step_by(3).for_each(|x| *x *= 30.0);
        x[0] = f32::NEG_INFINITY;
        for activation in [Activation::Silu, Activation::GeluTanh, clamped] {
            let got = same(|device| {
                let x = tensor(device, width * 2, &x);
                let mut out = device.tensor(rows, width).unwrap();
                device.gate(&x, width, activation, &mut out).unwrap();
                out.values().to_vec()
            });
            assert_eq!(got[0], 0.0);
            for (i, got) in got.iter().enumerate().skip(1) {
                let at = i / width * width * 2 + i % width;
                let (gate, up) = (f64::from(x[at]), f64::from(x[at + width]));
                let exact = exact_gate(activation, gate, up);
                let bound = match activation {
                    Activation::Silu => exact.abs() * 5e-7 + 1e-37,
                    // f64 cancels below about -6 as well; what is left there is next to nothing.
                    Activation::GeluTanh => exact.abs() * 4e-6 + 1e-13,
                    // The exponent's rounding, up to 1.702 * 90.
                    Activation::ClampedSwiglu { .. } => exact.abs() * 2e-5 + 1e-37,
                };
                let error = (f64::from(*got) - exact).abs();
                assert!(error <= bound, "{activation:?} of {gate} and {up}: {got}, not {exact}");
            }
        }
    }
}

#[test]
fn scale_and_softcap_are_in_place() {
    for (rows, columns) in sizes() {
        let mut x = Numbers(21).take(rows * columns);
        x.iter_mut().step_by(4).for_each(|x| *x *= 40.0);
        let factor = 45.254834_f32;
        let scaled = same(|device| {
            let mut x = tensor(device, columns, &x);
            device.scale(&mut x, factor).unwrap();
            x.values().to_vec()
        });
        let capped = same(|device| {
            let mut x = tensor(device, columns, &x);
            device.softcap(&mut x, 30.0).unwrap();
            x.values().to_vec()
        });
        for ((x, scaled), capped) in x.iter().zip(scaled).zip(capped) {
            assert_eq!(scaled.to_bits(), (x * factor).to_bits());
            let exact = 30.0 * libm::tanh(f64::from(*x) / 30.0);
            assert!((f64::from(capped) - exact).abs() <= exact.abs() * 5e-7, "{x}: {capped}");
        }
    }
}

#[test]
fn gated_sums_take_each_tokens_gate() {
    for (tokens, columns) in sizes() {
        let copies = 3;
        let mut numbers = Numbers(17);
        let (x, y) =
            (numbers.take(copies * tokens * columns), numbers.take(copies * tokens * columns));
        let gates = numbers.take(tokens);
        let got = same(|device| {
            let mut x = tensor(device, columns, &x);
            let (y, gates) = (tensor(device, columns, &y), tensor(device, 1, &gates));
            device.add_gated(&mut x, &y, &gates, copies).unwrap();
            x.values().to_vec()
        });
        for (i, got) in got.iter().enumerate() {
            let gate = f64::from(gates[i / columns % tokens]);
            let term = f64::from(y[i]) / (1.0 + libm::exp(-gate));
            let exact = f64::from(x[i]) + term;
            let bound = (exact.abs() + term.abs()) * 3e-7;
            assert!((f64::from(*got) - exact).abs() <= bound);
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
    let picks = (0..stripes).flat_map(|s| rows.iter().map(move |row| (s * slots) as u32 + row));
    let mut picks: Vec<u32> = picks.collect();
    // The last stripe leaves some out, and one token has none at all.
    let last = (stripes - 1) * slots;
    picks[last..last + chosen].fill(ELSEWHERE);
    picks[last + 2 * chosen] = ELSEWHERE;
    let got = same(|device| {
        let mut out = tensor(device, columns, &vec![4.0; stripes * tokens * columns]);
        let y = tensor(device, columns, &y);
        device.combine_experts(&y, &routes, &picks, &mut out).unwrap();
        out.values().to_vec()
    });
    for (i, got) in got.iter().enumerate() {
        let (s, t, c) = (i / columns / tokens, i / columns % tokens, i % columns);
        let expected =
            (t * chosen..(t + 1) * chosen).fold(0_f32, |acc, slot| match picks[s * slots + slot] {
                ELSEWHERE => acc,
                row => routes.weights[slot].mul_add(y[row as usize * columns + c], acc),
            });
        assert_eq!(got.to_bits(), expected.to_bits());
    }
}
