//! The paged KV cache: `[layer][block][kv_head][position][key_dim]` keys and, apart from them,
//! values, unless those are prefixes of the keys.
//!
//! Rows are padded with zeros to a whole number of vectors, so that a dot product has no tail.

use super::arena::{Arena, Block, Plain};
use super::lanes::{LANES, Lanes};
use super::math::to_bf16;
use super::tensor::CpuTensor;
use crate::check::{Check, out_of_memory};
use crate::{AttendSpan, CacheShape, CacheValue, DeviceError, Precision};

/// A paged KV cache.
#[derive(Debug)]
pub struct CpuCache {
    pub(crate) shape: CacheShape,
    pub(crate) store: Store,
}

/// Keys and values in one of the two types.
#[derive(Debug)]
pub(crate) enum Store {
    F32(Pages<f32>),
    Bf16(Pages<u16>),
}

/// Keys and values of their own, `rows * row_width(dim)` elements each.
#[derive(Debug)]
pub(crate) struct Pages<E> {
    pub(crate) keys: Block<E>,
    pub(crate) values: Block<E>,
}

/// How an element is kept.
pub(crate) trait Element: Plain {
    /// Rounds (to nearest, ties to even).
    fn narrow(value: f32) -> Self;
    /// Sixteen of them, widened.
    fn load<L: Lanes>(lanes: L, from: &[Self; LANES]) -> L::F;
}

impl Element for f32 {
    fn narrow(value: f32) -> f32 {
        value
    }

    #[inline(always)]
    fn load<L: Lanes>(lanes: L, from: &[f32; LANES]) -> L::F {
        lanes.load(from)
    }
}

impl Element for u16 {
    fn narrow(value: f32) -> u16 {
        to_bf16(value)
    }

    #[inline(always)]
    fn load<L: Lanes>(lanes: L, from: &[u16; LANES]) -> L::F {
        lanes.load_bf16(from)
    }
}

/// Elements that a head of width `dim` takes.
pub(crate) fn row_width(dim: usize) -> usize {
    dim.next_multiple_of(LANES)
}

impl<E: Element> Pages<E> {
    fn new(arena: &Arena, shape: &CacheShape) -> Result<Self, DeviceError> {
        let CacheShape { layers, blocks, kv_heads, block_tokens, .. } = *shape;
        let of = |dim| {
            let factors = [layers, blocks, kv_heads, block_tokens, dim];
            let len = factors.iter().try_fold(1_usize, |p, &factor| p.checked_mul(factor));
            arena.zeros(len.ok_or(out_of_memory::<E>(usize::MAX))?)
        };
        let values = match shape.value {
            CacheValue::Own(dim) => of(row_width(dim))?,
            CacheValue::PrefixOfKey(_) => of(0)?,
        };
        Ok(Pages { keys: of(row_width(shape.key_dim))?, values })
    }

    /// `value` is ignored where values are prefixes of keys.
    fn put(&mut self, shape: &CacheShape, at: Slot, key: &[f32], value: &[f32]) {
        for head in 0..shape.kv_heads {
            let row = at.row(shape, head);
            put(&mut self.keys, row, key, (head, shape.key_dim));
            if let CacheValue::Own(dim) = shape.value {
                put(&mut self.values, row, value, (head, dim));
            }
        }
    }
}

fn put<E: Element>(to: &mut [E], row: usize, from: &[f32], (head, dim): (usize, usize)) {
    let to = &mut to[row * row_width(dim)..][..dim];
    for (to, from) in to.iter_mut().zip(&from[head * dim..]) {
        *to = E::narrow(*from);
    }
}

/// A position in the cache; numbers have been checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    pub(crate) layer: usize,
    pub(crate) block: usize,
    pub(crate) position: usize,
}

impl Slot {
    /// Its row among all rows of the cache, for one KV head.
    pub(crate) fn row(self, shape: &CacheShape, head: usize) -> usize {
        ((self.layer * shape.blocks + self.block) * shape.kv_heads + head) * shape.block_tokens
            + self.position
    }
}

impl CpuCache {
    pub(crate) fn new(arena: &Arena, shape: CacheShape) -> Result<CpuCache, DeviceError> {
        let check = Check("cache");
        check.at_least("block_tokens", shape.block_tokens, 1)?;
        check.at_least("key_dim", shape.key_dim, 1)?;
        check.at_most("key_dim", shape.key_dim, 1 << 20)?;
        check.at_least("value_dim", shape.value_dim(), 1)?;
        let most = match shape.value {
            CacheValue::Own(_) => 1 << 20,
            CacheValue::PrefixOfKey(_) => shape.key_dim,
        };
        check.at_most("value_dim", shape.value_dim(), most)?;
        let store = match shape.precision {
            Precision::F32 => Store::F32(Pages::new(arena, &shape)?),
            Precision::Bf16 | Precision::Int8 | Precision::Int4 => {
                Store::Bf16(Pages::new(arena, &shape)?)
            }
        };
        Ok(CpuCache { shape, store })
    }

    /// Its size.
    pub fn shape(&self) -> CacheShape {
        self.shape
    }

    /// Checks one span against the cache and a call of `rows` rows; `from` is the first position
    /// that is touched.
    pub(crate) fn check_span(
        &self,
        check: Check,
        span: &AttendSpan<'_>,
        rows: usize,
        from: usize,
    ) -> Result<(), DeviceError> {
        let tokens = self.shape.block_tokens;
        check.at_most("start of a span's rows", span.rows.start, span.rows.end)?;
        check.at_most("end of a span's rows", span.rows.end, rows)?;
        let slots = span.blocks.len().saturating_mul(tokens);
        let end = check.fits("end of a span's positions", span.start, span.rows.len(), slots)?;
        if !span.rows.is_empty() {
            for &block in &span.blocks[from / tokens..end.div_ceil(tokens)] {
                check.below("block", block as usize, self.shape.blocks)?;
            }
        }
        Ok(())
    }

    /// See [`crate::Device::store_kv`].
    pub(crate) fn store(
        &mut self,
        layer: usize,
        x: &CpuTensor,
        (key_column, value_column): (usize, usize),
        spans: &[AttendSpan<'_>],
    ) -> Result<(), DeviceError> {
        let check = Check("store_kv");
        let shape = self.shape;
        let width = check.product("width of the keys", &[shape.kv_heads, shape.key_dim])?;
        let (value_column, value_width) = match shape.value {
            CacheValue::Own(dim) => {
                (value_column, check.product("width of the values", &[shape.kv_heads, dim])?)
            }
            CacheValue::PrefixOfKey(_) => (0, 0),
        };
        check.below("layer", layer, shape.layers)?;
        check.fits("end of the keys", key_column, width, x.columns())?;
        check.fits("end of the values", value_column, value_width, x.columns())?;
        for span in spans {
            self.check_span(check, span, x.rows(), span.start)?;
        }
        for span in spans {
            for (i, row) in span.rows.clone().enumerate() {
                let position = span.start + i;
                let block = span.blocks[position / shape.block_tokens] as usize;
                let at = Slot { layer, block, position: position % shape.block_tokens };
                let x = x.row(row);
                let (key, value) = (&x[key_column..][..width], &x[value_column..][..value_width]);
                match &mut self.store {
                    Store::F32(pages) => pages.put(&shape, at, key, value),
                    Store::Bf16(pages) => pages.put(&shape, at, key, value),
                }
            }
        }
        Ok(())
    }
}
