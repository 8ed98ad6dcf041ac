//! One rank: a thread that loads its stripes, meets its peers and runs steps until told to stop.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use cluster::Deployment;
use collective::tcp::Endpoint;
use collective::{AbortHandle, Collective, Link, Membership, TreeCollective};
use compute::CpuDevice;
use decoder::{CacheSize, Checkpoint, Decoder, ForwardError, LoadProgress, RankShape};
use engine::Step;
use identity::Tls;
use model::ModelSpec;
use tokio::sync::mpsc as channel;
use wire::{FormGroup, Report};

use crate::nodes::Nodes;
use crate::pulse::{Counted, Pulse, Watched};
use crate::shelf::Shelf;

/// How long ranks wait for each other after loading: a slow disk may take this much longer.
const MEET: Duration = Duration::from_secs(600);

/// What a group needs to know of itself on every rank.
pub(crate) struct Formation {
    /// The coordinator's order, checked against the model.
    pub(crate) order: FormGroup,
    /// By rank: where it meets its peers.
    pub(crate) meeting: Vec<SocketAddr>,
}

impl Formation {
    /// The incarnation, as collectives write it on their frames.
    pub(crate) fn membership(&self) -> Membership {
        Membership { group: self.order.group.0, epoch: self.order.epoch.0 }
    }

    /// The KV cache every rank keeps.
    pub(crate) fn cache(&self) -> CacheSize {
        let Deployment { kv_blocks, block_tokens, context, .. } = &self.order.deployment;
        CacheSize { blocks: *kv_blocks, block_tokens: *block_tokens, context: *context }
    }
}

/// How a rank reaches its peers.
pub(crate) enum Meeting {
    /// All ranks are threads of this process.
    Local(Box<dyn Link>),
    /// Over TCP, from the device's own endpoint, as this worker.
    Tcp(Arc<Endpoint>, Tls),
}

/// Stops a rank's thread wherever it waits.
#[derive(Clone, Default)]
pub(crate) struct Stop {
    stopped: Arc<AtomicBool>,
    links: Arc<Mutex<Vec<AbortHandle>>>,
    endpoints: Arc<Mutex<Vec<Arc<Endpoint>>>>,
}

impl Stop {
    /// Ends loading, waiting and collectives.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        for link in self.links.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            link.abort();
        }
        for endpoint in self.endpoints.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            endpoint.cancel();
        }
    }

    /// Whether it was told to stop.
    pub(crate) fn stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    fn watch_endpoint(&self, endpoint: &Arc<Endpoint>) {
        let mut endpoints = self.endpoints.lock().unwrap_or_else(PoisonError::into_inner);
        endpoints.push(Arc::clone(endpoint));
    }

    fn watch(&self, link: AbortHandle) {
        self.links.lock().unwrap_or_else(PoisonError::into_inner).push(link.clone());
        if self.stopped() {
            link.abort();
        }
    }
}

/// Everything a rank's thread starts with.
pub(crate) struct Setup {
    pub(crate) rank: usize,
    pub(crate) formation: Arc<Formation>,
    pub(crate) spec: Arc<ModelSpec>,
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) device: CpuDevice,
    /// Taken when the rank has loaded.
    pub(crate) meeting: Option<Meeting>,
    pub(crate) stop: Stop,
    pub(crate) reports: channel::UnboundedSender<Report>,
    /// Where weights stay for the next rank of the device.
    pub(crate) shelf: Shelf,
    /// What the rank does, for others to see.
    pub(crate) pulse: Pulse,
}

/// Why a rank cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) reason: String,
    /// The rank that is at fault, where it is another.
    pub(crate) blames: Option<usize>,
}

impl Failure {
    /// A failure of the rank's own.
    pub(crate) fn own(reason: impl ToString) -> Self {
        Self { reason: reason.to_string(), blames: None }
    }
}

impl From<ForwardError> for Failure {
    fn from(error: ForwardError) -> Self {
        Self { reason: error.to_string(), blames: error.blames() }
    }
}

/// A loaded rank among its peers.
pub(crate) struct Rank {
    pub(crate) decoder: Decoder<CpuDevice>,
    pub(crate) collective: Box<dyn Collective<CpuDevice>>,
    pub(crate) pulse: Pulse,
}

impl Setup {
    /// Tells the session, which may have ended; the rank will be stopped by then.
    fn report(&self, report: Report) {
        let _ = self.reports.send(report);
    }

    /// Loads, meets the peers and reports readiness; or the reason why not.
    pub(crate) fn form(&mut self) -> Result<Rank, Failure> {
        let FormGroup { group, epoch, .. } = self.formation.order;
        let (g, e, rank) = (group.0, epoch.0, self.rank);
        let decoder = self.load().map_err(Failure::own)?;
        tracing::debug!(group = g, epoch = e, rank, "loaded");
        let collective = match self.meet() {
            Ok(collective) => collective,
            Err(failure) => {
                self.shelve(decoder);
                return Err(failure);
            }
        };
        tracing::debug!(group = g, epoch = e, rank, "met its peers");
        self.report(Report::Ready { group, epoch, rank: self.rank });
        Ok(Rank { decoder, collective, pulse: self.pulse.clone() })
    }

    /// Says that the rank ended, unless it was told to.
    pub(crate) fn ended(&self, Failure { reason, blames }: Failure) {
        if self.stop.stopped() {
            return;
        }
        let FormGroup { group, epoch, .. } = self.formation.order;
        let (g, e, rank) = (group.0, epoch.0, self.rank);
        match blames {
            // Whoever is at fault, or the coordinator, says more.
            Some(peer) => {
                tracing::warn!(group = g, epoch = e, rank, peer, reason, "rank ended");
            }
            None => tracing::error!(group = g, epoch = e, rank, reason, "rank failed"),
        }
        self.report(Report::Failed { group, epoch, rank, reason, blames });
    }

    /// Ends a rank that cannot go on, for others to see: its peers learn at once whose fault it is,
    /// so that none of them is taken for the one that failed; then the coordinator does. The
    /// weights are put away last, for others wait for what was said.
    pub(crate) fn end(&self, mut rank: Rank, failure: Failure) {
        if let Some(peer) = failure.blames {
            rank.collective.accuse(peer);
        }
        self.ended(failure);
        self.keep(rank);
    }

    /// Lets go of the peers and leaves the weights to the device's next rank.
    fn keep(&self, rank: Rank) {
        drop(rank.collective);
        self.shelve(rank.decoder);
    }

    fn shelve(&self, decoder: Decoder<CpuDevice>) {
        self.shelf.put(self.number(), self.digest(), decoder.into_weights());
    }

    /// Which of the worker's devices this is.
    fn number(&self) -> usize {
        self.formation.order.plan.ranks[self.rank].device
    }

    /// Which model this is a rank of.
    fn digest(&self) -> &str {
        &self.formation.order.deployment.digest
    }

    fn load(&self) -> Result<Decoder<CpuDevice>, String> {
        let FormGroup { group, epoch, deployment, plan, .. } = &self.formation.order;
        let shape = RankShape {
            stripes: plan.stripes,
            plan: &plan.ranks[self.rank],
            experts: deployment.experts,
            compute: deployment.compute,
            cache: self.formation.cache(),
        };
        let mut progress = |p: LoadProgress| {
            let LoadProgress { bytes_read, bytes_total, .. } = p;
            let (group, epoch, rank) = (*group, *epoch, self.rank);
            self.report(Report::Progress { group, epoch, rank, bytes_read, bytes_total });
            !self.stop.stopped()
        };
        let device = self.device.clone();
        let spec = Arc::clone(&self.spec);
        let mut before = self.shelf.take(self.number(), self.digest());
        let loaded =
            Decoder::load_after(&mut before, device, spec, shape, &self.checkpoint, &mut progress);
        if let Some(before) = before {
            self.shelf.put(self.number(), self.digest(), before);
        }
        let decoder = loaded.map_err(|e| e.to_string())?;
        let rounding = decoder.rounding();
        if rounding.errors > 0.0 {
            let percent = rounding.relative() * 100.0;
            tracing::info!(
                rank = self.rank,
                "weights kept in {}: off by {percent:.2} % of their root mean square",
                deployment.compute
            );
        }
        Ok(decoder)
    }

    fn meet(&mut self) -> Result<Box<dyn Collective<CpuDevice>>, Failure> {
        let formation = &self.formation;
        let plan = &formation.order.plan;
        let again = || Failure::own("the rank has met its peers already");
        let meeting = self.meeting.take().ok_or_else(again)?;
        let link: Box<dyn Link> = match meeting {
            Meeting::Local(link) => link,
            Meeting::Tcp(endpoint, tls) => {
                self.stop.watch_endpoint(&endpoint);
                let nodes = Nodes::new(plan, tls).map_err(Failure::own)?;
                let (membership, peers) = (formation.membership(), &formation.meeting);
                let link = endpoint
                    .connect(membership, self.rank, peers, &nodes, MEET)
                    .map_err(|e| Failure { reason: e.to_string(), blames: e.peer() })?;
                Box::new(link)
            }
        };
        self.stop.watch(link.abort_handle());
        self.pulse.ready(self.spec.layers.len(), link.abort_handle());
        let link = Box::new(Watched { inner: link, pulse: self.pulse.clone() });
        let owners = plan.ranks.iter().map(|r| r.stripes.clone()).collect();
        let collective = TreeCollective::new(link, plan.stripes, owners).map_err(Failure::own)?;
        Ok(Box::new(Counted { inner: Box::new(collective), pulse: self.pulse.clone() }))
    }
}

impl Drop for Setup {
    /// A rank that panics must not leave a group that looks as if it served.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.ended(Failure::own("its thread panicked"));
        }
    }
}

/// Runs steps on a rank that does not lead, until a step fails or the leader's stream of steps
/// breaks; says which.
pub(crate) fn follow(
    rank: &mut Rank,
    steps: &mpsc::Receiver<(Step, channel::UnboundedSender<StepDone>)>,
) -> Failure {
    while let Ok((step, done)) = steps.recv() {
        rank.pulse.begin();
        let result = rank.decoder.forward(&step, rank.collective.as_mut(), &mut |_| {});
        rank.pulse.end();
        let failure = result.err().map(Failure::from);
        // A leader that went away learns nothing; the coordinator decides what follows.
        let _ = done.send(StepDone { number: step.number, failure: failure.clone() });
        if let Some(failure) = failure {
            return failure;
        }
    }
    Failure { reason: "the stream of steps from rank 0 broke".to_owned(), blames: Some(0) }
}

/// A step was run, or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StepDone {
    pub(crate) number: u64,
    /// Why not, where it was not.
    pub(crate) failure: Option<Failure>,
}
