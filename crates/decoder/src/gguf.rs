//! Finds the tensors of a model in a GGUF file.

use std::collections::{BTreeMap, BTreeSet};

use compute::{BlockFormat, StoredType};
use model::gguf::{Gguf, TensorInfo, TensorType};
use model::{ModelSpec, Part, TensorSpec};

use crate::CheckpointError;
use crate::stored::{Elements, Located, Place};

/// Read into the spec.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Finds every tensor of the spec's table in the file's bytes; nothing may be left over.
pub(crate) fn locate(
    name: &str,
    bytes: &[u8],
    spec: &ModelSpec,
) -> Result<BTreeMap<(Option<usize>, Part), Located>, CheckpointError> {
    let gguf = Gguf::parse(name, bytes)?;
    let mut used = BTreeSet::from([ROPE_FACTORS.to_owned()]);
    let mut tensors = BTreeMap::new();
    for wanted in spec.tensors() {
        let info = gguf.tensor(&wanted.name);
        let info = info.ok_or_else(|| {
            let (file, tensor) = (gguf.file().to_owned(), wanted.name.clone());
            CheckpointError::Missing { file, tensor }
        })?;
        used.insert(wanted.name.clone());
        tensors.insert((wanted.layer, wanted.part), find(&gguf, info, wanted)?);
    }
    match gguf.tensors().find(|(name, _)| !used.contains(*name)) {
        None => Ok(tensors),
        Some((tensor, _)) => {
            let (file, tensor) = (gguf.file().to_owned(), tensor.to_owned());
            Err(CheckpointError::Unexpected { file, tensor })
        }
    }
}

fn find(
    gguf: &Gguf<'_>,
    info: &TensorInfo,
    wanted: TensorSpec,
) -> Result<Located, CheckpointError> {
    let TensorSpec { name, stored, .. } = wanted;
    if info.shape != stored.shape {
        let (file, got, needed) = (gguf.file().to_owned(), info.shape.clone(), stored.shape);
        return Err(CheckpointError::Shape { file, tensor: name, got, needed });
    }
    let mut bytes = info.range.clone();
    if let Some(slab) = stored.slab {
        let size = bytes.len() / info.shape.first().copied().unwrap_or(1).max(1);
        bytes = bytes.start + slab * size..bytes.start + (slab + 1) * size;
    }
    Ok(Located {
        name,
        place: Place { file: 0, bytes },
        elements: elements(info.kind),
        stored_columns: info.shape.last().copied().unwrap_or(0),
        first_row: stored.first_row,
        row_step: stored.row_step,
        transposed: false,
        paired: stored.paired,
    })
}

/// How the numbers of a type are read.
fn elements(kind: TensorType) -> Elements {
    match kind {
        TensorType::F32 => Elements::Plain(StoredType::F32),
        TensorType::F16 => Elements::Plain(StoredType::F16),
        TensorType::BF16 => Elements::Plain(StoredType::Bf16),
        TensorType::Q4_0 => Elements::Blocks(BlockFormat::Q4_0),
        TensorType::Q4_1 => Elements::Blocks(BlockFormat::Q4_1),
        TensorType::Q5_0 => Elements::Blocks(BlockFormat::Q5_0),
        TensorType::Q5_1 => Elements::Blocks(BlockFormat::Q5_1),
        TensorType::Q8_0 => Elements::Blocks(BlockFormat::Q8_0),
        TensorType::Q2_K => Elements::Blocks(BlockFormat::Q2_K),
        TensorType::Q3_K => Elements::Blocks(BlockFormat::Q3_K),
        TensorType::Q4_K => Elements::Blocks(BlockFormat::Q4_K),
        TensorType::Q5_K => Elements::Blocks(BlockFormat::Q5_K),
        TensorType::Q6_K => Elements::Blocks(BlockFormat::Q6_K),
        TensorType::MXFP4 => Elements::Blocks(BlockFormat::Mxfp4),
    }
}
