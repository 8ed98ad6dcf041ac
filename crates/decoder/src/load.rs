//! From a checkpoint to one rank's packed weights, reading only the ranges its stripes need.

use std::sync::Arc;

use compute::{CacheShape, Device, DeviceError, HeadMap, Precision, RopeTable, WeightSource};
use model::{Attention, ComputeType, FeedForward, Grouped, ModelSpec, Part};
use planner::{PlanError, RankPlan};

use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::forward::{Decoder, Scratch};
use crate::layout::Layout;
use crate::rope;
use crate::weights::{
    AttentionWeights, EdgeWeights, FeedForwardWeights, Gated, LayerWeights, Piece,
};

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
        let RankShape { stripes, plan, compute, cache } = shape;
        planner::stripes::validate(&spec, stripes)?;
        let layout = layout(stripes, &plan.stripes)?;
        let context = cache.context.min(spec.context);
        let mut loader = Loader {
            device: &device,
            spec: &spec,
            checkpoint,
            layout: &layout,
            precision: precision(compute),
            edge_precision: edge_precision(compute),
            bytes_read: 0,
        };
        let edges = loader.edges()?;
        let (mut layers, mut caches) = (Vec::new(), Vec::new());
        let mut ropes = Ropes { context, known: Vec::new() };
        for index in 0..spec.layers.len() {
            let layer = loader.layer(index, &mut ropes)?;
            caches.push(device.cache(CacheShape {
                layers: 1,
                blocks: cache.blocks,
                block_tokens: cache.block_tokens,
                kv_heads: layer.attention.kv_heads,
                head_dim: layer.attention.head_dim,
                precision: loader.precision,
            })?);
            layers.push(layer);
            let bytes_read = loader.bytes_read;
            let layers_total = spec.layers.len();
            if !progress(LoadProgress { layers: index + 1, layers_total, bytes_read }) {
                return Err(LoadError::Stopped);
            }
        }
        let scratch = Scratch::new(&device)?;
        Ok(Self {
            device,
            spec,
            layout,
            edges,
            layers,
            caches,
            ropes: ropes.known.into_iter().map(|(_, _, table)| table).collect(),
            scratch,
            blocks: cache.blocks,
            block_tokens: cache.block_tokens,
            context,
        })
    }
}

/// Rotary tables made so far; layers with the same embedding share one.
struct Ropes {
    context: usize,
    known: Vec<(model::Rope, usize, RopeTable)>,
}

impl Ropes {
    fn of(&mut self, attention: &Grouped) -> Result<usize, DeviceError> {
        let same = |(rope, dim, _): &(model::Rope, usize, RopeTable)| {
            *rope == attention.rope && *dim == attention.head_dim
        };
        if let Some(known) = self.known.iter().position(same) {
            return Ok(known);
        }
        let table = rope::table(&attention.rope, attention.head_dim, self.context)?;
        self.known.push((attention.rope.clone(), attention.head_dim, table));
        Ok(self.known.len() - 1)
    }
}

fn layout(stripes: usize, own: &[usize]) -> Result<Layout, LoadError> {
    let ascending = own.windows(2).all(|pair| pair[0] < pair[1]);
    let inside = own.last().is_some_and(|last| *last < stripes);
    if !ascending || !inside {
        return Err(LoadError::Stripes { own: own.to_vec(), stripes });
    }
    Ok(Layout { stripes, own: own.to_vec() })
}

fn precision(compute: ComputeType) -> Precision {
    match compute {
        ComputeType::F32 => Precision::F32,
        ComputeType::Bf16 => Precision::Bf16,
        ComputeType::Int8 => Precision::Int8,
    }
}

fn edge_precision(compute: ComputeType) -> Precision {
    match compute {
        ComputeType::F32 => Precision::F32,
        ComputeType::Bf16 | ComputeType::Int8 => Precision::Bf16,
    }
}

impl<D: Device> Loader<'_, D> {
    /// Packs a rectangle of a tensor.
    fn pack(
        &mut self,
        layer: Option<usize>,
        part: Part,
        rows: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
        precision: Precision,
    ) -> Result<D::Matrix, LoadError> {
        let tensor = self.checkpoint.tensor(layer, part)?;
        let source = WeightSource {
            bytes: tensor.bytes,
            stored: tensor.stored,
            stored_columns: tensor.columns,
            rows: rows.clone(),
            columns: columns.clone(),
        };
        self.bytes_read += (rows.len() * columns.len() * tensor.element_bytes()) as u64;
        self.device
            .pack(&source, precision)
            .map_err(|source| LoadError::Pack { tensor: tensor.name.to_owned(), source })
    }

    /// A whole or partial vector as f32.
    fn vector(
        &mut self,
        layer: Option<usize>,
        part: Part,
        run: std::ops::Range<usize>,
    ) -> Result<Vec<f32>, LoadError> {
        let tensor = self.checkpoint.tensor(layer, part)?;
        self.bytes_read += (run.len() * tensor.element_bytes()) as u64;
        Ok(tensor.values(run))
    }

    fn norm(&mut self, layer: Option<usize>, part: Part) -> Result<Vec<f32>, LoadError> {
        self.vector(layer, part, 0..self.spec.hidden)
    }

    /// Embedding, head, final norm.
    fn edges(&mut self) -> Result<EdgeWeights<D>, LoadError> {
        let embedding = self.vocab(Part::Embedding)?;
        let head = if self.spec.tied { None } else { Some(self.vocab(Part::Head)?) };
        Ok(EdgeWeights { embedding, head, final_norm: self.norm(None, Part::FinalNorm)? })
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
        let spec = self.spec;
        let Attention::Grouped(attention) = &spec.layers[index].attention;
        Ok(LayerWeights {
            attention: self.attention(index, attention, ropes)?,
            feed_forward_norm: self.norm(Some(index), Part::FeedForwardNorm)?,
            feed_forward: self.feed_forward(index)?,
        })
    }

    fn attention(
        &mut self,
        index: usize,
        attention: &Grouped,
        ropes: &mut Ropes,
    ) -> Result<AttentionWeights<D>, LoadError> {
        let layer = Some(index);
        let dim = attention.head_dim;
        let queries = self.layout.query_heads(attention);
        let kv_heads = self.layout.kv_heads(attention);
        let mut qkv = Vec::new();
        for (run, local) in queries.global.iter().zip(&queries.local) {
            let rows = run.start * dim..run.end * dim;
            let parts = (Part::Query, Part::QueryBias);
            qkv.push(self.projection(layer, parts, rows, local * dim, attention.qkv_bias)?);
        }
        let keys = queries.total * dim;
        let values = keys + kv_heads.len() * dim;
        let kinds = [(Part::Key, Part::KeyBias, keys), (Part::Value, Part::ValueBias, values)];
        for (part, bias, start) in kinds {
            for (local, head) in kv_heads.iter().enumerate() {
                let rows = head * dim..(head + 1) * dim;
                let column = start + local * dim;
                qkv.push(self.projection(layer, (part, bias), rows, column, attention.qkv_bias)?);
            }
        }
        let mut output = Vec::new();
        for (run, local) in queries.global.iter().zip(&queries.local) {
            let columns = run.start * dim..run.end * dim;
            let rows = 0..self.spec.hidden;
            let matrix = self.pack(layer, Part::Output, rows, columns, self.precision)?;
            output.push(Piece { matrix, bias: None, column: local * dim });
        }
        let output_bias =
            if attention.out_bias { Some(self.norm(layer, Part::OutputBias)?) } else { None };
        Ok(AttentionWeights {
            norm: self.norm(layer, Part::AttentionNorm)?,
            qkv,
            output,
            output_bias,
            map: head_map(attention, &queries.global, &kv_heads),
            kv_heads: kv_heads.len(),
            head_dim: dim,
            rope: ropes.of(attention)?,
        })
    }

    /// A column-parallel piece with its bias.
    fn projection(
        &mut self,
        layer: Option<usize>,
        (part, bias_part): (Part, Part),
        rows: std::ops::Range<usize>,
        column: usize,
        bias: bool,
    ) -> Result<Piece<D>, LoadError> {
        let bias = if bias { Some(self.vector(layer, bias_part, rows.clone())?) } else { None };
        let matrix = self.pack(layer, part, rows, 0..self.spec.hidden, self.precision)?;
        Ok(Piece { matrix, bias, column })
    }

    fn feed_forward(&mut self, index: usize) -> Result<FeedForwardWeights<D>, LoadError> {
        let layer = Some(index);
        let spec = self.spec;
        match &spec.layers[index].feed_forward {
            FeedForward::Dense(dense) => {
                let parts = GatedParts {
                    gate: (Part::Gate, Part::GateBias),
                    up: (Part::Up, Part::UpBias),
                    down: Part::Down,
                };
                let down_bias =
                    if dense.bias { Some(self.norm(layer, Part::DownBias)?) } else { None };
                Ok(FeedForwardWeights::Dense {
                    network: self.gated(layer, &parts, dense.width, dense.bias)?,
                    down_bias,
                    width: self.layout.columns(dense.width).total,
                })
            }
            FeedForward::Experts(experts) => {
                let mut networks = Vec::with_capacity(experts.count);
                for e in 0..experts.count {
                    let parts = GatedParts {
                        gate: (Part::ExpertGate(e), Part::ExpertGate(e)),
                        up: (Part::ExpertUp(e), Part::ExpertUp(e)),
                        down: Part::ExpertDown(e),
                    };
                    networks.push(self.gated(layer, &parts, experts.width, false)?);
                }
                let (rows, columns) = (0..experts.count, 0..spec.hidden);
                Ok(FeedForwardWeights::Experts {
                    router: self.pack(layer, Part::Router, rows, columns, self.edge_precision)?,
                    experts: networks,
                    chosen: experts.chosen,
                    renormalise: experts.renormalise,
                    width: self.layout.columns(experts.width).total,
                })
            }
        }
    }

    fn gated(
        &mut self,
        layer: Option<usize>,
        parts: &GatedParts,
        width: usize,
        bias: bool,
    ) -> Result<Gated<D>, LoadError> {
        let runs = self.layout.columns(width);
        let mut gate_up = Vec::new();
        for (part, start) in [(parts.gate, 0), (parts.up, runs.total)] {
            for (run, local) in runs.global.iter().zip(&runs.local) {
                gate_up.push(self.projection(layer, part, run.clone(), start + local, bias)?);
            }
        }
        let mut down = Vec::new();
        for (run, local) in runs.global.iter().zip(&runs.local) {
            let rows = 0..self.spec.hidden;
            let matrix = self.pack(layer, parts.down, rows, run.clone(), self.precision)?;
            down.push(Piece { matrix, bias: None, column: *local });
        }
        Ok(Gated { gate_up, down })
    }
}

/// Which tensors make up a gated network: (weight, bias) inward, weight back.
struct GatedParts {
    gate: (Part, Part),
    up: (Part, Part),
    down: Part,
}

fn head_map(
    attention: &Grouped,
    queries: &[std::ops::Range<usize>],
    kv_heads: &[usize],
) -> HeadMap {
    let group = attention.heads / attention.kv_heads;
    let local = |head: usize| kv_heads.partition_point(|kv| *kv < head / group);
    HeadMap {
        kv_of_query: queries.iter().flat_map(|run| run.clone().map(local)).collect(),
        window: attention.window,
        scale: 1.0 / (attention.head_dim as f32).sqrt(),
    }
}
