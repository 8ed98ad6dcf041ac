//! config.json and generation_config.json, and what is computed from a config before any weight is
//! read: the tensor table and a plan.
#![no_main]

use libfuzzer_sys::fuzz_target;
use model::{ComputeType, ModelSpec};
use planner::{DeviceSpec, ExpertCut, Limits, NodeId, NodeSpec, stripes};

/// The table of a model with more layers than this takes long and shows nothing new.
const LAYERS: usize = 64;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(mut spec) = ModelSpec::from_config(text) else { return };
    let _ = spec.with_generation_config(text);
    let max = stripes::max_count(&spec);
    assert!(max >= 1);
    if spec.layers.len() > LAYERS {
        return;
    }
    let tensor = |part| spec.tensor(Some(0), part);
    let _ = (tensor(model::Part::Query), tensor(model::Part::Router));
    let device = DeviceSpec { memory_bytes: u64::MAX, weight: 1.0 };
    let nodes: Vec<NodeSpec> = (1..=2)
        .map(|id| NodeSpec { id: NodeId(id), devices: vec![device.clone()] })
        .collect();
    // Every expert has tensors of its own.
    let experts = spec.layers.iter().map(|layer| match &layer.feed_forward {
        model::FeedForward::Experts(experts) => experts.count,
        model::FeedForward::Dense(_) => 1,
    });
    if experts.max().is_none_or(|most| most > 256) {
        return;
    }
    for cut in ExpertCut::ALL {
        let limits = Limits {
            stripes: None,
            ranks: Some(max.min(2)),
            experts: cut,
            compute: ComputeType::Int8,
            kv_blocks: 1 << 20,
            block_tokens: 16,
        };
        if let Ok(plan) = planner::plan(&spec, &nodes, &limits) {
            assert_eq!(plan.check(&spec), Ok(()));
            let _ = plan.table(&spec, cut);
        }
    }
});
