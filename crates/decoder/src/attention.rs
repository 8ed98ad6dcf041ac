//! One layer's attention on one rank.

use collective::Collective;
use compute::{Device, RopeTable};

use crate::forward::{After, Batch, Decoder, ForwardError, Place, Scratch};
use crate::latent;
use crate::weights::{AttentionWeights, GroupedWeights};

impl<D: Device> Decoder<D> {
    /// `x += sum over stripes of output(heads(norm(x)))`.
    pub(crate) fn attention(
        &mut self,
        layer: usize,
        batch: &Batch<'_>,
        collective: &mut dyn Collective<D>,
    ) -> Result<(), ForwardError> {
        let (rows, hidden, eps) = (batch.rows, self.spec.hidden, self.spec.norm_eps);
        let (device, s) = (&self.device, &mut self.scratch);
        let w = &self.layers[layer];
        device.reshape(&mut s.h, rows, hidden)?;
        device.rms_norm(&s.x, &w.attention_norm, eps, &mut s.h)?;
        let cache = &mut self.caches[layer];
        match &w.attention {
            AttentionWeights::Grouped(w) => {
                grouped(device, s, w, (cache, &self.ropes[w.rope], eps), batch)?;
            }
            AttentionWeights::Latent(w) => {
                latent::heads(device, s, w, (cache, &self.ropes[w.rope]), batch)?;
            }
        }
        let own = w.output.len();
        device.reshape(&mut s.partials, own * rows, hidden)?;
        let segments: Vec<_> =
            w.output.iter().enumerate().map(|(i, p)| p.inward(0..rows, i * rows)).collect();
        device.matmul(&s.inner, &segments, &mut s.partials)?;
        let after = After {
            place: Place::Attention { layer },
            hidden,
            bias: w.output_bias.as_deref(),
            norm: w.attention_post_norm.as_deref(),
            scale: self.spec.branch_scale,
            eps,
        };
        Self::add_partials(device, s, rows, after, collective)
    }
}

/// From the normed stream in `h` to `[T, query heads * head_dim]` in `inner`.
fn grouped<D: Device>(
    device: &D,
    s: &mut Scratch<D>,
    w: &GroupedWeights<D>,
    (cache, rope, eps): (&mut D::Cache, &RopeTable, f32),
    batch: &Batch<'_>,
) -> Result<(), ForwardError> {
    let (rows, dim) = (batch.rows, w.head_dim);
    let queries = w.map.kv_of_query.len();
    let (query_columns, kv_columns) = (queries * dim, w.kv_heads * dim);
    device.reshape(&mut s.wide, rows, query_columns + 2 * kv_columns)?;
    let segments: Vec<_> = w.qkv.iter().map(|p| p.outward(0..rows)).collect();
    device.matmul(&s.h, &segments, &mut s.wide)?;
    if let Some((query, key)) = &w.head_norms {
        device.norm_heads(&mut s.wide, 0, queries, dim, query, eps)?;
        device.norm_heads(&mut s.wide, query_columns, w.kv_heads, dim, key, eps)?;
    }
    // Queries and keys stand side by side and share the rotary table.
    device.rope(&mut s.wide, 0, queries + w.kv_heads, dim, &batch.positions, rope)?;
    let value_column = query_columns + kv_columns;
    device.store_kv(cache, 0, &s.wide, query_columns, value_column, &batch.spans)?;
    device.reshape(&mut s.inner, rows, query_columns)?;
    device.attend(cache, 0, &s.wide, &w.map, &batch.spans, &mut s.inner)?;
    Ok(())
}
