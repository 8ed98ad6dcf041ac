//! Sums along the stripe tree, gathers and barriers, over any link.
//!
//! Every exchange has the next sequence number, the same on all ranks. In each, a rank first hands
//! over everything it has to send and only then receives, so no order of arrival can deadlock.

use std::ops::Range;

use compute::Device;

use crate::frame::Kind;
use crate::link::{AbortHandle, CollectiveError, Link};
use crate::tree::{SumTree, owned_subtrees};

/// Sums of at least this many bytes are, among more than two ranks, split by elements.
///
/// Below it one exchange beats two; above it the bytes saved count more (each rank then sends
/// about `(roots + 1) / ranks` of what it would send to every peer).
const SPLIT_BYTES: usize = 256 * 1024;

/// What the decoder needs of the other ranks. Every rank makes the same calls in the same order.
///
/// The first error is final: the link is aborted, so that the peers fail at once too, and every
/// later call returns that error again.
pub trait Collective<D: Device>: Send {
    /// This rank.
    fn rank(&self) -> usize;

    /// Ranks in the group.
    fn size(&self) -> usize;

    /// `partials: [local_stripes * rows, columns]` (stripe-major, local stripes ascending) ->
    /// `out: [rows, columns]` on every rank: the sum over all stripes, added along the tree.
    /// `Mismatch` where the tensors do not have these sizes.
    fn sum_stripes(
        &mut self,
        device: &D,
        partials: &D::Tensor,
        rows: usize,
        out: &mut D::Tensor,
    ) -> Result<(), CollectiveError>;

    /// `part: [rows, local_columns]` -> `out: [rows, total]` on rank 0, columns in stripe order;
    /// elsewhere `out` keeps its contents. Stripe `s` has `widths[s]` columns, so `local_columns`
    /// is the sum over the local stripes and `total` over all. `Mismatch` where sizes differ.
    fn gather_columns(
        &mut self,
        device: &D,
        part: &D::Tensor,
        widths: &[usize],
        out: &mut D::Tensor,
    ) -> Result<(), CollectiveError>;

    /// Returns once every rank has called it.
    fn barrier(&mut self) -> Result<(), CollectiveError>;

    /// Ends this rank's collectives because `peer` failed in a way that only the caller has seen,
    /// and tells the other ranks so: they end for the same reason and do not blame this rank.
    fn accuse(&mut self, peer: usize);

    /// What stops this rank's collectives from another thread.
    fn abort_handle(&self) -> AbortHandle;
}

/// [`Collective`] over a [`Link`]; the same bits whoever holds which stripe.
pub struct TreeCollective {
    link: Box<dyn Link>,
    layout: Layout,
    split_bytes: usize,
    sequence: u64,
    failed: Option<CollectiveError>,
    memory: Memory,
}

/// Who holds what; fixed for the life of a group incarnation.
struct Layout {
    rank: usize,
    /// By rank: its stripes, ascending.
    owners: Vec<Vec<usize>>,
    /// The trees of this rank's own subtrees, each with the position of its first local stripe.
    own: Vec<(SumTree, usize)>,
    /// By rank: its subtree roots, as a run of the inputs of `top`.
    roots: Vec<Range<usize>>,
    /// From all ranks' roots to the sum over all stripes.
    top: SumTree,
}

/// Has parts of a slice worked on, each with the index of its first element, in any order and on
/// any threads; the number is what an element costs.
type Share<'a> = &'a dyn Fn(&mut [f32], usize, &(dyn Fn(usize, &mut [f32]) + Sync));

/// Buffers that grow to the largest call and are then reused.
#[derive(Default)]
struct Memory {
    /// Own subtree roots, whole: `[own roots, elements]`.
    own: Vec<f32>,
    /// Other ranks' values as received.
    received: Vec<f32>,
    /// Values put together for one peer.
    outgoing: Vec<f32>,
    scratch: Vec<f32>,
}

impl Layout {
    fn new(rank: usize, stripes: usize, owners: Vec<Vec<usize>>) -> Result<Self, CollectiveError> {
        check_owners(stripes, &owners)?;
        let mut subtrees = Vec::new();
        let mut roots = Vec::new();
        for owned in &owners {
            let first = subtrees.len();
            subtrees.extend(owned_subtrees(stripes, owned));
            roots.push(first..subtrees.len());
        }
        let invalid = CollectiveError::Invalid { what: "stripes", got: 0, limit: stripes as u64 };
        let top = SumTree::over(0..stripes, &subtrees).ok_or(invalid.clone())?;
        let mut own = Vec::new();
        let mut first = 0;
        for subtree in &subtrees[roots[rank].clone()] {
            own.push((SumTree::over_leaves(subtree.clone()).ok_or(invalid.clone())?, first));
            first += subtree.len();
        }
        Ok(Self { rank, owners, own, roots, top })
    }

    fn size(&self) -> usize {
        self.owners.len()
    }

    fn local_stripes(&self) -> usize {
        self.owners[self.rank].len()
    }

    /// The other ranks, beginning behind this one so that not all turn to the same peer first.
    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, size) = (self.rank, self.size());
        (1..size).map(move |step| (rank + step) % size)
    }

    /// The run of `elements` that a rank completes when a sum is split by elements.
    fn share(&self, rank: usize, elements: usize) -> Range<usize> {
        // Wider than usize, so that no tensor is too large for the product.
        let cut = |r: usize| (r as u128 * elements as u128 / self.size() as u128) as usize;
        cut(rank)..cut(rank + 1)
    }

    /// `roots = ` the roots of this rank's subtrees, `[own roots, elements]`.
    fn sum_own(&self, partials: &[f32], elements: usize, roots: &mut [f32], share: Share<'_>) {
        if elements == 0 {
            return;
        }
        for ((tree, first), root) in self.own.iter().zip(roots.chunks_mut(elements)) {
            let leaf = |stripe: usize| &partials[(first + stripe) * elements..][..elements];
            share(root, self.local_stripes(), &|at, part| {
                tree.sum_from(at, &leaf, part, &mut Vec::new());
            });
        }
    }

    /// Whether this rank holds every stripe, so that its one root is the whole sum.
    fn is_alone(&self) -> bool {
        self.size() == 1 && self.own.len() == 1
    }
}

fn check_owners(stripes: usize, owners: &[Vec<usize>]) -> Result<(), CollectiveError> {
    let invalid = |what, got: usize| {
        Err(CollectiveError::Invalid { what, got: got as u64, limit: stripes as u64 })
    };
    let mut held = vec![false; stripes];
    for owned in owners {
        if !owned.is_sorted() {
            return invalid("order of a rank's stripes", owned[0]);
        }
        for &stripe in owned {
            match held.get_mut(stripe) {
                None => return invalid("stripe number", stripe),
                Some(true) => return invalid("stripe held twice", stripe),
                Some(free) => *free = true,
            }
        }
    }
    match held.iter().position(|&held| !held) {
        Some(stripe) => invalid("stripe that nobody holds", stripe),
        None if stripes == 0 => invalid("stripe count", 0),
        None => Ok(()),
    }
}

impl TreeCollective {
    /// Collectives of the group behind `link`. `owners[rank]` are a rank's stripes, ascending;
    /// together every number below `stripes` once. Otherwise `Invalid`.
    pub fn new(
        link: Box<dyn Link>,
        stripes: usize,
        owners: Vec<Vec<usize>>,
    ) -> Result<Self, CollectiveError> {
        if owners.len() != link.size() {
            return Err(CollectiveError::Invalid {
                what: "number of owners",
                got: owners.len() as u64,
                limit: link.size() as u64,
            });
        }
        let layout = Layout::new(link.rank(), stripes, owners)?;
        Ok(Self {
            link,
            layout,
            split_bytes: SPLIT_BYTES,
            sequence: 0,
            failed: None,
            memory: Memory::default(),
        })
    }

    /// How long one exchange with one peer may take before it fails with `Timeout`.
    pub fn set_timeout(&mut self, timeout: std::time::Duration) {
        self.link.set_timeout(timeout);
    }

    /// From which size of `out` on sums are split by elements among more than two ranks; the
    /// same on every rank. The result has the same bits either way.
    pub fn set_split_bytes(&mut self, bytes: usize) {
        self.split_bytes = bytes;
    }

    /// [`Collective::sum_stripes`] over values: `partials: [local_stripes, out.len()]`, where
    /// `out.len()` is a multiple of `rows`.
    pub fn sum_values(
        &mut self,
        partials: &[f32],
        rows: usize,
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.sum_shared(partials, rows, out, &|values, _, work| work(0, values))
    }

    /// [`Self::sum_values`], with own stripes added by whoever shares the work.
    fn sum_shared(
        &mut self,
        partials: &[f32],
        rows: usize,
        out: &mut [f32],
        share: Share<'_>,
    ) -> Result<(), CollectiveError> {
        self.operation(|this| {
            let sequence = this.sequence;
            let whole_rows = out.len() - out.len().checked_rem(rows).unwrap_or(out.len());
            this.check_own(sequence, "elements of the sum", whole_rows, out.len())?;
            let expected = this.layout.local_stripes().checked_mul(out.len());
            let expected = expected.unwrap_or(usize::MAX);
            this.check_own(sequence, "elements of the partials", expected, partials.len())?;
            if this.layout.is_alone() {
                this.next_sequence();
                this.layout.sum_own(partials, out.len(), out, share);
                return Ok(());
            }
            let own = &mut this.memory.own;
            own.resize(this.layout.own.len() * out.len(), 0.0);
            this.layout.sum_own(partials, out.len(), own, share);
            if this.layout.size() > 2 && size_of_val(out) >= this.split_bytes {
                this.sum_split(out)
            } else {
                this.sum_direct(out)
            }
        })
    }

    /// [`Collective::gather_columns`] over values.
    pub fn gather_values(
        &mut self,
        part: &[f32],
        widths: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        self.operation(|this| {
            let sequence = this.next_sequence();
            let stripes = this.layout.owners.iter().map(Vec::len).sum();
            this.check_own(sequence, "number of widths", stripes, widths.len())?;
            if this.layout.rank != 0 {
                let columns = this.columns_of(widths);
                let whole = part.len() - part.len().checked_rem(columns).unwrap_or(part.len());
                this.check_own(sequence, "elements of the part", whole, part.len())?;
                return this.link.send(0, Kind::Gather, sequence, part);
            }
            this.gather_at_root(sequence, part, widths, out)
        })
    }

    /// [`Collective::barrier`].
    pub fn wait_for_all(&mut self) -> Result<(), CollectiveError> {
        self.operation(|this| {
            let sequence = this.next_sequence();
            for peer in this.layout.peers() {
                this.link.send(peer, Kind::Barrier, sequence, &[])?;
            }
            for peer in this.layout.peers() {
                this.link.receive(peer, Kind::Barrier, sequence, &mut [])?;
            }
            Ok(())
        })
    }

    /// [`Collective::accuse`].
    pub fn end_for(&mut self, peer: usize) {
        let sequence = self.sequence;
        self.failed.get_or_insert(CollectiveError::Closed { peer, sequence });
        self.link.accuse(peer);
    }

    /// [`Collective::abort_handle`].
    pub fn link_abort_handle(&self) -> AbortHandle {
        self.link.abort_handle()
    }

    /// Runs one operation; an error of any kind ends the collective here and at the peers.
    fn operation(
        &mut self,
        run: impl FnOnce(&mut Self) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = run(self);
        if let Err(error) = &result {
            self.failed = Some(error.clone());
            // The peers wait for frames that will not come; let them know now.
            self.link.abort_handle().abort();
        }
        result
    }

    fn next_sequence(&mut self) -> u64 {
        let sequence = self.sequence;
        self.sequence += 1;
        sequence
    }

    fn check_own(
        &self,
        sequence: u64,
        what: &'static str,
        expected: usize,
        got: usize,
    ) -> Result<(), CollectiveError> {
        if expected == got {
            return Ok(());
        }
        Err(CollectiveError::Mismatch {
            peer: self.layout.rank,
            sequence,
            what,
            expected: expected as u64,
            got: got as u64,
        })
    }

    /// Every rank sends all its roots to every other, and completes the tree itself.
    fn sum_direct(&mut self, out: &mut [f32]) -> Result<(), CollectiveError> {
        let sequence = self.next_sequence();
        let Self { link, layout, memory, .. } = self;
        let elements = out.len();
        for peer in layout.peers() {
            link.send(peer, Kind::Partials, sequence, &memory.own)?;
        }
        let inputs = layout.roots.iter().map(Range::len).sum::<usize>();
        if layout.size() > 1 {
            memory.received.resize(inputs * elements, 0.0);
        }
        for peer in layout.peers() {
            let roots = &layout.roots[peer];
            let into = &mut memory.received[roots.start * elements..roots.end * elements];
            link.receive(peer, Kind::Partials, sequence, into)?;
        }
        complete(layout, memory, 0..elements, elements, out);
        Ok(())
    }

    /// Every rank completes the tree for its share of the elements and sends the sums to all.
    fn sum_split(&mut self, out: &mut [f32]) -> Result<(), CollectiveError> {
        let (sequence, second) = (self.next_sequence(), self.next_sequence());
        let Self { link, layout, memory, .. } = self;
        let elements = out.len();
        for peer in layout.peers() {
            memory.outgoing.clear();
            for root in memory.own.chunks(elements.max(1)) {
                memory.outgoing.extend_from_slice(&root[layout.share(peer, elements)]);
            }
            link.send(peer, Kind::Partials, sequence, &memory.outgoing)?;
        }
        let share = layout.share(layout.rank, elements);
        let inputs = layout.roots.iter().map(Range::len).sum::<usize>();
        memory.received.resize(inputs * share.len(), 0.0);
        for peer in layout.peers() {
            let roots = &layout.roots[peer];
            let into = &mut memory.received[roots.start * share.len()..roots.end * share.len()];
            link.receive(peer, Kind::Partials, sequence, into)?;
        }
        complete(layout, memory, share.clone(), elements, &mut out[share.clone()]);
        for peer in layout.peers() {
            link.send(peer, Kind::Sums, second, &out[share.clone()])?;
        }
        for peer in layout.peers() {
            link.receive(peer, Kind::Sums, second, &mut out[layout.share(peer, elements)])?;
        }
        Ok(())
    }

    /// Columns that this rank contributes to a gather.
    fn columns_of(&self, widths: &[usize]) -> usize {
        sum_of(&self.layout.owners[self.layout.rank], widths)
    }

    fn gather_at_root(
        &mut self,
        sequence: u64,
        part: &[f32],
        widths: &[usize],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let total = widths.iter().fold(0_usize, |sum, &width| sum.saturating_add(width));
        let rows = out.len().checked_div(total).unwrap_or(0);
        self.check_own(sequence, "elements gathered", rows.saturating_mul(total), out.len())?;
        let own = rows * self.columns_of(widths);
        self.check_own(sequence, "elements of the part", own, part.len())?;
        let Self { link, layout, memory, .. } = self;
        let mut starts = Vec::with_capacity(widths.len());
        let mut start = 0;
        for width in widths {
            starts.push(start);
            start += width;
        }
        let mut place = |owned: &[usize], mut values: &[f32]| {
            for row in 0..rows {
                for &stripe in owned {
                    let (columns, rest) = values.split_at(widths[stripe]);
                    let at = row * total + starts[stripe];
                    out[at..at + columns.len()].copy_from_slice(columns);
                    values = rest;
                }
            }
        };
        place(&layout.owners[0], part);
        for peer in layout.peers() {
            let owned = &layout.owners[peer];
            memory.received.resize(rows * sum_of(owned, widths), 0.0);
            link.receive(peer, Kind::Gather, sequence, &mut memory.received)?;
            place(owned, &memory.received);
        }
        Ok(())
    }
}

/// Widths of a set of stripes, added.
fn sum_of(stripes: &[usize], widths: &[usize]) -> usize {
    stripes.iter().fold(0, |sum, &stripe| sum.saturating_add(widths[stripe]))
}

/// `out = ` the sum over all stripes of the elements `at`, from own roots (`elements` apart) and
/// the peers' roots (`at.len()` apart).
fn complete(
    layout: &Layout,
    memory: &mut Memory,
    at: Range<usize>,
    elements: usize,
    out: &mut [f32],
) {
    let Memory { own, received, scratch, .. } = memory;
    let mine = &layout.roots[layout.rank];
    let input = |index: usize| {
        if mine.contains(&index) {
            &own[(index - mine.start) * elements..][at.clone()]
        } else {
            &received[index * at.len()..][..at.len()]
        }
    };
    layout.top.sum(&input, out, scratch);
}

impl<D: Device> Collective<D> for TreeCollective {
    fn rank(&self) -> usize {
        self.layout.rank
    }

    fn size(&self) -> usize {
        self.layout.size()
    }

    fn sum_stripes(
        &mut self,
        device: &D,
        partials: &D::Tensor,
        rows: usize,
        out: &mut D::Tensor,
    ) -> Result<(), CollectiveError> {
        let share: Share<'_> = &|values, cost, work| device.share(values, cost, work);
        self.sum_shared(device.host(partials), rows, device.host_mut(out), share)
    }

    fn gather_columns(
        &mut self,
        device: &D,
        part: &D::Tensor,
        widths: &[usize],
        out: &mut D::Tensor,
    ) -> Result<(), CollectiveError> {
        self.gather_values(device.host(part), widths, device.host_mut(out))
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.wait_for_all()
    }

    fn accuse(&mut self, peer: usize) {
        self.end_for(peer);
    }

    fn abort_handle(&self) -> AbortHandle {
        self.link.abort_handle()
    }
}
