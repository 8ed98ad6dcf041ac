//! Tests of the bench: every case runs on any number of ranks, and bounds count what is read.

use std::path::Path;

use model::Part;
use planner::stripes;

use super::*;

fn plan(model: &str, ranks: usize) -> Plan {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(model);
    let config = std::fs::read_to_string(directory.join("config.json")).expect("a config");
    Plan {
        directory,
        spec: Arc::new(ModelSpec::from_config(&config).expect("a spec")),
        compute: ComputeType::F32,
        ranks,
        threads: 1,
        kernels: None,
        cases: Vec::new(),
        repeat: 3,
        steps: 2,
    }
}

/// A machine that reads a byte and does an operation in a second.
const SLOW: MachineLimits =
    MachineLimits { threads: 1, class: KernelClass::Portable, read: 1.0, float: 1.0, int8: 1.0 };

#[test]
fn all_cases_run_on_one_rank_and_on_three() {
    let cases = [
        Case::Prefill { tokens: 40 },
        Case::Decode { sequences: 1, context: 17 },
        Case::Decode { sequences: 5, context: 3 },
    ];
    for ranks in [1, 3] {
        let plan = Plan { cases: cases.to_vec(), ..plan("mixtral", ranks) };
        let mut seen = Vec::new();
        let outcome = within(&plan, &|| Ok(SLOW), &mut |figure| seen.push(figure.clone()));
        let outcome = outcome.expect("figures");
        assert_eq!(outcome.figures, seen);
        assert_eq!(seen.iter().map(|figure| figure.case).collect::<Vec<_>>(), cases);
        for figure in seen {
            assert_eq!(figure.rates.len(), 3);
            assert!(figure.rates.is_sorted());
            assert!(figure.rate() > 0.0 && figure.rate() == figure.rates[1]);
            assert!((0.0..1.0).contains(&figure.collectives), "{}", figure.collectives);
            assert_eq!(figure.share(), figure.rate() / figure.bound.rate());
        }
    }
}

#[test]
fn what_cannot_be_run_is_refused() {
    let refused = |plan: Plan| within(&plan, &|| Ok(SLOW), &mut |_| {}).expect_err("an error");
    let long = plan("llama3", 1);
    let context = long.spec.context;
    let cases = vec![Case::Decode { sequences: 1, context }];
    let error = refused(Plan { cases, ..long });
    assert!(matches!(error, BenchError::Context { tokens, .. } if tokens == context + 2));
    for ranks in [0, 9] {
        assert!(matches!(refused(plan("llama3", ranks)), BenchError::Ranks { stripes: 8, .. }));
    }
    let missing = Plan { directory: "missing".into(), ..plan("llama3", 1) };
    assert!(matches!(refused(missing), BenchError::Checkpoint(_)));
}

/// Elements of all tensors that `of` picks.
fn elements(spec: &ModelSpec, of: impl Fn(Part) -> bool) -> f64 {
    let picked = spec.tensors().into_iter().filter(|tensor| of(tensor.part));
    picked.map(|tensor| tensor.elements() as f64).sum()
}

#[test]
fn a_step_reads_what_it_uses() {
    let decode = Case::Decode { sequences: 1, context: 10 };
    for name in ["llama3", "llama-tied-f32", "mixtral"] {
        let spec = plan(name, 1).spec;
        let bound = Bound::new(&spec, ComputeType::F32, decode, &SLOW);
        let all = elements(&spec, |_| true);
        let embedding = elements(&spec, |part| part == Part::Embedding && !spec.tied);
        let expert = elements(&spec, |part| part.expert().is_some());
        let idle = match &spec.layers[0].feed_forward {
            model::FeedForward::Dense(_) => 0.0,
            model::FeedForward::Experts(e) => expert * (1.0 - e.chosen as f64 / e.count as f64),
        };
        let cached = stripes::kv_bytes(&spec, 1, &[0], ComputeType::F32, 10, 1) as f64;
        let read = 4.0 * (all - embedding - idle) + cached;
        assert!((bound.bytes - read).abs() < 1.0, "{name}: {} and {read}", bound.bytes);
        // At a byte and an operation a second, the longer of the two is what a token takes.
        assert_eq!(bound.rate(), 1.0 / bound.reading.max(bound.arithmetic), "{name}");
    }
}

#[test]
fn arithmetic_grows_with_tokens_and_reading_does_not() {
    let spec = plan("llama3", 1).spec;
    let of = |tokens| Bound::new(&spec, ComputeType::F32, Case::Prefill { tokens }, &SLOW);
    let (few, many) = (of(10), of(100));
    assert_eq!(few.bytes, many.bytes);
    assert!(many.operations > 9.0 * few.operations);
    let expert = plan("mixtral", 1).spec;
    let of = |tokens| Bound::new(&expert, ComputeType::F32, Case::Prefill { tokens }, &SLOW);
    assert!(of(100).bytes > of(1).bytes, "more tokens use more experts");
}
