//! The owner without a network: slow readers and failing ranks.

#![allow(clippy::unwrap_used)]

use model::{ComputeType, ModelSpec};
use planner::DeviceSpec;

use super::*;

fn owner(ranks: usize) -> Owner {
    let spec = ModelSpec::from_config(
        r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4,
            "max_position_embeddings": 128, "vocab_size": 256, "rms_norm_eps": 1e-5,
            "bos_token_id": null, "eos_token_id": 0}"#,
    )
    .expect("a Llama config");
    let deployment = Deployment {
        model: "tiny".to_owned(),
        digest: "abc123".to_owned(),
        spec: Arc::new(spec),
        experts: planner::ExpertCut::Stripe,
        compute: ComputeType::F32,
        stripes: Some(8),
        ranks,
        kv_blocks: 16,
        block_tokens: 16,
        max_sequences: 4,
        step_tokens: 64,
        context: 128,
    };
    Owner::new(deployment).unwrap().0
}

fn join(owner: &mut Owner, number: u64) -> Joined {
    let info = NodeInfo {
        name: format!("w{number}"),
        worker_address: format!("host-{number}:9000"),
        collective_addresses: vec![format!("host-{number}:9100")],
        devices: vec![DeviceSpec { memory_bytes: 64 << 20, weight: 1.0 }],
        model_digest: "abc123".to_owned(),
        kernel_class: "avx2".to_owned(),
        version: "0.0.0".to_owned(),
    };
    let (reply, mut joined) = oneshot::channel();
    owner.handle(Event::Join { info, reply });
    owner.settle();
    joined.try_recv().unwrap().unwrap()
}

/// The living group, where there is one.
fn living(owner: &Owner) -> Option<(GroupId, Epoch)> {
    let mut live = owner.state.groups().iter().filter(|(_, group)| group.live());
    live.next().map(|(&id, group)| (id, group.epoch))
}

/// Rank 0, which the first node holds, fails.
fn fail(owner: &mut Owner) {
    let (group, epoch) = living(owner).unwrap();
    let node = owner.state.groups()[&group].plan.ranks[0].node;
    let report = Report::Failed { group, epoch, rank: 0, reason: "broken".to_owned() };
    owner.handle(Event::Report { node, report });
    owner.settle();
}

#[test]
fn a_worker_that_does_not_read_is_dropped_and_not_waited_for() {
    let mut owner = owner(2);
    let mut reader = join(&mut owner, 1);
    let sleeper = join(&mut owner, 2);
    for _ in 0..ORDERS {
        fail(&mut owner);
        owner.not_before = None;
        owner.settle();
        while reader.orders.try_recv().is_ok() {}
        if sleeper.ended.is_cancelled() {
            break;
        }
    }
    assert!(sleeper.ended.is_cancelled());
    assert!(!reader.ended.is_cancelled());
    let alive: Vec<bool> = owner.state.nodes().values().map(|node| node.alive).collect();
    assert_eq!(alive, [true, false]);
    assert_eq!(living(&owner), None);
    owner.state.check_integrity().unwrap();
}

#[test]
fn failures_pause_placement_longer_each_time_until_a_group_serves_for_long() {
    let mut owner = owner(1);
    let _first = join(&mut owner, 1);
    let mut pauses = Vec::new();
    for _ in 0..9 {
        pauses.push(owner.pause.as_millis());
        fail(&mut owner);
        assert_eq!(living(&owner), None, "a group was placed within the pause");
        owner.not_before = None;
        owner.settle();
    }
    assert_eq!(pauses, [250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
    let (group, epoch) = living(&owner).unwrap();
    let node = NodeId(1);
    owner.handle(Event::Report { node, report: Report::Ready { group, epoch, rank: 0 } });
    owner.settle();
    // It fails as soon as it serves: nothing has changed.
    fail(&mut owner);
    assert_eq!(owner.pause, LONGEST_PAUSE);
    owner.not_before = None;
    owner.settle();
    let (group, epoch) = living(&owner).unwrap();
    owner.handle(Event::Report { node, report: Report::Ready { group, epoch, rank: 0 } });
    owner.settle();
    owner.serving_since = Instant::now().checked_sub(LONGEST_PAUSE * 2);
    fail(&mut owner);
    assert_eq!(owner.pause, FIRST_PAUSE * 2);
}

#[test]
fn the_loss_of_the_failed_node_ends_the_pause() {
    let mut owner = owner(1);
    let first = join(&mut owner, 1);
    let _spare = join(&mut owner, 2);
    fail(&mut owner);
    assert_eq!(living(&owner), None);
    let why = Status::ok("the worker left");
    owner.handle(Event::Ended { node: first.node, why });
    owner.settle();
    assert_eq!(living(&owner), Some((GroupId(2), Epoch(2))));
}
