//! How the layers of a spec are written down: the different ones once, then which comes where. A
//! model of a hundred layers has one or two kinds of them.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::LayerSpec;
use crate::families::limits;

#[derive(Serialize)]
struct Written<'a> {
    kinds: Vec<&'a LayerSpec>,
    order: Vec<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Read {
    kinds: Vec<LayerSpec>,
    order: Vec<usize>,
}

pub(crate) fn serialize<S: Serializer>(
    layers: &[LayerSpec],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let mut kinds: Vec<&LayerSpec> = Vec::new();
    let order = layers.iter().map(|layer| {
        kinds.iter().position(|kind| *kind == layer).unwrap_or_else(|| {
            kinds.push(layer);
            kinds.len() - 1
        })
    });
    let order = order.collect();
    Written { kinds, order }.serialize(serializer)
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<LayerSpec>, D::Error> {
    let Read { kinds, order } = Read::deserialize(deserializer)?;
    if order.len() > limits::LAYERS {
        return Err(D::Error::custom("more layers than any model has"));
    }
    let layer = |at: usize| kinds.get(at).cloned();
    let layers: Option<Vec<LayerSpec>> = order.into_iter().map(layer).collect();
    layers.ok_or_else(|| D::Error::custom("a layer of a kind that is not listed"))
}
