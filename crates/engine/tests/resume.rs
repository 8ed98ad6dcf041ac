//! A sequence that had begun elsewhere goes on as if nothing had happened.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fake;

use engine::{Event, FinishReason, Rejected, Request, Resume, Scheduler};
use fake::{FakeExecutor, config, request};
use proptest::prelude::*;

/// Everything that one sequence alone delivers after `so_far`, as its caller sees it: tokens with
/// their indexes and logprobs, prompt logprobs, the end.
fn delivered(request: &Request, so_far: Resume) -> Vec<Event> {
    let mut scheduler = Scheduler::new(config()).unwrap();
    let mut executor = FakeExecutor::new(&config());
    scheduler.resume(request.clone(), so_far).unwrap();
    let mut events = Vec::new();
    while let Some(step) = scheduler.schedule() {
        let output = executor.run(&scheduler, &step);
        for event in scheduler.commit(output).unwrap() {
            match event {
                Event::PromptLogprobs { seq, tokens } => events.extend(
                    tokens.into_iter().map(|one| Event::PromptLogprobs { seq, tokens: vec![one] }),
                ),
                other => events.push(other),
            }
        }
        scheduler.check_integrity().unwrap();
    }
    assert!(scheduler.is_idle());
    events
}

fn so_far(events: &[Event]) -> Resume {
    let mut so_far = Resume::default();
    for event in events {
        match event {
            Event::Token { sampled, .. } => so_far.generated.push(sampled.token),
            Event::PromptLogprobs { .. } => so_far.scored += 1,
            Event::Finished { .. } => {}
        }
    }
    so_far
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn whatever_was_delivered_the_rest_is_the_same(
        prompt in prop::collection::vec(0u32..97, 1..20),
        max_tokens in 0usize..24,
        early in 0usize..24,
        stop_ids in prop::collection::vec(0u32..97, 0..6),
        (logprobs, prompt_logprobs) in any::<(bool, bool)>(),
    ) {
        let mut request = request(&prompt, max_tokens);
        request.stop.min_tokens = early.min(max_tokens);
        request.stop.stop_ids = stop_ids;
        request.logprobs = logprobs.then_some(0);
        request.prompt_logprobs = prompt_logprobs.then_some(0);
        let whole = delivered(&request, Resume::default());
        // The last event is the end; before it, the last token already says so.
        for cut in 0..whole.len() {
            let so_far = so_far(&whole[..cut]);
            match request.stop.reached(&so_far.generated) {
                Some(reason) => {
                    let generated = so_far.generated.len();
                    let Event::Finished { reason: said, generated: counted, .. } = &whole[cut]
                    else { panic!("an answer that is whole goes on: {:?}", whole[cut]) };
                    prop_assert_eq!((said, *counted), (&reason, generated));
                }
                None => prop_assert_eq!(&delivered(&request, so_far), &whole[cut..]),
            }
        }
    }
}

#[test]
fn what_cannot_have_been_is_refused() {
    let mut scheduler = Scheduler::new(config()).unwrap();
    let mut request = request(&[1, 2, 3], 4);
    request.stop.stop_ids = vec![9];
    let mut refused = |request: &Request, generated: &[u32], scored| {
        let so_far = Resume { generated: generated.to_vec(), scored };
        scheduler.resume(request.clone(), so_far).unwrap_err()
    };
    let field = |field| Rejected::BadResume { field };
    assert_eq!(refused(&request, &[5, 9], 0), field("generated"));
    assert_eq!(refused(&request, &[5; 4], 0), field("generated"));
    assert_eq!(refused(&request, &[5; 5], 0), field("generated"));
    assert_eq!(refused(&request, &[97], 0), Rejected::UnknownToken { id: 97, vocab: 97 });
    assert_eq!(refused(&request, &[], 1), field("scored"));
    request.prompt_logprobs = Some(1);
    assert_eq!(refused(&request, &[], 3), field("scored"));
    request.stop.max_tokens = 0;
    assert_eq!(refused(&request, &[5], 0), field("generated"));
    assert!(scheduler.is_idle());
}

#[test]
fn rules_see_the_end_of_an_answer() {
    let mut rules = request(&[1], 3).stop;
    (rules.min_tokens, rules.stop_ids) = (1, vec![9]);
    assert_eq!(rules.reached(&[]), None);
    assert_eq!(rules.reached(&[9]), None, "it may not end so early");
    assert_eq!(rules.reached(&[9, 9]), Some(FinishReason::Stop { id: 9 }));
    assert_eq!(rules.reached(&[1, 2]), None);
    assert_eq!(rules.reached(&[1, 2, 3]), Some(FinishReason::Length));
    assert_eq!(rules.reached(&[1, 2, 9]), Some(FinishReason::Stop { id: 9 }));
}
