//! `2x8xH200,1x64GiB` as nodes with devices.

use planner::{DeviceSpec, NodeId, NodeSpec};

use crate::config;

/// Most nodes, and most devices of one.
const MOST: usize = 1024;
/// Of a GPU's memory, tenths that weights and cache may take: activations and the libraries' own
/// buffers need the rest. A size given in bytes is taken as it is.
const GPU_TENTHS: u64 = 9;

/// Memory of devices in GiB, as their drivers report it, rounded down.
const GPUS: [(&str, u64); 28] = [
    ("A10", 22),
    ("A100", 79),
    ("A100-40GB", 39),
    ("A100-80GB", 79),
    ("A30", 23),
    ("A40", 44),
    ("A6000", 47),
    ("B200", 178),
    ("GH200", 94),
    ("H100", 79),
    ("H100-NVL", 93),
    ("H20", 95),
    ("H200", 140),
    ("L4", 22),
    ("L40", 44),
    ("L40S", 44),
    ("MI250X", 127),
    ("MI300X", 191),
    ("MI325X", 255),
    ("RTX3090", 23),
    ("RTX4090", 23),
    ("RTX5090", 31),
    ("RTX6000-ADA", 47),
    ("RTX-PRO-6000", 95),
    ("T4", 15),
    ("V100", 15),
    ("V100-16GB", 15),
    ("V100-32GB", 31),
];

/// Nodes of several kinds, as given.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Nodes {
    pub(crate) text: String,
    pub(crate) kinds: Vec<Kind>,
}

/// Equal nodes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Kind {
    pub(crate) count: usize,
    pub(crate) devices: usize,
    /// A GPU's name, or the size as given.
    pub(crate) device: String,
    /// Whether the device was given by a GPU's name.
    pub(crate) gpu: bool,
    /// Bytes that weights and cache may take on one device.
    pub(crate) usable_bytes: u64,
}

impl Nodes {
    /// All of them for the planner.
    pub(crate) fn specs(&self) -> Vec<NodeSpec> {
        let devices = |kind: &Kind| {
            vec![DeviceSpec { memory_bytes: kind.usable_bytes, weight: 1.0 }; kind.devices]
        };
        let nodes = self.kinds.iter().flat_map(|kind| vec![devices(kind); kind.count]);
        (1..).zip(nodes).map(|(id, devices)| NodeSpec { id: NodeId(id), devices }).collect()
    }

    /// Devices of all nodes.
    pub(crate) fn devices(&self) -> usize {
        self.kinds.iter().map(|kind| kind.count * kind.devices).sum()
    }
}

/// Parses what was typed.
pub(crate) fn nodes(text: &str) -> Result<Nodes, String> {
    let kinds = text.split(',').map(kind).collect::<Result<Vec<_>, _>>()?;
    let nodes = Nodes { text: text.to_owned(), kinds };
    let count: usize = nodes.kinds.iter().map(|kind| kind.count).sum();
    if count > MOST {
        return Err(format!("{count} nodes are more than {MOST}"));
    }
    Ok(nodes)
}

fn kind(text: &str) -> Result<Kind, String> {
    // A name may hold an x of its own, so the counts are taken from the front.
    let (count, rest) = counted(text.trim());
    let (devices, device) = counted(rest);
    let within = |number: Option<usize>, what: &str| match number.unwrap_or(1) {
        number if (1..=MOST).contains(&number) => Ok(number),
        number => Err(format!("{number} {what} in {text:?}: at least 1, at most {MOST}")),
    };
    let (usable_bytes, gpu) = memory(device).ok_or_else(|| unknown(device))?;
    Ok(Kind {
        count: within(count, "nodes")?,
        devices: within(devices, "devices")?,
        device: device.to_owned(),
        gpu,
        usable_bytes,
    })
}

/// `8xH200` as (8, `H200`).
fn counted(text: &str) -> (Option<usize>, &str) {
    let split = text.split_once(['x', 'X']);
    match split.and_then(|(number, rest)| Some((number.trim().parse().ok()?, rest))) {
        Some((number, rest)) => (Some(number), rest.trim()),
        None => (None, text),
    }
}

/// Usable bytes, and whether it is a GPU.
fn memory(device: &str) -> Option<(u64, bool)> {
    let named = GPUS.iter().find(|(name, _)| name.eq_ignore_ascii_case(device));
    let gpu = named.map(|(_, gib)| (gib << 30) / 10 * GPU_TENTHS);
    // A bare number would be bytes, which nobody means here.
    let size = || device.ends_with(['b', 'B']).then(|| config::bytes(device).ok()).flatten();
    let found = gpu.map(|bytes| (bytes, true)).or_else(|| Some((size()?, false)));
    found.filter(|(bytes, _)| *bytes > 0)
}

fn unknown(device: &str) -> String {
    let names = GPUS.map(|(name, _)| name).join(", ");
    let shown: String = device.chars().take(40).collect();
    format!("{shown:?} is neither a size such as 64GiB nor one of {names}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_nodes() {
        let parsed = nodes("2x8xH200, 4x64GiB,80gb").expect("nodes");
        let kinds: Vec<_> =
            parsed.kinds.iter().map(|k| (k.count, k.devices, k.device.as_str())).collect();
        assert_eq!(kinds, [(2, 8, "H200"), (4, 1, "64GiB"), (1, 1, "80gb")]);
        assert_eq!(parsed.devices(), 21);
        assert_eq!(parsed.kinds[0].usable_bytes, (140 << 30) / 10 * 9);
        assert_eq!(parsed.kinds[1].usable_bytes, 64 << 30);
        let specs = parsed.specs();
        assert_eq!(specs.len(), 7);
        assert_eq!((specs[1].id, specs[1].devices.len()), (NodeId(2), 8));
        assert_eq!(nodes("1xRTX4090").map(|n| n.kinds[0].device.clone()), Ok("RTX4090".into()));
    }

    #[test]
    fn what_is_no_node_is_refused_with_a_reason() {
        for (text, reason) in [
            ("", "neither a size"),
            ("2x8xH900", "H200"),
            ("0x8xH200", "at least 1"),
            ("2x0xH200", "at least 1"),
            ("2x99999xH200", "at most 1024"),
            ("1000xH100,1000xH100", "more than 1024"),
            ("4x64", "such as 64GiB"),
            ("4x0GiB", "neither"),
            ("4x99999999999TiB", "neither"),
            ("-1xH100", "neither"),
        ] {
            let refused = nodes(text).expect_err(text);
            assert!(refused.contains(reason), "{text}: {refused}");
        }
    }
}
