//! Random operations against a simple model: whatever is submitted, cancelled, preempted or given
//! up, every answer is the one its request gives alone, and no block is ever lost or shared.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fake;

use std::collections::BTreeMap;

use engine::{EngineConfig, Event, FinishReason, Rejected, Request, Scheduler, SeqId, Step};
use engine::{StepOutput, TokenLogprobs};
use fake::{FakeExecutor, hash, scored, solo};
use proptest::prelude::*;

/// One thing that a caller does.
#[derive(Debug, Clone)]
enum Op {
    Submit(Request),
    /// Cancels the n-th of all sequences ever submitted.
    Cancel(usize),
    Schedule,
    Commit,
    /// Commits an output that is wrong in the n-th way.
    CommitWrong(usize),
    Abandon,
}

/// What is still due to one sequence.
#[derive(Debug)]
struct Due {
    request: Request,
    answer: Vec<u32>,
    stop: Option<u32>,
    delivered: usize,
    scores: usize,
    over: bool,
}

/// The scheduler, its executor and the simple model of what must come out.
struct Bench {
    config: EngineConfig,
    scheduler: Scheduler,
    executor: FakeExecutor,
    due: BTreeMap<SeqId, Due>,
    ready: Option<(Step, StepOutput)>,
    sent_back: u64,
}

impl Bench {
    fn new(config: EngineConfig) -> Self {
        Self {
            scheduler: Scheduler::new(config.clone()).unwrap(),
            executor: FakeExecutor::new(&config),
            config,
            due: BTreeMap::new(),
            ready: None,
            sent_back: 0,
        }
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Submit(request) => self.submit(request),
            Op::Cancel(nth) => self.cancel(nth),
            Op::Schedule => self.schedule(),
            Op::Commit => self.commit(),
            Op::CommitWrong(way) => self.commit_wrong(way),
            Op::Abandon => {
                self.sent_back += self.scheduler.abandon() as u64;
                self.ready = None;
            }
        }
        self.scheduler.check_integrity().unwrap();
    }

    fn submit(&mut self, request: Request) {
        let config = &self.config;
        let (prompt, max_tokens) = (request.prompt.len(), request.stop.max_tokens);
        let needed = (prompt + max_tokens.max(1) - 1).div_ceil(config.block_tokens);
        let waiting = self.scheduler.counts().waiting;
        match self.scheduler.submit(request.clone()) {
            Ok(seq) => {
                assert!(needed <= config.blocks && prompt + max_tokens <= config.context);
                assert!(self.due.keys().all(|&earlier| earlier < seq), "numbers only grow");
                let (answer, stop) = solo(&request, config.vocab);
                let due = Due { request, answer, stop, delivered: 0, scores: 1, over: false };
                self.due.insert(seq, due);
            }
            Err(Rejected::TooFewBlocks { needed: told, total }) => {
                assert_eq!((told, total), (needed, config.blocks));
                assert!(needed > total);
            }
            Err(Rejected::QueueFull { .. }) => assert!(waiting >= config.waiting_max),
            Err(other) => panic!("{other}"),
        }
    }

    fn cancel(&mut self, nth: usize) {
        let Some((&seq, due)) = self.due.iter_mut().nth(nth) else {
            assert!(!self.scheduler.cancel(SeqId(1 << 40)));
            return;
        };
        let used = self.scheduler.counts().blocks_used;
        let flying = self.ready.iter().flat_map(|(step, _)| &step.entries);
        let blocks = flying.into_iter().find(|entry| entry.seq == seq).map(|e| e.blocks.len());
        assert_eq!(self.scheduler.cancel(seq), !due.over);
        assert!(self.scheduler.context(seq).is_none());
        due.over = true;
        if blocks.is_some() {
            assert_eq!(self.scheduler.counts().blocks_used, used, "a step still writes there");
        }
    }

    fn schedule(&mut self) {
        let step = self.scheduler.schedule();
        if self.ready.is_some() {
            assert_eq!(step, None, "one step at a time");
            return;
        }
        let oldest = self.due.iter().find(|(_, due)| !due.over).map(|(&seq, _)| seq);
        assert_eq!(step.is_some(), oldest.is_some());
        let (Some(step), Some(oldest)) = (step, oldest) else { return };
        let progress = step.entries.iter().any(|entry| entry.seq == oldest);
        assert!(progress, "the oldest sequence gets on in every step");
        let prefills = step.entries.iter().map(|entry| entry.tokens.len() > 1);
        let chunked: Vec<bool> = prefills.skip_while(|prefill| !prefill).collect();
        // One-token entries after a chunk are tails of prefills; they cannot be told apart here,
        // so only a decode of an answer counts.
        for (entry, _) in step.entries.iter().rev().zip(chunked) {
            let due = &self.due[&entry.seq];
            let decodes = entry.start >= due.request.prompt.len() && entry.tokens.len() == 1;
            let known = due.request.prompt.len() + due.delivered;
            assert!(!decodes || entry.start + 1 < known, "a decode behind a chunk");
        }
        let output = self.executor.run(&self.scheduler, &step);
        self.ready = Some((step, output));
    }

    fn commit(&mut self) {
        let Some((_, output)) = self.ready.take() else {
            assert!(self.scheduler.commit(StepOutput::default()).is_err());
            return;
        };
        for event in self.scheduler.commit(output).unwrap() {
            self.take(event);
        }
    }

    fn take(&mut self, event: Event) {
        let (Event::Token { seq, .. }
        | Event::PromptLogprobs { seq, .. }
        | Event::Finished { seq, .. }) = event;
        let due = self.due.get_mut(&seq).unwrap();
        assert!(!due.over, "an event after the last one, or after a cancellation: {event:?}");
        let prompt = &due.request.prompt;
        match event {
            Event::Token { index, sampled, .. } => {
                assert_eq!(index, due.delivered);
                assert_eq!(sampled.token, due.answer[index]);
                let before = hash(&[prompt, &due.answer[..index]].concat());
                let wanted = due.request.logprobs.map(|_| scored(before, sampled.token));
                assert_eq!(sampled.logprobs, wanted);
                due.delivered += 1;
            }
            Event::PromptLogprobs { tokens, .. } => {
                assert!(due.request.prompt_logprobs.is_some() && !tokens.is_empty());
                let end = due.scores + tokens.len();
                let wanted: Vec<TokenLogprobs> =
                    (due.scores..end).map(|at| scored(hash(&prompt[..at]), prompt[at])).collect();
                assert_eq!(tokens, wanted);
                due.scores = end;
            }
            Event::Finished { reason, generated, .. } => {
                assert_eq!((due.delivered, generated), (due.answer.len(), due.answer.len()));
                let wanted = due.stop.map_or(FinishReason::Length, |id| FinishReason::Stop { id });
                assert_eq!(reason, wanted);
                if due.request.prompt_logprobs.is_some() {
                    assert_eq!(due.scores, prompt.len(), "every prompt token but the first");
                }
                due.over = true;
            }
        }
    }

    /// A wrong output is refused and leaves no trace.
    fn commit_wrong(&mut self, way: usize) {
        let Some((_, output)) = &self.ready else { return };
        let mut wrong = output.clone();
        let place = way / 7 % wrong.outputs.len();
        let seq = wrong.outputs[place].seq;
        let live = self.scheduler.context(seq).is_some();
        let entry = &mut wrong.outputs[place];
        match way % 7 {
            0 => wrong.number += 1,
            1 => drop(wrong.outputs.pop()),
            2 => entry.seq = SeqId(seq.0 + 1),
            // What comes for a cancelled sequence is nobody's business.
            _ if !live => return,
            3 if entry.sampled.is_some() => entry.sampled = None,
            3 => entry.sampled = Some(engine::Sampled { token: 0, logprobs: None }),
            4 => entry.prompt_logprobs.push(scored(0, 0)),
            5 => match &mut entry.sampled {
                Some(sampled) => sampled.token = self.config.vocab as u32,
                None => return,
            },
            _ => match &mut entry.sampled {
                Some(sampled) if sampled.logprobs.is_some() => sampled.logprobs = None,
                Some(sampled) => sampled.logprobs = Some(scored(0, sampled.token)),
                None => return,
            },
        }
        let before = format!("{:?}", self.scheduler);
        assert!(self.scheduler.commit(wrong).is_err());
        assert_eq!(format!("{:?}", self.scheduler), before);
    }

    /// Runs until everything is answered.
    fn drain(&mut self) {
        for _ in 0..20_000 {
            self.apply(Op::Commit);
            if self.scheduler.is_idle() {
                break;
            }
            self.apply(Op::Schedule);
        }
        assert!(self.due.values().all(|due| due.over), "a sequence never ends");
        let counts = self.scheduler.counts();
        assert_eq!((counts.waiting, counts.running, counts.blocks_used), (0, 0, 0));
        assert!(self.executor.restarts <= counts.preemptions + self.sent_back);
    }
}

fn configs() -> impl Strategy<Value = EngineConfig> {
    (1..5usize, 2..14usize, 1..6usize, 0..10usize, 1..9usize, 1..9usize).prop_map(
        |(block_tokens, blocks, max_sequences, spare, chunk_tokens, waiting_max)| EngineConfig {
            block_tokens,
            blocks,
            context: 40,
            vocab: 13,
            max_sequences,
            step_tokens: max_sequences + spare,
            chunk_tokens,
            waiting_max,
        },
    )
}

fn requests() -> impl Strategy<Value = Request> {
    let top = || proptest::option::weighted(0.4, 0..=20u8);
    (
        proptest::collection::vec(0..13u32, 1..16),
        0..20usize,
        0..20usize,
        proptest::collection::vec(0..15u32, 0..3),
        top(),
        top(),
    )
        .prop_map(|(prompt, max_tokens, min_tokens, stop_ids, logprobs, prompt_logprobs)| {
            let mut request = fake::request(&prompt, max_tokens);
            request.stop.min_tokens = min_tokens.min(max_tokens) / 2;
            request.stop.stop_ids = stop_ids;
            request.logprobs = logprobs;
            request.prompt_logprobs = prompt_logprobs;
            request
        })
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => requests().prop_map(Op::Submit),
        2 => (0..24usize).prop_map(Op::Cancel),
        14 => Just(Op::Schedule),
        14 => Just(Op::Commit),
        2 => (0..70usize).prop_map(Op::CommitWrong),
        1 => Just(Op::Abandon),
    ];
    proptest::collection::vec(op, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_answer_is_the_solo_answer(config in configs(), ops in ops()) {
        let mut bench = Bench::new(config);
        for op in ops {
            bench.apply(op);
        }
        bench.drain();
    }

    /// Nothing but load: as many long answers at once as the queue takes, in few blocks.
    #[test]
    fn tiny_pools_preempt_and_finish(
        requests in proptest::collection::vec(requests(), 4..8),
        blocks in 9..16usize,
        max_sequences in 2..6usize,
    ) {
        let config = EngineConfig {
            block_tokens: 2,
            blocks,
            context: 40,
            vocab: 13,
            max_sequences,
            step_tokens: 9,
            chunk_tokens: 4,
            waiting_max: 8,
        };
        let mut bench = Bench::new(config);
        for request in requests {
            bench.apply(Op::Submit(request));
        }
        bench.drain();
    }
}

/// The random cases are worth nothing if they never meet what they are for.
#[test]
fn the_load_does_preempt() {
    let mut config = fake::config();
    config.blocks = 6;
    let mut bench = Bench::new(config);
    for first in 0..6 {
        let mut request = fake::request(&[first, 2, 3, 4, 5], 16);
        request.prompt_logprobs = Some(0);
        bench.apply(Op::Submit(request));
    }
    bench.drain();
    let preemptions = bench.scheduler.counts().preemptions;
    assert!(preemptions > 0);
    assert_eq!(bench.executor.restarts, preemptions);
}
