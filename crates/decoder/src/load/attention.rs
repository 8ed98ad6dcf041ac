//! A layer's attention from the checkpoint: whole heads of a rank's stripes.

use std::ops::Range;

use compute::{Device, DeviceError, HeadMap};
use model::{Attention, Grouped, Latent, LatentUp, Part};

use super::{LoadError, Loader, Ropes, pack};
use crate::kept::Key;
use crate::layout::Runs;
use crate::weights::{AttentionWeights, GroupedWeights, LatentWeights, Packed, Piece};

impl<D: Device> Loader<'_, D> {
    /// What makes each head's output, and the projection back by own stripe.
    pub(super) fn attention(
        &mut self,
        index: usize,
        ropes: &mut Ropes,
    ) -> Result<(AttentionWeights<D>, Vec<Piece<D>>), LoadError> {
        let spec = self.spec;
        match &spec.layers[index].attention {
            Attention::Grouped(attention) => {
                let queries = self.layout.query_heads(attention.heads);
                let output = self.output(Some(index), &queries, attention.head_dim)?;
                let weights = self.grouped(index, attention, &queries, ropes)?;
                Ok((AttentionWeights::Grouped(weights), output))
            }
            Attention::Latent(attention) => {
                let queries = self.layout.query_heads(attention.heads);
                let output = self.output(Some(index), &queries, attention.value_dim)?;
                let weights = self.latent(index, attention, &queries, ropes)?;
                Ok((AttentionWeights::Latent(weights), output))
            }
        }
    }

    pub(super) fn has_output_bias(&self, index: usize) -> bool {
        match &self.spec.layers[index].attention {
            Attention::Grouped(attention) => attention.out_bias,
            Attention::Latent(_) => false,
        }
    }

    /// By own stripe: `[hidden, its heads * dim]`.
    fn output(
        &mut self,
        layer: Option<usize>,
        queries: &Runs,
        dim: usize,
    ) -> Result<Vec<Piece<D>>, LoadError> {
        let mut output = Vec::new();
        for (run, local) in queries.global.iter().zip(&queries.local) {
            let (rows, columns) = (0..self.spec.hidden, times(run, dim));
            let matrix = self.pack(layer, Part::Output, rows, columns, self.precision)?;
            output.push(Piece { matrix, bias: None, column: local * dim });
        }
        Ok(output)
    }

    fn grouped(
        &mut self,
        index: usize,
        attention: &Grouped,
        queries: &Runs,
        ropes: &mut Ropes,
    ) -> Result<GroupedWeights<D>, LoadError> {
        let (layer, dim, hidden) = (Some(index), attention.head_dim, self.spec.hidden);
        let bias = |part| attention.qkv_bias.then_some(part);
        let kv_heads = self.layout.kv_heads(attention.heads, attention.kv_heads);
        let mut qkv = Vec::new();
        for (run, local) in queries.global.iter().zip(&queries.local) {
            let parts = (Part::Query, bias(Part::QueryBias));
            qkv.push(self.projection(layer, parts, times(run, dim), hidden, local * dim)?);
        }
        let keys = queries.total * dim;
        let values = keys + kv_heads.len() * dim;
        let kinds = [(Part::Key, Part::KeyBias, keys), (Part::Value, Part::ValueBias, values)];
        for (part, bias_part, start) in kinds {
            for (local, head) in kv_heads.iter().enumerate() {
                let rows = head * dim..(head + 1) * dim;
                let column = start + local * dim;
                let parts = (part, bias(bias_part));
                qkv.push(self.projection(layer, parts, rows, hidden, column)?);
            }
        }
        let head_norms = if attention.qk_norm {
            let query = self.norm(layer, Part::QueryNorm, dim)?;
            Some((query, self.norm(layer, Part::KeyNorm, dim)?))
        } else {
            None
        };
        let mut sinks = Vec::new();
        if attention.sinks {
            for run in &queries.global {
                sinks.extend(self.vector(layer, Part::Sinks, run.clone())?);
            }
        }
        let group = attention.heads / attention.kv_heads;
        let local = |head: usize| kv_heads.partition_point(|kv| *kv < head / group);
        Ok(GroupedWeights {
            qkv,
            head_norms,
            map: HeadMap {
                kv_of_query: queries.global.iter().cloned().flatten().map(local).collect(),
                window: attention.window,
                scale: attention.scale,
                softcap: attention.softcap,
                sinks,
            },
            kv_heads: kv_heads.len(),
            head_dim: dim,
            rope: ropes.of(&attention.rope)?,
        })
    }

    fn latent(
        &mut self,
        index: usize,
        attention: &Latent,
        queries: &Runs,
        ropes: &mut Ropes,
    ) -> Result<LatentWeights<D>, LoadError> {
        let (layer, hidden) = (Some(index), self.spec.hidden);
        let &Latent { kv_rank, nope_dim, rope_dim, value_dim, .. } = attention;
        let query_rank = attention.query_rank.unwrap_or(0);
        let mut query_down = None;
        let (mut part, mut inputs) = (Part::Query, hidden);
        if let Some(rank) = attention.query_rank {
            let down = self.projection(layer, (Part::QueryDown, None), 0..rank, hidden, 0)?;
            query_down = Some((down, self.norm(layer, Part::QueryDownNorm, rank)?));
            (part, inputs) = (Part::QueryUp, rank);
        }
        let dim = nope_dim + rope_dim;
        let mut query = Vec::new();
        for (run, local) in queries.global.iter().zip(&queries.local) {
            query.push(self.projection(
                layer,
                (part, None),
                times(run, dim),
                inputs,
                local * dim,
            )?);
        }
        let rows = 0..kv_rank + rope_dim;
        let latent = (Part::LatentDown, None);
        let latent_down = self.projection(layer, latent, rows, hidden, query_rank)?;
        let (mut key_up, mut value_up) = (Vec::new(), Vec::new());
        for head in queries.global.iter().cloned().flatten() {
            let (key, value) = self.latent_up(layer, attention, head)?;
            key_up.push(key);
            value_up.push(value);
        }
        Ok(LatentWeights {
            query_down,
            query,
            latent_down,
            latent_norm: self.norm(layer, Part::LatentNorm, kv_rank)?,
            key_up,
            value_up,
            map: HeadMap {
                kv_of_query: vec![0; queries.total],
                window: None,
                scale: attention.scale,
                softcap: None,
                sinks: Vec::new(),
            },
            query_rank,
            kv_rank,
            nope_dim,
            rope_dim,
            value_dim,
            rope: ropes.of(&attention.rope)?,
        })
    }

    /// One head's projections up from the latent: the keys', turned over, and the values'.
    fn latent_up(
        &mut self,
        layer: Option<usize>,
        attention: &Latent,
        head: usize,
    ) -> Result<(Packed<D>, Packed<D>), LoadError> {
        let &Latent { kv_rank, nope_dim, value_dim, .. } = attention;
        let precision = self.precision;
        let (part, values, key) = match attention.up {
            LatentUp::Joined => {
                let keys = head * (nope_dim + value_dim);
                let values = keys + nope_dim;
                let key = self.turned(layer, Part::LatentUp, keys..values, 0..kv_rank)?;
                (Part::LatentUp, values, key)
            }
            LatentUp::Split => {
                let rows = head * kv_rank..(head + 1) * kv_rank;
                let key = self.pack(layer, Part::LatentKeyUp, rows, 0..nope_dim, precision)?;
                (Part::LatentValueUp, head * value_dim, key)
            }
        };
        let rows = values..values + value_dim;
        Ok((key, self.pack(layer, part, rows, 0..kv_rank, precision)?))
    }

    /// Packs a rectangle of a tensor turned over: its rows become inputs.
    fn turned(
        &mut self,
        layer: Option<usize>,
        part: Part,
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> Result<Packed<D>, LoadError> {
        let key = Key::new(layer, part, (&rows, &columns), true);
        self.packed(key, |loader| {
            let (device, precision) = (loader.device, loader.precision);
            let elements = rows.len() * columns.len();
            let tensor = loader.tensor(layer, part)?;
            let (name, bytes) = (tensor.name(), tensor.bytes_of(elements));
            let source = tensor.turned(rows, columns)?.ok_or_else(|| LoadError::Pack {
                tensor: name.to_owned(),
                source: DeviceError::Shape {
                    op: "pack turned over",
                    what: "stored rows per row",
                    got: 0,
                    expected: 1,
                },
            })?;
            Ok((pack(device, name, &source, precision)?, bytes))
        })
    }
}

/// The rows of a run of heads.
fn times(run: &Range<usize>, dim: usize) -> Range<usize> {
    run.start * dim..run.end * dim
}
