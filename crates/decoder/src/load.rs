//! From a checkpoint to one rank's packed weights, reading only the ranges its stripes need.

mod attention;
mod feed_forward;

use std::ops::Range;
use std::sync::Arc;

use compute::{CacheShape, CacheValue, Device, DeviceError, Precision, RopeTable};
use compute::{Rounding, WeightSource};
use model::{ComputeType, ModelSpec, Part};
use planner::{ExpertCut, PlanError, RankPlan};

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::forward::{Decoder, Scratch};
use crate::kept::{Kept, Key};
use crate::layout::Layout;
use crate::rope;
use crate::stored::StoredTensor;
use crate::weights::{AttentionWeights, EdgeWeights, LayerWeights, Packed, Piece};

/// The paged KV cache a rank keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheSize {
    /// Blocks per layer.
    pub blocks: usize,
    /// Positions per block.
    pub block_tokens: usize,
    /// Most positions of one sequence; at most the model's context.
    pub context: usize,
}

/// Which part of which cut a rank loads, and in what form.
#[derive(Debug, Clone, Copy)]
pub struct RankShape<'a> {
    /// All stripes the model is cut into.
    pub stripes: usize,
    /// The rank's part of the plan.
    pub plan: &'a RankPlan,
    /// How experts are divided among stripes.
    pub experts: ExpertCut,
    /// What the weights are kept in.
    pub compute: ComputeType,
    /// The KV cache.
    pub cache: CacheSize,
}

/// How far loading has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Layers packed so far.
    pub layers: usize,
    /// Layers in all.
    pub layers_total: usize,
    /// Bytes of the checkpoint read so far.
    pub bytes_read: u64,
    /// Bytes there will be if the layers to come are like those before; exact at the end.
    pub bytes_total: u64,
}

/// Why a rank could not load.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The checkpoint lacks something or lies.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The stripes do not fit the model.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Packing failed.
    #[error("{tensor}: {source}")]
    Pack {
        /// The tensor.
        tensor: String,
        /// What failed.
        source: DeviceError,
    },
    /// A buffer could not be had.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The rank's stripes are not an ascending selection of the plan's.
    #[error("stripes {own:?} of {stripes} are not an ascending selection")]
    Stripes {
        /// The rank's stripes.
        own: Vec<usize>,
        /// All stripes.
        stripes: usize,
    },
    /// The caller asked to stop.
    #[error("loading was stopped")]
    Stopped,
}

/// Most bytes of memory that one tensor leaves to the next.
const REUSED: usize = 64 << 20;

/// Loads one part of a checkpoint at a time and counts what it read.
struct Loader<'a, D: Device> {
    device: &'a D,
    spec: &'a ModelSpec,
    checkpoint: &'a Checkpoint,
    layout: &'a Layout,
    /// Precision of the projections.
    precision: Precision,
    /// Precision of embedding, head and router.
    edge_precision: Precision,
    bytes_read: u64,
    rounding: Rounding,
    /// What an incarnation before has left.
    before: Kept<D>,
    /// Everything packed or taken over so far.
    weights: Kept<D>,
    /// The tensor that was read last.
    open: Option<((Option<usize>, Part), StoredTensor<'a>)>,
}

impl<D: Device> Decoder<D> {
    /// Loads one rank: packs the weights of its stripes and makes its KV cache. `progress` is
    /// called after every layer and stops the load by returning false.
    pub fn load(
        device: D,
        spec: Arc<ModelSpec>,
        shape: RankShape<'_>,
        checkpoint: &Checkpoint,
        progress: &mut dyn FnMut(LoadProgress) -> bool,
    ) -> Result<Self, LoadError> {
        Self::load_after(&mut None, device, spec, shape, checkpoint, progress)
    }

    /// The same where the device holds weights of this checkpoint already: what the rank's stripes
    /// need of them is taken over, and only the rest is read and counted. What they do not need is
    /// freed layer by layer. A load that fails leaves what it had in `before`.
    pub fn load_after(
        before: &mut Option<Kept<D>>,
        device: D,
        spec: Arc<ModelSpec>,
        shape: RankShape<'_>,
        checkpoint: &Checkpoint,
        progress: &mut dyn FnMut(LoadProgress) -> bool,
    ) -> Result<Self, LoadError> {
        let RankShape { stripes, plan, experts, compute, cache } = shape;
        planner::stripes::validate(&spec, stripes)?;
        let mut layout = layout(stripes, &plan.stripes)?;
        (layout.block, layout.experts) = (spec.format.block(), experts);
        let kept = before.take().filter(|kept| kept.fits(&spec, compute));
        let mut loader = Loader {
            device: &device,
            spec: &spec,
            checkpoint,
            layout: &layout,
            precision: precision(compute),
            edge_precision: edge_precision(compute),
            bytes_read: 0,
            rounding: Rounding::default(),
            before: kept.unwrap_or_else(|| Kept::new(&spec, compute)),
            weights: Kept::new(&spec, compute),
            open: None,
        };
        let context = cache.context.min(spec.context);
        let loaded = loader.all(cache, context, progress);
        let mut weights = loader.weights;
        let Loaded { edges, layers, caches, ropes, scratch } = match loaded {
            Ok(loaded) => loaded,
            Err(error) => {
                weights.absorb(loader.before);
                *before = Some(weights);
                return Err(error);
            }
        };
        let rounding = loader.rounding;
        Ok(Self {
            device,
            spec,
            layout,
            edges,
            layers,
            caches,
            ropes,
            scratch,
            blocks: cache.blocks,
            block_tokens: cache.block_tokens,
            context,
            rounding,
            weights,
        })
    }
}

/// What a load makes.
struct Loaded<D: Device> {
    edges: EdgeWeights<D>,
    layers: Vec<LayerWeights<D>>,
    caches: Vec<D::Cache>,
    ropes: Vec<RopeTable>,
    scratch: Scratch<D>,
}

/// Rotary tables made so far; layers with the same embedding share one.
struct Ropes {
    context: usize,
    known: Vec<(model::Rope, RopeTable)>,
}

impl Ropes {
    fn of(&mut self, rope: &model::Rope) -> Result<usize, DeviceError> {
        if let Some(known) = self.known.iter().position(|(known, _)| known == rope) {
            return Ok(known);
        }
        self.known.push((rope.clone(), rope::table(rope, self.context)?));
        Ok(self.known.len() - 1)
    }
}

/// What one layer keeps of every position.
fn cache_shape<D: Device>(
    attention: &AttentionWeights<D>,
    cache: CacheSize,
    precision: Precision,
) -> CacheShape {
    let (kv_heads, key_dim, value) = match attention {
        AttentionWeights::Grouped(w) => (w.kv_heads, w.head_dim, CacheValue::Own(w.head_dim)),
        AttentionWeights::Latent(w) => {
            (1, w.kv_rank + w.rope_dim, CacheValue::PrefixOfKey(w.kv_rank))
        }
    };
    CacheShape {
        layers: 1,
        blocks: cache.blocks,
        block_tokens: cache.block_tokens,
        kv_heads,
        key_dim,
        value,
        precision,
    }
}

fn layout(stripes: usize, own: &[usize]) -> Result<Layout, LoadError> {
    let ascending = own.windows(2).all(|pair| pair[0] < pair[1]);
    let inside = own.last().is_some_and(|last| *last < stripes);
    if !ascending || !inside {
        return Err(LoadError::Stripes { own: own.to_vec(), stripes });
    }
    Ok(Layout { stripes, own: own.to_vec(), block: 1, experts: ExpertCut::Stripe })
}

fn precision(compute: ComputeType) -> Precision {
    match compute {
        ComputeType::F32 => Precision::F32,
        ComputeType::Bf16 => Precision::Bf16,
        ComputeType::Int8 => Precision::Int8,
        ComputeType::Int4 => Precision::Int4,
    }
}

fn edge_precision(compute: ComputeType) -> Precision {
    match compute {
        ComputeType::F32 => Precision::F32,
        ComputeType::Bf16 | ComputeType::Int8 | ComputeType::Int4 => Precision::Bf16,
    }
}

fn pack<D: Device>(
    device: &D,
    tensor: &str,
    source: &WeightSource<'_>,
    precision: Precision,
) -> Result<D::Matrix, LoadError> {
    let failed = |source| LoadError::Pack { tensor: tensor.to_owned(), source };
    device.pack(source, precision).map_err(failed)
}

impl<'a, D: Device> Loader<'a, D> {
    fn all(
        &mut self,
        cache: CacheSize,
        context: usize,
        progress: &mut dyn FnMut(LoadProgress) -> bool,
    ) -> Result<Loaded<D>, LoadError> {
        let (device, spec) = (self.device, self.spec);
        let edges = self.edges()?;
        self.before.free(None);
        let before = self.bytes_read;
        let (mut layers, mut caches) = (Vec::new(), Vec::new());
        let mut ropes = Ropes { context, known: Vec::new() };
        for index in 0..spec.layers.len() {
            let layer = self.layer(index, &mut ropes)?;
            caches.push(device.cache(cache_shape(&layer.attention, cache, self.precision))?);
            layers.push(layer);
            self.before.free(Some(index));
            let (done, layers_total) = (index + 1, spec.layers.len());
            let bytes_read = self.bytes_read;
            let ahead = (bytes_read - before) * layers_total as u64 / done as u64;
            let bytes_total = before + ahead;
            if !progress(LoadProgress { layers: done, layers_total, bytes_read, bytes_total }) {
                return Err(LoadError::Stopped);
            }
        }
        let ropes = ropes.known.into_iter().map(|(_, table)| table).collect();
        Ok(Loaded { edges, layers, caches, ropes, scratch: Scratch::new(device)? })
    }

    /// A tensor; the one of the call before still has what was read of it.
    fn tensor(
        &mut self,
        layer: Option<usize>,
        part: Part,
    ) -> Result<&mut StoredTensor<'a>, LoadError> {
        let at = (layer, part);
        let mut used = None;
        match self.open.take() {
            Some(same) if same.0 == at => return Ok(&mut self.open.insert(same).1),
            Some((_, other)) => used = Some(other.into_memory()),
            None => {}
        }
        // Pages that are there already cost nothing; but not those of an embedding for ever.
        let mut used = used.filter(|memory| memory.bytes().len() <= REUSED);
        let tensor = self.checkpoint.tensor_within(layer, part, &mut used)?;
        Ok(&mut self.open.insert((at, tensor)).1)
    }

    /// Packs a rectangle of a tensor.
    fn pack(
        &mut self,
        layer: Option<usize>,
        part: Part,
        rows: Range<usize>,
        columns: Range<usize>,
        precision: Precision,
    ) -> Result<Packed<D>, LoadError> {
        let key = Key::new(layer, part, (&rows, &columns), false);
        self.packed(key, |loader| {
            let (device, elements) = (loader.device, rows.len() * columns.len());
            let tensor = loader.tensor(layer, part)?;
            let (name, bytes) = (tensor.name(), tensor.bytes_of(elements));
            Ok((pack(device, name, &tensor.source(rows, columns)?, precision)?, bytes))
        })
    }

    /// Takes over what is there from before, or else packs it and counts what was read.
    fn packed(
        &mut self,
        key: Key,
        pack: impl FnOnce(&mut Self) -> Result<(D::Matrix, u64), LoadError>,
    ) -> Result<Packed<D>, LoadError> {
        let matrix = match self.before.matrices.remove(&key) {
            Some(matrix) => matrix,
            None => {
                let (matrix, bytes) = pack(self)?;
                self.bytes_read += bytes;
                Arc::new(matrix)
            }
        };
        self.rounding += self.device.rounding(&matrix);
        self.weights.matrices.insert(key, Arc::clone(&matrix));
        Ok(matrix)
    }

    /// A whole or partial vector as f32.
    fn vector(
        &mut self,
        layer: Option<usize>,
        part: Part,
        run: Range<usize>,
    ) -> Result<Vec<f32>, LoadError> {
        let key = Key::new(layer, part, (&run, &(0..1)), false);
        let values = match self.before.vectors.remove(&key) {
            Some(values) => values,
            None => {
                let tensor = self.tensor(layer, part)?;
                let bytes = tensor.bytes_of(run.len());
                let values = tensor.values(run)?;
                self.bytes_read += bytes;
                values
            }
        };
        self.weights.vectors.insert(key, values.clone());
        Ok(values)
    }

    /// A vector as wide as the stream, where the model has it.
    fn hidden_if(
        &mut self,
        there: bool,
        layer: Option<usize>,
        part: Part,
    ) -> Result<Option<Vec<f32>>, LoadError> {
        let run = 0..self.spec.hidden;
        if there { self.vector(layer, part, run).map(Some) } else { Ok(None) }
    }

    /// A norm's weights as they multiply.
    fn norm(
        &mut self,
        layer: Option<usize>,
        part: Part,
        width: usize,
    ) -> Result<Vec<f32>, LoadError> {
        let mut weight = self.vector(layer, part, 0..width)?;
        if self.spec.norm_plus_one {
            weight.iter_mut().for_each(|w| *w += 1.0);
        }
        Ok(weight)
    }

    /// Embedding, head, final norm.
    fn edges(&mut self) -> Result<EdgeWeights<D>, LoadError> {
        let embedding = self.vocab(Part::Embedding)?;
        let head = if self.spec.tied { None } else { Some(self.vocab(Part::Head)?) };
        let final_norm = self.norm(None, Part::FinalNorm, self.spec.hidden)?;
        Ok(EdgeWeights { embedding, head, final_norm })
    }

    fn vocab(&mut self, part: Part) -> Result<Vec<Piece<D>>, LoadError> {
        let runs = self.layout.vocab(self.spec);
        let precision = self.edge_precision;
        let hidden = self.spec.hidden;
        runs.global
            .into_iter()
            .zip(runs.local)
            .map(|(run, column)| {
                let matrix = self.pack(None, part, run, 0..hidden, precision)?;
                Ok(Piece { matrix, bias: None, column })
            })
            .collect()
    }

    fn layer(&mut self, index: usize, ropes: &mut Ropes) -> Result<LayerWeights<D>, LoadError> {
        let (layer, spec) = (Some(index), self.spec);
        let hidden = spec.hidden;
        let post_norms = spec.layers[index].post_norms;
        let mut post_norm = |part| {
            if post_norms { self.norm(layer, part, hidden).map(Some) } else { Ok(None) }
        };
        let attention_post_norm = post_norm(Part::AttentionPostNorm)?;
        let feed_forward_post_norm = post_norm(Part::FeedForwardPostNorm)?;
        let (attention, output) = self.attention(index, ropes)?;
        let out_bias = self.has_output_bias(index);
        Ok(LayerWeights {
            attention_norm: self.norm(layer, Part::AttentionNorm, hidden)?,
            attention,
            output,
            output_bias: self.hidden_if(out_bias, layer, Part::OutputBias)?,
            attention_post_norm,
            feed_forward_norm: self.norm(layer, Part::FeedForwardNorm, hidden)?,
            feed_forward: self.feed_forward(index)?,
            feed_forward_post_norm,
        })
    }

    /// A column-parallel piece with its bias, which is cut as the matrix is.
    fn projection(
        &mut self,
        layer: Option<usize>,
        (part, bias_part): (Part, Option<Part>),
        rows: Range<usize>,
        inputs: usize,
        column: usize,
    ) -> Result<Piece<D>, LoadError> {
        let bias = match bias_part {
            Some(part) => Some(self.vector(layer, part, rows.clone())?),
            None => None,
        };
        let matrix = self.pack(layer, part, rows, 0..inputs, self.precision)?;
        Ok(Piece { matrix, bias, column })
    }
}
