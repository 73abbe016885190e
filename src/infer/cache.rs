//! Keys and values of the tokens so far, for several sequences of different lengths.

use crate::{
    model::ModelSpec,
    ops::attention::{self, Heads},
};
use tch::{Device, Kind, Tensor};

/// Keys and values, rotated, of every layer. A place is a token of a sequence: sequence·capacity + position.
pub struct KvCache {
    /// Per layer k|v: [places, 2·key_value, dim]
    layers: Vec<Tensor>,
    sequences: i64,
    capacity: i64,
}

impl KvCache {
    /// An empty cache of `sequences` sequences of at most `capacity` tokens.
    pub fn new(spec: &ModelSpec, sequences: usize, capacity: usize, kind: Kind, device: Device) -> Self {
        let (sequences, capacity) = (sequences as i64, capacity as i64);
        let shape = [sequences * capacity, 2 * spec.num_kv_heads as i64, spec.head_dim as i64];
        let layers = (0..spec.num_layers).map(|_| Tensor::zeros(shape, (kind, device))).collect();
        Self { layers, sequences, capacity }
    }

    /// The place of each (sequence, position): `[tokens]` i64.
    pub fn places(&self, tokens: impl IntoIterator<Item = (usize, usize)>, device: Device) -> Tensor {
        let place = |(sequence, position)| sequence as i64 * self.capacity + position as i64;
        let places: Vec<i64> = tokens.into_iter().map(place).collect();
        Tensor::from_slice(&places).to_device(device)
    }

    /// Keeps keys and values of q|k|v `[tokens, (query + 2·key_value)·dim]` at `places` `[tokens]` i64.
    pub fn store(&self, layer: usize, qkv: &Tensor, heads: Heads, places: &Tensor) {
        let width = 2 * heads.key_value;
        let key_value =
            qkv.view([qkv.size()[0], heads.query + width, heads.dim]).narrow(1, heads.query, width);
        let _ = self.layers[layer].shallow_clone().index_copy_(0, places, &key_value);
    }

    /// Attention of q|k|v `[sequences, (query + 2·key_value)·dim]`, whose keys and values are stored, over each sequence's
    /// first `lengths` `[sequences]` i64 tokens, none above `longest`. Returns `[sequences, query·dim]`.
    pub fn attend(
        &self,
        layer: usize,
        qkv: &Tensor,
        heads: Heads,
        lengths: &Tensor,
        longest: usize,
    ) -> Tensor {
        let width = 2 * heads.key_value;
        let q = qkv.view([self.sequences, heads.query + width, heads.dim]).narrow(1, 0, heads.query);
        let all = self.layers[layer].view([self.sequences, self.capacity, width, heads.dim]);
        let all = all.narrow(1, 0, longest as i64);
        let (k, v) = (all.narrow(2, 0, heads.key_value), all.narrow(2, heads.key_value, heads.key_value));
        attention::with_cache(&q, &k, &v, lengths, heads)
    }
}
