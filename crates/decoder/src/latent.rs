//! Latent attention in its absorbed form, for prompts and for single tokens alike: keys and values
//! are never expanded, all heads look at the one latent that is cached.

use compute::{Columns, Device, RopeTable};

use crate::forward::{Batch, ForwardError, Scratch};
use crate::weights::{LatentWeights, across};

/// Epsilon of the norms of the latents: the published models fix it, whatever `rms_norm_eps` says.
const LATENT_NORM_EPS: f32 = 1e-6;

/// From the normed stream in `h` to `[T, local heads * value_dim]` in `inner`.
pub(crate) fn heads<D: Device>(
    device: &D,
    s: &mut Scratch<D>,
    w: &LatentWeights<D>,
    (cache, rope): (&mut D::Cache, &RopeTable),
    batch: &Batch<'_>,
) -> Result<(), ForwardError> {
    let rows = batch.rows;
    project(device, s, w, (rope, &batch.positions), rows)?;
    // The key is `[normed latent | rotated]`; its first part is the value, too.
    device.store_kv(cache, 0, &s.wide, w.query_rank, w.query_rank, &batch.spans)?;
    absorb(device, s, w, rows)?;

    let count = w.map.kv_of_query.len();
    device.reshape(&mut s.inner, rows, count * w.kv_rank)?;
    device.attend(cache, 0, &s.expert, &w.map, &batch.spans, &mut s.inner)?;
    device.reshape(&mut s.wide, rows, count * w.value_dim)?;
    let segments: Vec<_> = w
        .value_up
        .iter()
        .enumerate()
        .map(|(head, matrix)| across(matrix.as_ref(), rows, head * w.kv_rank, head * w.value_dim))
        .collect();
    device.matmul(&s.inner, &segments, &mut s.wide)?;
    std::mem::swap(&mut s.inner, &mut s.wide);
    Ok(())
}

/// `wide = [query latent | normed latent | rotated key]`, `inner` = by head `[nope | rotated]`.
fn project<D: Device>(
    device: &D,
    s: &mut Scratch<D>,
    w: &LatentWeights<D>,
    (rope, positions): (&RopeTable, &[u32]),
    rows: usize,
) -> Result<(), ForwardError> {
    let count = w.map.kv_of_query.len();
    let query_dim = w.nope_dim + w.rope_dim;
    device.reshape(&mut s.wide, rows, w.query_rank + w.kv_rank + w.rope_dim)?;
    let down = w.query_down.iter().map(|(piece, _)| piece).chain([&w.latent_down]);
    let segments: Vec<_> = down.map(|piece| piece.outward(0..rows)).collect();
    device.matmul(&s.h, &segments, &mut s.wide)?;
    let latent = w.query_rank;
    device.norm_heads(&mut s.wide, latent, 1, w.kv_rank, &w.latent_norm, LATENT_NORM_EPS)?;
    device.rope(&mut s.wide, latent + w.kv_rank, 1, w.rope_dim, positions, rope)?;

    device.reshape(&mut s.inner, rows, count * query_dim)?;
    let segments: Vec<_> = w.query.iter().map(|piece| piece.outward(0..rows)).collect();
    if let Some((_, norm)) = &w.query_down {
        device.norm_heads(&mut s.wide, 0, 1, w.query_rank, norm, LATENT_NORM_EPS)?;
        device.matmul(&s.wide, &segments, &mut s.inner)?;
    } else {
        device.matmul(&s.h, &segments, &mut s.inner)?;
    }
    device.rope(&mut s.inner, w.nope_dim, count, query_dim, positions, rope)?;
    Ok(())
}

/// `expert` = by head `[key_up(nope) | rotated]`: queries as wide as the cached keys.
fn absorb<D: Device>(
    device: &D,
    s: &mut Scratch<D>,
    w: &LatentWeights<D>,
    rows: usize,
) -> Result<(), ForwardError> {
    let count = w.map.kv_of_query.len();
    let (query_dim, key_dim) = (w.nope_dim + w.rope_dim, w.kv_rank + w.rope_dim);
    device.reshape(&mut s.expert, rows, count * key_dim)?;
    let segments: Vec<_> = w
        .key_up
        .iter()
        .enumerate()
        .map(|(head, matrix)| across(matrix.as_ref(), rows, head * query_dim, head * key_dim))
        .collect();
    device.matmul(&s.inner, &segments, &mut s.expert)?;
    let from = Columns { first: w.nope_dim, stride: query_dim };
    let to = Columns { first: w.kv_rank, stride: key_dim };
    device.copy_columns(&s.inner, from, w.rope_dim, count, &mut s.expert, to)?;
    Ok(())
}
