//! One layer's attention on one rank.

use collective::Collective;
use compute::Device;

use crate::forward::{Batch, Decoder, ForwardError};

impl<D: Device> Decoder<D> {
    /// `x += sum over stripes of output(attend(rope(qkv(norm(x)))))`.
    pub(crate) fn attention(
        &mut self,
        layer: usize,
        batch: &Batch<'_>,
        collective: &mut dyn Collective<D>,
    ) -> Result<(), ForwardError> {
        let (device, s) = (&self.device, &mut self.scratch);
        let w = &self.layers[layer].attention;
        let (rows, hidden) = (batch.rows, self.spec.hidden);
        let (queries, own) = (w.map.kv_of_query.len(), w.output.len());
        let query_columns = queries * w.head_dim;
        let kv_columns = w.kv_heads * w.head_dim;

        device.reshape(&mut s.h, rows, hidden)?;
        device.rms_norm(&s.x, &w.norm, self.spec.norm_eps, &mut s.h)?;
        device.reshape(&mut s.wide, rows, query_columns + 2 * kv_columns)?;
        let segments: Vec<_> = w.qkv.iter().map(|p| p.outward(0..rows)).collect();
        device.matmul(&s.h, &segments, &mut s.wide)?;

        // Queries and keys stand side by side and share the rotary table.
        let rope = &self.ropes[w.rope];
        device.rope(&mut s.wide, 0, queries + w.kv_heads, &batch.positions, rope)?;
        let cache = &mut self.caches[layer];
        let value_column = query_columns + kv_columns;
        device.store_kv(cache, 0, &s.wide, query_columns, value_column, &batch.spans)?;
        device.reshape(&mut s.inner, rows, query_columns)?;
        device.attend(cache, 0, &s.wide, &w.map, &batch.spans, &mut s.inner)?;

        device.reshape(&mut s.partials, own * rows, hidden)?;
        device.reshape(&mut s.sum, rows, hidden)?;
        let segments: Vec<_> =
            w.output.iter().enumerate().map(|(i, p)| p.inward(0..rows, i * rows)).collect();
        device.matmul(&s.inner, &segments, &mut s.partials)?;
        Self::add_partials(device, s, rows, w.output_bias.as_deref(), collective)
    }
}
