//! What a cluster looks like, as tables for people and as JSON for programs.

use std::fmt::Write;

use serde_json::{Value, json};
use wire::pb;

/// Everything.
pub(crate) fn table(status: &pb::StatusReply) -> String {
    let mut text = String::new();
    let control = status.control.clone().unwrap_or_default();
    let leader = match control.leader {
        0 => "no leader: changes wait, answers go on".to_owned(),
        leader => format!("node {leader} leads term {}", control.term),
    };
    line(&mut text, &format!("control: {leader}; revision {}", status.revision));
    if !status.current {
        line(&mut text, "no majority confirmed this view: it may be old");
    }
    if control.storage_full {
        line(&mut text, "no room on this coordinator's disk: it accepts no changes");
    }
    for deployment in &status.deployments {
        let name = deployment.deployment.as_ref().map_or("", |one| &one.model);
        let waiting = match (deployment.waiting_for.as_str(), deployment.degraded.as_str()) {
            ("", "") => "served".to_owned(),
            ("", why) => format!("served, degraded: {why}"),
            (why, _) => format!("waiting: {why}"),
        };
        let draining = if deployment.draining { "draining, " } else { "" };
        let whole =
            deployment.deployment.as_ref().is_some_and(|one| one.experts() == pb::ExpertCut::Whole);
        let whole = if whole { ", experts whole" } else { "" };
        line(&mut text, &format!("deployment {name}{whole}: {draining}{waiting}"));
    }
    text.push_str(&aliases_table(status));
    if status.deployments.is_empty() {
        line(&mut text, "nothing is deployed");
    }
    let parts = [members_table(status), nodes_table(status), groups_table(status)];
    for part in parts.iter().filter(|part| !part.is_empty()) {
        line(&mut text, "");
        text.push_str(part);
    }
    text
}

pub(crate) fn aliases_table(status: &pb::StatusReply) -> String {
    let mut text = String::new();
    for pb::AliasStatus { name, deployment, before } in &status.aliases {
        let before = match before.as_str() {
            "" => String::new(),
            before => format!(", before {before}"),
        };
        line(&mut text, &format!("alias {name}: {deployment}{before}"));
    }
    text
}

pub(crate) fn aliases_json(status: &pb::StatusReply) -> Value {
    let aliases = status.aliases.iter().map(|one| {
        let before = Some(&one.before).filter(|before| !before.is_empty());
        json!({"name": one.name, "deployment": one.deployment, "before": before})
    });
    Value::Array(aliases.collect())
}

pub(crate) fn members_table(status: &pb::StatusReply) -> String {
    let control = status.control.clone().unwrap_or_default();
    let mut text = String::new();
    line(&mut text, &format!("{:<6}{:<9}{:<8}{:<24}API", "NODE", "PART", "", "ADDRESS"));
    for member in &control.members {
        let node = status.nodes.iter().find(|node| node.node == member.node);
        let leads = member.node == control.leader;
        line(
            &mut text,
            &format!(
                "{:<6}{:<9}{:<8}{:<24}{}",
                member.node,
                member.part,
                if leads { "leader" } else { "" },
                node.map_or("", |node| &node.cluster_address),
                node.map_or("", |node| &node.http_address),
            ),
        );
    }
    text
}

pub(crate) fn nodes_table(status: &pb::StatusReply) -> String {
    let mut text = String::new();
    line(
        &mut text,
        &format!(
            "{:<6}{:<20}{:<13}{:<24}{:<10}{:<9}STATE",
            "NODE", "NAME", "ROLE", "ADDRESS", "KERNELS", "DEVICES"
        ),
    );
    for node in &status.nodes {
        let address = match node.worker_address.as_str() {
            "" => &node.cluster_address,
            address => address,
        };
        line(
            &mut text,
            &format!(
                "{:<6}{:<20}{:<13}{:<24}{:<10}{:<9}{}",
                node.node,
                node.name,
                node.role,
                address,
                node.kernel_class,
                node.devices.len(),
                state(node),
            ),
        );
    }
    text
}

/// A coordinator offers no devices, so that it is merely enrolled says nothing.
fn state(node: &pb::NodeStatus) -> &str {
    match (node.role.as_str(), node.standing.as_str()) {
        ("coordinator", "enrolled") if !node.cluster_address.is_empty() => "member",
        (_, standing) => standing,
    }
}

pub(crate) fn groups_table(status: &pb::StatusReply) -> String {
    let mut text = String::new();
    for group in &status.groups {
        if !text.is_empty() {
            line(&mut text, "");
        }
        let reason = if group.reason.is_empty() { "" } else { ": " };
        line(
            &mut text,
            &format!(
                "group {} of {} epoch {} {}{reason}{}",
                group.group, group.deployment, group.epoch, group.phase, group.reason
            ),
        );
        line(
            &mut text,
            &format!(
                "{:<6}{:<6}{:<8}{:<18}{:<14}{:<14}LOADED",
                "RANK", "NODE", "DEVICE", "STRIPES", "WEIGHTS", "KV"
            ),
        );
        for rank in group.plan.iter().flat_map(|plan| &plan.ranks) {
            line(
                &mut text,
                &format!(
                    "{:<6}{:<6}{:<8}{:<18}{:<14}{:<14}{}",
                    rank.rank,
                    rank.node,
                    rank.device,
                    runs(&rank.stripes),
                    mebibytes(rank.weight_bytes),
                    mebibytes(rank.kv_bytes),
                    loaded(group, rank.rank)
                ),
            );
        }
    }
    text
}

pub(crate) fn models_table(status: &pb::StatusReply) -> String {
    let mut text = String::new();
    line(
        &mut text,
        &format!("{:<24}{:<18}{:<16}{:<12}CONTEXT", "MODEL", "DIGEST", "FAMILY", "PARAMETERS"),
    );
    for model in &status.models {
        line(
            &mut text,
            &format!(
                "{:<24}{:<18.16}{:<16}{:<12}{}",
                model.name,
                model.digest,
                model.family,
                format!("{:.2} M", model.parameters as f64 / 1e6),
                model.context
            ),
        );
    }
    text
}

fn line(text: &mut String, content: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{}", content.trim_end());
}

fn loaded(group: &pb::GroupStatus, rank: u32) -> String {
    match group.progress.iter().find(|p| p.rank == rank) {
        Some(progress) if progress.ready => {
            format!("ready, read {}", mebibytes(progress.bytes_read))
        }
        Some(progress) if progress.bytes_total > 0 => {
            format!("{} %", progress.bytes_read * 100 / progress.bytes_total)
        }
        _ => "waiting".to_owned(),
    }
}

/// `[0, 1, 2, 5]` as `0-2,5`.
pub(crate) fn runs(stripes: &[u32]) -> String {
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

fn experts_name(experts: pb::ExpertCut) -> &'static str {
    match experts {
        pb::ExpertCut::Unspecified | pb::ExpertCut::Stripe => "stripe",
        pb::ExpertCut::Whole => "whole",
    }
}

/// Everything.
pub(crate) fn json(status: &pb::StatusReply) -> Value {
    let deployments = status.deployments.iter().filter_map(|one| {
        let deployment = one.deployment.as_ref()?;
        Some(json!({
            "name": deployment.model,
            "digest": deployment.digest,
            "compute": compute_name(deployment.compute()),
            "experts": experts_name(deployment.experts()),
            "ranks": deployment.ranks,
            "replicas": deployment.replicas,
            "serving": one.serving,
            "waiting_for": one.waiting_for,
            "degraded": one.degraded,
            "draining": one.draining,
        }))
    });
    json!({
        "version": status.version,
        "revision": status.revision,
        "current": status.current,
        "certificate_generation": status.generation,
        "control": members_json(status),
        "deployments": deployments.collect::<Vec<_>>(),
        "aliases": aliases_json(status),
        "models": models_json(status),
        "nodes": nodes_json(status),
        "groups": groups_json(status),
    })
}

pub(crate) fn members_json(status: &pb::StatusReply) -> Value {
    let control = status.control.clone().unwrap_or_default();
    let members = control.members.iter().map(|member| {
        json!({
            "node": member.node,
            "part": member.part,
            "matched": member.matched,
            "active": member.active,
        })
    });
    json!({
        "answers": control.node,
        "term": control.term,
        "leader": Some(control.leader).filter(|leader| *leader > 0),
        "commit": control.commit,
        "applied": control.applied,
        "last": control.last,
        "snapshot": control.snapshot,
        "joint": control.joint,
        "stale_reports": control.stale_reports,
        "storage_full": control.storage_full,
        "state_hash": hexadecimal(&control.state_hash),
        "members": members.collect::<Vec<_>>(),
    })
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

pub(crate) fn nodes_json(status: &pb::StatusReply) -> Value {
    let nodes = status.nodes.iter().map(|node| {
        json!({
            "node": node.node,
            "name": node.name,
            "role": node.role,
            "address": node.worker_address,
            "cluster_address": node.cluster_address,
            "http_address": node.http_address,
            "kernels": node.kernel_class,
            "devices": node.devices.len(),
            "models": node.model_digests,
            "state": node.standing,
            "incarnation": node.incarnation,
            "version": node.version,
        })
    });
    Value::Array(nodes.collect())
}

pub(crate) fn models_json(status: &pb::StatusReply) -> Value {
    let models = status.models.iter().map(|model| {
        json!({
            "name": model.name,
            "digest": model.digest,
            "family": model.family,
            "parameters": model.parameters,
            "context": model.context,
        })
    });
    Value::Array(models.collect())
}

pub(crate) fn groups_json(status: &pb::StatusReply) -> Value {
    Value::Array(status.groups.iter().map(group_json).collect())
}

fn group_json(group: &pb::GroupStatus) -> Value {
    let ranks = group.plan.iter().flat_map(|plan| &plan.ranks).map(|rank| {
        let progress = group.progress.iter().find(|one| one.rank == rank.rank);
        let ready = progress.is_some_and(|one| one.ready);
        json!({
            "rank": rank.rank,
            "node": rank.node,
            "device": rank.device,
            "stripes": rank.stripes,
            "weight_bytes": rank.weight_bytes,
            "kv_bytes": rank.kv_bytes,
            "ready": ready,
            "bytes_read": progress.map_or(0, |one| one.bytes_read),
        })
    });
    json!({
        "group": group.group,
        "deployment": group.deployment,
        "epoch": group.epoch,
        "phase": group.phase,
        "reason": group.reason,
        "stripes": group.plan.as_ref().map(|plan| plan.stripes),
        "ranks": ranks.collect::<Vec<_>>(),
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
