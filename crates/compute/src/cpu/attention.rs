//! Softmax attention over a paged cache.
//!
//! The order, for one query and head. Scores: element `i` of the head goes to lane `i % 16`, one
//! fused multiply-add each, then the lanes are added by a fixed tree, then the scale and the cap.
//! Softmax: the maximum; `e = exp(score - maximum)`; the sum of `e`, where the i-th visible
//! position goes to lane `i % 16`, then the same tree. Values: per element of the head one fused
//! multiply-add per position, in order, then a division by the sum. The window's start follows
//! from the query's own position, so nothing depends on chunks, blocks or neighbours.
//!
//! This goes in passages over visible positions. State: maximum, sum, sums of values. A passage
//! raises the maximum to that of its scores, multiplies the state's sums by
//! `exp(old maximum - new maximum)`, then adds its own. Values of their own: all positions are one
//! passage. Prefixes of keys: [`PASSAGE`] positions each, counted from the first visible one, so
//! that a key comes from far memory once for its score and its value. A head's sink is a passage
//! of one position without a value before the first; without sinks the first maximum is -infinity.

use super::cache::{CpuCache, Element, Pages, Slot, Store, row_width};
use super::elementwise::SoftCap;
use super::lanes::{Kernel, LANES, Lanes, Simd};
use super::math::exp;
use super::team::Team;
use super::tensor::CpuTensor;
use crate::check::{Check, filled};
use crate::{AttendSpan, CacheShape, CacheValue, DeviceError, HeadMap};
use std::ops::Range;

/// Positions of a passage where values are prefixes of keys.
const PASSAGE: usize = 64;

/// Heads whose queries and sums stay in a processor's second-level cache beside a passage.
const MOST_HEADS: usize = 32;

/// A vector in memory.
type Vector = [f32; LANES];

/// Everything that the tasks of a call share.
struct Call<'a, E> {
    pages: &'a Pages<E>,
    shape: CacheShape,
    layer: usize,
    x: &'a CpuTensor,
    map: &'a HeadMap,
    spans: &'a [AttendSpan<'a>],
    /// By row: its span, or none.
    owners: &'a [Option<usize>],
    /// Consecutive query heads of a task; they share a KV head.
    group: usize,
}

/// Memory of one thread.
struct Scratch {
    /// `[group][key_dim padded]`
    queries: Vec<Vector>,
    /// `[group][positions of a passage]`
    scores: Vec<f32>,
    /// `[group]`
    totals: Vec<Total>,
    /// `[group][value_dim padded]`
    sums: Vec<Vector>,
}

/// The state of a head's softmax.
#[derive(Debug, Clone, Copy)]
struct Total {
    max: f32,
    sum: f32,
}

/// See [`crate::Device::attend`]. Rows that belong to no span become zeros.
pub(crate) fn attend(
    (simd, team): (Simd, &Team),
    cache: &CpuCache,
    layer: usize,
    x: &CpuTensor,
    (map, spans): (&HeadMap, &[AttendSpan<'_>]),
    out: &mut CpuTensor,
) -> Result<(), DeviceError> {
    let owners = validate(cache, layer, x, (map, spans), out)?;
    let (shape, group) = (cache.shape, common_group(&map.kv_of_query));
    let group = spread(group, x.rows().saturating_mul(map.kv_of_query.len()), team.threads());
    match &cache.store {
        Store::F32(pages) => {
            let owners = &owners;
            Call { pages, shape, layer, x, map, spans, owners, group }.run(simd, team, out)
        }
        Store::Bf16(pages) => {
            let owners = &owners;
            Call { pages, shape, layer, x, map, spans, owners, group }.run(simd, team, out)
        }
    }
}

fn validate(
    cache: &CpuCache,
    layer: usize,
    x: &CpuTensor,
    (map, spans): (&HeadMap, &[AttendSpan<'_>]),
    out: &CpuTensor,
) -> Result<Vec<Option<usize>>, DeviceError> {
    let check = Check("attend");
    let heads = map.kv_of_query.len();
    let width = check.product("width of the queries", &[heads, cache.shape.key_dim])?;
    let value_width = check.product("width of out", &[heads, cache.shape.value_dim()])?;
    check.below("layer", layer, cache.shape.layers)?;
    check.at_least("columns of x", x.columns(), width)?;
    check.equal("rows of out", out.rows(), x.rows())?;
    check.equal("columns of out", out.columns(), value_width)?;
    if !map.sinks.is_empty() {
        check.equal("sinks", map.sinks.len(), heads)?;
    }
    check.at_least("window", map.window.unwrap_or(1), 1)?;
    for &kv in &map.kv_of_query {
        check.below("KV head", kv, cache.shape.kv_heads)?;
    }
    let mut owners = filled(&[x.rows()], None)?;
    for (index, span) in spans.iter().enumerate() {
        cache.check_span(check, span, x.rows(), first_visible(map, span.start))?;
        for owner in &mut owners[span.rows.clone()] {
            check.equal(
                "spans before this one that hold one of its rows",
                owner.iter().len(),
                0,
            )?;
            *owner = Some(index);
        }
    }
    Ok(owners)
}

/// The first position that a query at `position` sees.
fn first_visible(map: &HeadMap, position: usize) -> usize {
    map.window.map_or(0, |window| position.saturating_add(1).saturating_sub(window))
}

/// The largest run length such that all runs of that many query heads read one KV head each.
fn common_group(kv_of_query: &[usize]) -> usize {
    let heads = kv_of_query.len();
    let one = |run: &[usize]| run.iter().all(|kv| *kv == run[0]);
    (1..=heads)
        .rev()
        .find(|&group| heads.is_multiple_of(group) && kv_of_query.chunks(group).all(one))
        .unwrap_or(1)
}

/// Heads of a task: a divisor of `group` of at most [`MOST_HEADS`], the largest that leaves each
/// of `threads` a task, or else the smallest of at least four (fewer would read keys more often
/// than they share them). `heads` counts those of all rows.
fn spread(group: usize, heads: usize, threads: usize) -> usize {
    let divisors = || (4..=group.min(MOST_HEADS)).filter(|&part| group.is_multiple_of(part));
    let enough = divisors().rev().find(|part| heads / part >= threads);
    enough.or(divisors().next()).unwrap_or(group)
}

impl<E: Element> Call<'_, E> {
    fn run(&self, simd: Simd, team: &Team, out: &mut CpuTensor) -> Result<(), DeviceError> {
        let span_rows = self.spans.iter().flat_map(|s| (0..s.rows.len()).map(move |i| s.start + i));
        let seen = |position| position + 1 - first_visible(self.map, position);
        let (mut most, mut total) = (0, 0_usize);
        for visible in span_rows.map(seen) {
            most = most.max(visible);
            total = total.saturating_add(visible);
        }
        let (key_dim, value_dim) = (self.shape.key_dim, self.shape.value_dim());
        let (key, value) = (row_width(key_dim) / LANES, row_width(value_dim) / LANES);
        let per_task = self.group * value_dim;
        let heads = self.map.kv_of_query.len();
        if heads == 0 {
            return Ok(());
        }
        let cost = total.saturating_mul(heads).saturating_mul((key_dim + value_dim) / 2);
        let zero = [0.0; LANES];
        let mut scratches = Vec::new();
        for _ in 0..team.hands(cost) {
            scratches.push(Scratch {
                queries: filled(&[self.group, key], zero)?,
                scores: filled(&[self.group, most.min(self.passage(most))], 0.0)?,
                totals: filled(&[self.group], Total { max: 0.0, sum: 0.0 })?,
                sums: filled(&[self.group, value], zero)?,
            });
        }
        let groups = out.columns() / per_task;
        let tasks = out.rows() * groups;
        let shared = super::team::Disjoint::new(out.values_mut());
        team.run(tasks, &mut scratches, |scratch, task| {
            // SAFETY: every task has its own heads of its own row.
            let out = unsafe { shared.slice(task * per_task, per_task) };
            let (row, group) = (task / groups, task % groups);
            simd.run(Task { call: self, scratch, row, group, out });
        });
        Ok(())
    }

    /// Positions of a passage, of `visible` ones.
    fn passage(&self, visible: usize) -> usize {
        match self.shape.value {
            CacheValue::Own(_) => visible,
            CacheValue::PrefixOfKey(_) => PASSAGE,
        }
    }

    /// Runs of cache rows that hold positions `visible` of one KV head, each with the index of its
    /// first position among the visible ones.
    #[inline(always)]
    fn runs(
        &self,
        span: &AttendSpan<'_>,
        visible: Range<usize>,
        head: usize,
    ) -> impl Iterator<Item = (usize, Range<usize>)> {
        let tokens = self.shape.block_tokens;
        let blocks = visible.start / tokens..visible.end.div_ceil(tokens);
        blocks.map(move |index| {
            let from = visible.start.max(index * tokens);
            let to = visible.end.min((index + 1) * tokens);
            let block = span.blocks[index] as usize;
            let slot = Slot { layer: self.layer, block, position: from % tokens };
            let start = slot.row(&self.shape, head);
            (from - visible.start, start..start + to - from)
        })
    }

    /// The vectors of some cache rows' keys.
    #[inline(always)]
    fn keys(&self, rows: Range<usize>) -> &[[E; LANES]] {
        let width = row_width(self.shape.key_dim);
        self.pages.keys[rows.start * width..rows.end * width].as_chunks().0
    }

    /// The vectors of some cache rows' values, and how many lie between the starts of two rows.
    #[inline(always)]
    fn values(&self, rows: Range<usize>) -> (&[[E; LANES]], usize) {
        match self.shape.value {
            CacheValue::Own(dim) => {
                let width = row_width(dim);
                let values = &self.pages.values[rows.start * width..rows.end * width];
                (values.as_chunks().0, width / LANES)
            }
            CacheValue::PrefixOfKey(_) => (self.keys(rows), row_width(self.shape.key_dim) / LANES),
        }
    }
}

/// One row's group of query heads.
struct Task<'a, 'c, E> {
    call: &'a Call<'c, E>,
    scratch: &'a mut Scratch,
    row: usize,
    group: usize,
    out: &'a mut [f32],
}

impl<E: Element> Kernel for Task<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let Task { call, scratch, row, group, out } = self;
        let Some(span) = call.owners[row].map(|owner| &call.spans[owner]) else {
            out.fill(0.0);
            return;
        };
        let (key_dim, value_dim) = (call.shape.key_dim, call.shape.value_dim());
        let vectors = (row_width(key_dim) / LANES, row_width(value_dim) / LANES);
        let position = span.start + (row - span.rows.start);
        let visible = first_visible(call.map, position)..position + 1;
        let first_head = group * call.group;
        let queries = call.x.row(row)[first_head * key_dim..].chunks(key_dim);
        for (to, query) in scratch.queries.chunks_mut(vectors.0).zip(queries) {
            to.as_flattened_mut()[..key_dim].copy_from_slice(query);
        }
        for (h, total) in scratch.totals.iter_mut().enumerate() {
            *total = match call.map.sinks.get(first_head + h) {
                Some(&sink) => Total { max: sink, sum: 1.0 },
                None => Total { max: f32::NEG_INFINITY, sum: 0.0 },
            };
        }
        scratch.sums.fill([0.0; LANES]);
        let step = call.passage(visible.len());
        let mut start = visible.start;
        while start < visible.end {
            let end = visible.end.min(start.saturating_add(step));
            pass(lanes, call, scratch, (span, start..end), (first_head, vectors));
            start = end;
        }
        let heads = scratch.totals.iter().zip(scratch.sums.chunks(vectors.1));
        for (head, (total, sums)) in out.chunks_mut(value_dim).zip(heads) {
            let sums = sums.as_flattened();
            head.iter_mut().zip(sums).for_each(|(to, sum)| *to = sum / total.sum);
        }
    }
}

/// Adds one passage's positions to the state of the heads from `first_head` on.
#[inline(always)]
fn pass<L: Lanes, E: Element>(
    lanes: L,
    call: &Call<'_, E>,
    scratch: &mut Scratch,
    (span, positions): (&AttendSpan<'_>, Range<usize>),
    (first_head, vectors): (usize, (usize, usize)),
) {
    let (map, len) = (call.map, positions.len());
    let kv_head = map.kv_of_query[first_head];
    for (first, rows) in call.runs(span, positions.clone(), kv_head) {
        let to = Scores { all: &mut scratch.scores, len, first, scale: map.scale };
        score(lanes, &scratch.queries, call.keys(rows), vectors.0, to);
    }
    let heads = scratch.totals.iter_mut().zip(scratch.sums.chunks_mut(vectors.1));
    for ((total, sums), values) in heads.zip(scratch.scores.chunks_mut(len)) {
        if let Some(cap) = map.softcap {
            SoftCap { values, cap }.run(lanes);
        }
        let factor = softmax(lanes, values, total);
        if factor != 1.0 {
            let factor = lanes.splat(factor);
            for sum in sums {
                lanes.store(lanes.mul(lanes.load(sum), factor), sum);
            }
        }
    }
    for (first, rows) in call.runs(span, positions, kv_head) {
        let scores = (scratch.scores.as_slice(), len, first);
        accumulate(lanes, scores, call.values(rows), vectors.1, &mut scratch.sums);
    }
}

/// Turns scores into exponentials below the maximum so far, which they may raise, and adds them to
/// the total; returns what the sums of values must be multiplied by.
#[inline(always)]
fn softmax<L: Lanes>(lanes: L, scores: &mut [f32], total: &mut Total) -> f32 {
    // NaN never becomes the maximum, but makes the sum NaN.
    let mut highest = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = scores.as_chunks::<LANES>();
    for chunk in whole {
        for (high, &score) in highest.iter_mut().zip(chunk) {
            *high = if score > *high { score } else { *high };
        }
    }
    let highest = highest.iter().chain(rest);
    let max = highest.fold(total.max, |max, &s| if s > max { s } else { max });
    scores.iter_mut().for_each(|score| *score = exp(*score - max));
    let (whole, rest) = scores.as_chunks::<LANES>();
    let mut sum = lanes.splat(0.0);
    for chunk in whole {
        sum = lanes.add(sum, lanes.load(chunk));
    }
    let mut last = [0.0; LANES];
    last[..rest.len()].copy_from_slice(rest);
    let sum = lanes.sum(lanes.add(sum, lanes.load(&last)));
    // Without a total there is nothing to multiply.
    let factor = if total.sum == 0.0 { 1.0 } else { exp(total.max - max) };
    *total = Total { max, sum: total.sum * factor + sum };
    factor
}

/// Where scores go: head `h`'s visible position `i` is `all[h * len + i]`.
struct Scores<'a> {
    all: &'a mut [f32],
    len: usize,
    first: usize,
    scale: f32,
}

/// How many of so many heads share a pass: 4, 2 or 1.
#[inline(always)]
fn together<L: Lanes>(heads: usize) -> usize {
    match heads {
        4.. => L::HEADS,
        2.. => 2,
        _ => 1,
    }
}

/// Keys whose scores are added up together.
const BATCH: usize = 8;

/// Scores of all heads against a run of keys, several heads and keys at once: their sums are
/// independent, which hides the latency of each.
#[inline(always)]
fn score<L: Lanes, E: Element>(
    lanes: L,
    queries: &[Vector],
    keys: &[[E; LANES]],
    vectors: usize,
    mut to: Scores<'_>,
) {
    let heads = queries.len() / vectors;
    let mut head = 0;
    while head < heads {
        let batch = together::<L>(heads - head);
        let queries = &queries[head * vectors..(head + batch) * vectors];
        for (index, keys) in keys.chunks(BATCH * vectors).enumerate() {
            let at = (head, index * BATCH);
            match (batch, L::KEYS) {
                (4, 2) => several::<L, E, 4, 2>(lanes, queries, keys, vectors, at, &mut to),
                (4, _) => several::<L, E, 4, 1>(lanes, queries, keys, vectors, at, &mut to),
                (2, _) => several::<L, E, 2, 2>(lanes, queries, keys, vectors, at, &mut to),
                _ => several::<L, E, 1, 4>(lanes, queries, keys, vectors, at, &mut to),
            }
        }
        head += batch;
    }
}

/// Scores of `H` heads and at most [`BATCH`] keys, `N` at a time.
#[inline(always)]
fn several<L: Lanes, E: Element, const H: usize, const N: usize>(
    lanes: L,
    queries: &[Vector],
    keys: &[[E; LANES]],
    vectors: usize,
    (head, key): (usize, usize),
    to: &mut Scores<'_>,
) {
    let mut folded = [[[0.0; LANES / 2]; BATCH]; H];
    let count = keys.len() / vectors;
    let mut n = 0;
    while n < count {
        let some = &keys[n * vectors..];
        if count - n >= N {
            let some = &some[..N * vectors];
            dots::<L, E, H, N>(lanes, queries, some, vectors, (n, &mut folded));
            n += N;
        } else {
            dots::<L, E, H, 1>(lanes, queries, &some[..vectors], vectors, (n, &mut folded));
            n += 1;
        }
    }
    for (h, folded) in folded.iter().enumerate() {
        let start = (head + h) * to.len + to.first + key;
        let sums = lanes.sum_folded(folded);
        for (score, sum) in to.all[start..start + count].iter_mut().zip(sums) {
            *score = sum * to.scale;
        }
    }
}

/// Products of `H` heads and `N` keys, folded once, from the `n`th key of `folded` on.
#[inline(always)]
fn dots<L: Lanes, E: Element, const H: usize, const N: usize>(
    lanes: L,
    queries: &[Vector],
    keys: &[[E; LANES]],
    vectors: usize,
    (first, folded): (usize, &mut [[[f32; LANES / 2]; BATCH]; H]),
) {
    let mut sums = [[lanes.splat(0.0); N]; H];
    for v in 0..vectors {
        let mut loaded = [lanes.splat(0.0); N];
        for n in 0..N {
            loaded[n] = E::load(lanes, &keys[n * vectors + v]);
        }
        for h in 0..H {
            let query = lanes.load(&queries[h * vectors + v]);
            for n in 0..N {
                sums[h][n] = lanes.fma(query, loaded[n], sums[h][n]);
            }
        }
    }
    for h in 0..H {
        for n in 0..N {
            lanes.fold(sums[h][n], &mut folded[h][first + n]);
        }
    }
}

/// Adds weighted values of a run to the sums of all heads.
#[inline(always)]
fn accumulate<L: Lanes, E: Element>(
    lanes: L,
    scores: (&[f32], usize, usize),
    values: (&[[E; LANES]], usize),
    vectors: usize,
    sums: &mut [Vector],
) {
    let heads = sums.len() / vectors;
    let mut head = 0;
    while head < heads {
        let batch = together::<L>(heads - head);
        let mut v = 0;
        while v < vectors {
            let at = (head, v);
            let left = vectors - v;
            v += match batch {
                4 if L::VECTORS >= 4 && left >= 4 => {
                    weigh::<L, E, 4, 4>(lanes, scores, values, vectors, at, sums)
                }
                4 => weigh::<L, E, 4, 1>(lanes, scores, values, vectors, at, sums),
                2 if left >= 2 => weigh::<L, E, 2, 2>(lanes, scores, values, vectors, at, sums),
                2 => weigh::<L, E, 2, 1>(lanes, scores, values, vectors, at, sums),
                _ if left >= 4 => weigh::<L, E, 1, 4>(lanes, scores, values, vectors, at, sums),
                _ => weigh::<L, E, 1, 1>(lanes, scores, values, vectors, at, sums),
            };
        }
        head += batch;
    }
}

/// Weighted values of `H` heads and `V` vectors of the head; returns `V`.
#[inline(always)]
fn weigh<L: Lanes, E: Element, const H: usize, const V: usize>(
    lanes: L,
    (scores, len, first): (&[f32], usize, usize),
    (values, stride): (&[[E; LANES]], usize),
    vectors: usize,
    (head, vector): (usize, usize),
    sums: &mut [Vector],
) -> usize {
    let mut acc = [[lanes.splat(0.0); V]; H];
    for h in 0..H {
        for v in 0..V {
            acc[h][v] = lanes.load(&sums[(head + h) * vectors + vector + v]);
        }
    }
    for (i, row) in values.chunks_exact(stride).enumerate() {
        let mut loaded = [lanes.splat(0.0); V];
        for v in 0..V {
            loaded[v] = E::load(lanes, &row[vector + v]);
        }
        for h in 0..H {
            let weight = lanes.splat(scores[(head + h) * len + first + i]);
            for v in 0..V {
                acc[h][v] = lanes.fma(weight, loaded[v], acc[h][v]);
            }
        }
    }
    for h in 0..H {
        for v in 0..V {
            lanes.store(acc[h][v], &mut sums[(head + h) * vectors + vector + v]);
        }
    }
    V
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CpuDevice, Device, KernelClass, Precision};

    const HEADS: usize = 5;
    const DIM: usize = 23;
    /// Small: exponentials of one magnitude, so that the order of their sum shows.
    const SCALE: f32 = 0.03;
    /// Several whole vectors of positions and a rest.
    const LEN: usize = 85;

    #[test]
    fn heads_are_spread_over_threads() {
        // One row of 16 or 128 heads; many rows; heads that cannot be parted.
        assert_eq!([1, 2, 4, 16].map(|threads| spread(16, 16, threads)), [16, 8, 4, 4]);
        assert_eq!([1, 4, 16].map(|threads| spread(128, 128, threads)), [32, 32, 8]);
        assert_eq!(spread(8, 512, 16), 8);
        assert_eq!(
            [(0, 1), (1, 1), (3, 9), (7, 2), (37, 2)].map(|(g, t)| spread(g, g, t)),
            [0, 1, 3, 7, 37]
        );
    }

    /// Sixteen lanes, added as the module says.
    fn tree(mut lanes: Vec<f32>) -> f32 {
        while lanes.len() > 1 {
            let half = lanes.len() / 2;
            lanes = (0..half).map(|i| lanes[i] + lanes[i + half]).collect();
        }
        lanes[0]
    }

    /// Adds `terms` (each a fused multiply-add) to lane `i % 16`.
    fn in_lanes(terms: impl Iterator<Item = (f32, f32)>) -> f32 {
        let mut lanes = vec![0_f32; 16];
        for (i, (a, b)) in terms.enumerate() {
            lanes[i % 16] = a.mul_add(b, lanes[i % 16]);
        }
        tree(lanes)
    }

    /// The last row's output as the module's header says, one number at a time.
    fn expected(x: &CpuTensor, window: usize) -> Vec<f32> {
        let mut out = Vec::new();
        let part = |row, first| &x.row(row)[first..first + DIM];
        for head in 0..HEADS {
            let query = part(LEN - 1, head * DIM);
            let seen = LEN - window..LEN;
            let scores = seen.clone().map(|p| {
                let key = part(p, HEADS * DIM);
                in_lanes(query.iter().copied().zip(key.iter().copied())) * SCALE
            });
            let scores: Vec<f32> = scores.collect();
            let max = scores.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s));
            let e: Vec<f32> = scores.iter().map(|s| exp(s - max)).collect();
            let sum = in_lanes(e.iter().map(|e| (*e, 1.0)));
            for d in 0..DIM {
                let terms = seen.clone().zip(&e);
                let add = |acc, (p, e): (_, &f32)| e.mul_add(part(p, (HEADS + 1) * DIM)[d], acc);
                out.push(terms.fold(0.0, add) / sum);
            }
        }
        out
    }

    #[test]
    fn every_class_follows_the_documented_order() {
        for class in KernelClass::ALL.into_iter().filter(|class| class.is_available()) {
            let device = CpuDevice::new(1, Some(class)).unwrap();
            let mut x = device.tensor(LEN, (HEADS + 2) * DIM).unwrap();
            for (i, x) in x.values_mut().iter_mut().enumerate() {
                *x = (i * i * 31 % 2003) as f32 / 500.0 - 2.0;
            }
            let shape = CacheShape {
                layers: 1,
                blocks: 22,
                block_tokens: 4,
                kv_heads: 1,
                key_dim: DIM,
                value: CacheValue::Own(DIM),
                precision: Precision::F32,
            };
            let mut cache = device.cache(shape).unwrap();
            let blocks: Vec<u32> = (0..22).map(|b| (b * 7 + 3) % 22).collect();
            let spans = [AttendSpan { rows: 0..LEN, start: 0, blocks: &blocks }];
            device.store_kv(&mut cache, 0, &x, HEADS * DIM, (HEADS + 1) * DIM, &spans).unwrap();
            for window in [LEN, 70] {
                let map = HeadMap {
                    kv_of_query: vec![0; HEADS],
                    window: Some(window),
                    scale: SCALE,
                    softcap: None,
                    sinks: vec![],
                };
                let mut out = device.tensor(LEN, HEADS * DIM).unwrap();
                device.attend(&cache, 0, &x, &map, &spans, &mut out).unwrap();
                assert_eq!(out.row(LEN - 1), expected(&x, window), "{class}");
            }
        }
    }
}
