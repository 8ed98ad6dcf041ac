//! Short plays: what the scheduler does, step by step, in situations with a name.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fake;

use std::fmt::Write as _;

use engine::{
    CommitError, Event, FinishReason, Rejected, Request, Sampled, Scheduler, SeqId, Step,
    StepOutput, Want,
};
use fake::{FakeExecutor, config, request, solo};

/// A scheduler and its executor, told what to do and asked what happened.
struct Play {
    scheduler: Scheduler,
    executor: FakeExecutor,
}

impl Play {
    fn new(change: impl FnOnce(&mut engine::EngineConfig)) -> Self {
        let mut config = config();
        change(&mut config);
        Self { executor: FakeExecutor::new(&config), scheduler: Scheduler::new(config).unwrap() }
    }

    fn submit(&mut self, prompt: usize, max_tokens: usize) -> SeqId {
        let prompt: Vec<u32> = (1..=prompt as u32).collect();
        self.scheduler.submit(request(&prompt, max_tokens)).unwrap()
    }

    /// Schedules and runs, commits nothing.
    fn launch(&mut self) -> (Step, StepOutput) {
        let step = self.scheduler.schedule().expect("something runs");
        let output = self.executor.run(&self.scheduler, &step);
        self.scheduler.check_integrity().unwrap();
        (step, output)
    }

    fn step(&mut self) -> (Step, Vec<Event>) {
        let (step, output) = self.launch();
        let events = self.scheduler.commit(output).unwrap();
        self.scheduler.check_integrity().unwrap();
        (step, events)
    }

    /// Steps until all is answered, a line per step: `seq:positions want blocks`, then the counts.
    fn transcript(&mut self, steps_max: usize) -> String {
        let mut text = String::new();
        for _ in 0..steps_max {
            if self.scheduler.is_idle() {
                break;
            }
            let (step, events) = self.step();
            let counts = self.scheduler.counts();
            text.push_str(&picture(&step));
            let finished = events.iter().filter(|e| matches!(e, Event::Finished { .. })).count();
            let (waiting, running, used) = (counts.waiting, counts.running, counts.blocks_used);
            writeln!(text, "| waiting {waiting} running {running} blocks {used} done {finished}")
                .unwrap();
        }
        text
    }
}

fn picture(step: &Step) -> String {
    let mut text = String::new();
    for entry in &step.entries {
        let (start, end) = (entry.start, entry.start + entry.tokens.len());
        let want = match entry.want {
            Want::Nothing => "-",
            Want::Last => "last",
            Want::All => "all",
        };
        let blocks: Vec<u32> = entry.blocks.iter().map(|block| block.0).collect();
        write!(text, "{}:{start}..{end} {want} {blocks:?} ", entry.seq.0).unwrap();
    }
    text
}

#[track_caller]
fn check(transcript: &str, expected: &str) {
    let lines = |text: &str| -> Vec<String> { text.lines().map(|l| l.trim().into()).collect() };
    let expected = lines(expected.trim());
    assert_eq!(lines(transcript.trim()), expected, "the play went like this:\n{transcript}");
}

#[test]
fn prefill_is_chunked_and_mixes_with_decode() {
    let mut play = Play::new(|config| config.step_tokens = 10);
    play.submit(3, 4);
    play.submit(18, 2);
    check(
        &play.transcript(20),
        "
        0:0..3 last [0] 1:0..7 - [1, 2] | waiting 0 running 2 blocks 3 done 0
        0:3..4 last [0] 1:7..15 - [1, 2, 3, 4] | waiting 0 running 2 blocks 5 done 0
        0:4..5 last [0, 5] 1:15..18 last [1, 2, 3, 4, 6] | waiting 0 running 2 blocks 7 done 0
        0:5..6 last [0, 5] 1:18..19 last [1, 2, 3, 4, 6] | waiting 0 running 0 blocks 0 done 2
    ",
    );
}

#[test]
fn the_youngest_is_preempted_and_comes_back() {
    let mut play = Play::new(|config| config.blocks = 4);
    play.submit(4, 9);
    play.submit(4, 9);
    check(
        &play.transcript(40),
        "
        0:0..4 last [0] 1:0..4 last [1] | waiting 0 running 2 blocks 2 done 0
        0:4..5 last [0, 2] 1:4..5 last [1, 3] | waiting 0 running 2 blocks 4 done 0
        0:5..6 last [0, 2] 1:5..6 last [1, 3] | waiting 0 running 2 blocks 4 done 0
        0:6..7 last [0, 2] 1:6..7 last [1, 3] | waiting 0 running 2 blocks 4 done 0
        0:7..8 last [0, 2] 1:7..8 last [1, 3] | waiting 0 running 2 blocks 4 done 0
        0:8..9 last [0, 2, 1] | waiting 1 running 1 blocks 3 done 0
        0:9..10 last [0, 2, 1] | waiting 1 running 1 blocks 3 done 0
        0:10..11 last [0, 2, 1] | waiting 1 running 1 blocks 3 done 0
        0:11..12 last [0, 2, 1] | waiting 1 running 0 blocks 0 done 1
        1:0..8 - [0, 1] | waiting 0 running 1 blocks 2 done 0
        1:8..9 last [0, 1, 2] | waiting 0 running 1 blocks 3 done 0
        1:9..10 last [0, 1, 2] | waiting 0 running 1 blocks 3 done 0
        1:10..11 last [0, 1, 2] | waiting 0 running 1 blocks 3 done 0
        1:11..12 last [0, 1, 2] | waiting 0 running 0 blocks 0 done 1
    ",
    );
    assert_eq!(play.scheduler.counts().preemptions, 1);
}

#[test]
fn the_watermark_leaves_room_to_grow() {
    let mut play = Play::new(|config| config.blocks = 4);
    play.submit(4, 9);
    // Two blocks now and a third soon: beside one block that is about to be two, of four.
    play.submit(8, 4);
    play.step();
    assert_eq!(play.scheduler.counts().waiting, 1);
    play.transcript(40);
    assert!(play.scheduler.is_idle());
    assert_eq!(play.scheduler.counts().preemptions, 0);
}

#[test]
fn blocks_that_a_long_prompt_will_need_are_not_given_away() {
    let mut play = Play::new(|config| config.blocks = 10);
    play.submit(32, 4);
    play.submit(8, 4);
    play.step();
    play.step();
    // Four of ten blocks are taken, and five more are spoken for.
    assert_eq!((play.scheduler.counts().blocks_used, play.scheduler.counts().waiting), (4, 1));
    play.transcript(40);
    assert!(play.scheduler.is_idle());
    assert_eq!(play.scheduler.counts().preemptions, 0);
}

#[test]
fn arrival_order_holds_when_a_later_one_would_fit() {
    let mut play = Play::new(|config| config.blocks = 6);
    play.submit(12, 4);
    play.submit(16, 4);
    play.submit(1, 1);
    check(
        &play.transcript(40),
        "
        0:0..8 - [0, 1] | waiting 2 running 1 blocks 2 done 0
        0:8..12 last [0, 1, 2] | waiting 2 running 1 blocks 3 done 0
        0:12..13 last [0, 1, 2, 3] | waiting 2 running 1 blocks 4 done 0
        0:13..14 last [0, 1, 2, 3] | waiting 2 running 1 blocks 4 done 0
        0:14..15 last [0, 1, 2, 3] | waiting 2 running 0 blocks 0 done 1
        1:0..8 - [0, 1] 2:0..1 last [2] | waiting 0 running 1 blocks 2 done 1
        1:8..16 last [0, 1, 2, 3] | waiting 0 running 1 blocks 4 done 0
        1:16..17 last [0, 1, 2, 3, 4] | waiting 0 running 1 blocks 5 done 0
        1:17..18 last [0, 1, 2, 3, 4] | waiting 0 running 1 blocks 5 done 0
        1:18..19 last [0, 1, 2, 3, 4] | waiting 0 running 0 blocks 0 done 1
    ",
    );
}

#[test]
fn an_answer_of_no_tokens_runs_the_prompt_once() {
    let mut play = Play::new(|_| {});
    let seq = play.submit(10, 0);
    let (first, events) = play.step();
    assert_eq!((picture(&first).as_str(), events.len()), ("0:0..8 - [0, 1] ", 0));
    let (last, events) = play.step();
    assert_eq!(picture(&last), "0:8..10 - [0, 1, 2] ");
    assert_eq!(events, [Event::Finished { seq, reason: FinishReason::Length, generated: 0 }]);
    assert!(play.scheduler.is_idle());
}

#[test]
fn echo_scores_every_prompt_token_but_the_first() {
    let mut play = Play::new(|_| {});
    let mut scored = request(&[5, 6, 7, 8, 9, 10, 11, 12, 13], 0);
    scored.prompt_logprobs = Some(3);
    play.scheduler.submit(scored.clone()).unwrap();
    let (first, events) = play.step();
    assert_eq!(first.entries[0].want, Want::All);
    let [Event::PromptLogprobs { tokens, .. }] = events.as_slice() else { panic!("{events:?}") };
    let ids: Vec<u32> = tokens.iter().map(|scored| scored.token).collect();
    assert_eq!(ids, scored.prompt[1..]);
    // The prompt's last token is followed by none: nothing is wanted of it.
    let (last, events) = play.step();
    assert_eq!(last.entries[0].want, Want::Nothing);
    assert!(matches!(events.as_slice(), [Event::Finished { generated: 0, .. }]));
}

#[test]
fn a_cancelled_sequence_in_flight_keeps_its_blocks_until_commit() {
    let mut play = Play::new(|_| {});
    let (first, second) = (play.submit(5, 5), play.submit(5, 5));
    let (step, output) = play.launch();
    assert!(play.scheduler.cancel(first));
    assert!(!play.scheduler.cancel(first), "once");
    assert!(!play.scheduler.samples(&step.entries[0]) && play.scheduler.samples(&step.entries[1]));
    assert!(play.scheduler.context(first).is_none());
    assert_eq!(play.scheduler.counts().blocks_used, 4);
    play.scheduler.check_integrity().unwrap();
    let events = play.scheduler.commit(output).unwrap();
    assert!(matches!(events.as_slice(), [Event::Token { seq, index: 0, .. }] if *seq == second));
    assert_eq!(play.scheduler.counts().blocks_used, 2);
    // Not in flight: at once.
    assert!(play.scheduler.cancel(second));
    assert_eq!(play.scheduler.counts().blocks_used, 0);
    assert!(play.scheduler.is_idle() && play.scheduler.schedule().is_none());
}

#[test]
fn a_step_given_up_is_computed_again() {
    let mut play = Play::new(|_| {});
    let seq = play.submit(5, 6);
    let gone = play.submit(5, 6);
    let expected = solo(play.scheduler.context(seq).unwrap().0, config().vocab).0;
    play.step();
    play.step();
    let (_, late) = play.launch();
    assert!(play.scheduler.cancel(gone));
    assert_eq!(play.scheduler.abandon(), 1);
    play.scheduler.check_integrity().unwrap();
    assert_eq!(play.scheduler.counts().blocks_used, 0);
    let got = late.number;
    assert_eq!(play.scheduler.commit(late), Err(CommitError::NothingInFlight { got }));
    let (again, events) = play.step();
    // Prompt and both tokens, in one chunk, and the third token of the answer.
    assert_eq!(picture(&again), "0:0..7 last [0, 1] ");
    let token = expected[2];
    let sampled = Sampled { token, logprobs: None };
    assert_eq!(events, [Event::Token { seq, index: 2, sampled }]);
}

#[test]
fn stop_ids_are_forbidden_until_min_tokens() {
    let mut play = Play::new(|_| {});
    let mut stopping = request(&[1, 2, 3], 10);
    let free = solo(&stopping, config().vocab).0;
    stopping.stop.stop_ids = vec![free[0], 4_000_000];
    stopping.stop.min_tokens = 1;
    let seq = play.scheduler.submit(stopping.clone()).unwrap();
    assert_eq!(play.scheduler.forbidden(seq), stopping.stop.stop_ids);
    let (_, events) = play.step();
    assert!(matches!(&events[0], Event::Token { sampled, .. } if sampled.token != free[0]));
    assert_eq!(play.scheduler.forbidden(seq), [0; 0]);
}

#[test]
fn an_early_stop_id_does_not_end_the_answer() {
    // An executor that does not mask: the scheduler holds to min_tokens all the same.
    let mut play = Play::new(|_| {});
    let mut stopping = request(&[1, 2, 3], 10);
    stopping.stop.stop_ids = vec![9];
    stopping.stop.min_tokens = 1;
    play.scheduler.submit(stopping).unwrap();
    for ends in [false, true] {
        let (_, mut output) = play.launch();
        output.outputs[0].sampled = Some(Sampled { token: 9, logprobs: None });
        let events = play.scheduler.commit(output).unwrap();
        let reason = FinishReason::Stop { id: 9 };
        let finished = Event::Finished { seq: SeqId(0), reason, generated: 2 };
        assert_eq!(events.contains(&finished), ends);
        assert_eq!(events.len(), if ends { 2 } else { 1 });
    }
}

#[test]
fn outputs_that_do_not_match_are_named_and_change_nothing() {
    let mut play = Play::new(|_| {});
    let seq = play.submit(3, 3);
    let (_, output) = play.launch();
    let number = output.number;
    let refuse = |play: &mut Play, change: &dyn Fn(&mut StepOutput)| {
        let mut wrong = output.clone();
        change(&mut wrong);
        play.scheduler.commit(wrong).unwrap_err()
    };
    assert_eq!(
        refuse(&mut play, &|o| o.number = 9),
        CommitError::WrongStep { expected: number, got: 9 }
    );
    assert_eq!(
        refuse(&mut play, &|o| o.outputs.clear()),
        CommitError::WrongCount { expected: 1, got: 0 }
    );
    let wrong = CommitError::WrongSequence { index: 0, expected: seq, got: SeqId(7) };
    assert_eq!(wrong.to_string(), "output 0 is for sequence 7 and the entry for 0");
    assert_eq!(refuse(&mut play, &|o| o.outputs[0].seq = SeqId(7)), wrong);
    assert_eq!(refuse(&mut play, &|o| o.outputs[0].sampled = None), CommitError::NoToken(seq));
    let unknown = |o: &mut StepOutput| {
        o.outputs[0].sampled = Some(Sampled { token: 97, logprobs: None });
    };
    assert_eq!(refuse(&mut play, &unknown), CommitError::UnknownToken { seq, id: 97, vocab: 97 });
    let unasked = |o: &mut StepOutput| {
        o.outputs[0].sampled = Some(Sampled { token: 1, logprobs: Some(fake::scored(1, 1)) });
    };
    assert_eq!(refuse(&mut play, &unasked), CommitError::WrongLogprobs(seq));
    let surplus = |o: &mut StepOutput| o.outputs[0].prompt_logprobs.push(fake::scored(1, 2));
    assert_eq!(
        refuse(&mut play, &surplus),
        CommitError::WrongPromptLogprobs { seq, expected: 0, got: 1 }
    );
    assert_eq!(play.scheduler.commit(output).unwrap().len(), 1);
}

#[test]
fn a_token_in_mid_prompt_is_surplus() {
    let mut play = Play::new(|_| {});
    let seq = play.submit(12, 3);
    let (_, mut output) = play.launch();
    output.outputs[0].sampled = Some(Sampled { token: 1, logprobs: None });
    assert_eq!(play.scheduler.commit(output), Err(CommitError::SurplusToken(seq)));
}

#[test]
fn every_bad_request_is_told_why() {
    let mut scheduler = Scheduler::new(config()).unwrap();
    let mut refused = |change: &dyn Fn(&mut Request)| {
        let mut bad = request(&[1, 2, 3], 4);
        change(&mut bad);
        scheduler.submit(bad).unwrap_err()
    };
    assert_eq!(refused(&|r| r.prompt.clear()), Rejected::EmptyPrompt);
    let long = Rejected::TooLong { prompt: 3, max_tokens: 46, context: 48 };
    assert_eq!(refused(&|r| r.stop.max_tokens = 46), long);
    let endless = refused(&|r| r.stop.max_tokens = usize::MAX);
    assert!(matches!(endless, Rejected::TooLong { .. }));
    let unknown = Rejected::UnknownToken { id: 97, vocab: 97 };
    assert_eq!(refused(&|r| r.prompt.push(97)), unknown);
    assert_eq!(refused(&|r| r.sampling.logit_bias = vec![(97, 1.0)]), unknown);

    let (nan, inf) = (f32::NAN, f32::INFINITY);
    type Change = fn(&mut Request, f32);
    let ranges: [(&str, Change, &[f32]); 6] = [
        ("temperature", |r, v| r.sampling.temperature = v, &[nan, inf, -0.1]),
        ("top_p", |r, v| r.sampling.top_p = v, &[nan, inf, 0.0, -1.0, 1.1]),
        ("min_p", |r, v| r.sampling.min_p = v, &[nan, inf, -0.1, 1.1]),
        ("repetition_penalty", |r, v| r.sampling.repetition_penalty = v, &[nan, inf, 0.0, -1.0]),
        ("frequency_penalty", |r, v| r.sampling.frequency_penalty = v, &[nan, inf, -2.1, 2.1]),
        ("presence_penalty", |r, v| r.sampling.presence_penalty = v, &[nan, inf, -2.1, 2.1]),
    ];
    for (field, change, values) in ranges {
        for &value in values {
            let error = refused(&|r| change(r, value));
            assert_eq!(error, Rejected::BadSampling { field }, "{field} = {value}");
        }
    }
    for bias in [vec![(1, nan)], vec![(1, inf)], vec![(2, 0.0), (1, 0.0)], vec![(1, 0.0); 2]] {
        let error = refused(&|r| r.sampling.logit_bias = bias.clone());
        assert_eq!(error, Rejected::BadSampling { field: "logit_bias" });
    }
    let field = |error| match error {
        Rejected::BadSampling { field } => field,
        other => panic!("{other}"),
    };
    assert_eq!(field(refused(&|r| r.logprobs = Some(21))), "logprobs");
    assert_eq!(field(refused(&|r| r.prompt_logprobs = Some(21))), "prompt_logprobs");
    assert_eq!(field(refused(&|r| r.stop.min_tokens = 5)), "min_tokens");
    assert!(scheduler.is_idle());
    let mut small = Scheduler::new(engine::EngineConfig { blocks: 2, ..config() }).unwrap();
    // The last token of an answer is never run: 3 + 6 - 1 positions fit two blocks of 4.
    assert!(small.submit(request(&[1, 2, 3], 6)).is_ok());
    let few = Rejected::TooFewBlocks { needed: 3, total: 2 };
    assert_eq!(small.submit(request(&[1, 2, 3], 7)), Err(few));
}

#[test]
fn bounds_themselves_are_accepted_and_the_queue_has_an_end() {
    let mut scheduler = Scheduler::new(config()).unwrap();
    let mut edge = request(&[0, 96], 46);
    edge.sampling.top_p = 1.0;
    edge.sampling.min_p = 1.0;
    edge.sampling.frequency_penalty = -2.0;
    edge.sampling.presence_penalty = 2.0;
    edge.sampling.top_k = u32::MAX;
    edge.sampling.logit_bias = vec![(0, -100.0), (96, 100.0)];
    (edge.logprobs, edge.prompt_logprobs) = (Some(20), Some(20));
    edge.stop.min_tokens = 46;
    for expected in 0..8 {
        assert_eq!(scheduler.submit(edge.clone()), Ok(SeqId(expected)));
    }
    assert_eq!(scheduler.submit(edge), Err(Rejected::QueueFull { waiting: 8 }));
}
