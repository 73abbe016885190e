//! Keys and values of the tokens so far, for several sequences of different lengths, and attention over them.

use crate::{
    model::{ModelSpec, attend::Attend},
    ops::{
        Buffer,
        attention::{self, Documents, Heads},
    },
    shard::ShardError,
};
use tch::{Device, Kind, Tensor};

/// Keys and values, rotated, of every layer. A place is a token of a sequence: sequence·capacity + position.
pub struct KvCache {
    /// Per layer k|v: `[places, key_value·(dim + value_dim)]`
    layers: Vec<Tensor>,
    sequences: i64,
    capacity: i64,
}

/// Attention of whole prompts, whose keys and values go into the cache.
pub struct Prefill<'a> {
    pub cache: &'a KvCache,
    /// The place of each token: `[tokens]` i64.
    pub places: Tensor,
    pub documents: &'a Documents,
}

/// Attention of the next token of every sequence over all of its tokens.
pub struct NextTokens<'a> {
    pub cache: &'a KvCache,
    /// The place of each sequence's new token: `[sequences]` i64.
    pub places: Tensor,
    /// Tokens of each sequence, the new one included: `[sequences]` i64.
    pub lengths: Tensor,
    /// The largest of `lengths`.
    pub longest: usize,
}

impl KvCache {
    /// An empty cache of `sequences` sequences of at most `capacity` tokens.
    pub fn new(spec: &ModelSpec, sequences: usize, capacity: usize, kind: Kind, device: Device) -> Self {
        let (sequences, capacity) = (sequences as i64, capacity as i64);
        let columns = |heads: Heads| heads.key_value * (heads.dim + heads.value_dim);
        let layers = spec.layers.iter().map(|layer| {
            let shape = [sequences * capacity, columns(layer.mixer.cached_heads())];
            Tensor::zeros(shape, (kind, device))
        });
        Self { layers: layers.collect(), sequences, capacity }
    }

    /// The place of each (sequence, position): `[tokens]` i64.
    pub fn places(&self, tokens: impl IntoIterator<Item = (usize, usize)>, device: Device) -> Tensor {
        let place = |(sequence, position)| sequence as i64 * self.capacity + position as i64;
        let places: Vec<i64> = tokens.into_iter().map(place).collect();
        Tensor::from_slice(&places).to_device(device)
    }

    /// Copies keys and values of q|k|v `[tokens, Σ widths]` to `places` `[tokens]` i64.
    fn store(&self, layer: usize, qkv: &Tensor, heads: Heads, places: &Tensor) {
        let [q, k, v] = heads.widths();
        let _ = self.layers[layer].shallow_clone().index_copy_(0, places, &qkv.narrow(1, q, k + v));
    }
}

impl Attend for Prefill<'_> {
    fn forward(&self, layer: usize, qkv: &Tensor, heads: Heads) -> Result<(Buffer, Tensor), ShardError> {
        self.cache.store(layer, qkv, heads, &self.places);
        Ok(attention::forward(qkv, heads, self.documents))
    }
}

impl Attend for NextTokens<'_> {
    fn forward(&self, layer: usize, qkv: &Tensor, heads: Heads) -> Result<(Buffer, Tensor), ShardError> {
        let Self { cache, places, lengths, longest } = self;
        cache.store(layer, qkv, heads, places);
        let [_, k, v] = heads.widths();
        let all = cache.layers[layer].view([cache.sequences, cache.capacity, k + v]);
        let all = all.narrow(1, 0, *longest as i64);
        let part = |first, columns, dim| all.narrow(2, first, columns).unflatten(2, [heads.key_value, dim]);
        let (k, v) = (part(0, k, heads.dim), part(k, v, heads.value_dim));
        let [q, _, _] = heads.split(qkv);
        let out = attention::with_cache(&q, &k, &v, lengths, heads);
        Ok((out.into(), Tensor::zeros([0], (Kind::Float, qkv.device()))))
    }
}
