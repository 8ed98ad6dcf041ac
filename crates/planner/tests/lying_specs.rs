//! A spec that a peer made up: whatever passes its check can be planned for without a panic.

#![allow(clippy::unwrap_used)]

use model::{ComputeType, ModelSpec};
use planner::{DeviceSpec, ExpertCut, Limits, NodeId, NodeSpec, plan, stripes};
use proptest::prelude::*;
use serde_json::{Value, json};

const CONFIGS: [&str; 5] = [
    include_str!("../../model/tests/fixtures/llama3.json"),
    include_str!("../../model/tests/fixtures/gemma3.json"),
    include_str!("../../model/tests/fixtures/gpt-oss-mxfp4.json"),
    include_str!("../../model/tests/fixtures/deepseek-v3-fp8.json"),
    include_str!("../../model/tests/fixtures/phi3.json"),
];

/// Everything in a JSON value that is no object or list.
fn leaves(value: &mut Value) -> Vec<&mut Value> {
    match value {
        Value::Object(map) => map.iter_mut().flat_map(|(_, inner)| leaves(inner)).collect(),
        Value::Array(list) => list.iter_mut().flat_map(leaves).collect(),
        leaf => vec![leaf],
    }
}

proptest! {
    #[test]
    fn a_spec_that_passes_can_be_planned_for(
        which in 0usize..5,
        lies in proptest::collection::vec((any::<prop::sample::Index>(), 0u32..40), 1..4),
        ranks in 1usize..9,
        memory in 0u32..64,
        experts in prop::sample::select(&ExpertCut::ALL[..]),
    ) {
        let honest = ModelSpec::from_config(CONFIGS[which]).unwrap();
        let mut value: Value = serde_json::from_str(&honest.to_json()).unwrap();
        for (leaf, bits) in lies {
            let count = leaves(&mut value).len();
            // Numbers of any size; odd ones half the time.
            *leaves(&mut value)[leaf.index(count)] = json!((1u64 << bits) - u64::from(bits % 2));
        }
        let Ok(spec) = ModelSpec::from_json(&value.to_string()) else { return Ok(()) };
        // Sizes that only take long are not what is tested here.
        if spec.tensors().len() > 1 << 14 {
            return Ok(());
        }
        let count = stripes::default_count(&spec);
        prop_assert!(stripes::validate(&spec, count).is_ok());
        let device = DeviceSpec { memory_bytes: 1 << memory, weight: 1.0 };
        let nodes: Vec<NodeSpec> =
            (0..9).map(|id| NodeSpec { id: NodeId(id), devices: vec![device.clone()] }).collect();
        let limits = Limits {
            stripes: None,
            ranks: Some(ranks),
            experts,
            compute: ComputeType::Int8,
            kv_blocks: u32::MAX as usize,
            block_tokens: u32::MAX as usize,
        };
        match plan(&spec, &nodes, &limits) {
            Ok(plan) => plan.check(&spec).unwrap(),
            Err(error) => drop(error.to_string()),
        }
    }
}
