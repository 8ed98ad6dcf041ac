//! What operators and workers tell the cluster, and what of it is refused.

use core::net::Ipv6Addr;
use std::sync::Arc;

use model::{ComputeType, ModelSpec};
use planner::{DeviceSpec, ExpertCut, stripes};

/// Most bytes of a name, a version or a kernel class.
const NAME_MAX: usize = 128;
/// Most bytes of an address: a full DNS name, a colon, five digits.
const ADDRESS_MAX: usize = 259;
/// Most devices of one node.
const DEVICES_MAX: usize = 64;

/// The wish that a model be served, with its options.
#[derive(Debug, Clone, PartialEq)]
pub struct Deployment {
    /// The name under which requests ask for it.
    pub model: String,
    /// blake3 of the model directory, in hexadecimal digits.
    pub digest: String,
    /// What the model is.
    pub spec: Arc<ModelSpec>,
    /// What the weights are kept in.
    pub compute: ComputeType,
    /// How experts are divided among stripes.
    pub experts: ExpertCut,
    /// Stripes the model is cut into; `None` is the model's default.
    pub stripes: Option<usize>,
    /// Ranks of a group; at least one, at most the number of stripes.
    pub ranks: usize,
    /// KV blocks that every rank keeps.
    pub kv_blocks: usize,
    /// Tokens per KV block.
    pub block_tokens: usize,
    /// Most sequences that run at once.
    pub max_sequences: usize,
    /// Most tokens of one step.
    pub step_tokens: usize,
    /// Longest prompt plus answer, in tokens.
    pub context: usize,
}

/// What a worker says of itself when it joins.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeInfo {
    /// A name for people; need not be unique.
    pub name: String,
    /// `host:port` of the Worker service.
    pub worker_address: String,
    /// `host:port` of the tensor plane, one per device.
    pub collective_addresses: Vec<String>,
    /// What it offers; each device can be one rank.
    pub devices: Vec<DeviceSpec>,
    /// blake3 of its model directory.
    pub model_digest: String,
    /// Kernel class of its processor.
    pub kernel_class: String,
    /// Release of its binary.
    pub version: String,
}

/// A field that holds what it may not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {problem}")]
pub struct BadField {
    /// The field.
    pub field: &'static str,
    /// What is wrong with it, as the end of a sentence that starts with the field.
    pub problem: &'static str,
}

impl Deployment {
    /// The number of stripes that a plan for this deployment has.
    pub fn stripe_count(&self) -> usize {
        self.stripes.unwrap_or_else(|| stripes::default_count(&self.spec))
    }

    /// Refuses what no group could ever serve.
    ///
    /// # Errors
    /// [`BadField`] names the first field that is wrong.
    pub fn check(&self) -> Result<(), BadField> {
        text("model", &self.model)?;
        hexadecimal("digest", &self.digest)?;
        if self.stripes.is_some_and(|count| stripes::validate(&self.spec, count).is_err()) {
            return Err(bad("stripes", "is not a number of stripes this model can be cut into"));
        }
        if self.ranks == 0 || self.ranks > self.stripe_count() {
            return Err(bad("ranks", "must be at least one and at most the number of stripes"));
        }
        let sizes = [
            ("kv_blocks", self.kv_blocks),
            ("block_tokens", self.block_tokens),
            ("max_sequences", self.max_sequences),
            ("step_tokens", self.step_tokens),
            ("context", self.context),
        ];
        for (field, size) in sizes {
            if size == 0 {
                return Err(bad(field, "must be at least one"));
            }
        }
        if self.step_tokens < self.max_sequences {
            // Every running sequence takes part in every step.
            return Err(bad("step_tokens", "is less than max_sequences"));
        }
        if self.kv_blocks.checked_mul(self.block_tokens).is_none() {
            return Err(bad("kv_blocks", "is out of range"));
        }
        Ok(())
    }
}

impl NodeInfo {
    /// Refuses what no other node could reach or what no plan could use.
    ///
    /// # Errors
    /// [`BadField`] names the first field that is wrong.
    pub fn check(&self) -> Result<(), BadField> {
        text("name", &self.name)?;
        text("kernel_class", &self.kernel_class)?;
        text("version", &self.version)?;
        hexadecimal("model_digest", &self.model_digest)?;
        check_address("worker_address", &self.worker_address)?;
        if self.devices.is_empty() || self.devices.len() > DEVICES_MAX {
            return Err(bad("devices", "must hold 1 to 64 devices"));
        }
        if self.collective_addresses.len() != self.devices.len() {
            return Err(bad("collective_addresses", "must hold one address per device"));
        }
        for one in &self.collective_addresses {
            check_address("collective_addresses", one)?;
        }
        for device in &self.devices {
            if !device.weight.is_finite() || device.weight <= 0.0 {
                return Err(bad("devices", "must have finite positive weights"));
            }
        }
        Ok(())
    }
}

fn bad(field: &'static str, problem: &'static str) -> BadField {
    BadField { field, problem }
}

/// Names are shown in logs and tables, so control characters have no business in them.
fn text(field: &'static str, value: &str) -> Result<(), BadField> {
    if value.is_empty() {
        return Err(bad(field, "is empty"));
    }
    if value.len() > NAME_MAX {
        return Err(bad(field, "is longer than 128 bytes"));
    }
    if value.chars().any(char::is_control) {
        return Err(bad(field, "holds control characters"));
    }
    Ok(())
}

fn hexadecimal(field: &'static str, value: &str) -> Result<(), BadField> {
    text(field, value)?;
    if !value.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(bad(field, "is not hexadecimal"));
    }
    Ok(())
}

/// Accepts `name:port`, `1.2.3.4:port` and `[::1]:port`; names are not looked up here.
///
/// # Errors
/// [`BadField`] with the name `field`.
pub fn check_address(field: &'static str, value: &str) -> Result<(), BadField> {
    let wrong = bad(field, "is not host:port");
    if value.len() > ADDRESS_MAX {
        return Err(wrong);
    }
    let (host, port) = value.rsplit_once(':').ok_or(wrong.clone())?;
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    if !digits || port.parse::<u16>().map_or(true, |port| port == 0) {
        return Err(wrong);
    }
    let bracketed = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let known = match bracketed {
        Some(inner) => inner.parse::<Ipv6Addr>().is_ok(),
        None => {
            let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
            !host.is_empty() && host.bytes().all(letter)
        }
    };
    if known { Ok(()) } else { Err(wrong) }
}

#[cfg(test)]
mod tests {
    use super::check_address;

    #[test]
    fn addresses_are_host_and_port() {
        for good in ["127.0.0.1:8000", "worker-1.svc:1", "[::1]:65535", "a_b:80"] {
            assert!(check_address("x", good).is_ok(), "{good}");
        }
        let long = format!("{}:80", "a".repeat(300));
        for bad in
            ["", ":80", "host", "host:", "host:0", "host:65536", "host:+80", "::1:80", "[zz]:80"]
        {
            assert!(check_address("x", bad).is_err(), "{bad}");
        }
        assert!(check_address("x", &long).is_err());
        assert!(check_address("x", "a b:80").is_err());
        assert!(check_address("x", "http://host:80").is_err());
    }
}
