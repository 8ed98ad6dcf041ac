//! Weights that outlive their rank: when a group is repaired, what a device holds already is not
//! read again.
//!
//! Packed pieces are known by what they are: a rectangle of a tensor. Pieces are cut along
//! stripes, so a rank that takes over stripes finds all pieces of those that it had.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use compute::Device;
use model::{ComputeType, ModelSpec, Part};

use crate::weights::Packed;

/// A rectangle of a tensor: rows and columns, begin and end.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    layer: Option<usize>,
    part: Part,
    rows: (usize, usize),
    columns: (usize, usize),
    turned: bool,
}

impl Key {
    pub(crate) fn new(
        layer: Option<usize>,
        part: Part,
        (rows, columns): (&Range<usize>, &Range<usize>),
        turned: bool,
    ) -> Self {
        let (rows, columns) = ((rows.start, rows.end), (columns.start, columns.end));
        Self { layer, part, rows, columns, turned }
    }
}

/// What a rank has packed, for whichever rank its device is next. Of one checkpoint: the caller
/// offers it to a load of the same one only.
pub struct Kept<D: Device> {
    spec: Arc<ModelSpec>,
    compute: ComputeType,
    pub(crate) matrices: BTreeMap<Key, Packed<D>>,
    pub(crate) vectors: BTreeMap<Key, Vec<f32>>,
}

impl<D: Device> Kept<D> {
    pub(crate) fn new(spec: &Arc<ModelSpec>, compute: ComputeType) -> Self {
        let spec = Arc::clone(spec);
        Self { spec, compute, matrices: BTreeMap::new(), vectors: BTreeMap::new() }
    }

    /// Whether these are weights of that model, in that form.
    pub(crate) fn fits(&self, spec: &ModelSpec, compute: ComputeType) -> bool {
        self.compute == compute && *self.spec == *spec
    }

    /// Frees what is left of a layer, or of what stands in none.
    pub(crate) fn free(&mut self, layer: Option<usize>) {
        self.matrices.retain(|key, _| key.layer != layer);
        self.vectors.retain(|key, _| key.layer != layer);
    }

    /// Adds what another one holds.
    pub(crate) fn absorb(&mut self, mut other: Self) {
        self.matrices.append(&mut other.matrices);
        self.vectors.append(&mut other.vectors);
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.matrices.is_empty() && self.vectors.is_empty()
    }
}

impl<D: Device> std::fmt::Debug for Kept<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} matrices and {} vectors", self.matrices.len(), self.vectors.len())
    }
}
