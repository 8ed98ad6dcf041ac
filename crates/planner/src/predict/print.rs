//! Predictions as a table that says what they are.

use super::{Prediction, Work};
use crate::table::aligned;

/// A line that says that this is predicted, then a line for each prediction; no newline at the end.
pub fn table(predictions: &[Prediction]) -> String {
    let header = [
        "in", "work", "ms/step", "between", "tokens/s", "floor", "weights", "KV", "matrix", "sums",
        "gaps",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    rows.extend(predictions.iter().map(row));
    let on = nodes(predictions);
    let said = "Times in ms; weights to gaps are in the floor:";
    format!("PREDICTED, not measured, for ranks on {on}. {said}\n{}", aligned(&rows))
}

/// `1 node`, `8 nodes`, `2 to 4 nodes`.
fn nodes(predictions: &[Prediction]) -> String {
    let counts = || predictions.iter().map(|prediction| prediction.nodes);
    match (counts().min().unwrap_or(0), counts().max().unwrap_or(0)) {
        (1, 1) => "1 node".to_owned(),
        (least, most) if least == most => format!("{most} nodes"),
        (least, most) => format!("{least} to {most} nodes"),
    }
}

fn row(prediction: &Prediction) -> Vec<String> {
    let work = match prediction.work {
        Work::Decode { sequences, context } => format!("decode {sequences} at {context}"),
        Work::Prefill { tokens } => format!("prefill {tokens}"),
    };
    let floor = &prediction.floor;
    let (low, high) = prediction.band;
    let mut row = vec![prediction.kept.name().to_owned(), work, ms(prediction.step_seconds())];
    row.push(format!("{}-{}", ms(low), ms(high)));
    row.push(format!("{:.0}", prediction.tokens_per_second()));
    let parts =
        [floor.total(), floor.weights, floor.kv, floor.matrix, floor.collectives, floor.gaps];
    row.extend(parts.map(ms));
    row
}

/// Seconds as milliseconds with three digits or more.
fn ms(seconds: f64) -> String {
    let ms = seconds * 1e3;
    if ms < 10.0 { format!("{ms:.2}") } else { format!("{ms:.1}") }
}
