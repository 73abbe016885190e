//! Replies of passes to bodies that clients read.

use super::proto::{ArrayRecord, BatchedTensor, DType, ForwardBackwardOutput};
use crate::server::request::PassReply;
use prost::Message;
use serde::Serialize;
use std::{collections::BTreeMap, io};
use utoipa::ToSchema;

/// The class that clients expect the outputs of a loss to have.
const OUTPUT_TYPE: &str = "ArrayRecord";

/// The one output of a loss: log p of each target.
const LOG_PROBS: &str = "logprobs";

/// Endings of a metric's name, by which clients combine the chunks of a pass.
const COMBINATIONS: [&str; 7] = ["sum", "mean", "min", "max", "slack", "hash2", "unique"];

/// The sum of the loss and all statistics whose name has one ':' and a known ending: clients crash on others.
fn metrics(reply: &PassReply) -> BTreeMap<String, f64> {
    let is_known = |name: &str| match name.split_once(':') {
        Some((_, ending)) => COMBINATIONS.contains(&ending),
        None => false,
    };
    let known = reply.metrics.iter().filter(|(name, _)| is_known(name));
    let mut metrics: BTreeMap<_, _> = known.map(|(name, &value)| (name.clone(), value)).collect();
    metrics.insert("loss:sum".to_owned(), reply.loss);
    metrics
}

/// A `ForwardBackwardOutput`. `columns`: as in [`PassCall`](super::data::PassCall).
pub fn to_protobuf(reply: &PassReply, columns: &[Option<usize>]) -> Vec<u8> {
    let mut records = Vec::new();
    let mut first = 0;
    for run in columns.chunk_by(|a, b| a == b) {
        let data = &reply.log_probs[first..first + run.len()];
        first += run.len();
        records.push(record(data, run[0]));
    }
    let output = ForwardBackwardOutput {
        loss_fn_output_type: OUTPUT_TYPE.to_owned(),
        loss_fn_outputs: records,
        metrics: metrics(reply),
    };
    output.encode_to_vec()
}

/// Log-probabilities of data whose targets have the same columns.
fn record(data: &[Vec<f32>], columns: Option<usize>) -> ArrayRecord {
    let values: Vec<u8> = data.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
    let mut end = 0_i64;
    let ends = data.iter().map(|datum| {
        end += size_of_val(&datum[..]) as i64;
        end
    });
    let offsets: Vec<u8> = std::iter::once(0).chain(ends).flat_map(i64::to_le_bytes).collect();
    let tensor = BatchedTensor {
        data: values.into(),
        offsets: offsets.into(),
        dtype: DType::Float32.into(),
        trailing_shape: columns.map(|k| k as i64).into_iter().collect(),
    };
    ArrayRecord {
        type_tag: OUTPUT_TYPE.to_owned(),
        fields: BTreeMap::from([(LOG_PROBS.to_owned(), tensor)]),
        num_datums: data.len() as i64,
    }
}

/// The result of a pass.
#[derive(Serialize, ToSchema)]
#[schema(as = tinker::PassResult)]
pub(super) struct JsonOutput<'a> {
    loss_fn_output_type: &'static str,
    #[schema(value_type = Vec<BTreeMap<String, JsonTensor<'a>>>)]
    loss_fn_outputs: Vec<BTreeMap<&'static str, JsonTensor<'a>>>,
    metrics: BTreeMap<String, f64>,
}

#[derive(Serialize, ToSchema)]
#[schema(as = tinker::OutputTensor)]
struct JsonTensor<'a> {
    #[schema(value_type = Vec<f32>)]
    data: &'a [f32],
    dtype: &'static str,
    shape: Vec<usize>,
}

/// Writes a number that is not finite as `NaN`, which Python reads, in place of null, which makes its clients fail.
struct PythonNumbers;

impl serde_json::ser::Formatter for PythonNumbers {
    fn write_null<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b"NaN")
    }
}

/// The same for clients up to 0.24 that ask for JSON.
///
/// # Errors
/// None is known: the text goes to memory.
pub fn to_json(reply: &PassReply, columns: &[Option<usize>]) -> serde_json::Result<Vec<u8>> {
    let output = |(data, columns): (_, &Option<usize>)| {
        let data: &Vec<f32> = data;
        let shape = std::iter::once(data.len() / columns.unwrap_or(1)).chain(*columns).collect();
        BTreeMap::from([(LOG_PROBS, JsonTensor { data, dtype: "float32", shape })])
    };
    let outputs = reply.log_probs.iter().zip(columns).map(output).collect();
    let json =
        JsonOutput { loss_fn_output_type: OUTPUT_TYPE, loss_fn_outputs: outputs, metrics: metrics(reply) };
    let mut text = Vec::new();
    json.serialize(&mut serde_json::Serializer::with_formatter(&mut text, PythonNumbers))?;
    Ok(text)
}
