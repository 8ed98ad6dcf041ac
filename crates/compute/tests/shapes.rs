//! Whatever does not fit is an error that names the operation, and nothing is written.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod support;

use compute::{
    Activation, AttendSpan, CacheShape, CacheValue, Columns, CpuDevice, Device, DeviceError,
    ELSEWHERE, Encoding, GroupScore, Groups, HeadMap, Precision, RopePairs, RopeTable, Routes,
    Routing, Score, Segment, StoredType, WeightSource,
};
use proptest::prelude::*;
use std::ops::Range;
use support::*;

fn misfit<T: std::fmt::Debug>(result: Result<T, DeviceError>, name: &str) {
    match result {
        Err(DeviceError::Shape { op, .. }) => assert_eq!(op, name),
        other => panic!("{name}: expected a shape error, got {other:?}"),
    }
}

fn source(bytes: &[u8], columns: usize, rows: Range<usize>, c: Range<usize>) -> WeightSource<'_> {
    WeightSource::plain(bytes, StoredType::Bf16, columns, rows, c)
}

#[test]
#[expect(clippy::reversed_empty_ranges, reason = "wrong on purpose")]
fn pack_checks_the_stored_rectangle() {
    let (device, bytes) = (plain(), [0; 24]);
    for (columns, rows, taken) in [
        (4, 0..4, 0..4),
        (4, 0..3, 0..5),
        (4, 2..1, 0..4),
        (4, 0..3, 3..2),
        (5, 0..1, 0..5),
        (usize::MAX, 0..1, 0..1),
        (usize::MAX / 2, 0..1, 0..1),
        (4, usize::MAX..usize::MAX, 0..1),
        (4, 0..usize::MAX, 0..1),
        (0, 0..1, 0..1),
    ] {
        for precision in PRECISIONS {
            misfit(
                device.pack(&source(&bytes, columns, rows.clone(), taken.clone()), precision),
                "pack",
            );
        }
    }
    let empty = device.pack(&source(&bytes, 4, 3..3, 4..4), Precision::Int8).unwrap();
    assert_eq!(device.matrix_shape(&empty), (0, 0));
    assert!(device.pack(&source(&bytes, 4, 0..3, 0..4), Precision::F32).is_ok());
}

#[test]
fn pack_checks_encodings_and_strides() {
    let (device, bytes, ones) = (plain(), [0; 96], [1; 24]);
    let pack = |source: &WeightSource<'_>| device.pack(source, Precision::F32);
    let scale_type = StoredType::F32;
    let fp8 = |scales, block| WeightSource {
        encoding: Encoding::Fp8Blocks { scales, scale_type, block },
        ..source(&bytes, 8, 0..12, 0..8)
    };
    // 12 rows and 8 columns in blocks of 5: 3 by 2 scales.
    pack(&fp8(&ones, 5)).unwrap();
    misfit(pack(&fp8(&ones[4..], 5)), "pack");
    misfit(pack(&fp8(&ones, 6)), "pack");
    misfit(pack(&fp8(&ones, 0)), "pack");
    misfit(pack(&WeightSource { rows: 0..13, ..fp8(&ones, 5) }), "pack");
    let turned = WeightSource { transposed: true, ..fp8(&ones, 5) };
    misfit(pack(&turned), "pack");
    pack(&WeightSource { rows: 0..8, columns: 0..12, ..turned.clone() }).unwrap();
    misfit(pack(&WeightSource { rows: 0..8, columns: 0..13, ..turned }), "pack");

    // 3 rows of 64 columns: 2 scales each.
    let mx = |scales| WeightSource {
        encoding: Encoding::Mxfp4 { scales },
        ..source(&bytes, 64, 0..3, 0..64)
    };
    pack(&mx(&ones[..6])).unwrap();
    misfit(pack(&mx(&ones[..7])), "pack");
    misfit(pack(&WeightSource { stored_columns: 48, columns: 0..48, ..mx(&ones[..6]) }), "pack");
    misfit(pack(&WeightSource { transposed: true, rows: 0..1, ..mx(&ones[..6]) }), "pack");

    // 6 rows of 8 columns.
    let steps = |first_row, row_step, rows| WeightSource {
        first_row,
        row_step,
        ..source(&bytes, 8, rows, 0..8)
    };
    pack(&steps(1, 2, 0..3)).unwrap();
    pack(&steps(5, usize::MAX, 0..1)).unwrap();
    pack(&steps(usize::MAX, 7, 0..0)).unwrap();
    misfit(pack(&steps(2, 2, 0..3)), "pack");
    misfit(pack(&steps(0, 0, 0..3)), "pack");
    misfit(pack(&steps(1, usize::MAX, 1..2)), "pack");
    misfit(pack(&steps(0, usize::MAX, 2..3)), "pack");
    misfit(pack(&steps(usize::MAX, 1, 0..1)), "pack");
    let turned = WeightSource { transposed: true, columns: 0..6, ..steps(2, 3, 0..2) };
    pack(&turned).unwrap();
    misfit(pack(&WeightSource { first_row: 5, ..turned.clone() }), "pack");
    misfit(pack(&WeightSource { columns: 0..7, ..turned }), "pack");
}

#[test]
#[expect(clippy::reversed_empty_ranges, reason = "wrong on purpose")]
fn matmul_checks_every_segment() {
    let device = plain();
    let w = matrix(&device, 4, &[1.0; 12], Precision::F32);
    let x = tensor(&device, 6, &[1.0; 30]);
    let good = Segment {
        matrix: &w,
        bias: None,
        from_rows: 0..5,
        from_column: 2,
        to_row: 1,
        to_column: 3,
    };
    let mut out = device.tensor(6, 6).unwrap();
    let bad = [
        Segment { from_rows: 0..6, to_row: 0, ..good.clone() },
        Segment { from_rows: 3..2, ..good.clone() },
        Segment { from_column: 3, ..good.clone() },
        Segment { from_column: usize::MAX, ..good.clone() },
        Segment { to_row: 2, ..good.clone() },
        Segment { to_row: usize::MAX, ..good.clone() },
        Segment { to_column: 4, ..good.clone() },
        Segment { to_column: usize::MAX, ..good.clone() },
        Segment { bias: Some(&[0.0; 2]), ..good.clone() },
        Segment { to_column: 1, from_rows: 4..5, to_row: 5, ..good.clone() },
    ];
    for bad in bad {
        misfit(device.matmul(&x, &[good.clone(), bad], &mut out), "matmul");
    }
    assert!(out.values().iter().all(|v| *v == 0.0));
    device.matmul(&x, &[good], &mut out).unwrap();
    assert_eq!(out.values().iter().filter(|v| **v == 4.0).count(), 15);
    device.matmul(&x, &[], &mut out).unwrap();
}

#[test]
fn row_operations_check_their_operands() {
    let d = plain();
    let t = |rows: usize, columns| d.tensor(rows, columns).unwrap();
    misfit(d.rms_norm(&t(2, 4), &[1.0; 3], 0.1, &mut t(2, 4)), "rms_norm");
    misfit(d.rms_norm(&t(2, 4), &[1.0; 4], 0.1, &mut t(1, 4)), "rms_norm");
    misfit(d.rms_norm(&t(2, 4), &[1.0; 4], 0.1, &mut t(2, 3)), "rms_norm");
    misfit(d.gate(&t(2, 4), 3, Activation::Silu, &mut t(2, 3)), "gate");
    misfit(d.gate(&t(2, 4), 2, Activation::GeluTanh, &mut t(2, 3)), "gate");
    misfit(d.gate(&t(2, 4), 2, Activation::GeluTanh, &mut t(1, 2)), "gate");
    misfit(d.gate(&t(2, 4), usize::MAX, Activation::Silu, &mut t(2, 3)), "gate");
    misfit(d.add(&mut t(2, 4), &t(2, 3), None), "add");
    misfit(d.add(&mut t(2, 4), &t(1, 4), None), "add");
    misfit(d.add(&mut t(2, 4), &t(2, 4), Some(&[0.0])), "add");
    misfit(d.gather_rows(&t(2, 4), &[2], &mut t(1, 4)), "gather_rows");
    misfit(d.gather_rows(&t(2, 4), &[0], &mut t(2, 4)), "gather_rows");
    misfit(d.gather_rows(&t(2, 4), &[0], &mut t(1, 3)), "gather_rows");
    misfit(d.add_gated(&mut t(4, 3), &t(4, 3), &t(2, 2), 2), "add_gated");
    misfit(d.add_gated(&mut t(4, 3), &t(4, 3), &t(2, 1), 1), "add_gated");
    misfit(d.add_gated(&mut t(4, 3), &t(4, 3), &t(2, 1), usize::MAX), "add_gated");
    misfit(d.add_gated(&mut t(4, 3), &t(3, 3), &t(2, 1), 2), "add_gated");
    misfit(d.add_gated(&mut t(4, 3), &t(4, 2), &t(2, 1), 2), "add_gated");
    d.add_gated(&mut t(0, 3), &t(0, 3), &t(0, 1), 7).unwrap();
    let w = matrix(&d, 4, &[1.0; 12], Precision::Bf16);
    misfit(d.embed(&w, &[Some(3)], 0, &mut t(1, 4)), "embed");
    misfit(d.embed(&w, &[None], 0, &mut t(1, 3)), "embed");
    misfit(d.embed(&w, &[None], 1, &mut t(1, 4)), "embed");
    misfit(d.embed(&w, &[None], usize::MAX, &mut t(1, 4)), "embed");
}

#[test]
fn routing_checks_its_numbers() {
    let d = plain();
    let plain = Routing {
        chosen: 2,
        score: Score::Sigmoid,
        renormalise: true,
        scale: 1.0,
        groups: None,
        correction: None,
    };
    let groups = |count, chosen, by| Some(Groups { count, chosen, by });
    let logits = d.tensor(2, 6).unwrap();
    let bad = [
        Routing { chosen: 7, ..plain },
        Routing { correction: Some(&[0.0; 5]), ..plain },
        Routing { groups: groups(0, 0, GroupScore::Max), ..plain },
        Routing { groups: groups(4, 2, GroupScore::Max), ..plain },
        Routing { groups: groups(3, 4, GroupScore::Max), ..plain },
        Routing { groups: groups(6, 2, GroupScore::TopTwoSum), ..plain },
        Routing { chosen: 3, groups: groups(3, 1, GroupScore::TopTwoSum), ..plain },
    ];
    for bad in bad {
        misfit(d.route(&logits, &bad), "route");
    }
    for by in [GroupScore::Max, GroupScore::TopTwoSum] {
        let routes = d.route(&logits, &Routing { groups: groups(3, 1, by), ..plain }).unwrap();
        assert_eq!(routes.experts, [0, 1, 0, 1]);
    }
    let none = Routing { chosen: 0, groups: groups(3, 0, GroupScore::Max), ..plain };
    assert_eq!(d.route(&d.tensor(3, 0).unwrap(), &none).unwrap().experts, [0; 0]);
}

#[test]
fn rope_checks_table_and_columns() {
    let d = plain();
    let table = RopeTable::new(RopePairs::Halves, &[1.0, 0.5], 1.0, 3).unwrap();
    let mut x = d.tensor(2, 9).unwrap();
    d.rope(&mut x, 1, 2, 4, &[0, 2], &table).unwrap();
    d.rope(&mut x, 0, 2, 5, &[0, 2], &table).unwrap();
    d.rope(&mut x, 5, 1, 0, &[0, 2], &table).unwrap();
    d.rope(&mut x, 90, 0, 4, &[0, 2], &table).unwrap();
    misfit(d.rope(&mut x, 1, 2, 4, &[0, 3], &table), "rope");
    misfit(d.rope(&mut x, 1, 2, 4, &[0], &table), "rope");
    misfit(d.rope(&mut x, 2, 2, 4, &[0, 1], &table), "rope");
    misfit(d.rope(&mut x, 1, 2, 5, &[0, 1], &table), "rope");
    misfit(d.rope(&mut x, 0, 2, 3, &[0, 1], &table), "rope");
    misfit(d.rope(&mut x, 0, 2, usize::MAX, &[0, 1], &table), "rope");
    misfit(d.rope(&mut x, usize::MAX, 1, 4, &[0, 1], &table), "rope");
    misfit(d.rope(&mut x, 0, usize::MAX, 4, &[0, 1], &table), "rope");
    let short = RopeTable { sin: vec![0.0; 2], ..table.clone() };
    misfit(d.rope(&mut x, 0, 1, 4, &[0, 0], &short), "rope");
    misfit(d.rope(&mut x, 0, 1, 4, &[0, 0], &RopeTable { dims: 3, ..table }), "rope");
    let empty = RopeTable { dims: 0, pairs: RopePairs::Halves, cos: vec![], sin: vec![] };
    misfit(d.rope(&mut x, 0, 1, 4, &[0, 0], &empty), "rope");
}

#[test]
fn runs_of_columns_must_fit() {
    let d = plain();
    let at = |first, stride| Columns { first, stride };
    let mut x = tensor(&d, 9, &[1.0; 18]);
    let before = x.clone();
    misfit(d.norm_heads(&mut x, 2, 2, 4, &[1.0; 4], 0.1), "norm_heads");
    misfit(d.norm_heads(&mut x, 0, 2, 3, &[1.0; 4], 0.1), "norm_heads");
    misfit(d.norm_heads(&mut x, 0, 3, usize::MAX, &[1.0; 4], 0.1), "norm_heads");
    misfit(d.norm_heads(&mut x, usize::MAX, 1, 4, &[1.0; 4], 0.1), "norm_heads");
    d.norm_heads(&mut x, 77, 3, 1, &[], 0.1).unwrap();
    assert_eq!(x, before);
    let mut out = tensor(&d, 7, &[5.0; 14]);
    let name = "copy_columns";
    misfit(d.copy_columns(&x, at(0, 5), 5, 2, &mut out, at(0, 5)), name);
    misfit(d.copy_columns(&x, at(6, 0), 4, 1, &mut out, at(0, 4)), name);
    misfit(d.copy_columns(&x, at(0, 2), 3, 2, &mut out, at(0, 2)), name);
    misfit(d.copy_columns(&x, at(0, 3), 3, 2, &mut out, at(2, 3)), name);
    misfit(d.copy_columns(&x, at(0, 3), 3, usize::MAX, &mut out, at(2, 3)), name);
    misfit(d.copy_columns(&x, at(0, 3), usize::MAX, 1, &mut out, at(2, 3)), name);
    let mut short = d.tensor(1, 7).unwrap();
    misfit(d.copy_columns(&x, at(0, 3), 3, 1, &mut short, at(0, 3)), name);
    assert!(out.values().iter().all(|v| *v == 5.0));
    d.copy_columns(&x, at(8, 0), 1, 3, &mut out, at(0, 3)).unwrap();
    d.copy_columns(&x, at(99, 0), 0, 3, &mut out, at(99, 0)).unwrap();
    assert_eq!(out.values()[..7], [1.0, 5.0, 5.0, 1.0, 5.0, 5.0, 1.0]);
}

#[test]
fn combine_checks_slots() {
    let d = plain();
    let t = |rows: usize, columns| d.tensor(rows, columns).unwrap();
    let routes = Routes { chosen: 2, experts: vec![0; 4], weights: vec![0.5; 4] };
    let rows = [0, 1, 2, 3, 4, 5, ELSEWHERE, 7];
    let name = "combine_experts";
    d.combine_experts(&t(8, 3), &routes, &rows, &mut t(4, 3)).unwrap();
    misfit(d.combine_experts(&t(7, 3), &routes, &rows, &mut t(4, 3)), name);
    misfit(d.combine_experts(&t(8, 3), &routes, &rows, &mut t(2, 3)), name);
    misfit(d.combine_experts(&t(8, 3), &routes, &rows, &mut t(4, 2)), name);
    misfit(d.combine_experts(&t(8, 3), &routes, &rows[1..], &mut t(4, 3)), name);
    misfit(d.combine_experts(&t(8, 3), &routes, &[0, 1, 2, 8], &mut t(2, 3)), name);
    let none = Routes { chosen: 0, ..routes.clone() };
    misfit(d.combine_experts(&t(8, 3), &none, &rows, &mut t(4, 3)), name);
    let odd = Routes { chosen: 3, ..routes };
    misfit(d.combine_experts(&t(8, 3), &odd, &rows, &mut t(4, 3)), name);
}

const SHAPE: CacheShape = CacheShape {
    layers: 2,
    blocks: 3,
    block_tokens: 4,
    kv_heads: 2,
    key_dim: 8,
    value: CacheValue::Own(8),
    precision: Precision::F32,
};

fn map_of(kv_of_query: Vec<usize>, window: Option<usize>) -> HeadMap {
    HeadMap { kv_of_query, window, scale: 1.0, softcap: None, sinks: vec![] }
}

fn attend_with(
    device: &CpuDevice,
    map: &HeadMap,
    layer: usize,
    spans: &[AttendSpan<'_>],
    out: (usize, usize),
) -> Result<(), DeviceError> {
    let cache = device.cache(SHAPE).unwrap();
    let mut out = device.tensor(out.0, out.1).unwrap();
    device.attend(&cache, layer, &device.tensor(4, 20).unwrap(), map, spans, &mut out)
}

#[test]
#[expect(clippy::reversed_empty_ranges, reason = "wrong on purpose")]
fn the_cache_checks_spans_blocks_and_layers() {
    let device = plain();
    let span = |rows, start, blocks| AttendSpan { rows, start, blocks };
    let map = map_of(vec![0, 1], None);
    attend_with(&device, &map, 1, &[span(0..4, 4, &[2, 1])], (4, 16)).unwrap();
    let bad_spans: [&[AttendSpan<'_>]; 9] = [
        &[span(0..5, 0, &[0, 1])],
        &[span(3..2, 0, &[0, 1])],
        &[span(0..4, 5, &[0, 1])],
        &[span(0..4, usize::MAX, &[0, 1])],
        &[span(0..4, 0, &[])],
        &[span(0..4, 0, &[3])],
        &[span(0..1, 5, &[3, 0])],
        &[span(0..2, 0, &[0]), span(1..3, 0, &[1])],
        &[span(0..1, usize::MAX - 1, &[0])],
    ];
    for spans in bad_spans {
        misfit(attend_with(&device, &map, 0, spans, (4, 16)), "attend");
    }
    let good = [span(0..4, 0, &[0])];
    misfit(attend_with(&device, &map, 2, &good, (4, 16)), "attend");
    misfit(attend_with(&device, &map, 0, &good, (3, 16)), "attend");
    misfit(attend_with(&device, &map, 0, &good, (4, 8)), "attend");
    let other = HeadMap { kv_of_query: vec![0, 2], ..map.clone() };
    misfit(attend_with(&device, &other, 0, &good, (4, 16)), "attend");
    let other = HeadMap { kv_of_query: vec![0; 3], ..map.clone() };
    misfit(attend_with(&device, &other, 0, &good, (4, 24)), "attend");
    for sinks in [1, 3] {
        let other = HeadMap { sinks: vec![0.0; sinks], ..map.clone() };
        misfit(attend_with(&device, &other, 0, &good, (4, 16)), "attend");
    }
    let other = HeadMap { window: Some(0), ..map };
    misfit(attend_with(&device, &other, 0, &good, (4, 16)), "attend");

    let mut cache = device.cache(SHAPE).unwrap();
    let x = device.tensor(4, 33).unwrap();
    device.store_kv(&mut cache, 1, &x, 1, 17, &good).unwrap();
    misfit(device.store_kv(&mut cache, 2, &x, 1, 17, &good), "store_kv");
    misfit(device.store_kv(&mut cache, 1, &x, 18, 0, &good), "store_kv");
    misfit(device.store_kv(&mut cache, 1, &x, 0, 18, &good), "store_kv");
    misfit(device.store_kv(&mut cache, 1, &x, usize::MAX, 0, &good), "store_kv");
    for spans in [bad_spans[0], bad_spans[1], bad_spans[2], bad_spans[3], bad_spans[5]] {
        misfit(device.store_kv(&mut cache, 0, &x, 0, 16, spans), "store_kv");
    }
}

#[test]
fn widths_of_keys_and_values_differ() {
    let device = plain();
    let spans = [AttendSpan { rows: 0..4, start: 0, blocks: &[0] }];
    let x = device.tensor(4, 33).unwrap();
    let map = map_of(vec![0, 1, 1], None);
    for (value, dim) in [(CacheValue::Own(5), 5), (CacheValue::PrefixOfKey(7), 7)] {
        let mut cache = device.cache(CacheShape { value, ..SHAPE }).unwrap();
        let mut out = device.tensor(4, 3 * dim).unwrap();
        device.store_kv(&mut cache, 0, &x, 17, 0, &spans).unwrap();
        misfit(device.store_kv(&mut cache, 0, &x, 18, 0, &spans), "store_kv");
        let end = device.store_kv(&mut cache, 0, &x, 0, 24, &spans);
        match value {
            CacheValue::Own(_) => misfit(end, "store_kv"),
            CacheValue::PrefixOfKey(_) => end.unwrap(),
        }
        device.attend(&cache, 0, &x, &map, &spans, &mut out).unwrap();
        let mut wide = device.tensor(4, 24).unwrap();
        misfit(device.attend(&cache, 0, &x, &map, &spans, &mut wide), "attend");
        let narrow = device.tensor(4, 23).unwrap();
        misfit(device.attend(&cache, 0, &narrow, &map, &spans, &mut out), "attend");
    }
}

#[test]
fn sizes_that_cannot_be_had() {
    let device = plain();
    let none = |result| assert!(matches!(result, Err(DeviceError::OutOfMemory { .. })));
    none(device.tensor(usize::MAX, 2).map(drop));
    none(device.tensor(1 << 40, 1 << 20).map(drop));
    none(device.cache(CacheShape { blocks: 1 << 60, ..SHAPE }).map(drop));
    let mut tensor = tensor(&device, 2, &[1.0; 4]);
    none(device.reshape(&mut tensor, 1 << 40, 1 << 20));
    assert_eq!((tensor.rows(), tensor.columns(), tensor.values().len()), (2, 2, 4));
    device.reshape(&mut tensor, 3, 1).unwrap();
    assert_eq!((tensor.rows(), tensor.columns(), device.host(&tensor).len()), (3, 1, 3));
    misfit(device.cache(CacheShape { block_tokens: 0, ..SHAPE }).map(drop), "cache");
    misfit(device.cache(CacheShape { key_dim: 0, ..SHAPE }).map(drop), "cache");
    misfit(device.cache(CacheShape { key_dim: usize::MAX, ..SHAPE }).map(drop), "cache");
    for value in [
        CacheValue::Own(0),
        CacheValue::Own(usize::MAX),
        CacheValue::PrefixOfKey(0),
        CacheValue::PrefixOfKey(9),
    ] {
        misfit(device.cache(CacheShape { value, ..SHAPE }).map(drop), "cache");
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 20 } else { 500 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Anything at all is either done or refused.
    #[test]
    fn attention_never_panics(
        rows in 0_usize..6, end in 0_usize..6, start in prop_oneof![0_usize..20, Just(usize::MAX)],
        blocks in prop::collection::vec(0_u32..5, 0..5), window in prop::option::of(0_usize..9),
        heads in prop::collection::vec(0_usize..3, 0..5), key in 0_usize..30, value in 0_usize..30,
    ) {
        let device = CpuDevice::new(1, None).unwrap();
        let mut cache = device.cache(SHAPE).unwrap();
        let x = device.tensor(4, 33).unwrap();
        let spans = [AttendSpan { rows: rows..end, start, blocks: &blocks }];
        let stored = device.store_kv(&mut cache, 0, &x, key, value, &spans);
        let mut out = device.tensor(4, heads.len() * 8).unwrap();
        let map = map_of(heads.clone(), window);
        let attended = device.attend(&cache, 0, &x, &map, &spans, &mut out);
        let fits = rows <= end && end <= 4 && start < 20
            && start + (end - rows) <= blocks.len() * 4;
        prop_assert!(fits || stored.is_err() && attended.is_err());
        if attended.is_ok() {
            // All keys and values are zero, so is their mean.
            prop_assert!(out.values().iter().all(|v| *v == 0.0));
        }
    }
}
