//! A model directory's safetensors files, or one GGUF file, checked against the spec before use.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use compute::{MappedFile, SparseMemory};
use model::content::Content;
use model::gguf::GgufError;
use model::safetensors::{self, Header, Index, SafetensorsError};
use model::{Format, ModelSpec, Part};

use crate::files::WeightFile;
use crate::gguf;
use crate::stored::{Finder, Located, StoredTensor};

const SINGLE: &str = "model.safetensors";
const HEAD: &str = "lm_head.weight";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// What is wrong with a checkpoint. Names files and tensors, never whole paths.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file cannot be read.
    #[error("cannot read {file}: {source}")]
    Read {
        /// The file's name.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what it was when the model was digested.
    #[error("{file} is no longer what it was when the model was digested, from byte {at} on")]
    Changed {
        /// The file's name.
        file: String,
        /// Where the piece begins that differs.
        at: u64,
    },
    /// What the model was digested from does not name a file of weights.
    #[error("{file} was not there when the model was digested")]
    New {
        /// The file's name.
        file: String,
    },
    /// The directory holds pickles and no safetensors.
    #[error(
        "{file} is a pickle, which can execute code when opened; convert the model to safetensors"
    )]
    Pickle {
        /// One of the pickle files.
        file: String,
    },
    /// The directory holds no weights.
    #[error("neither {SINGLE} nor {INDEX} is in the model directory")]
    NoWeights,
    /// A header is malformed or lies.
    #[error(transparent)]
    Safetensors(#[from] SafetensorsError),
    /// A GGUF file is malformed or lies.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A tensor of a GGUF file has another shape than the spec implies.
    #[error("{file}: tensor {tensor} has shape {got:?}, the model needs {needed:?}")]
    Shape {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its shape.
        got: Vec<usize>,
        /// The shape by the spec.
        needed: Vec<usize>,
    },
    /// A matrix of 4-bit integers that does not fill its words.
    #[error("tensor {tensor} has {count} {what}, not a multiple of 8 as 4-bit words have")]
    Eighths {
        /// The tensor.
        tensor: String,
        /// Which side.
        what: &'static str,
        /// How many.
        count: usize,
    },
    /// A tensor the spec asks for is absent.
    #[error("{file}: tensor {tensor} is missing")]
    Missing {
        /// The file, or the index where there are several.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// The index names a file for a tensor that the file does not hold.
    #[error("{file} does not hold tensor {tensor}, which the index places there")]
    WrongIndex {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// Two files hold the same tensor.
    #[error("tensor {tensor} stands in {first} and in {second}")]
    Twice {
        /// The tensor.
        tensor: String,
        /// One file.
        first: String,
        /// The other.
        second: String,
    },
    /// A tensor's element type is not the one its encoding has.
    #[error("{file}: tensor {tensor} has type {dtype}, expected {expected}")]
    Type {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its type.
        dtype: String,
        /// What would be read.
        expected: &'static str,
    },
    /// A part of a tensor was asked for that does not stand in what is stored.
    #[error("tensor {tensor} does not hold elements {first}..{end} as a vector")]
    Outside {
        /// The tensor.
        tensor: String,
        /// First element wanted.
        first: usize,
        /// Past the last.
        end: usize,
    },
    /// A tensor stands in the checkpoint that the spec gives no meaning.
    #[error(
        "{file}: tensor {tensor} has no place in this architecture; ignoring it would be wrong"
    )]
    Unexpected {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// A head is stored beside the embedding it is said to be, and is another matrix.
    #[error("{file}: {HEAD} differs from the embedding, though the config ties them")]
    OtherHead {
        /// The file.
        file: String,
    },
    /// The loader asked for a part the spec does not have.
    #[error("the model has no {part:?} in layer {layer:?}")]
    NoSuchPart {
        /// The layer.
        layer: Option<usize>,
        /// The part.
        part: Part,
    },
}

/// A checkpoint whose every tensor was found with the right shape.
pub struct Checkpoint {
    files: Vec<WeightFile>,
    tensors: BTreeMap<(Option<usize>, Part), Located>,
}

impl Checkpoint {
    /// Opens the safetensors files of `directory`, or `directory` itself where the spec is that of
    /// a GGUF file, and checks them against `spec`: every tensor is there once, has the implied
    /// shape, a readable type and its scales, and nothing else is there but what the spec says to
    /// ignore.
    pub fn open(directory: &Path, spec: &ModelSpec) -> Result<Self, CheckpointError> {
        if let Format::Gguf(_) = spec.format {
            let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let read = |source| CheckpointError::Read { file: name.clone(), source };
            let mapped = MappedFile::open(directory).map_err(read)?;
            let tensors = gguf::locate(&name, mapped.bytes(), spec)?;
            let file = WeightFile::open(&name, directory, mapped.bytes().len())?;
            return Ok(Self { files: vec![file], tensors });
        }
        let (names, index) = weight_files(directory)?;
        let (mut files, mut mapped, mut headers) = (Vec::new(), Vec::new(), Vec::new());
        for name in &names {
            let read = |source| CheckpointError::Read { file: name.clone(), source };
            let path = directory.join(name);
            let map = MappedFile::open(&path).map_err(read)?;
            headers.push(safetensors::parse_header(name, map.bytes())?);
            files.push(WeightFile::open(name, &path, map.bytes().len())?);
            mapped.push(map);
        }
        let holders = holders(&headers)?;
        if let Some(index) = index {
            check_index(&index, &headers, &holders)?;
        }
        let tensors = locate(spec, &headers, holders)?;
        check_tied(spec, &headers, &mapped)?;
        Ok(Self { files, tensors })
    }

    /// The same, which from now on yields only what was there when the model was digested: by file
    /// name, what each file held. Whatever else is found later is an error of who reads it. Large
    /// parts are read and checked by so many threads.
    ///
    /// # Errors
    /// A file has another length, or was not there.
    pub fn expecting(
        mut self,
        contents: &BTreeMap<String, Content>,
        threads: usize,
    ) -> Result<Self, CheckpointError> {
        for file in &mut self.files {
            let content = contents.get(file.name()).cloned();
            let new = || CheckpointError::New { file: file.name().to_owned() };
            let content = content.ok_or_else(new)?;
            file.expect(content, threads)?;
        }
        Ok(self)
    }

    /// One tensor of the model.
    pub fn tensor(
        &self,
        layer: Option<usize>,
        part: Part,
    ) -> Result<StoredTensor<'_>, CheckpointError> {
        self.tensor_within(layer, part, &mut None)
    }

    /// The same in memory that another one left, where that is large enough.
    pub(crate) fn tensor_within(
        &self,
        layer: Option<usize>,
        part: Part,
        used: &mut Option<SparseMemory>,
    ) -> Result<StoredTensor<'_>, CheckpointError> {
        let located =
            self.tensors.get(&(layer, part)).ok_or(CheckpointError::NoSuchPart { layer, part })?;
        StoredTensor::new(located, &self.files, used)
    }
}

/// A stored copy of a tied head must be one: another matrix would be dropped in silence.
fn check_tied(
    spec: &ModelSpec,
    headers: &[Header],
    mapped: &[MappedFile],
) -> Result<(), CheckpointError> {
    let stored = |tensor: &str| {
        headers.iter().zip(mapped).find_map(|(header, file)| {
            header.get(tensor).map(|info| (header.file(), &file.bytes()[info.range.clone()]))
        })
    };
    let embedding = spec.tensor(None, Part::Embedding).map(|tensor| tensor.name);
    match (stored(HEAD), embedding.and_then(|embedding| stored(&embedding))) {
        (Some((file, head)), Some((_, embedding))) if spec.tied && head != embedding => {
            Err(CheckpointError::OtherHead { file: file.to_owned() })
        }
        _ => Ok(()),
    }
}

/// File names of the weights, sorted, and the index where there is one.
fn weight_files(directory: &Path) -> Result<(Vec<String>, Option<Index>), CheckpointError> {
    let index_path: PathBuf = directory.join(INDEX);
    if index_path.is_file() {
        let read = |source| CheckpointError::Read { file: INDEX.to_owned(), source };
        let text = std::fs::read_to_string(&index_path).map_err(read)?;
        let index = Index::parse(INDEX, &text)?;
        let names = index.files().into_iter().map(str::to_owned).collect();
        return Ok((names, Some(index)));
    }
    if directory.join(SINGLE).is_file() {
        return Ok((vec![SINGLE.to_owned()], None));
    }
    let read = |source| CheckpointError::Read { file: "the model directory".to_owned(), source };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(read)? {
        names.push(entry.map_err(read)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    let pickle = |name: &String| {
        [".bin", ".pt", ".pth", ".pkl", ".ckpt"].iter().any(|suffix| name.ends_with(suffix))
    };
    match names.into_iter().find(pickle) {
        Some(file) => Err(CheckpointError::Pickle { file }),
        None => Err(CheckpointError::NoWeights),
    }
}

/// By tensor: the number of the file that holds it. A tensor in two files is refused.
fn holders(headers: &[Header]) -> Result<BTreeMap<&str, usize>, CheckpointError> {
    let mut holders = BTreeMap::new();
    for (number, header) in headers.iter().enumerate() {
        for (tensor, _) in header.tensors() {
            if let Some(first) = holders.insert(tensor, number) {
                return Err(CheckpointError::Twice {
                    tensor: tensor.to_owned(),
                    first: headers[first].file().to_owned(),
                    second: header.file().to_owned(),
                });
            }
        }
    }
    Ok(holders)
}

fn check_index(
    index: &Index,
    headers: &[Header],
    holders: &BTreeMap<&str, usize>,
) -> Result<(), CheckpointError> {
    for (tensor, file) in index.tensors() {
        if holders.get(tensor).is_none_or(|number| headers[*number].file() != file) {
            let (file, tensor) = (file.to_owned(), tensor.to_owned());
            return Err(CheckpointError::WrongIndex { file, tensor });
        }
    }
    Ok(())
}

/// Finds every tensor of the spec's table; what is left over must change nothing.
fn locate(
    spec: &ModelSpec,
    headers: &[Header],
    holders: BTreeMap<&str, usize>,
) -> Result<BTreeMap<(Option<usize>, Part), Located>, CheckpointError> {
    let mut finder = Finder::new(headers, holders);
    let mut tensors = BTreeMap::new();
    for wanted in spec.tensors() {
        let key = (wanted.layer, wanted.part);
        tensors.insert(key, finder.locate(wanted)?);
    }
    match finder.unused().find(|(name, _)| !harmless(spec, name)) {
        Some((tensor, file)) => Err(CheckpointError::Unexpected {
            file: headers[file].file().to_owned(),
            tensor: tensor.to_owned(),
        }),
        None => Ok(tensors),
    }
}

/// Tensors that published checkpoints carry and that change nothing: precomputed rotary
/// frequencies (recomputed here from the config), a stored copy of a tied head, and what lies
/// outside the plain path.
fn harmless(spec: &ModelSpec, name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
        || (spec.tied && name == HEAD)
        || spec.ignored_prefixes.iter().any(|prefix| name.starts_with(prefix.as_str()))
}
