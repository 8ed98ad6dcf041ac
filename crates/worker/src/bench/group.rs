//! Ranks as threads of this process, and steps made by hand.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use collective::local::{self, LocalLink};
use collective::{AbortHandle, Collective, CollectiveError, Membership, TreeCollective};
use compute::CpuDevice;
use compute::cpu::CpuTensor;
use decoder::{CacheSize, Checkpoint, Decoder, ForwardError, RankShape, sample};
use engine::{BlockId, Sampling, SeqId, Step, StepEntry, Want};
use planner::{ExpertCut, NodeId, RankPlan};

use super::{BLOCK, BenchError, Plan};

/// Rank 0, and where the other ranks get their steps.
pub(super) struct Group<'a> {
    decoder: Decoder<CpuDevice>,
    collective: Timed,
    followers: &'a [mpsc::Sender<Step>],
    /// Blocks of the cache.
    blocks: usize,
    /// The next step's number.
    number: u64,
    /// By sequence: the token that its last step gave.
    tokens: Vec<u32>,
}

/// Loads all ranks and calls `run` on rank 0's thread, this one. `blocks` of cache each.
pub(super) fn with<T>(
    plan: &Plan,
    checkpoint: &Checkpoint,
    (stripes, blocks): (usize, usize),
    run: impl FnOnce(&mut Group<'_>) -> Result<T, BenchError>,
) -> Result<T, BenchError> {
    let owner = |r: usize| (r * stripes / plan.ranks..(r + 1) * stripes / plan.ranks).collect();
    let owners: Vec<Vec<usize>> = (0..plan.ranks).map(owner).collect();
    let membership = Membership { group: 1, epoch: 1 };
    let mut links = local::links(plan.ranks, membership).into_iter().enumerate();
    let make = &|rank, link| make(plan, checkpoint, (&owners, blocks), rank, link);
    std::thread::scope(|scope| {
        let first = links.next();
        let (mut senders, mut followers) = (Vec::new(), Vec::new());
        for (rank, link) in links {
            let (sender, steps) = mpsc::channel();
            senders.push(sender);
            followers.push(scope.spawn(move || follow(make(rank, link)?, &steps)));
        }
        let lead = || {
            let (_, link) = first.ok_or(BenchError::Ranks { ranks: 0, stripes })?;
            let (decoder, mut collective) = make(0, link)?;
            // Ranks that load more slowly are waited for.
            collective.inner.barrier()?;
            let followers = senders.as_slice();
            let (number, tokens) = (0, Vec::new());
            run(&mut Group { decoder, collective, followers, blocks, number, tokens })
        };
        let result = lead();
        drop(senders);
        let ends = followers.into_iter().enumerate();
        let ends = ends.map(|(i, f)| f.join().unwrap_or(Err(BenchError::Panicked { rank: i + 1 })));
        // What went wrong elsewhere comes first: here it shows as a broken collective.
        ends.collect::<Result<Vec<()>, _>>()?;
        result
    })
}

fn follow(
    (mut decoder, mut collective): (Decoder<CpuDevice>, Timed),
    steps: &mpsc::Receiver<Step>,
) -> Result<(), BenchError> {
    collective.inner.barrier()?;
    while let Ok(step) = steps.recv() {
        decoder.forward(&step, &mut collective, &mut |_| {})?;
    }
    Ok(())
}

fn make(
    plan: &Plan,
    checkpoint: &Checkpoint,
    (owners, blocks): (&[Vec<usize>], usize),
    rank: usize,
    link: LocalLink,
) -> Result<(Decoder<CpuDevice>, Timed), BenchError> {
    let device = CpuDevice::new(plan.threads, plan.kernels)?;
    let (stripes, node) = (owners[rank].clone(), NodeId(1));
    let rank_plan = RankPlan { rank, node, device: rank, stripes, weight_bytes: 0, kv_bytes: 0 };
    let stripes = owners.iter().map(Vec::len).sum();
    let shape = RankShape {
        stripes,
        plan: &rank_plan,
        experts: ExpertCut::Stripe,
        compute: plan.compute,
        cache: CacheSize { blocks, block_tokens: BLOCK, context: plan.spec.context },
    };
    let decoder = Decoder::load(device, plan.spec.clone(), shape, checkpoint, &mut |_| true)?;
    let mut tree = TreeCollective::new(Box::new(link), stripes, owners.to_vec())?;
    // Loading may take minutes; a rank that fails ends its link at once.
    tree.set_timeout(Duration::from_secs(600));
    Ok((decoder, Timed { inner: Box::new(tree), spent: Duration::ZERO }))
}

impl Group<'_> {
    /// Time that rank 0 has spent in collectives so far.
    pub(super) fn in_collectives(&self) -> Duration {
        self.collective.spent
    }

    /// Runs a prompt in one step; how long it took.
    pub(super) fn prefill(&mut self, prompt: &[u32]) -> Result<Duration, BenchError> {
        let blocks = run_of_blocks(0, prompt.len());
        self.timed(vec![entry(0, 0, prompt, &blocks)])
    }

    /// Gives each of `sequences` the context `prompt`, in steps of at most `chunk` tokens.
    pub(super) fn fill(
        &mut self,
        sequences: usize,
        prompt: &[u32],
        chunk: usize,
    ) -> Result<(), BenchError> {
        self.tokens = vec![prompt.last().copied().unwrap_or(0); sequences];
        for sequence in 0..sequences {
            // As many blocks as the steps to come need, so that sequences do not share any.
            let blocks = self.blocks(sequence, sequences);
            for (index, part) in prompt.chunks(chunk).enumerate() {
                self.timed(vec![entry(sequence, index * chunk, part, &blocks)])?;
            }
        }
        Ok(())
    }

    /// Runs `steps` steps of one token for each sequence, from `context` on; how long they took.
    pub(super) fn decode(
        &mut self,
        sequences: usize,
        context: usize,
        steps: usize,
    ) -> Result<Duration, BenchError> {
        let tables: Vec<_> = (0..sequences).map(|s| self.blocks(s, sequences)).collect();
        let began = Instant::now();
        for position in context..context + steps {
            let entries = tables.iter().enumerate();
            let entries = entries.map(|(s, blocks)| entry(s, position, &[self.tokens[s]], blocks));
            let entries = entries.collect();
            self.timed(entries)?;
        }
        Ok(began.elapsed())
    }

    /// An equal share of the cache for each sequence.
    fn blocks(&self, sequence: usize, sequences: usize) -> Vec<BlockId> {
        let each = self.blocks / sequences.max(1);
        run_of_blocks(sequence * each, each * BLOCK)
    }

    /// Runs a step on all ranks and takes the likeliest token of each sequence.
    fn timed(&mut self, entries: Vec<StepEntry>) -> Result<Duration, BenchError> {
        let step = Step { number: self.number, entries };
        self.number += 1;
        let began = Instant::now();
        for follower in self.followers {
            // A follower that ended says why when it is joined.
            let _ = follower.send(step.clone());
        }
        let (greedy, tokens) = (Sampling::greedy(), &mut self.tokens);
        let result: Result<(), ForwardError> =
            self.decoder.forward(&step, &mut self.collective, &mut |logits| {
                let history = sample::History { prompt: &[], generated: &[], forbidden: &[] };
                let token = sample::choose(logits.values, &greedy, history);
                let sequence = step.entries[logits.entry].seq.0 as usize;
                if let Some(last) = tokens.get_mut(sequence) {
                    *last = token;
                }
            });
        result?;
        Ok(began.elapsed())
    }
}

fn run_of_blocks(first: usize, positions: usize) -> Vec<BlockId> {
    (first..first + positions.div_ceil(BLOCK)).map(|block| BlockId(block as u32)).collect()
}

fn entry(sequence: usize, start: usize, tokens: &[u32], blocks: &[BlockId]) -> StepEntry {
    StepEntry {
        seq: SeqId(sequence as u64),
        start,
        tokens: tokens.to_vec(),
        blocks: blocks.to_vec(),
        want: Want::Last,
    }
}

/// A collective that says how long its caller spent in it.
struct Timed {
    inner: Box<dyn Collective<CpuDevice>>,
    spent: Duration,
}

impl Timed {
    fn timed<T>(&mut self, run: impl FnOnce(&mut dyn Collective<CpuDevice>) -> T) -> T {
        let began = Instant::now();
        let result = run(self.inner.as_mut());
        self.spent += began.elapsed();
        result
    }
}

impl Collective<CpuDevice> for Timed {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn sum_stripes(
        &mut self,
        device: &CpuDevice,
        partials: &CpuTensor,
        rows: usize,
        out: &mut CpuTensor,
    ) -> Result<(), CollectiveError> {
        self.timed(|inner| inner.sum_stripes(device, partials, rows, out))
    }

    fn gather_columns(
        &mut self,
        device: &CpuDevice,
        part: &CpuTensor,
        widths: &[usize],
        out: &mut CpuTensor,
    ) -> Result<(), CollectiveError> {
        self.timed(|inner| inner.gather_columns(device, part, widths, out))
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.inner.barrier()
    }

    fn accuse(&mut self, peer: usize) {
        self.inner.accuse(peer);
    }

    fn abort_handle(&self) -> AbortHandle {
        self.inner.abort_handle()
    }
}
