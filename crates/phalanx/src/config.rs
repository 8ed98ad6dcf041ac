//! From what was typed to what is run: every rule about options in one place, a sentence each.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use cluster::{Deployment, Model};
use control::leader::Timing;
use gateway::{GatewayConfig, RequestLimits, ServedModel};
use model::ComputeType;

use crate::args::{Compute, Deploy, Http, Patience, Quantize};
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

/// Parses a time: `250ms`, `3s`, `30m`, `24h`, `7d`.
pub(crate) fn time(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| "not a whole number and a unit".to_owned())?;
    let milliseconds: u64 = match &text[digits.len()..] {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        other => return Err(format!("unknown unit {other:?}; use ms, s, m, h or d")),
    };
    let time = number.checked_mul(milliseconds).ok_or_else(|| "too long".to_owned())?;
    Ok(Duration::from_millis(time))
}

/// Shortest and longest tick of consensus.
const TICKS: [Duration; 2] = [Duration::from_millis(1), Duration::from_secs(1)];

/// Leases, as typed.
pub(crate) fn timing(patience: &Patience) -> anyhow::Result<Timing> {
    let Patience { heartbeat, suspicion, lease, tick } = *patience;
    ensure!(!heartbeat.is_zero(), "--heartbeat must not be zero");
    ensure!(suspicion > heartbeat, "--suspicion must be longer than --heartbeat");
    ensure!(lease >= suspicion * 2, "--lease must be at least twice --suspicion");
    ensure!(
        lease <= Duration::from_secs(3600),
        "--lease must be at most an hour: so long a dead worker's ranks would be missed"
    );
    ensure!(tick >= TICKS[0] && tick <= TICKS[1], "--tick must be between 1 ms and 1 s");
    let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    Ok(Timing {
        heartbeat: milliseconds(heartbeat),
        suspicion: milliseconds(suspicion),
        lease: milliseconds(lease),
        takeover: milliseconds(lease),
    })
}

/// Leases and tick where all roles share a process: they come and go together.
pub(crate) fn alone() -> (Timing, Duration) {
    let timing = Timing { heartbeat: 500, suspicion: 5_000, lease: 30_000, takeover: 30_000 };
    (timing, Duration::from_millis(10))
}

/// `host:port` at which others reach a listener.
pub(crate) fn reached(listen: SocketAddr, advertise: Option<&str>) -> anyhow::Result<String> {
    let address = match advertise {
        Some(host) if host.contains(':') && !host.starts_with('[') => {
            format!("[{host}]:{}", listen.port())
        }
        Some(host) => format!("{host}:{}", listen.port()),
        None => {
            ensure!(
                !listen.ip().is_unspecified(),
                "{listen} is no address that other nodes could reach; say with --advertise which is"
            );
            listen.to_string()
        }
    };
    cluster::check_address("address", &address)
        .with_context(|| format!("--advertise {address}"))?;
    Ok(address)
}

/// What models are known by.
pub(crate) fn digests(models: &[ModelDir]) -> BTreeSet<String> {
    models.iter().map(|model| model.digest.to_string()).collect()
}

/// The model, as the cluster knows it.
pub(crate) fn model(model: &ModelDir) -> Model {
    Model {
        name: model.name.clone(),
        digest: model.digest.to_string(),
        spec: Arc::clone(&model.spec),
    }
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
    sizes(deploy)?;
    let context = context(deploy, spec.context)?;
    let stripes = deploy.stripes.unwrap_or_else(|| planner::stripes::default_count(spec));
    planner::stripes::validate(spec, stripes).context("--stripes")?;
    ensure!(
        ranks <= stripes,
        "--ranks {ranks} is more than the {stripes} stripes the model is cut into"
    );
    Ok(Deployment {
        name: served_names(deploy, model)[0].clone(),
        digest: model.digest.to_string(),
        compute: compute(deploy),
        experts: deploy.experts.into(),
        stripes: Some(stripes),
        ranks,
        replicas: 1,
        nodes: BTreeSet::new(),
        kv_blocks: kv_blocks(deploy, context)?,
        block_tokens: deploy.block_size,
        max_sequences: deploy.max_num_seqs,
        step_tokens: deploy.max_num_batched_tokens,
        context,
    })
}

/// Refuses sizes that make no sense for any model.
pub(crate) fn sizes(deploy: &Deploy) -> anyhow::Result<()> {
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
    Ok(())
}

/// Tokens of prompt and answer together, for a model made for `most`.
pub(crate) fn context(deploy: &Deploy, most: usize) -> anyhow::Result<usize> {
    Ok(match deploy.max_model_len {
        Some(0) => bail!("--max-model-len must be at least 1"),
        Some(wanted) if wanted > most => bail!(
            "--max-model-len {wanted} is more than the {} positions the model was made for",
            most
        ),
        Some(wanted) => wanted,
        None => most,
    })
}

/// KV blocks of each rank.
pub(crate) fn kv_blocks(deploy: &Deploy, context: usize) -> anyhow::Result<usize> {
    let kv_tokens = deploy.kv_tokens.unwrap_or_else(|| default_kv_tokens(context));
    ensure!(
        kv_tokens >= context,
        "--kv-tokens {kv_tokens} cannot hold one context of {context} tokens; lower --max-model-len"
    );
    Ok(kv_tokens.div_ceil(deploy.block_size))
}

/// Tokens of KV cache that a rank keeps when nobody says.
pub(crate) fn default_kv_tokens(context: usize) -> usize {
    context.max(KV_TOKENS.min(context.saturating_mul(KV_CONTEXTS)))
}

/// What enters products.
pub(crate) fn compute(deploy: &Deploy) -> ComputeType {
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

/// What the gateway needs of the options and the models, of which `deployment` has the first.
pub(crate) fn gateway(
    (deploy, http): (&Deploy, &Http),
    models: &[ModelDir],
    deployment: &Deployment,
) -> anyhow::Result<GatewayConfig> {
    let first = models.first().context("a model directory is needed")?;
    let served = |model: &ModelDir| {
        let own = model.digest == first.digest;
        Ok(ServedModel {
            digest: model.digest.to_string(),
            files: model.gateway_files()?,
            context: if own { deployment.context } else { model.spec.context },
            vocab: model.spec.vocab,
            bos: model.spec.bos,
            eos: model.spec.eos.clone(),
        })
    };
    Ok(GatewayConfig {
        served_names: served_names(deploy, first),
        models: models.iter().map(served).collect::<anyhow::Result<_>>()?,
        limits: RequestLimits { drain: http.grace, ..RequestLimits::default() },
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
    use std::time::Duration;

    use super::{bytes, reached, time};

    #[test]
    fn times_have_a_unit() {
        assert_eq!(time("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(time("7d"), Ok(Duration::from_secs(7 * 24 * 3600)));
        for wrong in ["", "5", "s", "-1s", "1.5s", "3 s", "1w", "99999999999999999d"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_address_that_nobody_could_reach_is_refused() {
        let at = |text: &str| text.parse().expect("an address");
        assert_eq!(reached(at("10.0.0.1:8100"), None).ok(), Some("10.0.0.1:8100".to_owned()));
        assert!(reached(at("0.0.0.0:8100"), None).is_err());
        let named = reached(at("0.0.0.0:8100"), Some("c-0.phalanx"));
        assert_eq!(named.ok(), Some("c-0.phalanx:8100".to_owned()));
        assert_eq!(reached(at("[::]:1"), Some("::1")).ok(), Some("[::1]:1".to_owned()));
        assert!(reached(at("0.0.0.0:8100"), Some("a b")).is_err());
    }

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
