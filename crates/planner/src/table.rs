//! A plan as text: aligned columns, bytes as people read them.

use std::fmt;
use std::ops::Range;

use model::{FeedForward, ModelSpec};

use crate::cut::ExpertCut;
use crate::plan::{NodeId, RankPlan, ShardPlan};
use crate::stripes;

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Rank, node, device, stripes and bytes, one line per rank.
impl fmt::Display for ShardPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let header = ["rank", "node", "device", "stripes", "weights", "KV"];
        let mut rows = vec![header.map(str::to_owned).to_vec()];
        rows.extend(self.ranks.iter().map(|rank| {
            let mut row = place(rank);
            row.extend([human_bytes(rank.weight_bytes), human_bytes(rank.kv_bytes)]);
            row
        }));
        f.write_str(&aligned(&rows))
    }
}

impl ShardPlan {
    /// The plan with what each rank holds of the model: query heads, KV heads (of the first
    /// layer), feed-forward columns and vocabulary rows, as inclusive runs. Columns are those of
    /// every expert; where experts are divided whole, they have a column of the table, and
    /// feed-forward columns are those of the first dense layer.
    pub fn table(&self, spec: &ModelSpec, experts: ExpertCut) -> String {
        let whole = experts_of(spec).filter(|_| experts == ExpertCut::Whole);
        let mut header = vec!["rank", "node", "device", "stripes", "Q heads", "KV heads"];
        header.push("FFN columns");
        header.extend(whole.map(|_| "experts"));
        header.extend(["vocab rows", "weights", "KV"]);
        let mut rows = vec![header.into_iter().map(str::to_owned).collect()];
        rows.extend(self.ranks.iter().map(|rank| self.row(rank, spec, whole)));
        aligned(&rows)
    }

    /// `whole` is the number of experts of a layer, where they are not cut.
    fn row(&self, rank: &RankPlan, spec: &ModelSpec, whole: Option<usize>) -> Vec<String> {
        let (count, block) = (self.stripes, spec.format.block());
        let of = |range: &dyn Fn(usize) -> Range<usize>| {
            runs(rank.stripes.iter().map(|&stripe| range(stripe)))
        };
        let mut row = place(rank);
        match spec.layers.first() {
            None => row.extend(["-", "-", "-"].map(str::to_owned)),
            Some(layer) => {
                let heads = layer.attention.heads();
                let width = match whole {
                    None => stripes::width(layer),
                    Some(_) => dense_width(spec),
                };
                row.push(of(&|stripe| stripes::query_heads(heads, count, stripe)));
                row.push(of(&|stripe| stripes::cached_heads(&layer.attention, count, stripe)));
                row.push(of(&|stripe| stripes::columns(width, block, count, stripe)));
            }
        }
        row.extend(whole.map(|experts| of(&|stripe| stripes::experts(experts, count, stripe))));
        row.push(of(&|stripe| stripes::vocab(spec.vocab, count, stripe)));
        row.extend([human_bytes(rank.weight_bytes), human_bytes(rank.kv_bytes)]);
        row
    }
}

/// Experts of the first layer that has any.
fn experts_of(spec: &ModelSpec) -> Option<usize> {
    spec.layers.iter().find_map(|layer| match &layer.feed_forward {
        FeedForward::Experts(experts) => Some(experts.count),
        FeedForward::Dense(_) => None,
    })
}

/// Columns of the first dense network that is cut, a shared one if need be; 0 where there is none.
fn dense_width(spec: &ModelSpec) -> usize {
    let width = |layer: &model::LayerSpec| match &layer.feed_forward {
        FeedForward::Dense(dense) => Some(dense.width),
        FeedForward::Experts(experts) => experts.shared.map(|shared| shared.width),
    };
    spec.layers.iter().find_map(width).unwrap_or(0)
}

/// Rank, node, device and stripes.
fn place(rank: &RankPlan) -> Vec<String> {
    let stripes = runs(rank.stripes.iter().map(|&stripe| stripe..stripe.saturating_add(1)));
    vec![rank.rank.to_string(), rank.node.to_string(), rank.device.to_string(), stripes]
}

/// Ascending ranges as inclusive runs, neighbours joined: `0-2,5`.
fn runs(ranges: impl Iterator<Item = Range<usize>>) -> String {
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in ranges.filter(|range| !range.is_empty()) {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    let text = |range: &Range<usize>| match range.len() {
        1 => range.start.to_string(),
        _ => format!("{}-{}", range.start, range.end - 1),
    };
    if joined.is_empty() {
        return "-".to_owned();
    }
    joined.iter().map(text).collect::<Vec<_>>().join(",")
}

/// Rows of cells as lines, every column right-aligned to its widest cell; no newline at the end.
pub(crate) fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cell_width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(cell_width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:>width$}"));
        cells.collect::<Vec<_>>().join("  ")
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// `512 B`, `1.50 KiB`, `2.00 GiB`: two decimals in the largest unit below the number, rounded.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match UNITS.into_iter().find(|(_, shift)| bytes >> shift > 0) {
        None => format!("{bytes} B"),
        Some((unit, shift)) => format!("{:.2} {unit}", bytes as f64 / (1u64 << shift) as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_as_people_read_them() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.50 KiB"),
            (1 << 20, "1.00 MiB"),
            (5 << 30, "5.00 GiB"),
            (u64::MAX, "16777216.00 TiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(human_bytes(bytes), text);
        }
    }

    #[test]
    fn runs_join_neighbours() {
        assert_eq!(runs([0..1, 1..2, 2..3, 5..6].into_iter()), "0-2,5");
        assert_eq!(runs([0..2, 1..3].into_iter()), "0-2");
        assert_eq!(runs(std::iter::once(3..3)), "-");
    }
}
