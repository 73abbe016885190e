//! Bodies of `forward_backward` and `forward` to passes of the engine: protobuf, and the JSON of clients up to 0.24.

use super::{
    calls::Address,
    proto::{self, ChunkKind, LossConfig},
    tensor::{Dense, JsonTensor, SentTensor, TensorError, read_values},
};
use crate::{
    loss::{NamedLoss, Param},
    server::{
        request::{Datum, ModelId, ModelIdError, Pass},
        wire::bounded::{Fields, List},
    },
};
use prost::{Message, bytes::Bytes};
use serde::Deserialize;
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// The input of every loss that names what each token should predict.
const TARGETS: &str = "target_tokens";

/// Bounds of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Data a request.
    pub data: usize,
    /// Tokens a datum.
    pub tokens: usize,
    /// Token ids, targets and inputs of a request, once dense, in bytes.
    pub bytes: usize,
    /// Ids of the vocabulary.
    pub vocabulary: usize,
}

/// A request for a pass.
#[derive(Clone, Debug, PartialEq)]
pub struct PassCall {
    pub model: ModelId,
    /// `None`: the client gave none, so the request repeats no other.
    pub seq_id: Option<u64>,
    pub pass: Pass,
    /// For each datum, `k` of targets of shape `[tokens, k]`, or `None` of shape `[tokens]`: the shapes of the reply.
    pub columns: Vec<Option<usize>>,
}

/// A request that was refused, with its address as far as it could be read.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct RefusedPass {
    pub address: Address,
    pub reason: DataError,
}

/// Why a request for a pass was refused. Permanent: to be answered by 400 with this text.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("body: {0}")]
    Protobuf(#[from] prost::DecodeError),
    #[error("body: {0}")]
    Json(#[from] serde_json::Error),
    #[error("expected either forward_backward_input or forward_input")]
    Input,
    #[error(transparent)]
    Model(#[from] ModelIdError),
    #[error("seq_id {0}: expected a positive number")]
    SeqId(i64),
    #[error("loss_fn_config_v2.{0}: expected a number or a text")]
    Config(String),
    #[error("data: no datum")]
    NoData,
    #[error("{got} data: at most {most} a request; send them in several")]
    TooManyData { got: usize, most: usize },
    #[error("data: more than {most} data, chunks and inputs; send them in several requests")]
    TooManyParts { most: usize },
    #[error("data[{index}]: {reason}")]
    Datum { index: usize, reason: DatumError },
}

/// Why a datum was refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum DatumError {
    #[error("model_input.chunks[{chunk}] is {kind}: this server trains on text; send encoded_text")]
    Chunk { chunk: usize, kind: String },
    #[error("model_input.chunks[{chunk}].tokens: {reason}")]
    Tokens { chunk: usize, reason: TensorError },
    #[error("model_input: no token")]
    NoTokens,
    #[error("model_input: {got} tokens, at most {most} a datum")]
    TooManyTokens { got: usize, most: usize },
    #[error("{name}: token {index} is {id}: the vocabulary has {vocabulary} ids, 0 and up")]
    Id { name: &'static str, index: usize, id: i64, vocabulary: usize },
    #[error("loss_fn_inputs: {TARGETS} is missing; it names the token that each position predicts")]
    NoTargets,
    #[error("loss_fn_inputs.{name}: {reason}")]
    Input { name: String, reason: TensorError },
    #[error("loss_fn_inputs.{name}: {got} values a token: expected 1, or 1 for each of its {k} targets")]
    Columns { name: String, got: usize, k: usize },
    #[error("with this datum the request exceeds {most} bytes: send fewer data at once")]
    TooManyBytes { most: usize },
}

impl PassCall {
    /// Reads a `ForwardBackwardRequest`.
    ///
    /// # Errors
    /// The body is no such message, or the pass is out of bounds or makes no sense.
    pub fn from_protobuf(body: Bytes, limits: &Limits) -> Result<Self, RefusedPass> {
        let unread = |reason| RefusedPass { address: Address::default(), reason };
        count_parts(&body).map_err(unread)?;
        let request = proto::ForwardBackwardRequest::decode(body).map_err(|reason| unread(reason.into()))?;
        // 0 is the value of a field that was not sent.
        let seq_id = Some(request.seq_id.into()).filter(|&seq_id| seq_id != 0);
        let data = request.data.into_iter().map(SentDatum::from);
        let params = params(request.loss_fn_config, request.loss_fn_config_v2);
        let loss = params.map(|params| NamedLoss { name: request.loss_fn, params });
        Self::new(&request.model_id, seq_id, data, loss, !request.forward_only, limits)
    }

    /// Reads the JSON of clients up to 0.24.
    ///
    /// # Errors
    /// The body is no such JSON, or the pass is out of bounds or makes no sense.
    pub fn from_json(body: &[u8], limits: &Limits) -> Result<Self, RefusedPass> {
        let refused = |reason| RefusedPass { address: Address::of(body), reason };
        let request: JsonRequest = serde_json::from_slice(body).map_err(|reason| refused(reason.into()))?;
        let (input, backward) = match (request.forward_backward_input, request.forward_input) {
            (Some(input), None) => (input, true),
            (None, Some(input)) => (input, false),
            _ => return Err(refused(DataError::Input)),
        };
        let loss = NamedLoss { name: input.loss_fn, params: input.loss_fn_config.unwrap_or_default().0 };
        let data = input.data.0.into_iter().map(SentDatum::from);
        Self::new(&request.model_id, request.seq_id, data, Ok(loss), backward, limits)
    }

    fn new(
        model: &str,
        seq_id: Option<i64>,
        data: impl ExactSizeIterator<Item = SentDatum>,
        loss: Result<NamedLoss, DataError>,
        backward: bool,
        limits: &Limits,
    ) -> Result<Self, RefusedPass> {
        let named = ModelId::new(model);
        let address = Address {
            model: named.as_ref().ok().cloned(),
            seq_id: seq_id.and_then(|seq_id| u64::try_from(seq_id).ok()),
        };
        let known_seq_id = address.seq_id;
        let read = || -> Result<_, DataError> {
            let model = named?;
            if let Some(seq_id) = seq_id.filter(|&seq_id| seq_id < 1) {
                return Err(DataError::SeqId(seq_id));
            }
            let loss = loss?;
            let (data, columns) = read_data(data, limits)?;
            Ok(Self { model, seq_id: known_seq_id, pass: Pass { data, loss, backward }, columns })
        };
        read().map_err(|reason| RefusedPass { address, reason })
    }
}

/// Data, chunks, inputs and parameters of a request, at most.
const MOST_PARTS: usize = 1 << 17;

/// The tag of the data in a request.
const DATA: u32 = 3;

/// Counts data and their parts before they are read. A part takes some hundred bytes of memory for a few in the body,
/// so a body within its limit could fill memory.
fn count_parts(body: &[u8]) -> Result<(), DataError> {
    let mut parts = 0;
    for (tag, field) in proto::fields(body) {
        parts += 1;
        if tag == DATA {
            parts += proto::fields(field).count();
        }
        if parts > MOST_PARTS {
            return Err(DataError::TooManyParts { most: MOST_PARTS });
        }
    }
    Ok(())
}

/// Parameters of the loss; the older map holds numbers only.
fn params(
    numbers: BTreeMap<String, f64>,
    values: BTreeMap<String, proto::LossConfigValue>,
) -> Result<BTreeMap<String, Param>, DataError> {
    if values.is_empty() {
        return Ok(numbers.into_iter().map(|(name, number)| (name, Param::Number(number))).collect());
    }
    let param = |(name, value): (String, proto::LossConfigValue)| match value.value {
        Some(LossConfig::Number(number)) => Ok((name, Param::Number(number))),
        Some(LossConfig::Text(text)) => Ok((name, Param::Text(text))),
        None => Err(DataError::Config(name)),
    };
    values.into_iter().map(param).collect()
}

/// Data and the columns of their targets.
fn read_data(
    sent: impl ExactSizeIterator<Item = SentDatum>,
    limits: &Limits,
) -> Result<(Vec<Datum>, Vec<Option<usize>>), DataError> {
    match sent.len() {
        0 => return Err(DataError::NoData),
        got if got > limits.data => return Err(DataError::TooManyData { got, most: limits.data }),
        _ => {}
    }
    let mut left = limits.bytes;
    let read = |(index, datum): (usize, SentDatum)| {
        datum.read(limits, &mut left).map_err(|reason| DataError::Datum { index, reason })
    };
    sent.enumerate().map(read).collect()
}

/// A chunk of text, or the name of another kind.
enum SentChunk {
    Tokens(Result<Vec<i64>, TensorError>),
    Other(String),
}

/// A tensor whose values are read when its name says as what.
enum SentInput {
    Protobuf(proto::Tensor),
    Json(JsonTensor),
}

struct SentDatum {
    chunks: Vec<SentChunk>,
    inputs: BTreeMap<String, SentInput>,
}

impl SentInput {
    fn into_integers(self) -> Result<SentTensor<i64>, TensorError> {
        match self {
            Self::Protobuf(tensor) => tensor.into_integers(),
            Self::Json(tensor) => tensor.into_integers(),
        }
    }

    fn into_floats(self) -> Result<SentTensor<f32>, TensorError> {
        match self {
            Self::Protobuf(tensor) => tensor.into_floats(),
            Self::Json(tensor) => tensor.into_floats(),
        }
    }
}

impl SentDatum {
    /// `left`: bytes that the request may still take.
    fn read(mut self, limits: &Limits, left: &mut usize) -> Result<(Datum, Option<usize>), DatumError> {
        let ids = read_ids(std::mem::take(&mut self.chunks), limits)?;
        let tokens = ids.len();
        let mut take = |values: usize, bytes: usize| -> Result<(), DatumError> {
            let taken = values.checked_mul(bytes).and_then(|bytes| left.checked_sub(bytes));
            *left = taken.ok_or(DatumError::TooManyBytes { most: limits.bytes })?;
            Ok(())
        };
        take(tokens, size_of::<i64>())?;

        let most = limits.bytes / size_of::<i64>();
        let of_input = |name: &str| {
            let name = name.to_owned();
            move |reason| DatumError::Input { name, reason }
        };
        let targets = self.inputs.remove(TARGETS).ok_or(DatumError::NoTargets)?.into_integers();
        let targets = targets.and_then(|sent| sent.into_dense(tokens, most)).map_err(of_input(TARGETS))?;
        check_ids(TARGETS, &targets.values, i64::MIN, limits.vocabulary)?;
        take(targets.values.len(), size_of::<i64>())?;

        let k = targets.columns.unwrap_or(1);
        let mut inputs = BTreeMap::new();
        for (name, sent) in self.inputs {
            let dense = sent.into_floats().and_then(|sent| sent.into_dense(tokens, most));
            let Dense { values, columns } = dense.map_err(of_input(&name))?;
            match columns {
                Some(got) if got != 1 && got != k => return Err(DatumError::Columns { name, got, k }),
                _ => {}
            }
            take(values.len(), size_of::<f32>())?;
            inputs.insert(name, values);
        }
        Ok((Datum { ids, targets: targets.values, k, inputs }, targets.columns))
    }
}

/// The tokens of all chunks, one after another.
fn read_ids(chunks: Vec<SentChunk>, limits: &Limits) -> Result<Vec<i64>, DatumError> {
    let mut ids = Vec::new();
    for (chunk, sent) in chunks.into_iter().enumerate() {
        match sent {
            SentChunk::Tokens(Ok(tokens)) => ids.extend(tokens),
            SentChunk::Tokens(Err(reason)) => return Err(DatumError::Tokens { chunk, reason }),
            SentChunk::Other(kind) => return Err(DatumError::Chunk { chunk, kind }),
        }
    }
    match ids.len() {
        0 => Err(DatumError::NoTokens),
        got if got > limits.tokens => Err(DatumError::TooManyTokens { got, most: limits.tokens }),
        _ => check_ids("model_input", &ids, 0, limits.vocabulary).map(|()| ids),
    }
}

fn check_ids(name: &'static str, ids: &[i64], least: i64, vocabulary: usize) -> Result<(), DatumError> {
    match ids.iter().position(|&id| id < least || id >= vocabulary as i64) {
        Some(index) => Err(DatumError::Id { name, index, id: ids[index], vocabulary }),
        None => Ok(()),
    }
}

impl From<proto::Datum> for SentDatum {
    fn from(datum: proto::Datum) -> Self {
        let chunk = |chunk: proto::Chunk| match chunk.kind {
            Some(ChunkKind::EncodedText(text)) => {
                SentChunk::Tokens(read_values(&text.tokens, "int32", |bytes| {
                    i32::from_le_bytes(bytes).into()
                }))
            }
            Some(ChunkKind::Image(_)) => SentChunk::Other("image".into()),
            Some(ChunkKind::Dmel(_)) => SentChunk::Other("dmel".into()),
            None => SentChunk::Other("of a kind that is not known".into()),
        };
        let input = |(name, tensor)| (name, SentInput::Protobuf(tensor));
        Self {
            chunks: datum.model_input.into_iter().map(chunk).collect(),
            inputs: datum.loss_fn_inputs.into_iter().map(input).collect(),
        }
    }
}

/// A pass as JSON: with backward by `forward_backward_input`, without by `forward_input`.
#[derive(Deserialize, ToSchema)]
#[schema(as = tinker::Pass)]
pub(super) struct JsonRequest {
    #[schema(example = "default", pattern = "^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
    model_id: String,
    #[serde(default)]
    seq_id: Option<i64>,
    #[serde(default)]
    forward_backward_input: Option<JsonInput>,
    #[serde(default)]
    forward_input: Option<JsonInput>,
}

#[derive(Deserialize, ToSchema)]
#[schema(as = tinker::PassInput)]
struct JsonInput {
    #[schema(value_type = Vec<JsonDatum>, min_items = 1)]
    data: List<JsonDatum>,
    loss_fn: String,
    #[serde(default)]
    #[schema(value_type = Option<BTreeMap<String, serde_json::Value>>)]
    loss_fn_config: Option<Fields<Param>>,
}

#[derive(Deserialize, ToSchema)]
#[schema(as = tinker::Datum)]
struct JsonDatum {
    model_input: JsonModelInput,
    /// `target_tokens` and other inputs of the loss: a value or k for each token.
    #[schema(value_type = BTreeMap<String, JsonTensor>)]
    loss_fn_inputs: Fields<JsonTensor>,
}

#[derive(Deserialize, ToSchema)]
#[schema(as = tinker::ModelInput, example = json!({"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]}))]
pub(super) struct JsonModelInput {
    #[schema(value_type = Vec<JsonChunk>)]
    chunks: List<JsonChunk>,
}

#[derive(Deserialize, ToSchema)]
#[schema(as = tinker::Chunk)]
struct JsonChunk {
    /// `encoded_text`
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    tokens: Option<Vec<i64>>,
}

impl JsonChunk {
    /// Its tokens; of another kind than text, its name.
    fn tokens(self) -> Result<Vec<i64>, String> {
        match (self.kind.as_deref(), self.tokens) {
            (None | Some("encoded_text"), Some(tokens)) => Ok(tokens),
            (kind, _) => Err(kind.unwrap_or("of a kind that is not known").to_owned()),
        }
    }
}

impl JsonModelInput {
    /// The tokens of all chunks, one after another; or the place of the first that is no text, and its kind.
    pub(super) fn into_tokens(self) -> Result<Vec<i64>, (usize, String)> {
        let mut all = Vec::new();
        for (chunk, sent) in self.chunks.0.into_iter().enumerate() {
            all.extend(sent.tokens().map_err(|kind| (chunk, kind))?);
        }
        Ok(all)
    }
}

impl From<JsonDatum> for SentDatum {
    fn from(datum: JsonDatum) -> Self {
        let chunk = |chunk: JsonChunk| match chunk.tokens() {
            Ok(tokens) => SentChunk::Tokens(Ok(tokens)),
            Err(kind) => SentChunk::Other(kind),
        };
        let input = |(name, tensor)| (name, SentInput::Json(tensor));
        Self {
            chunks: datum.model_input.chunks.0.into_iter().map(chunk).collect(),
            inputs: datum.loss_fn_inputs.0.into_iter().map(input).collect(),
        }
    }
}
