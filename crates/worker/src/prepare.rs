//! Weights that are loaded before their rank is: the group that they are meant for serves
//! meanwhile, and is interrupted only when they are there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use cluster::GroupId;
use decoder::{CacheSize, Decoder, LoadProgress, RankShape};
use planner::{NodeId, RankPlan};
use tokio::sync::mpsc as channel;
use wire::{FormGroup, Report};

use crate::group::Hardware;
use crate::shelf::Shelf;

/// Weights that are being loaded for a group.
struct Preparation {
    group: GroupId,
    devices: BTreeSet<usize>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// What a worker prepares.
#[derive(Default)]
pub(crate) struct Preparations {
    open: Mutex<Vec<Preparation>>,
}

impl Preparations {
    fn lock(&self) -> MutexGuard<'_, Vec<Preparation>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Loads the weights of this node's ranks and leaves them on the shelf; then says so. `busy`:
    /// the devices that hold ranks, and of which groups. The group's own have what they need; one
    /// of another group cannot be loaded for. Whatever was prepared for the group before is given
    /// up.
    pub(crate) fn begin(
        &self,
        node: NodeId,
        order: FormGroup,
        (hardware, busy): (&Hardware, &BTreeMap<usize, GroupId>),
        shelf: &Shelf,
        reports: &channel::UnboundedSender<Report>,
    ) {
        let (group, epoch) = (order.group, order.epoch);
        self.end(|one| one.group == group);
        let mine = order.plan.ranks.iter().filter(|rank| rank.node == node);
        let devices: BTreeSet<usize> = mine.map(|rank| rank.device).collect();
        let other = |device: &&usize| busy.get(device).is_some_and(|holder| *holder != group);
        if let Some(device) = devices.iter().find(other) {
            let error = Some(format!("its device {device} holds a rank of another group"));
            let _ = reports.send(Report::Prepared { group, epoch, error });
            return;
        }
        let devices: BTreeSet<usize> =
            devices.into_iter().filter(|device| !busy.contains_key(device)).collect();
        // Another group's preparation on the same device would be in vain.
        self.end(|one| !one.devices.is_disjoint(&devices));
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, told, shelf) = (Arc::clone(&stop), reports.clone(), shelf.clone());
        let own: Vec<_> = hardware.devices.clone();
        // The order was checked against this model.
        let Some(model) = hardware.models.get(&order.deployment.digest) else { return };
        let (spec, checkpoint) = (Arc::clone(&model.spec), Arc::clone(&model.checkpoint));
        let on = devices.clone();
        let work = move || {
            let ranks = order.plan.ranks.iter().filter(|rank| rank.node == node);
            let mut loaded = ranks.filter(|rank| on.contains(&rank.device)).map(|rank| {
                let device = own.get(rank.device).ok_or("it has no such device")?.clone();
                let mut progress = |LoadProgress { bytes_read, bytes_total, .. }: LoadProgress| {
                    let rank = rank.rank;
                    let report = Report::Progress { group, epoch, rank, bytes_read, bytes_total };
                    !stopped.load(Ordering::SeqCst) && told.send(report).is_ok()
                };
                let decoder = |before: &mut _| {
                    let (shape, spec) = (shape(&order, rank), Arc::clone(&spec));
                    let loaded = Decoder::load_after(
                        before,
                        device,
                        spec,
                        shape,
                        &checkpoint,
                        &mut progress,
                    );
                    loaded.map(Decoder::into_weights).map_err(|error| error.to_string())
                };
                shelf.fill(rank.device, &order.deployment.digest, decoder)
            });
            let error = loaded.find_map(Result::err);
            if !stopped.load(Ordering::SeqCst) {
                tracing::info!(%group, %epoch, error, "prepared to join a group");
                // The session that listens may have ended already.
                let _ = told.send(Report::Prepared { group, epoch, error });
            }
        };
        let thread = std::thread::Builder::new().name("prepare".to_owned()).spawn(work);
        match thread {
            Ok(thread) => self.lock().push(Preparation { group, devices, stop, thread }),
            Err(error) => {
                let error = Some(format!("a thread cannot be started: {error}"));
                let _ = reports.send(Report::Prepared { group, epoch, error });
            }
        }
    }

    /// Gives up what is prepared on these devices. What was loaded of it is on the shelf then.
    pub(crate) fn end_on(&self, devices: &BTreeSet<usize>) {
        self.end(|one| !one.devices.is_disjoint(devices));
    }

    /// Gives everything up.
    pub(crate) fn end_all(&self) {
        self.end(|_| true);
    }

    /// Whether nothing is being prepared.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().iter().all(|one| one.thread.is_finished())
    }

    fn end(&self, which: impl Fn(&Preparation) -> bool) {
        let ended: Vec<Preparation> = {
            let mut open = self.lock();
            open.extract_if(.., |one| which(one) || one.thread.is_finished()).collect()
        };
        ended.iter().for_each(|one| one.stop.store(true, Ordering::SeqCst));
        for one in ended {
            if one.thread.join().is_err() {
                tracing::error!("a thread that loaded weights panicked");
            }
        }
    }
}

/// A rank's weights need no more of a KV cache than a block.
fn shape<'a>(order: &FormGroup, plan: &'a RankPlan) -> RankShape<'a> {
    let block_tokens = order.deployment.block_tokens;
    RankShape {
        stripes: order.plan.stripes,
        plan,
        experts: order.deployment.experts,
        compute: order.deployment.compute,
        cache: CacheSize { blocks: 1, block_tokens, context: block_tokens },
    }
}
