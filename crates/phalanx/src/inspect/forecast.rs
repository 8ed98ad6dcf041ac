//! What steps on given nodes should take: the planner's predictions for what fits there.

use anyhow::ensure;
use model::{ComputeType, Format, ModelSpec};
use planner::predict::{self, Case, Kept, Prediction, Rates, Work};
use planner::{DeviceSpec, NodeSpec, ShardPlan, human_bytes, plan, stripes};
use serde_json::{Value, json};

use super::calibration::Known;
use super::fit::{BLOCK, Fits, Wish};
use super::nodes::Nodes;

/// Sequences in a batch where nobody says.
const BATCHES: [usize; 4] = [1, 8, 32, 64];
/// Tokens of context where nobody says, and no more than the model's.
const AT: usize = 1024;

/// What was asked for.
pub(crate) struct Question {
    /// Sequences of each batch.
    pub(crate) batches: Vec<usize>,
    /// Tokens in the cache of each sequence; also those of the prompt.
    pub(crate) at: usize,
}

/// Everything predicted.
pub(crate) struct Forecast {
    predictions: Vec<Prediction>,
    /// What could not be predicted, a sentence each.
    left_out: Vec<String>,
    /// By kind of device: where its rates come from.
    sources: Vec<(String, String)>,
}

impl Question {
    /// Fills in what was not said and refuses what this model cannot have.
    pub(crate) fn new(
        batches: &[usize],
        at: Option<usize>,
        spec: &ModelSpec,
    ) -> anyhow::Result<Question> {
        let batches = if batches.is_empty() { BATCHES.to_vec() } else { batches.to_vec() };
        ensure!(batches.iter().all(|batch| *batch > 0), "--batch must be at least 1");
        // One more is computed.
        let most = spec.context.saturating_sub(1);
        let at = at.unwrap_or(AT.min(most));
        ensure!(
            (1..=most).contains(&at),
            "--at {at}: at least 1, and for this model at most {most}"
        );
        Ok(Question { batches, at })
    }

    fn works(&self) -> Vec<Work> {
        let decode = |&sequences: &usize| Work::Decode { sequences, context: self.at };
        let decodes = self.batches.iter().map(decode);
        decodes.chain([Work::Prefill { tokens: self.at }]).collect()
    }
}

/// Tokens that a step needs room for.
fn cached(work: Work) -> usize {
    match work {
        Work::Decode { sequences, context } => sequences.saturating_mul(context.saturating_add(1)),
        Work::Prefill { tokens } => tokens,
    }
}

/// Predicts every step that was asked for, with every way of keeping weights that fits.
pub(crate) fn on(
    spec: &ModelSpec,
    nodes: &Nodes,
    (wish, fits): (&Wish, &Fits),
    known: &Known,
    question: &Question,
) -> anyhow::Result<Forecast> {
    let mut of_node = Vec::new();
    let mut sources = Vec::new();
    for kind in &nodes.kinds {
        let (rates, source) = known.of(kind)?;
        of_node.extend(std::iter::repeat_n(rates, kind.count));
        if !sources.iter().any(|(device, _)| *device == kind.device) {
            sources.push((kind.device.clone(), source));
        }
    }
    let mut forecast = Forecast { predictions: Vec::new(), left_out: Vec::new(), sources };
    for fit in &fits.fits {
        if let (Ok(plan), Some(room)) = (&fit.plan, fit.room_tokens) {
            forecast.add(spec, (Kept::As(fit.compute), plan, room), wish, &of_node, question)?;
        }
    }
    // Blocks are multiplied as they are stored on GPUs only.
    let blocks = !matches!(spec.format, Format::Plain | Format::Gguf(_));
    if blocks && nodes.kinds.iter().all(|kind| kind.gpu) {
        let stored = as_stored(spec, nodes, wish, &of_node)?;
        match stored {
            Ok((plan, room)) => {
                forecast.add(spec, (Kept::Stored, &plan, room), wish, &of_node, question)?;
            }
            Err(reason) => forecast.left_out.push(reason),
        }
    }
    Ok(forecast)
}

/// The plan with weights as the checkpoint has them, and the KV tokens there is room for; or what
/// is missing.
fn as_stored(
    spec: &ModelSpec,
    nodes: &Nodes,
    wish: &Wish,
    of_node: &[Rates],
) -> anyhow::Result<Result<(ShardPlan, u64), String>> {
    let most = wish.stripes.unwrap_or(stripes::max_count(spec));
    let ranks = wish.ranks.unwrap_or(nodes.devices().min(most));
    // The planner knows sizes by compute type only, so memory is looked at afterwards.
    let roomy = DeviceSpec { memory_bytes: u64::MAX, weight: 1.0 };
    let specs = nodes.specs();
    let without_limit: Vec<NodeSpec> = specs
        .iter()
        .map(|node| NodeSpec { id: node.id, devices: vec![roomy.clone(); node.devices.len()] })
        .collect();
    let plan = plan(spec, &without_limit, &wish.limits(spec, ranks, ComputeType::Bf16))?;
    let rates = by_rank(&plan, of_node);
    let (kept, experts) = (Kept::Stored, wish.experts);
    let case = Case { spec, plan: &plan, experts, kept, rates: &rates };
    let mut least = u64::MAX;
    for rank in &plan.ranks {
        let device = &specs[(rank.node.0 - 1) as usize].devices[rank.device];
        let weights = predict::weight_bytes(&case, rank)?.ceil() as u64;
        let token =
            stripes::kv_bytes(spec, plan.stripes, &rank.stripes, ComputeType::Bf16, 1, 1).max(1);
        let room = device.memory_bytes.saturating_sub(weights) / token;
        let wanted = (wish.kv_tokens.div_ceil(BLOCK) * BLOCK) as u64;
        if device.memory_bytes < weights || room < wanted {
            let number = rank.rank;
            let size = human_bytes(weights.saturating_add(wanted.saturating_mul(token)));
            return Ok(Err(format!("stored: does not fit; rank {number} would need {size}")));
        }
        least = least.min(room);
    }
    Ok(Ok((plan, least)))
}

/// By rank: the rates of its device. Nodes are numbered from 1.
fn by_rank(plan: &ShardPlan, of_node: &[Rates]) -> Vec<Rates> {
    plan.ranks.iter().map(|rank| of_node[(rank.node.0 - 1) as usize]).collect()
}

impl Forecast {
    fn add(
        &mut self,
        spec: &ModelSpec,
        (kept, plan, room): (Kept, &ShardPlan, u64),
        wish: &Wish,
        of_node: &[Rates],
        question: &Question,
    ) -> anyhow::Result<()> {
        let rates = by_rank(plan, of_node);
        let case = Case { spec, plan, experts: wish.experts, kept, rates: &rates };
        for work in question.works() {
            let needed = cached(work);
            if needed as u64 > room {
                let name = kept.name();
                let what = format!("{name}: {needed} tokens of cache, there is room for {room}");
                self.left_out.push(what);
                continue;
            }
            self.predictions.push(predict::predict(&case, work)?);
        }
        Ok(())
    }

    /// For people.
    pub(crate) fn table(&self) -> String {
        let mut text = format!("\n{}\n", predict::table(&self.predictions));
        for (device, source) in &self.sources {
            text.push_str(&format!("Rates of {device}: {source}.\n"));
        }
        for reason in &self.left_out {
            text.push_str(&format!("Left out, {reason}.\n"));
        }
        text
    }

    /// For programs.
    pub(crate) fn json(&self) -> Value {
        let sources = self.sources.iter().map(|(device, source)| (device.clone(), json!(source)));
        json!({
            "measured": false,
            "rates": sources.collect::<serde_json::Map<_, _>>(),
            "steps": self.predictions.iter().map(step).collect::<Vec<_>>(),
            "left_out": self.left_out,
        })
    }
}

fn step(prediction: &Prediction) -> Value {
    let work = match prediction.work {
        Work::Decode { sequences, context } => {
            json!({"decode": {"sequences": sequences, "context": context}})
        }
        Work::Prefill { tokens } => json!({"prefill": {"tokens": tokens}}),
    };
    let (low, high) = prediction.band;
    let floor = &prediction.floor;
    json!({
        "kept": prediction.kept.name(),
        "work": work,
        "predicted_seconds": prediction.step_seconds(),
        "predicted_between_seconds": [low, high],
        "predicted_tokens_per_second": prediction.tokens_per_second(),
        "efficiency": prediction.efficiency,
        "slowest_rank": prediction.slowest,
        "nodes": prediction.nodes,
        "floor_seconds": {
            "total": floor.total(),
            "weights": floor.weights,
            "kv": floor.kv,
            "matrix": floor.matrix,
            "collectives": floor.collectives,
            "gaps": floor.gaps,
        },
    })
}
