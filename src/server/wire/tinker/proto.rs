//! Messages of package `tinker_public` as far as they are read or written here. Fields that are left out, among them
//! the provenance spans of a datum and what an image holds, are skipped in decoding. Numbers inside `bytes` are
//! little-endian and not copied.

use prost::{
    bytes::Bytes,
    encoding::{self, DecodeContext, WireType, decode_key, decode_varint, skip_field},
};
use std::{collections::BTreeMap, iter};

/// The fields of a message, unread: the tag of each with its bytes, none for a number. It ends where the message is
/// broken.
pub fn fields(mut message: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    iter::from_fn(move || {
        let (tag, kind) = decode_key(&mut message).ok()?;
        if kind != WireType::LengthDelimited {
            skip_field(kind, tag, &mut message, DecodeContext::default()).ok()?;
            return Some((tag, &[][..]));
        }
        let length = usize::try_from(decode_varint(&mut message).ok()?).ok()?;
        let (field, rest) = message.split_at_checked(length)?;
        message = rest;
        Some((tag, field))
    })
}

/// `model_id` and `seq_id` of a [`ForwardBackwardRequest`] whose end may be missing: writers put them first.
pub fn address(mut message: &[u8]) -> (Option<String>, Option<i32>) {
    let (mut model_id, mut seq_id) = (None, None);
    while let Ok((tag, kind)) = decode_key(&mut message) {
        let read = match tag {
            1 => encoding::string::merge(
                kind,
                model_id.insert(String::new()),
                &mut message,
                DecodeContext::default(),
            ),
            2 => encoding::int32::merge(kind, seq_id.insert(0), &mut message, DecodeContext::default()),
            _ => break,
        };
        if read.is_err() {
            return (None, None);
        }
    }
    (model_id, seq_id)
}

/// The body of `forward_backward`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ForwardBackwardRequest {
    #[prost(string, tag = "1")]
    pub model_id: String,
    #[prost(int32, tag = "2")]
    pub seq_id: i32,
    #[prost(message, repeated, tag = "3")]
    pub data: Vec<Datum>,
    #[prost(string, tag = "4")]
    pub loss_fn: String,
    /// Numbers only; read where `loss_fn_config_v2` is empty.
    #[prost(btree_map = "string, double", tag = "5")]
    pub loss_fn_config: BTreeMap<String, f64>,
    #[prost(bool, tag = "6")]
    pub forward_only: bool,
    #[prost(btree_map = "string, message", tag = "7")]
    pub loss_fn_config_v2: BTreeMap<String, LossConfigValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct LossConfigValue {
    #[prost(oneof = "LossConfig", tags = "1, 2")]
    pub value: Option<LossConfig>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum LossConfig {
    #[prost(double, tag = "1")]
    Number(f64),
    #[prost(string, tag = "2")]
    Text(String),
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Datum {
    #[prost(message, repeated, tag = "1")]
    pub model_input: Vec<Chunk>,
    #[prost(btree_map = "string, message", tag = "2")]
    pub loss_fn_inputs: BTreeMap<String, Tensor>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Chunk {
    #[prost(oneof = "ChunkKind", tags = "1, 2, 3")]
    pub kind: Option<ChunkKind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum ChunkKind {
    #[prost(message, tag = "1")]
    EncodedText(EncodedTextChunk),
    #[prost(message, tag = "2")]
    Image(ImageChunk),
    #[prost(message, tag = "3")]
    Dmel(DmelChunk),
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct EncodedTextChunk {
    /// int32 `[tokens]`
    #[prost(bytes = "bytes", tag = "1")]
    pub tokens: Bytes,
}

/// An image, which is refused unread.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ImageChunk {}

/// Audio, which is refused unread.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DmelChunk {}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Tensor {
    #[prost(oneof = "Encoding", tags = "1, 2")]
    pub encoding: Option<Encoding>,
    #[prost(enumeration = "DType", tag = "3")]
    pub dtype: i32,
    #[prost(int64, repeated, tag = "4")]
    pub shape: Vec<i64>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Encoding {
    #[prost(bytes = "bytes", tag = "1")]
    Dense(Bytes),
    #[prost(message, tag = "2")]
    SparseCsr(SparseCsr),
}

/// Values that are not listed are 0.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SparseCsr {
    /// `[listed]`, of the tensor's dtype
    #[prost(bytes = "bytes", tag = "1")]
    pub values: Bytes,
    /// int64 `[rows + 1]`
    #[prost(bytes = "bytes", tag = "2")]
    pub crow_indices: Bytes,
    /// int64 `[listed]`
    #[prost(bytes = "bytes", tag = "3")]
    pub col_indices: Bytes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum DType {
    Unspecified = 0,
    Float32 = 1,
    Int64 = 2,
    Int32 = 3,
    Bfloat16 = 4,
}

/// The result of `forward_backward`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ForwardBackwardOutput {
    #[prost(string, tag = "1")]
    pub loss_fn_output_type: String,
    /// Data in order, cut where the trailing shape changes.
    #[prost(message, repeated, tag = "2")]
    pub loss_fn_outputs: Vec<ArrayRecord>,
    #[prost(btree_map = "string, double", tag = "3")]
    pub metrics: BTreeMap<String, f64>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct ArrayRecord {
    #[prost(string, tag = "1")]
    pub type_tag: String,
    #[prost(btree_map = "string, message", tag = "2")]
    pub fields: BTreeMap<String, BatchedTensor>,
    #[prost(int64, tag = "3")]
    pub num_datums: i64,
}

/// Tensors of several data, back to back.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BatchedTensor {
    #[prost(bytes = "bytes", tag = "1")]
    pub data: Bytes,
    /// int64 `[data + 1]`, in bytes
    #[prost(bytes = "bytes", tag = "2")]
    pub offsets: Bytes,
    #[prost(enumeration = "DType", tag = "3")]
    pub dtype: i32,
    /// Sizes after the first.
    #[prost(int64, repeated, tag = "4")]
    pub trailing_shape: Vec<i64>,
}

/// The result of `asample`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SampleResponse {
    #[prost(message, repeated, tag = "1")]
    pub sequences: Vec<SampledSequence>,
    /// float32 `[tokens]`; NaN where a token is not scored.
    #[prost(bytes = "bytes", optional, tag = "2")]
    pub prompt_logprobs: Option<Bytes>,
    #[prost(message, optional, tag = "3")]
    pub topk_prompt_logprobs: Option<TopkLogprobs>,
    /// float32, of the shape of the targets in the request.
    #[prost(message, optional, tag = "5")]
    pub target_prompt_logprobs: Option<Tensor>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct SampledSequence {
    #[prost(enumeration = "StopReason", tag = "1")]
    pub stop_reason: i32,
    /// int32 `[tokens]`
    #[prost(bytes = "bytes", tag = "2")]
    pub tokens: Bytes,
    /// float32 `[tokens]`
    #[prost(bytes = "bytes", optional, tag = "3")]
    pub logprobs: Option<Bytes>,
    #[prost(message, optional, tag = "4")]
    pub topk_sampled_logprobs: Option<TopkLogprobs>,
}

/// The most likely tokens at each position; what a row lacks is token 0 with [`ABSENT`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct TopkLogprobs {
    /// int32 `[length × k]`
    #[prost(bytes = "bytes", tag = "1")]
    pub token_ids: Bytes,
    /// float32 `[length × k]`
    #[prost(bytes = "bytes", tag = "2")]
    pub logprobs: Bytes,
    #[prost(uint32, tag = "3")]
    pub k: u32,
    #[prost(uint32, tag = "4")]
    pub length: u32,
}

/// The log-probability of a token that is absent.
pub const ABSENT: f32 = -99999.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum StopReason {
    Stop = 0,
    Length = 1,
}
