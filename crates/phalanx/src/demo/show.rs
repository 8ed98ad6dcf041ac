//! What the demo shows: progress bars, the plan, the answer, figures, what to try next.

use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use planner::ExpertCut;
use wire::pb;

use super::Timing;
use crate::http::Answer;
use crate::model_dir::ModelDir;
use crate::process;

/// Prints to standard output, or nothing at all.
#[derive(Clone)]
pub(crate) struct Show {
    on: bool,
}

impl Show {
    pub(crate) fn new(on: bool) -> Self {
        Self { on }
    }

    fn line(&self, text: &str) {
        if self.on {
            // A reader that has seen enough ends the show, not the answer.
            let _ = process::line(text);
        }
    }

    pub(crate) fn opening(&self, model: &ModelDir, workers: usize) {
        let spec = &model.spec;
        self.line(&format!(
            "Phalanx demo: one coordinator and {workers} worker processes on this machine."
        ));
        self.line(&format!(
            "Model {}: {} architecture, {:.2} M parameters, {} layers, digest {:.16}.",
            model.name,
            spec.family.name(),
            spec.parameters() as f64 / 1e6,
            spec.layers.len(),
            model.digest.to_string(),
        ));
        self.line("It is a toy, trained in minutes on old books: it writes readable nonsense.\n");
    }

    /// A bar per rank, or none where there is no terminal.
    pub(crate) fn bars(&self, ranks: usize) -> Bars {
        if !self.on || !std::io::stderr().is_terminal() {
            return Bars { bars: Vec::new() };
        }
        let style =
            ProgressStyle::with_template("  {prefix}  [{bar:32}] {bytes}/{total_bytes} {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
        let all = MultiProgress::new();
        let bar = |rank: usize| {
            let bar = all.add(ProgressBar::new(1).with_style(style.clone()));
            bar.set_prefix(format!("rank {rank}"));
            bar.set_message("joining");
            bar
        };
        Bars { bars: (0..ranks).map(bar).collect() }
    }

    /// The plan that the coordinator decided, as a table.
    pub(crate) fn plan(&self, status: &pb::StatusReply, model: &ModelDir) -> anyhow::Result<()> {
        let group = status.groups.iter().find(|g| g.phase == "serving");
        let plan = group.and_then(|g| g.plan.clone()).context("the group has no plan")?;
        let plan = wire::plan_from_wire(plan, &model.spec).context("the coordinator's plan")?;
        self.line(&format!("The plan: {} stripes on {} ranks.", plan.stripes, plan.ranks.len()));
        // The demo asks for nothing else.
        self.line(&plan.table(&model.spec, ExpertCut::Stripe));
        Ok(())
    }

    pub(crate) fn question(&self, prompt: &str) {
        self.line(&format!("> {prompt}"));
    }

    /// A piece of the answer, as it comes.
    pub(crate) fn piece(&self, text: &str) {
        if self.on {
            let mut out = std::io::stdout();
            let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        }
    }

    /// Something that is not part of the answer, on a line of its own.
    pub(crate) fn note(&self, text: &str) {
        self.line(text);
    }

    pub(crate) fn figures(&self, answer: &Answer, timing: &Timing, digest: &str, ready: Duration) {
        self.line(&format!(
            "\n\n{} tokens, {:.0} tokens per second, first one after {:.0} ms; \
             the cluster was ready after {:.1} s.",
            answer.tokens,
            timing.tokens_per_second(answer.tokens),
            timing.first.as_secs_f64() * 1e3,
            ready.as_secs_f64()
        ));
        self.line(&format!(
            "Digest of the answer: {digest:.32}. It is the same with --workers 1 to 8."
        ));
    }

    pub(crate) fn next(&self, http: SocketAddr, model: &str) {
        self.line("\nThe cluster goes on serving. Try:\n");
        self.line(&format!(
            "  curl -N http://{http}/v1/chat/completions \\\n    \
             -H 'Content-Type: application/json' \\\n    \
             -d '{{\"model\": \"{model}\", \"stream\": true, \"max_tokens\": 60, \
             \"messages\": [{{\"role\": \"user\", \"content\": \"Who goes there?\"}}]}}'"
        ));
        self.line("\nCtrl-C ends it and every process it started.");
    }
}

/// Progress bars of ranks that load.
pub(crate) struct Bars {
    bars: Vec<ProgressBar>,
}

impl Bars {
    pub(crate) fn update(&self, status: &pb::StatusReply) {
        for progress in status.groups.iter().rev().take(1).flat_map(|group| &group.progress) {
            let Some(bar) = self.bars.get(progress.rank as usize) else { continue };
            bar.set_length(progress.bytes_total.max(1));
            bar.set_position(progress.bytes_read);
            bar.set_message(if progress.ready { "ready" } else { "loading" });
        }
    }

    pub(crate) fn finish(&self) {
        self.bars.iter().for_each(ProgressBar::abandon);
        if !self.bars.is_empty() {
            // The last bar leaves the cursor at its end.
            eprintln!();
        }
    }
}
