//! `phalanx status`: nodes, groups, ranks and the plan, as a coordinator sees them.

use std::fmt::Write;

use anyhow::Context;
use serde_json::{Value, json};
use wire::pb;

use crate::args;
use crate::process;

pub(crate) async fn run(args: args::Status) -> anyhow::Result<()> {
    let status = fetch(&args.coordinator)
        .await
        .with_context(|| format!("no coordinator answers at {}", args.coordinator))?;
    match args.output {
        args::Output::Table => process::line(table(&status).trim_end()),
        args::Output::Json => process::line(&json(&status).to_string()),
    }
    .context("standard output")
}

/// Asks a coordinator for its view.
pub(crate) async fn fetch(address: &str) -> anyhow::Result<pb::StatusReply> {
    let channel = wire::transport::connect(address).await?;
    let mut client = wire::transport::coordinator_client(channel);
    let reply = client.status(pb::StatusRequest {}).await;
    Ok(reply.map_err(|status| anyhow::anyhow!("{}", status.message()))?.into_inner())
}

fn table(status: &pb::StatusReply) -> String {
    let mut text = String::new();
    let mut line = |content: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{content}");
    };
    if let Some(deployment) = &status.deployment {
        let compute = compute_name(deployment.compute());
        line(format!("model {} ({compute}), digest {:.16}", deployment.model, deployment.digest));
    }
    line(format!("revision {}, release {}", status.revision, status.version));
    if !status.waiting_for.is_empty() {
        line(format!("waiting: {}", status.waiting_for));
    }
    line(String::new());
    line(format!(
        "{:<6}{:<20}{:<24}{:<10}{:<9}STATE",
        "NODE", "NAME", "ADDRESS", "KERNELS", "DEVICES"
    ));
    for node in &status.nodes {
        line(format!(
            "{:<6}{:<20}{:<24}{:<10}{:<9}{}",
            node.node,
            node.name,
            node.worker_address,
            node.kernel_class,
            node.devices.len(),
            if node.alive { "alive" } else { "lost" }
        ));
    }
    for group in &status.groups {
        line(String::new());
        let reason = if group.reason.is_empty() { "" } else { ": " };
        line(format!(
            "group {} epoch {} {}{reason}{}",
            group.group, group.epoch, group.phase, group.reason
        ));
        line(format!(
            "{:<6}{:<6}{:<8}{:<18}{:<14}{:<14}LOADED",
            "RANK", "NODE", "DEVICE", "STRIPES", "WEIGHTS", "KV"
        ));
        for rank in group.plan.iter().flat_map(|plan| &plan.ranks) {
            line(format!(
                "{:<6}{:<6}{:<8}{:<18}{:<14}{:<14}{}",
                rank.rank,
                rank.node,
                rank.device,
                runs(&rank.stripes),
                mebibytes(rank.weight_bytes),
                mebibytes(rank.kv_bytes),
                loaded(group, rank.rank)
            ));
        }
    }
    text
}

fn loaded(group: &pb::GroupStatus, rank: u32) -> String {
    match group.progress.iter().find(|p| p.rank == rank) {
        Some(progress) if progress.ready => "ready".to_owned(),
        Some(progress) if progress.bytes_total > 0 => {
            format!("{} %", progress.bytes_read * 100 / progress.bytes_total)
        }
        _ => "waiting".to_owned(),
    }
}

/// `[0, 1, 2, 5]` as `0-2,5`.
fn runs(stripes: &[u32]) -> String {
    let mut text = String::new();
    let mut i = 0;
    while i < stripes.len() {
        let mut end = i;
        while end + 1 < stripes.len() && stripes[end + 1] == stripes[end] + 1 {
            end += 1;
        }
        let comma = if text.is_empty() { "" } else { "," };
        let _ = match end - i {
            0 => write!(text, "{comma}{}", stripes[i]),
            _ => write!(text, "{comma}{}-{}", stripes[i], stripes[end]),
        };
        i = end + 1;
    }
    text
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

fn compute_name(compute: pb::ComputeType) -> &'static str {
    match compute {
        pb::ComputeType::F32 => "f32",
        pb::ComputeType::Bf16 => "bf16",
        pb::ComputeType::Int8 => "int8",
        pb::ComputeType::Int4 => "int4",
        pb::ComputeType::Unspecified => "unspecified",
    }
}

fn json(status: &pb::StatusReply) -> Value {
    let nodes: Vec<Value> = status
        .nodes
        .iter()
        .map(|n| {
            json!({
                "node": n.node,
                "name": n.name,
                "address": n.worker_address,
                "kernels": n.kernel_class,
                "devices": n.devices.len(),
                "alive": n.alive,
            })
        })
        .collect();
    let groups: Vec<Value> = status.groups.iter().map(group_json).collect();
    json!({
        "version": status.version,
        "revision": status.revision,
        "model": status.deployment.as_ref().map(|d| &d.model),
        "digest": status.deployment.as_ref().map(|d| &d.digest),
        "compute": status.deployment.as_ref().map(|d| compute_name(d.compute())),
        "waiting_for": status.waiting_for,
        "nodes": nodes,
        "groups": groups,
    })
}

fn group_json(group: &pb::GroupStatus) -> Value {
    let ranks: Vec<Value> = group
        .plan
        .iter()
        .flat_map(|plan| &plan.ranks)
        .map(|r| {
            let ready = group.progress.iter().any(|p| p.rank == r.rank && p.ready);
            json!({
                "rank": r.rank,
                "node": r.node,
                "device": r.device,
                "stripes": r.stripes,
                "weight_bytes": r.weight_bytes,
                "kv_bytes": r.kv_bytes,
                "ready": ready,
            })
        })
        .collect();
    json!({
        "group": group.group,
        "epoch": group.epoch,
        "phase": group.phase,
        "reason": group.reason,
        "stripes": group.plan.as_ref().map(|p| p.stripes),
        "ranks": ranks,
    })
}

#[cfg(test)]
mod tests {
    use super::runs;

    #[test]
    fn stripe_runs_are_written_short() {
        assert_eq!(runs(&[0, 1, 2, 5, 7, 8]), "0-2,5,7-8");
        assert_eq!(runs(&[3]), "3");
        assert_eq!(runs(&[]), "");
    }
}
