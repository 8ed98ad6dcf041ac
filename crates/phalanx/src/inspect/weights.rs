//! What a checkpoint's weights take: as the config says they are stored, and as the files are.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Context;
use model::gguf::Gguf;
use model::{Encoding, Int4Packing, Int4Tensors, ModelSpec};
use serde_json::Value;

/// Side of a block that shares a scale in FP8 checkpoints.
const FP8_SIDE: u64 = 128;

/// The weight files of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Files {
    pub(crate) count: usize,
    pub(crate) bytes: u64,
}

/// Sums up the weight files; `None` where there are none.
pub(crate) fn files(directory: &Path) -> anyhow::Result<Option<Files>> {
    let mut found = Files { count: 0, bytes: 0 };
    for entry in std::fs::read_dir(directory).context("cannot list the model directory")? {
        let entry = entry.context("cannot list the model directory")?;
        let name = entry.file_name();
        if !name.to_string_lossy().ends_with(".safetensors") {
            continue;
        }
        // Through links, as loading goes.
        let metadata = entry
            .path()
            .metadata()
            .with_context(|| format!("cannot read {}", name.to_string_lossy()))?;
        found.count += 1;
        found.bytes = found.bytes.saturating_add(metadata.len());
    }
    Ok((found.count > 0).then_some(found))
}

/// The type of unquantised weights, as the config names it.
pub(crate) fn plain(config: &Value) -> &'static str {
    let named = config["dtype"].as_str().or(config["torch_dtype"].as_str());
    match named {
        Some("float32") => "f32",
        Some("float16") => "f16",
        _ => "bf16",
    }
}

/// Bytes by type as the spec and `plain` say they are stored. A tensor that others share counts
/// once; layers outside the plain path do not count.
pub(crate) fn stored(spec: &ModelSpec, plain: &'static str) -> BTreeMap<String, u64> {
    let width = if plain == "f32" { 4 } else { 2 };
    let mut by_type: BTreeMap<String, u64> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for tensor in spec.tensors() {
        if !seen.insert(tensor.name) {
            continue;
        }
        let shape: Vec<u64> = tensor.stored.shape.iter().map(|n| *n as u64).collect();
        let elements = shape.iter().fold(1, |product: u64, n| product.saturating_mul(*n));
        let mut add = |name, bytes| add(&mut by_type, name, bytes);
        match &tensor.stored.encoding {
            Encoding::Fp8Blocks { .. } => {
                add("fp8", elements);
                let blocks = shape.iter().map(|n| n.div_ceil(FP8_SIDE));
                add("scales", blocks.fold(4, u64::saturating_mul));
            }
            Encoding::Mxfp4 { .. } => {
                add("mxfp4", elements);
                // A byte for every sixteen of packed numbers.
                add("scales", elements / 16);
            }
            Encoding::Int4(tensors) => {
                add("int4", elements.div_ceil(2));
                add("scales", beside_int4(&shape, tensors));
            }
            Encoding::Plain | Encoding::AsTyped => add(plain, elements.saturating_mul(width)),
        }
    }
    by_type
}

/// Bytes of scales, zeros and the list of groups beside 4-bit integers `[outputs, inputs]`.
fn beside_int4(shape: &[u64], tensors: &Int4Tensors) -> u64 {
    let [outputs, inputs] = *shape else { return 0 };
    let format = tensors.format;
    let group = format.group.map_or(inputs, |group| group as u64);
    let pairs = inputs.div_ceil(group.max(1)).saturating_mul(outputs);
    let listed = matches!(format.packing, Int4Packing::Gptq { .. });
    let list = if listed { inputs.saturating_mul(4) } else { 0 };
    // An f16 scale and four bits of a zero each.
    pairs.saturating_mul(2).saturating_add(pairs.div_ceil(2)).saturating_add(list)
}

/// Bytes by type as a GGUF file lists its tensors.
pub(crate) fn stored_as_typed(gguf: &Gguf<'_>) -> BTreeMap<String, u64> {
    let mut by_type = BTreeMap::new();
    for (_, info) in gguf.tensors() {
        add(&mut by_type, &info.kind.to_string().to_lowercase(), info.range.len() as u64);
    }
    by_type
}

fn add(by_type: &mut BTreeMap<String, u64>, name: &str, bytes: u64) {
    let sum = by_type.entry(name.to_owned()).or_default();
    *sum = sum.saturating_add(bytes);
}
