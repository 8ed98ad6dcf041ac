//! The leader as its callers see it, with a real model on one rank.

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use collective::{Membership, TreeCollective, local};
use compute::CpuDevice;
use decoder::{CacheSize, Checkpoint, Decoder, RankShape};
use engine::{EngineConfig, Sampling, StopRules};
use model::{ComputeType, ModelSpec};
use planner::{NodeId, RankPlan};

use crate::pulse::Pulse;

use super::*;

/// No other ranks.
struct Nobody;

impl Followers for Nobody {
    fn launch(&mut self, _step: &Step) -> Result<(), GroupGone> {
        Ok(())
    }
}

fn rank(context: usize) -> (Arc<ModelSpec>, Rank) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/llama3");
    let config = std::fs::read_to_string(directory.join("config.json")).expect("a config");
    let spec = Arc::new(ModelSpec::from_config(&config).expect("a spec"));
    let checkpoint = Checkpoint::open(&directory, &spec).expect("a checkpoint");
    let stripes: Vec<usize> = (0..8).collect();
    let plan = RankPlan {
        rank: 0,
        node: NodeId(1),
        device: 0,
        stripes: stripes.clone(),
        weight_bytes: 0,
        kv_bytes: 0,
    };
    let cache = CacheSize { blocks: 64, block_tokens: 16, context };
    let (experts, compute) = (planner::ExpertCut::Stripe, ComputeType::F32);
    let shape = RankShape { stripes: 8, plan: &plan, experts, compute, cache };
    let device = CpuDevice::new(1, None).expect("a device");
    let decoder = Decoder::load(device, Arc::clone(&spec), shape, &checkpoint, &mut |_| true);
    let link = local::links(1, Membership { group: 1, epoch: 1 }).remove(0);
    let collective = TreeCollective::new(Box::new(link), 8, vec![stripes]).expect("a partition");
    (
        spec,
        Rank {
            decoder: decoder.expect("a decoder"),
            collective: Box::new(collective),
            pulse: Pulse::default(),
        },
    )
}

fn start() -> (mpsc::Sender<Command>, JoinHandle<GroupGone>) {
    let (spec, rank) = rank(512);
    let scheduler = Scheduler::new(EngineConfig {
        block_tokens: 16,
        blocks: 64,
        context: 512,
        vocab: spec.vocab,
        max_sequences: 8,
        step_tokens: 64,
        chunk_tokens: 64,
        waiting_max: 8,
    });
    let leader = Leader::new(scheduler.expect("limits"), rank, Box::new(Nobody));
    let (commands, inbox) = mpsc::channel();
    (commands, std::thread::spawn(move || leader.run(&inbox).0))
}

fn submit(
    commands: &mpsc::Sender<Command>,
    max_tokens: usize,
) -> (SeqId, channel::Receiver<Result<Event, GroupGone>>) {
    let request = Request {
        prompt: vec![5, 6, 7],
        sampling: Sampling::greedy(),
        stop: StopRules { max_tokens, min_tokens: 0, stop_ids: Vec::new() },
        logprobs: None,
        prompt_logprobs: None,
    };
    let (events, incoming) = channel::channel(max_tokens + 8);
    let (reply, seq) = oneshot::channel();
    let request = Box::new(request);
    let so_far = Resume::default();
    commands.send(Command::Submit { request, so_far, events, reply }).expect("a leader");
    (seq.blocking_recv().expect("an answer").expect("a sequence"), incoming)
}

fn counts(commands: &mpsc::Sender<Command>) -> Counts {
    let (reply, counted) = oneshot::channel();
    commands.send(Command::Counts(reply)).expect("a leader");
    let (counts, integrity) = counted.blocking_recv().expect("counts");
    assert_eq!(integrity, Ok(()));
    counts
}

#[test]
fn a_cancelled_sequence_frees_its_blocks_before_another_step() {
    let (commands, leader) = start();
    let (seq, mut incoming) = submit(&commands, 400);
    for _ in 0..3 {
        incoming.blocking_recv().expect("an event").expect("a token");
    }
    assert!(counts(&commands).blocks_used > 0);
    commands.send(Command::Cancel(seq)).expect("a leader");
    // Commands are taken between steps, in order: whatever runs after the first one is without it.
    let after = counts(&commands);
    assert_eq!((after.blocks_used, after.running), (0, 0));
    assert!(after.steps < 400, "it ran to its end");
    commands.send(Command::Stop).expect("a leader");
    leader.join().expect("a leader that ends");
}

#[test]
fn a_reader_that_is_gone_frees_its_blocks_with_the_next_token() {
    let (commands, leader) = start();
    let (_, mut incoming) = submit(&commands, 400);
    incoming.blocking_recv().expect("an event").expect("a token");
    drop(incoming);
    let before = counts(&commands).steps;
    while counts(&commands).blocks_used > 0 {
        assert!(counts(&commands).steps < before + 20, "nobody reads and it goes on");
    }
    commands.send(Command::Stop).expect("a leader");
    leader.join().expect("a leader that ends");
}

#[test]
fn the_end_of_a_group_is_told_to_every_open_sequence() {
    let (commands, leader) = start();
    let (_, mut first) = submit(&commands, 400);
    let (_, mut second) = submit(&commands, 400);
    commands
        .send(Command::Failed { reason: "rank 2 is gone".to_owned(), blames: Some(2) })
        .expect("a leader");
    let gone = leader.join().expect("a leader that ends");
    assert_eq!(gone.reason, "rank 2 is gone");
    for incoming in [&mut first, &mut second] {
        let last = std::iter::from_fn(|| incoming.blocking_recv()).last();
        assert_eq!(last.expect("an end").expect_err("no token"), gone);
    }
}
