//! Keys and values of the tokens so far, in pages that are allocated once, and attention over them.

use super::step::{PAGE, RankStep};
use crate::{
    buffers::zeros_on_demand,
    model::{ModelSpec, attend::Attend},
    ops::{
        Buffer,
        attention::{self, Documents, Heads, Paged, Part},
    },
    shard::ShardError,
};
use tch::{Device, Kind, Tensor};

/// Keys and values, rotated, of every layer, in pages of [`PAGE`] tokens.
pub struct KvCache {
    /// Per layer k|v: `[pages·PAGE, key_value·(dim + value_dim)]`
    layers: Vec<Tensor>,
    pages: usize,
}

/// Bytes of a page in all layers of `spec`, of elements of `element` bytes.
pub fn page_bytes(spec: &ModelSpec, element: usize) -> usize {
    let columns: i64 = spec.layers.iter().map(|layer| columns(layer.mixer.cached_heads())).sum();
    columns as usize * PAGE * element
}

fn columns(heads: Heads) -> i64 {
    heads.key_value * (heads.dim + heads.value_dim)
}

impl KvCache {
    /// A cache of `pages` pages, which on the host take memory as they are used.
    pub fn new(spec: &ModelSpec, pages: usize, kind: Kind, device: Device) -> Self {
        let layers = spec.layers.iter().map(|layer| {
            let shape = [(pages * PAGE) as i64, columns(layer.mixer.cached_heads())];
            zeros_on_demand(&shape, kind, device)
        });
        Self { layers: layers.collect(), pages }
    }

    fn index(&self, values: &[i64]) -> Tensor {
        let device = self.layers.first().map_or(Device::Cpu, Tensor::device);
        Tensor::from_slice(values).to_device(device)
    }

    /// Copies pages, `(from, to)`, in all layers. No page is copied to and from.
    pub fn copy(&mut self, pages: &[(u32, u32)]) {
        if pages.is_empty() {
            return;
        }
        let [from, to] = [|pair: &(u32, u32)| pair.0, |pair: &(u32, u32)| pair.1]
            .map(|side| self.index(&pages.iter().map(|pair| i64::from(side(pair))).collect::<Vec<_>>()));
        for layer in &self.layers {
            let mut by_page = layer.view([self.pages as i64, -1]);
            let _ = by_page.index_copy_(0, &to, &by_page.index_select(0, &from));
        }
    }

    /// Attention of the runs of `step` over the cache.
    pub fn attend(&self, step: &RankStep) -> OverPages<'_> {
        let (mut row, mut places) = (0, Vec::new());
        let (mut whole, mut lengths, mut parts) = (Vec::new(), Vec::new(), Vec::new());
        for run in &step.runs {
            let part = Part { rows: row..row + run.ids.len(), first: run.first, pages: run.pages.clone() };
            row = part.rows.end;
            places.extend(part.places(PAGE).map(|place| place as i64));
            if run.first == 0 {
                lengths.push(part.rows.len());
                whole.extend(part.rows.map(|row| row as i64));
            } else {
                parts.push(part);
            }
        }
        let places = self.index(&places);
        let documents = Documents::new(&lengths, places.device());
        let others = || (self.index(&whole), Paged::new(parts, PAGE, &places));
        let others = if whole.len() < row { Some(others()) } else { None };
        OverPages { cache: self, places, documents, others }
    }
}

/// Attention of a batch's tokens over their sequences, whose keys and values go into the cache.
pub struct OverPages<'a> {
    cache: &'a KvCache,
    /// The place of each token: `[tokens]` i64.
    places: Tensor,
    /// Sequences that begin here: they see nothing but themselves.
    documents: Documents,
    /// If some sequences go on: the rows of those that begin, and the parts of those that go on.
    others: Option<(Tensor, Paged)>,
}

impl Attend for OverPages<'_> {
    fn forward(&self, layer: usize, qkv: &Tensor, heads: Heads) -> Result<(Buffer, Tensor), ShardError> {
        let [q, k, v] = heads.widths();
        let kv = &self.cache.layers[layer];
        let _ = kv.shallow_clone().index_copy_(0, &self.places, &qkv.narrow(1, q, k + v));
        let Some((whole, paged)) = &self.others else {
            return Ok(attention::forward(qkv, heads, &self.documents));
        };
        let mut out = Buffer::empty(&[qkv.size()[0], heads.output()], qkv.kind(), qkv.device());
        if whole.numel() > 0 {
            let (o, _) = attention::forward(&qkv.index_select(0, whole), heads, &self.documents);
            let _ = out.index_copy_(0, whole, &o);
        }
        attention::over_pages(qkv, kv, paged, heads, &out);
        Ok((out, Tensor::zeros([0], (Kind::Float, qkv.device()))))
    }
}
