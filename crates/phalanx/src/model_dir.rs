//! A model directory or GGUF file: its config as a spec, its digest, and the files the gateway
//! reads.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use gateway::ModelFiles;
use model::content::{Content, ContentHasher};
use model::digest::{DigestBuilder, ModelDigest};
use model::gguf::Gguf;
use model::{Format, ModelSpec};
use worker::MappedFile;

/// Largest text file of a model that is read whole.
const TEXT_MAX: u64 = 256 << 20;

/// A model directory or GGUF file that was read and understood.
#[derive(Debug, Clone)]
pub(crate) struct ModelDir {
    pub(crate) path: PathBuf,
    /// The directory's last component, or the file's name without its ending.
    pub(crate) name: String,
    pub(crate) spec: Arc<ModelSpec>,
    /// Over names, lengths and contents of every file that decides answers.
    pub(crate) digest: ModelDigest,
    /// By file name: what it was made from.
    pub(crate) contents: Arc<BTreeMap<String, Content>>,
}

/// Most models of one process.
const MODELS_MAX: usize = 16;

impl ModelDir {
    /// Reads several, each another model.
    pub(crate) fn open_all(paths: &[PathBuf]) -> anyhow::Result<Vec<Self>> {
        ensure!(paths.len() <= MODELS_MAX, "at most {MODELS_MAX} models can be given");
        let mut all: Vec<Self> = Vec::with_capacity(paths.len());
        for path in paths {
            let model = Self::open(path)?;
            if let Some(same) = all.iter().find(|other| other.digest == model.digest) {
                bail!("{} and {} are one model", same.path.display(), model.path.display());
            }
            all.push(model);
        }
        Ok(all)
    }

    /// Reads the config and digests the directory or file.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        if path.extension().is_some_and(|ending| ending == "gguf") && path.is_file() {
            return Self::open_gguf(path);
        }
        ensure!(path.is_dir(), "{} is neither a directory nor a .gguf file", path.display());
        let path = path.canonicalize().with_context(|| path.display().to_string())?;
        let config = required(&path, "config.json")?;
        let mut spec = ModelSpec::from_config(&config).context("config.json")?;
        if let Some(generation) = optional(&path, "generation_config.json")? {
            spec.with_generation_config(&generation).context("generation_config.json")?;
        }
        let name = path.file_name().map_or("model".into(), |n| n.to_string_lossy());
        let (name, spec) = (name.into_owned(), Arc::new(spec));
        let contents = contents(&path)?;
        let mut builder = DigestBuilder::new();
        for (name, content) in &contents {
            builder.add(name, content.length(), content.hash())?;
        }
        let (digest, contents) = (builder.finish(), Arc::new(contents));
        Ok(Self { name, spec, digest, contents, path })
    }

    /// One file with everything in it.
    fn open_gguf(path: &Path) -> anyhow::Result<Self> {
        let path = path.canonicalize().with_context(|| path.display().to_string())?;
        let file = MappedFile::open(&path).context("cannot read the GGUF file")?;
        let (stem, name) = (path.file_stem(), path.file_name());
        let text = |part: Option<&std::ffi::OsStr>| {
            part.map_or("model".into(), |part| part.to_string_lossy().into_owned())
        };
        let (stem, name) = (text(stem), text(name));
        let spec = Gguf::parse(&name, file.bytes())?.spec()?;
        // The content alone: a file is often renamed, and says itself what it is.
        let mut builder = DigestBuilder::new();
        let content = content(&path).with_context(|| format!("cannot read {name}"))?;
        builder.add("model.gguf", content.length(), content.hash())?;
        let (digest, contents) = (builder.finish(), BTreeMap::from([(name, content)]));
        let (spec, contents) = (Arc::new(spec), Arc::new(contents));
        Ok(Self { path, name: stem, spec, digest, contents })
    }

    /// What the gateway needs to turn text into tokens and back.
    pub(crate) fn gateway_files(&self) -> anyhow::Result<ModelFiles> {
        if let Format::Gguf(_) = self.spec.format {
            let file = MappedFile::open(&self.path).context("cannot read the GGUF file")?;
            let tokenizer = Gguf::parse(&self.name, file.bytes())?.tokenizer()?;
            return Ok(ModelFiles {
                tokenizer_json: tokenizer.tokenizer.into_bytes(),
                tokenizer_config: Some(tokenizer.config),
                ..ModelFiles::default()
            });
        }
        let tokenizer = required(&self.path, "tokenizer.json")?;
        Ok(ModelFiles {
            tokenizer_json: tokenizer.into_bytes(),
            tokenizer_config: optional(&self.path, "tokenizer_config.json")?,
            chat_template: optional(&self.path, "chat_template.jinja")?,
            generation_config: optional(&self.path, "generation_config.json")?,
        })
    }
}

fn required(directory: &Path, name: &str) -> anyhow::Result<String> {
    optional(directory, name)?
        .with_context(|| format!("{name} is missing in the model directory {directory:?}"))
}

fn optional(directory: &Path, name: &str) -> anyhow::Result<Option<String>> {
    text(&directory.join(name))
}

/// A text file of a model; `None` where there is none.
pub(crate) fn text(path: &Path) -> anyhow::Result<Option<String>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    match path.metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        metadata => regular(&name, &metadata.with_context(|| format!("cannot read {name}"))?)?,
    }
    let mut text = String::new();
    let file = File::open(path).with_context(|| format!("cannot read {name}"))?;
    let read = file.take(TEXT_MAX + 1).read_to_string(&mut text);
    let read = read.with_context(|| format!("cannot read {name}"))?;
    ensure!(read as u64 <= TEXT_MAX, "{name} is larger than {} MiB", TEXT_MAX >> 20);
    Ok(Some(text))
}

/// Devices and pipes have no length and may have no end.
fn regular(name: &str, metadata: &Metadata) -> anyhow::Result<()> {
    ensure!(metadata.is_file(), "{name} is not a regular file");
    Ok(())
}

/// Files that may decide answers: the named ones and every safetensors file. Anything else in the
/// directory is left out, so that a README does not make two copies of one model differ.
fn decides_answers(name: &str) -> bool {
    let named = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    ];
    named.contains(&name) || name.ends_with(".safetensors")
}

/// By name: what each file holds that may decide answers.
fn contents(directory: &Path) -> anyhow::Result<BTreeMap<String, Content>> {
    let mut contents = BTreeMap::new();
    for entry in std::fs::read_dir(directory).context("cannot list the model directory")? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !decides_answers(&name) {
            continue;
        }
        let path = directory.join(&name);
        let metadata = path.metadata().with_context(|| format!("cannot read {name}"))?;
        regular(&name, &metadata)?;
        let content = content(&path).with_context(|| format!("cannot read {name}"))?;
        contents.insert(name, content);
    }
    Ok(contents)
}

fn content(path: &Path) -> std::io::Result<Content> {
    let mut file = File::open(path)?;
    let mut hasher = ContentHasher::default();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hasher.finish());
        }
        hasher.update(&buffer[..read]);
    }
}
