//! Record and replay: one rank of three runs alone, with what the others once gave it.

use std::sync::Arc;

use collective::record::{
    Checked, Operation, Recorder, Recording, ReplayError, Replayer, Tolerance,
};
use collective::{AbortHandle, Collective, CollectiveError, Membership, TreeCollective, local};
use compute::{CpuDevice, Device};
use decoder::{Checkpoint, Decoder};
use engine::{BlockId, SeqId, Step, StepEntry, Want};
use model::ModelSpec;
use tests::golden::{self, Golden};
use tests::group::{Setup, load};

const RANKS: usize = 3;
const LIMIT: u64 = 64 << 20;

/// A prompt, then a token after it.
fn steps(prompt: &[u32]) -> [Step; 2] {
    let step = |number, start, tokens: &[u32]| {
        let end = start + tokens.len();
        let entry = StepEntry {
            seq: SeqId(1),
            start,
            tokens: tokens.to_vec(),
            blocks: (0..end.div_ceil(16) as u32).map(BlockId).collect(),
            want: Want::All,
        };
        Step { number, entries: vec![entry] }
    };
    [step(0, 0, prompt), step(1, prompt.len(), &[7])]
}

/// Bits of every row of logits.
fn forward(
    decoder: &mut Decoder<CpuDevice>,
    collective: &mut dyn Collective<CpuDevice>,
    prompt: &[u32],
) -> Vec<Vec<u32>> {
    let mut rows = Vec::new();
    for step in steps(prompt) {
        let mut keep = |logits: decoder::Logits<'_>| {
            rows.push(logits.values.iter().map(|value| value.to_bits()).collect());
        };
        decoder.forward(&step, collective, &mut keep).expect("a step");
    }
    rows
}

fn rank(spec: &Arc<ModelSpec>, checkpoint: &Checkpoint, rank: usize) -> Decoder<CpuDevice> {
    let setup = Setup::even(RANKS);
    load(spec, checkpoint, &setup, &setup.owners[rank], None).0
}

/// By rank: its logits (rank 0 alone has any) and its recording.
fn record(golden: &Golden, prompt: &[u32]) -> Vec<(Vec<Vec<u32>>, Recording)> {
    let links = local::links(RANKS, Membership { group: 1, epoch: 1 });
    std::thread::scope(|scope| {
        let run = |(number, link)| {
            move || {
                let mut decoder = rank(&golden.spec, &golden.checkpoint, number);
                let owners = Setup::even(RANKS).owners;
                let tree = TreeCollective::new(Box::new(link), 8, owners).expect("a partition");
                let mut recorder = Recorder::new(Box::new(tree), LIMIT);
                let rows = forward(&mut decoder, &mut recorder, prompt);
                (rows, recorder.finish().expect("a recording"))
            }
        };
        let threads: Vec<_> =
            links.into_iter().enumerate().map(|rank| scope.spawn(run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank")).collect()
    })
}

/// Adds to one number of one sum before it is handed on: a rank that computes wrongly there.
struct Meddler {
    inner: Replayer,
    sums: u64,
    wrong: u64,
    by: f32,
}

impl Collective<CpuDevice> for Meddler {
    fn rank(&self) -> usize {
        Collective::<CpuDevice>::rank(&self.inner)
    }

    fn size(&self) -> usize {
        Collective::<CpuDevice>::size(&self.inner)
    }

    fn sum_stripes(
        &mut self,
        device: &CpuDevice,
        partials: &<CpuDevice as Device>::Tensor,
        rows: usize,
        out: &mut <CpuDevice as Device>::Tensor,
    ) -> Result<(), CollectiveError> {
        let values = device.host(partials);
        let mut changed = device.tensor(1, values.len()).expect("memory");
        device.host_mut(&mut changed).copy_from_slice(values);
        if self.sums == self.wrong {
            device.host_mut(&mut changed)[5] += self.by;
        }
        self.sums += 1;
        self.inner.sum_stripes(device, &changed, rows, out)
    }

    fn gather_columns(
        &mut self,
        device: &CpuDevice,
        part: &<CpuDevice as Device>::Tensor,
        widths: &[usize],
        out: &mut <CpuDevice as Device>::Tensor,
    ) -> Result<(), CollectiveError> {
        self.inner.gather_columns(device, part, widths, out)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        Collective::<CpuDevice>::barrier(&mut self.inner)
    }

    fn accuse(&mut self, peer: usize) {
        Collective::<CpuDevice>::accuse(&mut self.inner, peer);
    }

    fn abort_handle(&self) -> AbortHandle {
        Collective::<CpuDevice>::abort_handle(&self.inner)
    }
}

/// A rank alone, wrong in one sum by so much: its logits and what the replay says.
fn replay(
    golden: &Golden,
    recording: &Recording,
    prompt: &[u32],
    (wrong, by): (u64, f32),
    tolerance: Tolerance,
) -> (Vec<Vec<u32>>, Result<Vec<Checked>, ReplayError>) {
    let bytes = recording.encode();
    let read = Recording::decode(&bytes, LIMIT).expect("what was written");
    let mut decoder = rank(&golden.spec, &golden.checkpoint, read.rank as usize);
    let mut meddler = Meddler { inner: Replayer::new(read, tolerance), sums: 0, wrong, by };
    let rows = forward(&mut decoder, &mut meddler, prompt);
    (rows, meddler.inner.finish())
}

#[test]
fn each_rank_of_three_runs_alone_with_the_same_logits() {
    // Grouped attention with experts, and latent attention.
    for name in ["mixtral", "deepseek-v3"] {
        let golden = golden::load(name);
        let prompt = &golden.prompts["short"].ids;
        let sums = 1 + 2 * golden.spec.layers.len() as u64;
        for (logits, recording) in record(&golden, prompt) {
            assert_eq!(recording.calls.len() as u64, 2 * (sums + 1), "{name}: two steps");
            let nowhere = (u64::MAX, 0.0);
            let (rows, report) = replay(&golden, &recording, prompt, nowhere, Tolerance::Bits);
            let checked = report.expect("the same contributions");
            assert_eq!(checked.len(), recording.calls.len());
            assert_eq!(rows, logits, "{name}: rank {}", recording.rank);
            assert_eq!(rows.is_empty(), recording.rank != 0);
        }
    }
}

#[test]
fn a_wrong_contribution_is_named_by_rank_call_and_operation() {
    let golden = golden::load("mixtral");
    let prompt = &golden.prompts["short"].ids;
    for (logits, recording) in record(&golden, prompt) {
        for wrong in [0, 3] {
            let at = (wrong, 1e-3);
            let (rows, report) = replay(&golden, &recording, prompt, at, Tolerance::Bits);
            let error = report.expect_err("a wrong number");
            let ReplayError::Diverged { rank, call, operation, first, more, .. } = error else {
                panic!("{error}");
            };
            // The recorded sums go on, so nothing after it is off.
            assert_eq!((rank, call, more), (recording.rank, wrong, 0));
            assert_eq!((operation, first), (Operation::Sum, 5));
            assert_eq!(rows, logits);
        }
        let close = Tolerance::RelativeL2(1e-2);
        let (_, report) = replay(&golden, &recording, prompt, (3, 1e-6), close);
        let checked = report.expect("within the tolerance");
        assert!(checked[3].relative_l2 > 0.0 && checked[4].relative_l2 == 0.0);
        let (_, report) = replay(&golden, &recording, prompt, (3, 1e3), close);
        report.expect_err("too far");
    }
}
