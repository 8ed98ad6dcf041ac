//! A group of ranks as threads of this process, driven by the real scheduler, with every row of
//! logits recorded.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use collective::tcp::Endpoint;
use collective::{Collective, Link, Membership, TreeCollective};
use compute::{CpuDevice, KernelClass};
use decoder::{CacheSize, Checkpoint, Decoder, Kept, LoadProgress, RankShape, sample};
use engine::{
    EngineConfig, Event, Request, Sampled, Sampling, Scheduler, SeqId, SequenceOutput, Step,
    StepOutput, StopRules, Want,
};
use model::{ComputeType, ModelSpec};
use planner::{ExpertCut, NodeId, RankPlan};

/// How a group is made and run. The default is one rank, one thread, whole prompts.
#[derive(Debug, Clone)]
pub struct Setup {
    /// By rank: its stripes.
    pub owners: Vec<Vec<usize>>,
    /// How experts are divided among stripes.
    pub experts: ExpertCut,
    /// What the weights are kept in.
    pub compute: ComputeType,
    /// Threads per rank.
    pub threads: usize,
    /// Instruction set; `None` takes the best.
    pub kernels: Option<KernelClass>,
    /// Collectives over TCP instead of within the process.
    pub tcp: bool,
    /// Most prompt tokens of a sequence in one step.
    pub chunk: usize,
    /// KV blocks of 16 tokens.
    pub blocks: usize,
    /// Sums partials one after the other instead of along the tree: a deliberate mistake.
    pub wrong_order: bool,
    /// By rank: the stripes that its device held in a group before, whose weights it takes over.
    pub held: Vec<Vec<usize>>,
}

impl Setup {
    /// `ranks` ranks with contiguous stripes out of eight, as even as can be.
    pub fn even(ranks: usize) -> Self {
        let run = |r: usize| (r * 8 / ranks..(r + 1) * 8 / ranks).collect();
        Self::owned((0..ranks).map(run).collect())
    }

    /// Ranks with given stripes out of eight.
    pub fn owned(owners: Vec<Vec<usize>>) -> Self {
        Self {
            owners,
            experts: ExpertCut::Stripe,
            compute: ComputeType::F32,
            threads: 1,
            kernels: None,
            tcp: false,
            chunk: 512,
            blocks: 512,
            wrong_order: false,
            held: Vec::new(),
        }
    }

    fn stripes(&self) -> usize {
        self.owners.iter().map(Vec::len).sum()
    }
}

/// What came out of a run.
#[derive(Debug, Default)]
pub struct Trace {
    /// By request and position: the logits after that position.
    pub logits: BTreeMap<(usize, usize), Vec<f32>>,
    /// By request: the tokens generated.
    pub generated: Vec<Vec<u32>>,
    /// Sequences that lost their blocks and were computed again.
    pub preemptions: u64,
}

impl Trace {
    /// A hash over every logit of one request in position order.
    pub fn digest(&self, request: usize) -> String {
        let mut hasher = blake3::Hasher::new();
        for ((_, position), logits) in self.logits.range((request, 0)..=(request, usize::MAX)) {
            hasher.update(&(*position as u64).to_le_bytes());
            for logit in logits {
                hasher.update(&logit.to_bits().to_le_bytes());
            }
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// A greedy request whose logits are wanted at every position.
pub fn greedy(prompt: &[u32], max_tokens: usize) -> Request {
    Request {
        prompt: prompt.to_vec(),
        sampling: Sampling::greedy(),
        stop: StopRules { max_tokens, min_tokens: 0, stop_ids: Vec::new() },
        logprobs: None,
        prompt_logprobs: Some(0),
    }
}

/// Runs all requests to their ends on a group made as `setup` says.
///
/// # Panics
/// Where anything fails: this is for tests.
pub fn run(
    spec: &Arc<ModelSpec>,
    checkpoint: &Arc<Checkpoint>,
    setup: &Setup,
    requests: &[Request],
) -> Trace {
    let mut links = links(setup);
    std::thread::scope(|scope| {
        let mut followers = Vec::new();
        for rank in 1..setup.owners.len() {
            let (steps, inbox) = mpsc::channel::<Step>();
            let link = links.remove(&rank).expect("a link per rank");
            followers.push(steps);
            scope.spawn(move || {
                let (mut decoder, mut collective) = make(spec, checkpoint, setup, rank, link());
                while let Ok(step) = inbox.recv() {
                    let result = decoder.forward(&step, collective.as_mut(), &mut |_| {});
                    result.expect("a step on a follower");
                }
            });
        }
        let link = links.remove(&0).expect("a link per rank");
        let (mut decoder, mut collective) = make(spec, checkpoint, setup, 0, link());
        let mut scheduler = Scheduler::new(engine_config(spec, setup)).expect("limits");
        let numbers: BTreeMap<SeqId, usize> = requests
            .iter()
            .enumerate()
            .map(|(n, r)| (scheduler.submit(r.clone()).expect("a request that fits"), n))
            .collect();
        let mut trace = Trace { generated: vec![Vec::new(); requests.len()], ..Trace::default() };
        while let Some(step) = scheduler.schedule() {
            for follower in &followers {
                follower.send(step.clone()).expect("a follower that runs");
            }
            let mut outputs = empty_outputs(&step);
            let record = |l: decoder::Logits<'_>| {
                record(&scheduler, &step, &numbers, l, &mut trace, &mut outputs);
            };
            let mut record = record;
            decoder.forward(&step, collective.as_mut(), &mut record).expect("a step on rank 0");
            let output = StepOutput { number: step.number, outputs };
            for event in scheduler.commit(output).expect("an output that fits its step") {
                if let Event::Token { seq, sampled, .. } = event {
                    trace.generated[numbers[&seq]].push(sampled.token);
                }
            }
            scheduler.check_integrity().expect("whole block accounting");
        }
        trace.preemptions = scheduler.counts().preemptions;
        trace
    })
}

fn empty_outputs(step: &Step) -> Vec<SequenceOutput> {
    let output = |seq| SequenceOutput { seq, sampled: None, prompt_logprobs: Vec::new() };
    step.entries.iter().map(|e| output(e.seq)).collect()
}

/// Keeps a row of logits and answers what the scheduler wants of it.
fn record(
    scheduler: &Scheduler,
    step: &Step,
    numbers: &BTreeMap<SeqId, usize>,
    logits: decoder::Logits<'_>,
    trace: &mut Trace,
    outputs: &mut [SequenceOutput],
) {
    let entry = &step.entries[logits.entry];
    let position = entry.start + logits.token;
    let before = trace.logits.insert((numbers[&entry.seq], position), logits.values.to_vec());
    if let Some(before) = before {
        let same = before.iter().zip(logits.values).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same, "computing position {position} again gave other bits");
    }
    let (request, generated) = scheduler.context(entry.seq).expect("a live sequence");
    let output = &mut outputs[logits.entry];
    if entry.want == Want::All && position + 1 < request.prompt.len() {
        let next = request.prompt[position + 1];
        output.prompt_logprobs.push(sample::logprobs(logits.values, next, 0));
    }
    if logits.token + 1 == entry.tokens.len() && scheduler.samples(entry) {
        let history = sample::History { prompt: &request.prompt, generated, forbidden: &[] };
        let token = sample::choose(logits.values, &request.sampling, history);
        output.sampled = Some(Sampled { token, logprobs: None });
    }
}

fn engine_config(spec: &ModelSpec, setup: &Setup) -> EngineConfig {
    EngineConfig {
        block_tokens: 16,
        blocks: setup.blocks,
        context: spec.context,
        vocab: spec.vocab,
        max_sequences: 64,
        step_tokens: 512,
        chunk_tokens: setup.chunk,
        waiting_max: 64,
    }
}

type MakeLink = Box<dyn FnOnce() -> Box<dyn Link> + Send>;

/// By rank: how its thread makes its link.
fn links(setup: &Setup) -> BTreeMap<usize, MakeLink> {
    let size = setup.owners.len();
    let membership = Membership { group: 1, epoch: 1 };
    if !setup.tcp {
        let links = collective::local::links(size, membership).into_iter().enumerate();
        return links
            .map(|(rank, link)| {
                (rank, Box::new(move || Box::new(link) as Box<dyn Link>) as MakeLink)
            })
            .collect();
    }
    let bind = |_| Endpoint::bind("127.0.0.1:0").expect("a port on loopback");
    let endpoints: Vec<Endpoint> = (0..size).map(bind).collect();
    let peers: Vec<SocketAddr> = endpoints.iter().map(Endpoint::local_addr).collect();
    let make = |(rank, endpoint): (usize, Endpoint)| {
        let peers = peers.clone();
        let link = move || {
            let wait = Duration::from_secs(60);
            let secure = crate::nodes::node(rank);
            let link = endpoint.connect(membership, rank, &peers, &secure, wait);
            let link = link.expect("a full mesh");
            Box::new(link) as Box<dyn Link>
        };
        (rank, Box::new(link) as MakeLink)
    };
    endpoints.into_iter().enumerate().map(make).collect()
}

type Rank = (Decoder<CpuDevice>, Box<dyn Collective<CpuDevice>>);

fn make(
    spec: &Arc<ModelSpec>,
    checkpoint: &Checkpoint,
    setup: &Setup,
    rank: usize,
    link: Box<dyn Link>,
) -> Rank {
    let before = setup.held.get(rank).map(|held| load(spec, checkpoint, setup, held, None));
    let before = before.map(|(decoder, _)| decoder.into_weights());
    let (decoder, _) = load(spec, checkpoint, setup, &setup.owners[rank], before);
    let owners = setup.owners.clone();
    let tree = TreeCollective::new(link, setup.stripes(), owners).expect("a partition");
    let collective: Box<dyn Collective<CpuDevice>> = if setup.wrong_order {
        Box::new(crate::mistake::LeftToRight(tree))
    } else {
        Box::new(tree)
    };
    (decoder, collective)
}

/// Loads a rank of those stripes, after what its device held before; also the bytes read.
///
/// # Panics
/// Where it does not load: this is for tests.
pub fn load(
    spec: &Arc<ModelSpec>,
    checkpoint: &Checkpoint,
    setup: &Setup,
    stripes: &[usize],
    mut before: Option<Kept<CpuDevice>>,
) -> (Decoder<CpuDevice>, u64) {
    let device = CpuDevice::new(setup.threads, setup.kernels).expect("a CPU device");
    let (rank, node, stripes) = (0, NodeId(1), stripes.to_vec());
    let plan = RankPlan { rank, node, device: 0, stripes, weight_bytes: 0, kv_bytes: 0 };
    let shape = RankShape {
        stripes: setup.stripes(),
        plan: &plan,
        experts: setup.experts,
        compute: setup.compute,
        cache: CacheSize { blocks: setup.blocks, block_tokens: 16, context: spec.context },
    };
    let (spec, mut read) = (Arc::clone(spec), 0);
    let mut progress = |progress: LoadProgress| {
        read = progress.bytes_read;
        true
    };
    let decoder = Decoder::load_after(&mut before, device, spec, shape, checkpoint, &mut progress);
    (decoder.expect("a rank that loads"), read)
}

/// Bytes of a checkpoint that a rank with these stripes out of eight reads.
fn bytes_read(
    spec: &Arc<ModelSpec>,
    checkpoint: &Checkpoint,
    experts: ExpertCut,
    stripes: Vec<usize>,
) -> u64 {
    let node = NodeId(1);
    let plan = RankPlan { rank: 0, node, device: 0, stripes, weight_bytes: 0, kv_bytes: 0 };
    let cache = CacheSize { blocks: 1, block_tokens: 16, context: 16 };
    let shape = RankShape { stripes: 8, plan: &plan, experts, compute: ComputeType::F32, cache };
    let device = CpuDevice::new(1, None).expect("a CPU device");
    let mut last = (0, 0);
    Decoder::load(device, spec.clone(), shape, checkpoint, &mut |progress| {
        last = (progress.bytes_read, progress.bytes_total);
        true
    })
    .expect("a rank that loads");
    assert_eq!(last.0, last.1, "the total is exact at the end");
    last.0
}

/// Asserts that a rank with one of eight stripes reads little more than an eighth of a checkpoint,
/// whichever way experts are divided.
pub fn reads_its_stripes_only(spec: &Arc<ModelSpec>, checkpoint: &Checkpoint) {
    for experts in ExpertCut::ALL {
        let read = |stripes| bytes_read(spec, checkpoint, experts, stripes);
        let whole = read((0..8).collect());
        // Neighbouring stripes share KV heads, runs of feed-forward columns may differ by a block,
        // and where there are fewer experts than stripes some have one and some have none.
        let most = if experts == ExpertCut::Stripe { whole / 4 } else { whole / 3 };
        let each: Vec<u64> = (0..8).map(|stripe| read(vec![stripe])).collect();
        for (stripe, one) in each.iter().enumerate() {
            assert!(*one < most, "{experts}: stripe {stripe} read {one} of {whole} bytes");
        }
        let all: u64 = each.iter().sum();
        assert!(all < whole * 3 / 2, "{experts}: all together read {all} for {whole} bytes");
    }
}
