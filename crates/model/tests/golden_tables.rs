//! The tensor tables of the golden checkpoints against the names, shapes and types that those
//! checkpoints hold, written down from their headers.

#![allow(clippy::unwrap_used, reason = "a test may stop at once")]

use std::collections::{BTreeMap, BTreeSet};

use model::{Encoding, ModelSpec, Part, TensorSpec};

/// Every stored tensor as `name shape`, once, scales included.
fn stored(spec: &ModelSpec) -> BTreeMap<String, Vec<usize>> {
    let mut all = BTreeMap::new();
    for tensor in spec.tensors() {
        let shape = tensor.stored.shape.clone();
        match &tensor.stored.encoding {
            Encoding::Plain | Encoding::AsTyped | Encoding::Int4(_) => {}
            Encoding::Fp8Blocks { scales } => {
                let blocks = shape.iter().map(|n| n.div_ceil(128)).collect();
                all.insert(scales.clone(), blocks);
            }
            Encoding::Mxfp4 { scales } => {
                all.insert(scales.clone(), shape[..shape.len() - 1].to_vec());
            }
        }
        // Parts of one fused tensor must agree on it.
        assert_eq!(all.entry(tensor.name).or_insert(shape.clone()), &shape);
    }
    all
}

/// Each stored row (or column) of a fused tensor belongs to exactly one logical tensor.
fn assert_partition(spec: &ModelSpec) {
    let mut rows: BTreeMap<(String, Option<usize>), Vec<usize>> = BTreeMap::new();
    let mut all: BTreeMap<(String, Option<usize>), usize> = BTreeMap::new();
    for TensorSpec { name, stored, shape, .. } in spec.tensors() {
        let key = (name, stored.slab);
        let taken = (0..shape[0]).map(|row| stored.first_row + row * stored.row_step);
        rows.entry(key.clone()).or_default().extend(taken);
        let at = usize::from(stored.slab.is_some()) + usize::from(stored.transposed);
        all.insert(key, stored.shape[at]);
    }
    for (key, mut rows) in rows {
        rows.sort_unstable();
        assert_eq!(rows, (0..all[&key]).collect::<Vec<_>>(), "{key:?}");
    }
}

macro_rules! golden {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("fixtures/", $name, ".json")),
            include_str!(concat!("fixtures/", $name, ".tensors")))),*]
    };
}

#[test]
fn tables_are_what_checkpoints_hold() {
    for (name, config, headers) in golden![
        "deepseek-v2",
        "deepseek-v2-lite",
        "deepseek-v3",
        "deepseek-v3-fp8",
        "gemma2",
        "gemma3",
        "gpt-oss",
        "gpt-oss-mxfp4",
        "granite",
        "phi3",
        "qwen2",
        "qwen2-moe",
        "qwen3",
        "qwen3-moe",
    ] {
        let spec = ModelSpec::from_config(config).unwrap_or_else(|error| panic!("{name}: {error}"));
        let table: BTreeSet<String> =
            stored(&spec).iter().map(|(name, shape)| format!("{name} {shape:?}")).collect();
        let ignored = |line: &str| spec.ignored_prefixes.iter().any(|p| line.starts_with(p));
        let held: BTreeSet<String> =
            headers.lines().filter(|line| !ignored(line)).map(str::to_owned).collect();
        let missing: Vec<&String> = table.difference(&held).collect();
        let unknown: Vec<&String> = held.difference(&table).collect();
        assert!(missing.is_empty() && unknown.is_empty(), "{name}: {missing:?} {unknown:?}");
        assert_partition(&spec);
        for tensor in spec.tensors() {
            assert_eq!(spec.tensor(tensor.layer, tensor.part), Some(tensor), "{name}");
        }
        assert_eq!(spec.tensor(Some(0), Part::ExpertUpBias(1 << 20)), None);
    }
}
