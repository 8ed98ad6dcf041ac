//! What the gateway counts, under its own names and under those that vLLM's dashboards,
//! autoscalers and gateways read.

use std::sync::atomic::AtomicU64;
use std::time::Instant;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry};
use wire::pb::CountsReply;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    finished_reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answer {
    route: String,
    status: u16,
}

type Total = Counter<u64, AtomicU64>;

/// Counters and histograms of this gateway. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    model: String,
    prompt_tokens: Total,
    generation_tokens: Total,
    success: Family<Reason, Total>,
    first_token: Histogram,
    between_tokens: Histogram,
    whole: Histogram,
    http: Family<Answer, Total>,
    resumed: Total,
    pause: Histogram,
    stale: Total,
}

impl Metrics {
    /// `model`: the label of vLLM's names.
    pub(crate) fn new(model: &str) -> Self {
        // 1 ms to 131 s, and 0.1 ms to 13 s between tokens.
        let wide = || Histogram::new(exponential_buckets(0.001, 2.0, 18));
        Self {
            model: model.to_owned(),
            prompt_tokens: Total::default(),
            generation_tokens: Total::default(),
            success: Family::default(),
            first_token: wide(),
            between_tokens: Histogram::new(exponential_buckets(0.0001, 2.0, 18)),
            whole: wide(),
            http: Family::default(),
            resumed: Total::default(),
            pause: wide(),
            stale: Total::default(),
        }
    }

    /// Counts something of another epoch, which was refused.
    pub(crate) fn stale(&self) {
        self.stale.inc();
    }

    /// Counts an answered HTTP request. `route` is a pattern of the route table, never a path as
    /// sent.
    pub(crate) fn answered(&self, route: &str, status: u16) {
        self.http.get_or_create(&Answer { route: route.to_owned(), status }).inc();
    }

    /// Watches one sequence that is about to start; see [`Meter::taken`].
    pub(crate) fn meter(&self, prompt_tokens: usize) -> Meter {
        Meter {
            metrics: self.clone(),
            prompt_tokens: u64::try_from(prompt_tokens).unwrap_or(0),
            started: Instant::now(),
            last: None,
            lost: None,
            running: false,
        }
    }

    /// The exposition in OpenMetrics text; `counts` are the group leader's, where it told them.
    pub(crate) fn text(&self, counts: Option<&CountsReply>) -> String {
        let mut registry = Registry::default();
        registry.register("phalanx_http_requests", "Answered HTTP requests", self.http.clone());
        self.register_repairs(&mut registry);
        self.register(registry.sub_registry_with_prefix("phalanx"), "", counts);
        let labels =
            [("model_name".into(), self.model.clone().into()), ("engine".into(), "0".into())];
        let aliases = registry.sub_registry_with_labels(labels.into_iter());
        self.register(aliases, "vllm:", counts);
        if let Some(counts) = counts {
            register_blocks(&mut registry, counts);
        }
        let mut text = String::new();
        // Writing into a string fails for no other reason than a metric's own encoder.
        if encode(&mut text, &registry).is_err() {
            tracing::error!("the metrics could not be written");
        }
        text
    }

    fn register_repairs(&self, registry: &mut Registry) {
        let at = &mut (registry, "phalanx_");
        let resumed = "Sequences that went on after their group was lost";
        add(at, "sequences_resumed", resumed, self.resumed.clone());
        let pause = "Loss of a sequence's group to its next token";
        add(at, "resume_pause_seconds", pause, self.pause.clone());
        add(at, "stale_tokens", "Events of another epoch, refused", self.stale.clone());
    }

    fn register(&self, registry: &mut Registry, prefix: &str, counts: Option<&CountsReply>) {
        let at = &mut (registry, prefix);
        add(at, "prompt_tokens", "Prompt tokens taken", self.prompt_tokens.clone());
        add(at, "generation_tokens", "Tokens generated", self.generation_tokens.clone());
        add(at, "request_success", "Sequences by how they ended", self.success.clone());
        let first = "time_to_first_token_seconds";
        add(at, first, "Start to first token", self.first_token.clone());
        let between = "inter_token_latency_seconds";
        add(at, between, "Token to next token", self.between_tokens.clone());
        add(at, "e2e_request_latency_seconds", "Start to last token", self.whole.clone());
        let Some(counts) = counts else { return };
        add(at, "num_requests_running", "Sequences in steps", gauge(counts.running));
        add(at, "num_requests_waiting", "Sequences in the queue", gauge(counts.waiting));
        let used = share(counts.blocks_used, counts.blocks_total);
        add(at, "kv_cache_usage_perc", "KV blocks in use, 0 to 1", ConstGauge::new(used));
        let preemptions = ConstCounter::new(counts.preemptions);
        add(at, "num_preemptions", "Sequences put back for recomputation", preemptions);
    }
}

fn add(at: &mut (&mut Registry, &str), name: &str, help: &str, metric: impl Metric) {
    at.0.register(format!("{}{name}", at.1), help, metric);
}

fn gauge(n: u64) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(n).unwrap_or(i64::MAX))
}

fn register_blocks(registry: &mut Registry, counts: &CountsReply) {
    registry.register("phalanx_kv_blocks_used", "KV blocks in use", gauge(counts.blocks_used));
    registry.register("phalanx_kv_blocks_total", "KV blocks", gauge(counts.blocks_total));
    registry.register("phalanx_steps", "Forward passes", ConstCounter::new(counts.steps));
    let stale = ConstCounter::new(counts.stale);
    registry.register("phalanx_stale_calls", "Calls of another epoch, refused", stale);
    let frames = ConstCounter::new(counts.stale_frames);
    let help = "Collective frames and connections of another epoch that the leader's node refused";
    registry.register("phalanx_stale_frames", help, frames);
    let whole = u64::from(counts.integrity.is_empty());
    registry.register("phalanx_integrity", "1 when block accounting is whole", gauge(whole));
}

#[expect(clippy::cast_precision_loss, reason = "a share for a dashboard")]
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// Watches one sequence. Dropped before its end, the sequence counts as aborted.
#[derive(Debug)]
pub(crate) struct Meter {
    metrics: Metrics,
    prompt_tokens: u64,
    started: Instant,
    last: Option<Instant>,
    /// When its group was lost, if no token came since.
    lost: Option<Instant>,
    running: bool,
}

impl Meter {
    /// The leader has taken the sequence; a refused one is in no count of sequences.
    pub(crate) fn taken(&mut self) {
        self.running = true;
    }

    /// The sequence's group is lost, and it is about to look for another.
    pub(crate) fn lost(&mut self) {
        self.lost.get_or_insert_with(Instant::now);
    }

    /// A token came.
    pub(crate) fn token(&mut self) {
        let now = Instant::now();
        let metrics = &self.metrics;
        if let Some(lost) = self.lost.take() {
            metrics.resumed.inc();
            metrics.pause.observe((now - lost).as_secs_f64());
        }
        metrics.generation_tokens.inc();
        match self.last.replace(now) {
            None => {
                metrics.prompt_tokens.inc_by(self.prompt_tokens);
                metrics.first_token.observe((now - self.started).as_secs_f64());
            }
            Some(last) => metrics.between_tokens.observe((now - last).as_secs_f64()),
        }
    }

    /// The sequence ended by itself.
    pub(crate) fn finish(&mut self, reason: &'static str) {
        if self.last.is_none() {
            self.metrics.prompt_tokens.inc_by(self.prompt_tokens);
        }
        self.running = false;
        self.metrics.whole.observe(self.started.elapsed().as_secs_f64());
        self.metrics.success.get_or_create(&Reason { finished_reason: reason }).inc();
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if self.running {
            self.metrics.success.get_or_create(&Reason { finished_reason: "abort" }).inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_others_read() {
        let metrics = Metrics::new("demo");
        metrics.answered("/v1/models", 200);
        let mut meter = metrics.meter(7);
        meter.taken();
        meter.token();
        meter.token();
        meter.finish("stop");
        drop(meter);
        let mut left = metrics.meter(1);
        left.taken();
        drop(left);
        drop(metrics.meter(1));
        let counts = CountsReply {
            waiting: 1,
            running: 2,
            blocks_used: 3,
            blocks_total: 4,
            preemptions: 5,
            steps: 6,
            integrity: String::new(),
            stale: 7,
            stale_frames: 8,
        };
        let text = metrics.text(Some(&counts));
        let labels = "{model_name=\"demo\",engine=\"0\"}";
        for line in [
            "phalanx_http_requests_total{route=\"/v1/models\",status=\"200\"} 1".to_owned(),
            "phalanx_prompt_tokens_total 7".to_owned(),
            format!("vllm:prompt_tokens_total{labels} 7"),
            format!("vllm:generation_tokens_total{labels} 2"),
            format!("vllm:num_requests_running{labels} 2"),
            format!("vllm:num_requests_waiting{labels} 1"),
            format!("vllm:kv_cache_usage_perc{labels} 0.75"),
            format!("vllm:num_preemptions_total{labels} 5"),
            format!("vllm:time_to_first_token_seconds_count{labels} 1"),
            format!("vllm:inter_token_latency_seconds_count{labels} 1"),
            format!("vllm:e2e_request_latency_seconds_count{labels} 1"),
            "phalanx_kv_blocks_used 3".to_owned(),
            "phalanx_kv_blocks_total 4".to_owned(),
            "phalanx_integrity 1".to_owned(),
            "phalanx_stale_calls_total 7".to_owned(),
            "phalanx_stale_frames_total 8".to_owned(),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        let success = |reason: &str| {
            text.lines().any(|l| {
                l.starts_with("vllm:request_success_total{")
                    && l.contains(&format!("finished_reason=\"{reason}\""))
                    && l.ends_with("} 1")
            })
        };
        assert!(success("stop") && success("abort"), "{text}");
        assert!(!metrics.text(None).contains("kv_cache"), "unknown counts are left out");
    }
}
