//! The report, for people and for programs.

use std::fmt::Write;

use model::{Attention, ComputeType, FeedForward, ModelSpec};
use planner::{ExpertCut, ShardPlan, human_bytes, stripes};
use serde_json::{Map, Value, json};

use super::Model;
use super::fit::{Fit, Fits, Wish, largest};

/// All stripes on one rank: the model once.
fn whole(spec: &ModelSpec, compute: ComputeType) -> u64 {
    stripes::weight_bytes(spec, 1, &[0], compute)
}

/// Cache bytes of one token, over all layers and heads.
fn kv_per_token(spec: &ModelSpec, compute: ComputeType) -> u64 {
    stripes::kv_bytes(spec, 1, &[0], compute, 1, 1)
}

/// `671.03 B (37.55 B active)`.
fn parameters(number: u64) -> String {
    let of = |unit: f64, name: &str| format!("{:.2} {name}", number as f64 / unit);
    match number {
        1_000_000_000.. => of(1e9, "B"),
        1_000_000.. => of(1e6, "M"),
        _ => number.to_string(),
    }
}

/// Runs of equal layers in a few words each.
fn layers(spec: &ModelSpec) -> Vec<String> {
    let mut first = 0;
    let mut lines = Vec::new();
    for run in spec.layers.chunk_by(|a, b| a == b) {
        let last = first + run.len() - 1;
        let place = if run.len() == 1 { first.to_string() } else { format!("{first}-{last}") };
        lines.push(format!(
            "{place}: {}; {}",
            attention(&run[0].attention),
            feed_forward(&run[0].feed_forward)
        ));
        first = last + 1;
    }
    lines
}

fn attention(attention: &Attention) -> String {
    match attention {
        Attention::Grouped(a) => {
            let window = a.window.map_or(String::new(), |window| format!(", window {window}"));
            let (heads, kv, width) = (a.heads, a.kv_heads, a.head_dim);
            format!("{heads} heads over {kv} KV heads of {width}{window}")
        }
        Attention::Latent(a) => {
            format!("{} heads over one latent of {} + {}", a.heads, a.kv_rank, a.rope_dim)
        }
    }
}

fn feed_forward(feed_forward: &FeedForward) -> String {
    match feed_forward {
        FeedForward::Dense(dense) => format!("dense {}", dense.width),
        FeedForward::Experts(e) => {
            let shared =
                e.shared.map_or(String::new(), |s| format!(" and a shared of {}", s.width));
            format!("{} of {} experts of {}{shared}", e.chosen, e.count, e.width)
        }
    }
}

/// For people.
pub(crate) fn table(model: &Model, wish: &Wish, fits: &Fits) -> String {
    let spec = &model.spec;
    let mut text = String::new();
    let mut line = |name: &str, content: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<12}{content}");
    };
    line("model", &model.name);
    line("family", spec.family.name());
    let (total, active) = (parameters(spec.parameters()), parameters(spec.active_parameters()));
    line("parameters", &format!("{total} ({active} for each token)"));
    let (hidden, vocab, context) = (spec.hidden, spec.vocab, spec.context);
    line("shape", &format!("hidden {hidden}, vocabulary {vocab}, context {context}"));
    for (i, layers) in layers(spec).iter().enumerate() {
        line(if i == 0 { "layers" } else { "" }, layers);
    }
    if !spec.ignored_prefixes.is_empty() {
        line("not served", &format!("{} (further prediction)", spec.ignored_prefixes.join(", ")));
    }
    let stored = &model.stored;
    let parts: Vec<String> =
        stored.iter().map(|(name, bytes)| format!("{name} {}", human_bytes(*bytes))).collect();
    let sum = stored.values().fold(0u64, |sum, bytes| sum.saturating_add(*bytes));
    line("stored", &format!("{} ({})", human_bytes(sum), parts.join(", ")));
    if let Some(files) = &model.files {
        line("files", &format!("{} of weights, {}", files.count, human_bytes(files.bytes)));
    }
    match &model.tokenizer {
        Some(Ok(())) => line("tokenizer", "can be used"),
        Some(Err(reason)) => line("tokenizer", reason),
        None => {}
    }
    for compute in ComputeType::ALL {
        let name = format!("as {compute}");
        let (weights, kv) = (whole(spec, compute), kv_per_token(spec, compute));
        let (weights, kv) = (human_bytes(weights), human_bytes(kv));
        line(&name, &format!("{weights} of weights, {kv} of KV cache a token"));
    }
    let (default, max) = (stripes::default_count(spec), stripes::max_count(spec));
    line("stripes", &format!("1 to {max}; {default} unless said otherwise"));
    if model.licences.is_empty() {
        line("licence", "nothing said in the files that were read");
    }
    for (i, licence) in model.licences.iter().enumerate() {
        let name = if i == 0 { "licence" } else { "" };
        line(name, &format!("{} ({})", licence.text, licence.place));
    }
    let _ = writeln!(text);
    text.push_str(&match &fits.nodes {
        None => ranks_table(wish, fits),
        Some(nodes) => nodes_table(&nodes.text, spec, wish, fits),
    });
    text
}

/// Memory of the largest rank, by ranks and compute type.
fn ranks_table(wish: &Wish, fits: &Fits) -> String {
    let mut text = format!(
        "Memory of each rank{}, with {} tokens of KV cache (weights + cache):\n",
        divided(wish.experts),
        wish.kv_tokens
    );
    let names = ComputeType::ALL.map(|compute| format!("{:>24}", compute.name())).concat();
    let _ = writeln!(text, "{:>6}{:>9}{names}", "RANKS", "STRIPES");
    let mut counts: Vec<(usize, usize)> = fits.fits.iter().filter_map(count).collect();
    counts.sort_unstable();
    counts.dedup();
    for (ranks, stripes) in counts {
        let of = |compute| {
            let same = |fit: &&Fit| fit.compute == compute && count(fit) == Some((ranks, stripes));
            let plan = fits.fits.iter().find(same).and_then(|fit| fit.plan.as_ref().ok());
            let shown = plan.and_then(|plan| {
                let rank = plan.ranks.iter().max_by_key(|r| r.weight_bytes + r.kv_bytes)?;
                Some(format!("{} + {}", human_bytes(rank.weight_bytes), human_bytes(rank.kv_bytes)))
            });
            format!("{:>24}", shown.unwrap_or_default())
        };
        let cells = ComputeType::ALL.map(of).concat();
        let _ = writeln!(text, "{ranks:>6}{stripes:>9}{cells}");
    }
    text
}

/// How experts are divided, where it is not the usual way.
fn divided(experts: ExpertCut) -> &'static str {
    match experts {
        ExpertCut::Stripe => "",
        ExpertCut::Whole => ", experts whole",
    }
}

fn count(fit: &Fit) -> Option<(usize, usize)> {
    fit.plan.as_ref().ok().map(|plan| (plan.ranks.len(), fit.stripes))
}

/// Whether and how it fits given nodes; the most exact compute type that fits with its plan.
fn nodes_table(nodes: &str, spec: &ModelSpec, wish: &Wish, fits: &Fits) -> String {
    let mut text = format!(
        "On {nodes}{}, with {} tokens of KV cache on each rank:\n",
        divided(wish.experts),
        wish.kv_tokens
    );
    for fit in &fits.fits {
        let says = match (&fit.plan, fit.enough) {
            (Ok(plan), _) => format!(
                "fits on {} ranks ({} stripes), up to {} each; room for {} tokens",
                plan.ranks.len(),
                plan.stripes,
                human_bytes(largest(plan)),
                fit.room_tokens.unwrap_or(0)
            ),
            (Err(_), Some(Some(ranks))) => {
                format!("does not fit; {ranks} devices of the largest kind would do")
            }
            (Err(error), Some(None)) => format!("does not fit on any number of them: {error}"),
            (Err(error), None) => error.to_string(),
        };
        let _ = writeln!(text, "{:<6}{says}", fit.compute.name());
    }
    let first = fits.fits.iter().find_map(|fit| Some((fit.compute, fit.plan.as_ref().ok()?)));
    if let Some((compute, plan)) = first {
        let _ = writeln!(text, "\nThe plan in {compute}:\n{}", plan.table(spec, wish.experts));
    }
    text.push_str("\nMemory alone is counted. This release computes on processors only.\n");
    text
}

/// For programs.
pub(crate) fn json(model: &Model, wish: &Wish, fits: &Fits) -> Value {
    let spec = &model.spec;
    let computed: Map<String, Value> = ComputeType::ALL
        .into_iter()
        .map(|compute| {
            let (weights, kv) = (whole(spec, compute), kv_per_token(spec, compute));
            let sizes = json!({"weight_bytes": weights, "kv_bytes_per_token": kv});
            (compute.name().to_owned(), sizes)
        })
        .collect();
    let licences = model.licences.iter().map(|l| json!({"place": l.place, "text": l.text}));
    json!({
        "model": model.name,
        "family": spec.family.name(),
        "parameters": spec.parameters(),
        "active_parameters": spec.active_parameters(),
        "hidden": spec.hidden,
        "vocab": spec.vocab,
        "context": spec.context,
        "layers": layers(spec),
        "not_served": spec.ignored_prefixes,
        "stored_bytes": model.stored,
        "files": model.files.as_ref().map(|f| json!({"count": f.count, "bytes": f.bytes})),
        "tokenizer": model.tokenizer.as_ref().map(|t| match t {
            Ok(()) => json!({"usable": true}),
            Err(reason) => json!({"usable": false, "reason": reason}),
        }),
        "computed": computed,
        "stripes": {"default": stripes::default_count(spec), "max": stripes::max_count(spec)},
        "licences": licences.collect::<Vec<_>>(),
        "experts": wish.experts.name(),
        "kv_tokens": wish.kv_tokens,
        "nodes": fits.nodes.as_ref().map(|nodes| &nodes.text),
        "plans": fits.fits.iter().map(fit).collect::<Vec<_>>(),
    })
}

fn fit(fit: &Fit) -> Value {
    let mut value = json!({"compute": fit.compute.name(), "stripes": fit.stripes});
    match &fit.plan {
        Ok(plan) => value["ranks"] = ranks(plan),
        Err(error) => value["error"] = json!(error.to_string()),
    }
    if let Some(enough) = fit.enough {
        value["devices_that_would_do"] = json!(enough);
    }
    if let Some(room) = fit.room_tokens {
        value["kv_tokens_with_room"] = json!(room);
    }
    value
}

fn ranks(plan: &ShardPlan) -> Value {
    let rank = |rank: &planner::RankPlan| {
        json!({
            "rank": rank.rank,
            "node": rank.node.0,
            "device": rank.device,
            "stripes": rank.stripes,
            "weight_bytes": rank.weight_bytes,
            "kv_bytes": rank.kv_bytes,
        })
    };
    plan.ranks.iter().map(rank).collect()
}
