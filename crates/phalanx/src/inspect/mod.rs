//! `phalanx model inspect`: what a model is, what it weighs, and what it takes to serve it. Reads
//! the config and a few small files, or what a GGUF file says of itself, never weights.

mod calibration;
mod fit;
mod forecast;
mod licence;
mod nodes;
mod report;
mod weights;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use model::ModelSpec;
use model::gguf::Gguf;
use serde_json::Value;
use worker::MappedFile;

use crate::args::{self, Output};
use crate::{config, model_dir, process};
use licence::Licence;
use weights::Files;

pub(crate) use nodes::{Nodes, nodes};

/// A model as far as it can be known without its weights.
pub(crate) struct Model {
    pub(crate) name: String,
    pub(crate) spec: Arc<ModelSpec>,
    /// Bytes of the weights, by the type that they are stored in.
    pub(crate) stored: BTreeMap<String, u64>,
    pub(crate) files: Option<Files>,
    pub(crate) licences: Vec<Licence>,
    /// Whether the tokenizer can be used, or why not; `None` where there is none.
    pub(crate) tokenizer: Option<Result<(), String>>,
}

/// Prints what there is to know.
pub(crate) fn run(args: &args::Inspect) -> anyhow::Result<()> {
    let model = open(&args.model)?;
    let kv_tokens = args.kv_tokens.unwrap_or(config::default_kv_tokens(model.spec.context));
    ensure!(kv_tokens > 0, "--kv-tokens must be at least 1");
    let experts = args.experts.into();
    let wish = fit::Wish { ranks: args.ranks, stripes: args.stripes, experts, kv_tokens };
    wish.check(&model.spec)?;
    let fit = match &args.nodes {
        Some(nodes) => fit::on(&model.spec, nodes, &wish)?,
        None => fit::anywhere(&model.spec, &wish)?,
    };
    let forecast = match (&args.nodes, args.predict) {
        (Some(nodes), true) => {
            let known = calibration::Known::read(args.calibration.as_deref())?;
            let question = forecast::Question::new(&args.batch, args.at, &model.spec)?;
            Some(forecast::on(&model.spec, nodes, (&wish, &fit), &known, &question)?)
        }
        _ => None,
    };
    match args.output {
        Output::Table => {
            let mut text = report::table(&model, &wish, &fit);
            text.push_str(&forecast.map_or(String::new(), |forecast| forecast.table()));
            process::line(text.trim_end())
        }
        Output::Json => {
            let mut value = report::json(&model, &wish, &fit);
            value["predictions"] = forecast.map_or(Value::Null, |forecast| forecast.json());
            process::line(&value.to_string())
        }
    }
    .context("standard output")
}

/// Reads a model directory, a GGUF file, or a config alone.
fn open(path: &Path) -> anyhow::Result<Model> {
    let metadata = path.metadata().with_context(|| format!("cannot read {}", path.display()))?;
    if metadata.is_file() && path.extension().is_some_and(|ending| ending == "gguf") {
        return open_gguf(path);
    }
    let (directory, file) = if metadata.is_dir() {
        (Some(path), path.join("config.json"))
    } else {
        (None, path.to_owned())
    };
    let file_name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    ensure!(
        file_name.ends_with(".json"),
        "{} is neither a model directory nor a .gguf file nor a config.json",
        path.display()
    );
    let text = model_dir::text(&file)
        .with_context(|| format!("cannot read {}", file.display()))?
        .with_context(|| format!("{} holds no config.json", path.display()))?;
    let spec = ModelSpec::from_config(&text).with_context(|| file_name.clone())?;
    let config: Value = serde_json::from_str(&text).with_context(|| file_name.clone())?;
    let of = directory.unwrap_or_else(|| path.parent().unwrap_or(path));
    let name = of.canonicalize().ok();
    let name = name.as_deref().and_then(Path::file_name).unwrap_or_default();
    let name = if directory.is_some() { name.to_string_lossy().into_owned() } else { file_name };
    Ok(Model {
        name,
        stored: weights::stored(&spec, weights::plain(&config)),
        spec: Arc::new(spec),
        files: directory.map(weights::files).transpose()?.flatten(),
        licences: licence::find(directory, &config),
        tokenizer: directory.map(tokenizer).transpose()?.flatten(),
    })
}

/// Reads what a GGUF file says of itself.
fn open_gguf(path: &Path) -> anyhow::Result<Model> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let file = MappedFile::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let bytes = file.bytes();
    let gguf = Gguf::parse(&name, bytes)?;
    let spec = gguf.spec()?;
    // A file with weights alone is a model, too.
    let tokenizer = gguf.has_tokenizer().then(|| {
        let files = gguf.tokenizer().map_err(|error| error.to_string())?;
        try_tokenizer(&files.tokenizer)
    });
    Ok(Model {
        name,
        stored: weights::stored_as_typed(&gguf),
        spec: Arc::new(spec),
        files: Some(Files { count: 1, bytes: bytes.len() as u64 }),
        licences: licence::of_gguf(&gguf),
        tokenizer,
    })
}

/// Tries the tokenizer as serving would.
fn tokenizer(directory: &Path) -> anyhow::Result<Option<Result<(), String>>> {
    let json = model_dir::text(&directory.join("tokenizer.json"))?;
    Ok(json.map(|json| try_tokenizer(&json)))
}

fn try_tokenizer(json: &str) -> Result<(), String> {
    let tried = gateway::try_tokenizer(json.as_bytes(), &["Hello, world!"]);
    tried.map(drop).map_err(|error| error.to_string())
}
