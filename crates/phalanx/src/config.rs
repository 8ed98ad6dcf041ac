//! From what was typed to what is run: every rule about options in one place, a sentence each.

use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use cluster::Deployment;
use gateway::{GatewayConfig, RequestLimits};
use model::ComputeType;
use planner::ExpertCut;

use crate::args::{Compute, Deploy, Experts, Quantize};
use crate::model_dir::ModelDir;

/// KV cache that is kept where one context needs less, in tokens.
const KV_TOKENS: usize = 16_384;
/// More contexts than this are never planned for by default.
const KV_CONTEXTS: usize = 16;

/// Most sequences that may run at once.
const SEQUENCES_MAX: usize = 1 << 16;
/// Most tokens of one forward pass.
const STEP_TOKENS_MAX: usize = 1 << 20;
/// Most threads of one rank: more than any machine has cores for it.
const THREADS_MAX: usize = 512;

/// Parses a number of bytes: `1073741824`, `512MiB`, `8GiB`, `8GB`.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" | "k" => 1 << 10,
        "mib" | "m" => 1 << 20,
        "gib" | "g" => 1 << 30,
        "tib" | "t" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        other => return Err(format!("unknown unit {other}; use MiB, GiB or TiB")),
    };
    let number: u64 = digits.trim().parse().map_err(|_| "not a whole number".to_owned())?;
    number.checked_mul(unit).ok_or_else(|| "too many bytes".to_owned())
}

/// The wish, from the options and the model.
pub(crate) fn deployment(
    deploy: &Deploy,
    ranks: usize,
    model: &ModelDir,
) -> anyhow::Result<Deployment> {
    let spec = &model.spec;
    ensure!(ranks > 0, "--ranks must be at least 1");
    for name in &deploy.served_model_name {
        ensure!(
            (1..=128).contains(&name.len()) && !name.chars().any(char::is_control),
            "--served-model-name must have 1 to 128 bytes and no control characters"
        );
    }
    ensure!(
        (1..=SEQUENCES_MAX).contains(&deploy.max_num_seqs),
        "--max-num-seqs must be between 1 and {SEQUENCES_MAX}"
    );
    ensure!(
        (deploy.max_num_seqs..=STEP_TOKENS_MAX).contains(&deploy.max_num_batched_tokens),
        "--max-num-batched-tokens must be between --max-num-seqs ({}) and {STEP_TOKENS_MAX}: every \
         running sequence takes part in every pass",
        deploy.max_num_seqs
    );
    ensure!(
        (1..=4096).contains(&deploy.block_size),
        "--block-size must be between 1 and 4096 tokens"
    );
    let context = match deploy.max_model_len {
        Some(0) => bail!("--max-model-len must be at least 1"),
        Some(wanted) if wanted > spec.context => bail!(
            "--max-model-len {wanted} is more than the {} positions the model was made for",
            spec.context
        ),
        Some(wanted) => wanted,
        None => spec.context,
    };
    let default_tokens = context.max(KV_TOKENS.min(context.saturating_mul(KV_CONTEXTS)));
    let kv_tokens = deploy.kv_tokens.unwrap_or(default_tokens);
    ensure!(
        kv_tokens >= context,
        "--kv-tokens {kv_tokens} cannot hold one context of {context} tokens; lower --max-model-len"
    );
    let stripes = deploy.stripes.unwrap_or_else(|| planner::stripes::default_count(spec));
    planner::stripes::validate(spec, stripes).context("--stripes")?;
    ensure!(
        ranks <= stripes,
        "--ranks {ranks} is more than the {stripes} stripes the model is cut into"
    );
    Ok(Deployment {
        model: served_names(deploy, model)[0].clone(),
        digest: model.digest.to_string(),
        spec: Arc::clone(spec),
        experts: match deploy.experts {
            Experts::Stripe => ExpertCut::Stripe,
            Experts::Whole => ExpertCut::Whole,
        },
        compute: compute(deploy),
        stripes: Some(stripes),
        ranks,
        kv_blocks: kv_tokens.div_ceil(deploy.block_size),
        block_tokens: deploy.block_size,
        max_sequences: deploy.max_num_seqs,
        step_tokens: deploy.max_num_batched_tokens,
        context,
    })
}

/// What enters products.
fn compute(deploy: &Deploy) -> ComputeType {
    match (deploy.quantize, deploy.compute) {
        (Some(Quantize::Q8), _) | (None, Compute::Int8) => ComputeType::Int8,
        (Some(Quantize::Q4), _) => ComputeType::Int4,
        (None, Compute::F32) => ComputeType::F32,
        (None, Compute::Bf16) => ComputeType::Bf16,
    }
}

/// Checks `host:port` as typed: a worker would try for ever to reach what is no address.
pub(crate) fn address(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p > 0) => {
            Ok(text.to_owned())
        }
        _ => Err("not of the form HOST:PORT".to_owned()),
    }
}

/// Names clients use; the first one is the model's id.
pub(crate) fn served_names(deploy: &Deploy, model: &ModelDir) -> Vec<String> {
    if deploy.served_model_name.is_empty() {
        vec![model.name.clone()]
    } else {
        deploy.served_model_name.clone()
    }
}

/// What the gateway needs of the options and the model.
pub(crate) fn gateway(
    deploy: &Deploy,
    model: &ModelDir,
    deployment: &Deployment,
) -> anyhow::Result<GatewayConfig> {
    Ok(GatewayConfig {
        served_names: served_names(deploy, model),
        files: model.gateway_files()?,
        context: deployment.context,
        vocab: model.spec.vocab,
        bos: model.spec.bos,
        eos: model.spec.eos.clone(),
        limits: RequestLimits::default(),
    })
}

/// Threads per rank when nobody says: all cores, divided.
pub(crate) fn threads(wanted: Option<usize>, ranks: usize) -> anyhow::Result<usize> {
    match wanted {
        Some(threads) if !(1..=THREADS_MAX).contains(&threads) => {
            bail!("--threads must be between 1 and {THREADS_MAX}, not {threads}")
        }
        Some(threads) => Ok(threads),
        None => {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            Ok((cores / ranks.max(1)).max(1))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn bytes_are_read_with_and_without_units() {
        assert_eq!(bytes("1024"), Ok(1024));
        assert_eq!(bytes("8GiB"), Ok(8 << 30));
        assert_eq!(bytes("2gb"), Ok(2_000_000_000));
    }

    #[test]
    fn bytes_refuse_what_they_cannot_mean() {
        for wrong in ["", "GiB", "-1", "1.5GiB", "8 parsecs", "99999999999TiB"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}
