//! Every type comes back from the wire as it went; what cannot be is refused by name.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::sync::Arc;

use cluster::{Deployment, Epoch, GroupId, NodeInfo};
use engine::{
    BlockId, Event, FinishReason, Request, Resume, Sampled, Sampling, SeqId, Step, StepEntry,
    StopRules, TokenLogprobs, Want,
};
use model::{ComputeType, ModelSpec};
use planner::{DeviceSpec, Limits, NodeId, NodeSpec, plan};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use wire::{
    FormGroup, Generate, Held, Order, RankAddress, Report, StepOrder, StepReport, WireError,
    event_from_wire, event_to_wire, pb,
};

fn spec() -> Arc<ModelSpec> {
    Arc::new(
        ModelSpec::from_config(
            r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 4,
            "max_position_embeddings": 128, "vocab_size": 256, "rms_norm_eps": 1e-5,
            "bos_token_id": null, "eos_token_id": 0}"#,
        )
        .expect("a Llama config"),
    )
}

/// Any finite number.
fn float() -> impl Strategy<Value = f32> {
    prop::num::f32::NORMAL | prop::num::f32::SUBNORMAL | prop::num::f32::ZERO
}

fn sampling() -> impl Strategy<Value = Sampling> {
    let bias = vec((any::<u32>(), float()), 0..4);
    (vec(float(), 6), any::<u32>(), bias, any::<u64>(), any::<u32>()).prop_map(
        |(f, top_k, logit_bias, seed, choice)| Sampling {
            temperature: f[0],
            top_k,
            top_p: f[1],
            min_p: f[2],
            repetition_penalty: f[3],
            frequency_penalty: f[4],
            presence_penalty: f[5],
            logit_bias,
            seed,
            choice,
        },
    )
}

fn generate() -> impl Strategy<Value = Generate> {
    let stop = (any::<usize>(), any::<usize>(), vec(any::<u32>(), 0..4));
    let stop = stop.prop_map(|(max_tokens, min_tokens, stop_ids)| StopRules {
        max_tokens,
        min_tokens,
        stop_ids,
    });
    let prompt = vec(any::<u32>(), 0..20);
    let top = || option::of(0u8..=20);
    let request = (prompt, sampling(), stop, top(), top()).prop_map(
        |(prompt, sampling, stop, logprobs, prompt_logprobs)| Request {
            prompt,
            sampling,
            stop,
            logprobs,
            prompt_logprobs,
        },
    );
    let so_far = (vec(any::<u32>(), 0..20), any::<usize>());
    (any::<u64>(), any::<u64>(), ".{0,20}", request, so_far).prop_map(
        |(group, epoch, request_id, request, (generated, scored))| Generate {
            group: GroupId(group),
            epoch: Epoch(epoch),
            request_id,
            request,
            so_far: Resume { generated, scored },
        },
    )
}

fn logprobs() -> impl Strategy<Value = TokenLogprobs> {
    (any::<u32>(), float(), vec((any::<u32>(), float()), 0..=20))
        .prop_map(|(token, logprob, top)| TokenLogprobs { token, logprob, top })
}

fn event() -> impl Strategy<Value = Event> {
    let seq = SeqId(7);
    let token = (any::<usize>(), any::<u32>(), option::of(logprobs()));
    let reason = prop_oneof![
        any::<u32>().prop_map(|id| FinishReason::Stop { id }),
        Just(FinishReason::Length)
    ];
    prop_oneof![
        token.prop_map(move |(index, token, logprobs)| Event::Token {
            seq,
            index,
            sampled: Sampled { token, logprobs },
        }),
        vec(logprobs(), 0..5).prop_map(move |tokens| Event::PromptLogprobs { seq, tokens }),
        (reason, any::<usize>()).prop_map(move |(reason, generated)| Event::Finished {
            seq,
            reason,
            generated
        }),
    ]
}

fn step() -> impl Strategy<Value = StepOrder> {
    let want = prop_oneof![Just(Want::Nothing), Just(Want::Last), Just(Want::All)];
    let blocks = vec(any::<u32>().prop_map(BlockId), 0..5);
    let entry = (any::<u64>(), 0..usize::MAX / 2, vec(any::<u32>(), 1..5), blocks, want).prop_map(
        |(seq, start, tokens, blocks, want)| StepEntry {
            seq: SeqId(seq),
            start,
            tokens,
            blocks,
            want,
        },
    );
    (any::<u64>(), any::<u64>(), any::<u32>(), any::<u64>(), vec(entry, 0..5)).prop_map(
        |(group, epoch, rank, number, entries)| StepOrder {
            group: GroupId(group),
            epoch: Epoch(epoch),
            rank: rank as usize,
            step: Step { number, entries },
        },
    )
}

fn step_report() -> impl Strategy<Value = StepReport> {
    let error = (option::of(".{1,20}"), option::of(0..64_usize));
    (any::<u64>(), any::<u64>(), any::<u32>(), any::<u64>(), error).prop_map(
        |(group, epoch, rank, number, (error, blames))| StepReport {
            group: GroupId(group),
            epoch: Epoch(epoch),
            rank: rank as usize,
            number,
            error,
            blames,
        },
    )
}

fn node_info() -> impl Strategy<Value = NodeInfo> {
    let devices = vec((any::<u64>(), 1e-3f64..1e6), 1..4);
    let digests = proptest::collection::btree_set("[0-9a-f]{64}", 1..4);
    ("[a-z]{1,9}", "[a-z]{1,9}", 1u16.., devices, digests, any::<u64>()).prop_map(
        |(name, host, port, devices, model_digests, boot)| NodeInfo {
            boot,
            name,
            worker_address: format!("{host}:{port}"),
            collective_addresses: devices.iter().map(|_| format!("[::1]:{port}")).collect(),
            devices: devices
                .into_iter()
                .map(|(memory_bytes, weight)| DeviceSpec { memory_bytes, weight })
                .collect(),
            model_digests,
            kernel_class: "avx512_bf16".to_owned(),
            version: "1.2.3".to_owned(),
        },
    )
}

fn report() -> impl Strategy<Value = Report> {
    let member = || {
        (any::<u64>(), any::<u64>(), any::<u32>())
            .prop_map(|(group, epoch, rank)| (GroupId(group), Epoch(epoch), rank as usize))
    };
    let bytes = (any::<u64>(), any::<u64>()).prop_map(|(a, b)| (a.min(b), a.max(b)));
    prop_oneof![
        (node_info(), proptest::collection::vec((member(), any::<bool>()), 0..4)).prop_map(
            |(info, held)| {
                let held = held.into_iter().map(|((group, epoch, rank), ready)| Held {
                    group,
                    epoch,
                    rank,
                    ready,
                });
                Report::Join(info, held.collect())
            }
        ),
        vec((any::<u64>(), any::<u64>()), 0..4).prop_map(|groups| {
            let groups = groups.into_iter().map(|(group, epoch)| (GroupId(group), Epoch(epoch)));
            Report::Heartbeat(groups.collect())
        }),
        (member(), bytes).prop_map(|((group, epoch, rank), (bytes_read, bytes_total))| {
            Report::Progress { group, epoch, rank, bytes_read, bytes_total }
        }),
        member().prop_map(|(group, epoch, rank)| Report::Ready { group, epoch, rank }),
        (member(), option::of(".{1,20}"))
            .prop_map(|((group, epoch, _), error)| { Report::Prepared { group, epoch, error } }),
        (member(), ".{0,20}", option::of(0usize..9)).prop_map(
            |((group, epoch, rank), reason, blames)| {
                Report::Failed { group, epoch, rank, reason, blames }
            }
        ),
    ]
}

fn form(ranks: usize, compute: ComputeType, stripes: Option<usize>) -> FormGroup {
    let deployment = Deployment {
        name: "tiny".to_owned(),
        digest: "abc123".to_owned(),
        experts: planner::ExpertCut::ALL[ranks % 2],
        compute,
        stripes,
        ranks,
        replicas: 2,
        nodes: BTreeSet::from([NodeId(1), NodeId(7)]),
        kv_blocks: 10,
        block_tokens: 16,
        max_sequences: 4,
        step_tokens: 64,
        context: 128,
    };
    let device = DeviceSpec { memory_bytes: 1 << 30, weight: 1.0 };
    let nodes: Vec<NodeSpec> = (1..=ranks as u64)
        .map(|id| NodeSpec { id: NodeId(id), devices: vec![device.clone()] })
        .collect();
    let limits = Limits {
        stripes,
        ranks: Some(ranks),
        experts: deployment.experts,
        compute,
        kv_blocks: 10,
        block_tokens: 16,
    };
    let plan = plan(&spec(), &nodes, &limits).unwrap();
    let addresses = plan.ranks.iter().map(|rank| RankAddress {
        node: rank.node,
        worker_address: format!("host-{}:1", rank.node.0),
        collective_address: format!("host-{}:2", rank.node.0),
    });
    let addresses = addresses.collect();
    FormGroup { group: GroupId(3), epoch: Epoch(9), deployment, plan, addresses }
}

/// The only model of a worker.
fn known(digest: &str) -> Option<Arc<ModelSpec>> {
    (digest == "abc123").then(spec)
}

fn order() -> impl Strategy<Value = Order> {
    let compute = prop::sample::select(&ComputeType::ALL[..]);
    let stripes = prop_oneof![Just(None), Just(Some(8))];
    prop_oneof![
        (any::<u64>(), 1..u32::MAX, any::<u32>(), any::<u64>()).prop_map(
            |(node, heartbeat_ms, lease_ms, generation)| Order::Welcome {
                node: NodeId(node),
                heartbeat_ms: heartbeat_ms.into(),
                lease_ms: lease_ms.into(),
                generation,
            }
        ),
        Just(Order::Lease),
        any::<u64>().prop_map(|generation| Order::Certificate { generation }),
        prop::collection::btree_set(1..90u64, 0..9).prop_map(|present| Order::Roll {
            given: 90,
            present: present.into_iter().map(NodeId).collect(),
        }),
        (1usize..=8, compute, stripes).prop_map(|(ranks, compute, stripes)| Order::Form(Box::new(
            form(ranks, compute, stripes)
        ))),
        (1usize..=8).prop_map(|ranks| Order::Prepare(Box::new(form(
            ranks,
            ComputeType::F32,
            None
        )))),
        (any::<u64>(), any::<u64>(), ".{0,20}").prop_map(|(group, epoch, reason)| {
            Order::Retire { group: GroupId(group), epoch: Epoch(epoch), reason }
        }),
    ]
}

proptest! {
    #[test]
    fn generate_requests(sent in generate()) {
        prop_assert_eq!(Generate::from_wire(sent.to_wire()).unwrap(), sent);
    }

    #[test]
    fn events(sent in event(), group: u64, epoch: u64) {
        let wire = event_to_wire(GroupId(group), Epoch(epoch), &sent);
        let came = event_from_wire(SeqId(7), wire).unwrap();
        prop_assert_eq!(came, (GroupId(group), Epoch(epoch), sent));
    }

    #[test]
    fn steps(sent in step()) {
        prop_assert_eq!(StepOrder::from_wire(sent.to_wire()).unwrap(), sent);
    }

    #[test]
    fn step_reports(sent in step_report()) {
        prop_assert_eq!(StepReport::from_wire(sent.to_wire()).unwrap(), sent);
    }

    #[test]
    fn reports(sent in report()) {
        prop_assert_eq!(Report::from_wire(sent.to_wire()).unwrap(), sent);
    }

    #[test]
    fn orders(sent in order()) {
        prop_assert_eq!(Order::from_wire(sent.to_wire(), known).unwrap(), sent);
    }
}

/// A request that is whole, to be spoilt.
fn whole() -> pb::GenerateRequest {
    pb::GenerateRequest {
        prompt: vec![1],
        sampling: Some(pb::Sampling::default()),
        stop: Some(pb::StopRules::default()),
        ..Default::default()
    }
}

#[test]
fn requests_that_cannot_be() {
    assert!(Generate::from_wire(whole()).is_ok());
    let refused = |spoil: fn(&mut pb::GenerateRequest)| {
        let mut wire = whole();
        spoil(&mut wire);
        Generate::from_wire(wire).unwrap_err()
    };
    assert_eq!(refused(|r| r.stop = None), WireError::Missing { field: "stop" });
    assert_eq!(refused(|r| r.sampling = None), WireError::Missing { field: "sampling" });
    let out = |field| WireError::OutOfRange { field };
    assert_eq!(refused(|r| r.logprobs = Some(21)), out("logprobs"));
    assert_eq!(refused(|r| r.prompt_logprobs = Some(256)), out("prompt_logprobs"));
    let nan = refused(|r| r.sampling.as_mut().unwrap().temperature = f32::NAN);
    assert_eq!(nan, WireError::NotFinite { field: "temperature" });
    let infinite = refused(|r| {
        let bias = pb::LogitBias { token: 1, bias: f32::INFINITY };
        r.sampling.as_mut().unwrap().logit_bias.push(bias);
    });
    assert_eq!(infinite, WireError::NotFinite { field: "logit_bias" });
    let long = refused(|r| r.request_id = "x".repeat(257));
    assert_eq!(long, WireError::TooLong { field: "request_id", got: 257, limit: 256 });
    let status = tonic::Status::from(refused(|r| r.stop = None));
    assert_eq!(
        (status.code(), status.message()),
        (tonic::Code::InvalidArgument, "stop is missing")
    );
}

#[test]
fn events_that_cannot_be() {
    let refused = |event: pb::generate_event::Event| {
        let wire = pb::GenerateEvent { group: 1, epoch: 1, event: Some(event) };
        event_from_wire(SeqId(0), wire).unwrap_err()
    };
    let finished = |reason, stop_id| {
        pb::generate_event::Event::Finished(pb::Finished { reason, stop_id, generated: 0 })
    };
    assert_eq!(refused(finished(0, None)), WireError::UnknownEnum { field: "reason", value: 0 });
    assert_eq!(refused(finished(77, None)), WireError::UnknownEnum { field: "reason", value: 77 });
    assert_eq!(refused(finished(1, None)), WireError::Missing { field: "stop_id" });
    assert!(matches!(refused(finished(2, Some(1))), WireError::Mismatch { .. }));
    let logprobs = |top_tokens: Vec<u32>, top_logprobs: Vec<f32>, logprob| {
        let logprobs = Some(pb::TokenLogprobs { token: 1, logprob, top_tokens, top_logprobs });
        pb::generate_event::Event::Token(pb::Token { token: 1, index: 0, logprobs })
    };
    let short = refused(logprobs(vec![1, 2], vec![0.0], 0.0));
    assert_eq!(short, WireError::Mismatch { field: "top_logprobs", other: "top_tokens" });
    let many = refused(logprobs(vec![1; 21], vec![0.0; 21], 0.0));
    assert_eq!(many, WireError::TooLong { field: "top_tokens", got: 21, limit: 20 });
    let nan = refused(logprobs(vec![], vec![], f32::NAN));
    assert_eq!(nan, WireError::NotFinite { field: "logprob" });
    let empty = event_from_wire(SeqId(0), pb::GenerateEvent::default()).unwrap_err();
    assert_eq!(empty, WireError::Missing { field: "event" });
}

#[test]
fn steps_that_cannot_be() {
    let refused = |spoil: fn(&mut pb::StepEntry)| {
        let mut entry = pb::StepEntry { tokens: vec![1], want: 2, ..Default::default() };
        spoil(&mut entry);
        let wire = pb::StepPlan { entries: vec![entry], ..Default::default() };
        StepOrder::from_wire(wire).unwrap_err()
    };
    assert_eq!(refused(|e| e.want = 4), WireError::UnknownEnum { field: "want", value: 4 });
    assert_eq!(refused(|e| e.want = 0), WireError::UnknownEnum { field: "want", value: 0 });
    assert_eq!(refused(|e| e.tokens.clear()), WireError::Missing { field: "tokens" });
    assert_eq!(refused(|e| e.start = u64::MAX), WireError::OutOfRange { field: "start" });
    let many = refused(|e| e.blocks = vec![0; wire::BLOCKS_MAX + 1]);
    assert!(matches!(many, WireError::TooLong { field: "blocks", .. }));
    let many = refused(|e| e.tokens = vec![0; wire::TOKENS_MAX + 1]);
    assert!(matches!(many, WireError::TooLong { field: "tokens", .. }));
}

#[test]
fn orders_that_cannot_be() {
    let refused = |spoil: fn(&mut pb::FormGroup)| {
        let mut form = form(3, ComputeType::F32, Some(8)).to_wire();
        spoil(&mut form);
        FormGroup::from_wire(form, known).unwrap_err()
    };
    let other = refused(|f| f.deployment.as_mut().unwrap().digest = "def456".to_owned());
    assert_eq!(other, WireError::UnknownModel { field: "digest" });
    assert_eq!(refused(|f| f.plan = None), WireError::Missing { field: "plan" });
    assert_eq!(refused(|f| f.deployment = None), WireError::Missing { field: "deployment" });
    let compute = refused(|f| f.deployment.as_mut().unwrap().compute = 9);
    assert_eq!(compute, WireError::UnknownEnum { field: "compute", value: 9 });
    let ranks = refused(|f| f.deployment.as_mut().unwrap().ranks = 2);
    assert_eq!(ranks, WireError::Mismatch { field: "plan", other: "deployment" });
    let short = refused(|f| drop(f.addresses.pop()));
    assert_eq!(short, WireError::Mismatch { field: "addresses", other: "plan" });
    let swapped = refused(|f| f.addresses.swap(0, 1));
    assert_eq!(swapped, WireError::Mismatch { field: "addresses", other: "plan" });
    let twice = refused(|f| f.plan.as_mut().unwrap().ranks[0].stripes.push(7));
    assert!(matches!(twice, WireError::Plan(_)), "{twice}");
    let address = refused(|f| f.addresses[1].collective_address = "x".to_owned());
    assert_eq!(address.to_string(), "collective_address is not host:port");
    let huge = refused(|f| f.deployment.as_mut().unwrap().kv_blocks = u64::MAX);
    assert_eq!(huge.to_string(), "kv_blocks is out of range");
}

#[test]
fn rolls_that_cannot_be() {
    let roll = |given, present: &[u64]| {
        let roll = pb::Roll { given, present: present.to_vec() };
        let order = Some(pb::order::Order::Roll(roll));
        Order::from_wire(pb::Order { order }, known)
    };
    assert!(roll(3, &[1, 3]).is_ok());
    let wrong = Err(WireError::OutOfRange { field: "present" });
    assert_eq!(roll(3, &[3, 1]), wrong);
    assert_eq!(roll(3, &[1, 1]), wrong);
    assert_eq!(roll(3, &[1, 4]), wrong);
    let many: Vec<u64> = (1..=5_000).collect();
    assert!(matches!(roll(5_000, &many), Err(WireError::TooLong { field: "present", .. })));
}

#[test]
fn reports_that_cannot_be() {
    let empty = Report::from_wire(pb::WorkerReport::default()).unwrap_err();
    assert_eq!(empty, WireError::Missing { field: "report" });
    let progress = pb::LoadProgress { bytes_read: 2, bytes_total: 1, ..Default::default() };
    let wire = pb::WorkerReport { report: Some(pb::worker_report::Report::Progress(progress)) };
    let refused = Report::from_wire(wire).unwrap_err();
    assert_eq!(refused, WireError::OutOfRange { field: "bytes_read" });
    let device = pb::Device { memory_bytes: 1, weight: f64::INFINITY };
    let refused = wire::device_from_wire(device).unwrap_err();
    assert_eq!(refused, WireError::NotFinite { field: "weight" });
    let refused = wire::join_from_wire(pb::Join::default()).unwrap_err();
    assert_eq!(refused.to_string(), "name is empty");
}
