//! The command `generate`, whole: read a model, an adapter and prompts, continue them on all ranks.

use super::{Limits, decode::NOT_FINITE, greedy};
use crate::{
    checkpoint::{
        adapter_config,
        peft::{AdapterFolder, StoredAdapter},
        steps,
    },
    comm::World,
    config::ReduceGradients,
    console::first_of,
    data::{ChatTemplate, Prompt, Reference, Tokenizer},
    dtype::DType,
    error::{Error, Result},
    lora::Adapter,
    loss::CrossEntropy,
    model::{
        ModelSpec,
        base_plan::{Options, all_projections},
        hf_config::HfModel,
        stored_base,
        transformer::{Batch, MicroBatchLoss, Transformer},
    },
    shard::ProcessGroups,
    weights::{SafetensorsSource, WeightSource},
};
use serde_json::{Value, json};
use std::{
    io::Write,
    path::{Path, PathBuf},
};

/// A request to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// HF model directory; `None`: the base that the adapter names.
    pub model_dir: Option<PathBuf>,
    /// PEFT adapter directory, or that of a run: its newest step.
    pub adapter_dir: Option<PathBuf>,
    pub prompts: Prompts,
    pub max_new_tokens: usize,
    /// Compute dtype; `None`: that of the checkpoint, fp32 for fp16.
    pub compute: Option<DType>,
}

/// Prompts, and the destination of their continuations.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompts {
    /// One user message, rendered by the model's chat template; the answer goes to stdout.
    Chat(String),
    /// Text as it is; what follows goes to stdout.
    Text(String),
    /// Every chat of a jsonl file; one JSON line each (`prompt_index`, `completion`, and the reference's `loss_sum` and
    /// `loss_tokens`, null without a reference) to `out`, or to stdout.
    File { chats: PathBuf, out: Option<PathBuf> },
}

/// A generation, read and validated.
pub struct Generation {
    request: Request,
    spec: ModelSpec,
    source: SafetensorsSource,
    compute: DType,
    tokenizer: Tokenizer,
    prompts: Vec<Prompt>,
    limits: Limits,
    adapter: Option<StoredAdapter>,
}

impl Generation {
    /// Reads everything but the weights. Enters no collective and writes nothing.
    pub fn prepare(request: Request) -> Result<Self> {
        let adapter =
            request.adapter_dir.as_deref().map(steps::adapter_at).transpose().map_err(Error::Input)?;
        let directory = &match &request.model_dir {
            Some(directory) => directory.clone(),
            None => base_of(adapter.as_deref())?,
        };
        let hf = HfModel::open(directory)?;
        if !hf.generation_unread.is_empty() {
            let settings = first_of(&hf.generation_unread);
            tracing::warn!(
                "{}: generation_config.json: not built, not used: {settings}",
                directory.display()
            );
        }
        if hf.end_token_ids.is_empty() && !hf.eos_token_ids.is_empty() {
            tracing::warn!(
                "{}: no token ends a generation, as in transformers: generation_config.json, or without one \
                 config.json, names no eos_token_id",
                directory.display()
            );
        }
        let mut spec = hf.spec;
        let source = stored_base::open(directory, &mut spec)?;
        let tokenizer = Tokenizer::load(directory)?;
        let template = || ChatTemplate::load(directory);
        let vocab = spec.vocab_size;
        let prompts = match &request.prompts {
            Prompts::Text(text) => vec![Prompt::text(text, &tokenizer, vocab)?],
            Prompts::Chat(text) => vec![Prompt::user(text, &tokenizer, &template()?, vocab)?],
            Prompts::File { chats, out } => {
                let folder =
                    out.as_ref().and_then(|out| out.parent()).filter(|at| !at.as_os_str().is_empty());
                if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
                    return Err(Error::Input(format!("--out: {} is no folder", folder.display())));
                }
                Prompt::chats(chats, &tokenizer, &template()?, vocab)?
            }
        };
        let stored = hf.dtype.unwrap_or(DType::F32);
        let compute = request.compute.unwrap_or(if stored == DType::F16 { DType::F32 } else { stored });
        let read = |path: &PathBuf| {
            // Whatever is wrong with an adapter that the user named is the user's to mend.
            let stored = AdapterFolder::open(path).and_then(|folder| folder.adapter(&all_projections(&spec)));
            stored.map_err(|error| Error::Input(error.to_string()))
        };
        let adapter = adapter.as_ref().map(read).transpose()?;
        let limits =
            Limits { max_new_tokens: request.max_new_tokens, eos_token_ids: hf.end_token_ids.clone() };
        Ok(Self { request, spec, source, compute, tokenizer, prompts, limits, adapter })
    }

    /// Continues the prompts on all ranks, the base sharded over them; rank 0 writes.
    pub fn execute(self, world: &World) -> Result<()> {
        let (rank, ranks) = (world.rank(), world.size());
        let groups = ProcessGroups::one_block(world);
        let options =
            Options { compute: self.compute, reduce: ReduceGradients::MicroBatch, ..Options::default() };
        let mut model = Transformer::new(self.spec.clone(), options, &groups)?;
        model.load(&self.source as &dyn WeightSource)?;
        let mut adapter = None;
        if let Some(StoredAdapter { sites, shapes, values }) = &self.adapter {
            let mut own = model.new_adapter(sites, shapes.clone());
            own.set(|parameter, range| values[&parameter.name][range].to_vec())?;
            adapter = Some(own);
        }
        let adapters = &mut adapter.iter_mut().collect::<Vec<_>>()[..];

        // Prompt i is rank (i mod ranks)'s.
        let own: Vec<usize> = (rank..self.prompts.len()).step_by(ranks).collect();
        let ids: Vec<&[i64]> = own.iter().map(|&i| &self.prompts[i].ids[..]).collect();
        let continuations = greedy(&mut model, adapters, groups.shard.as_ref(), &ids, &self.limits)?;
        let scored = self.prompts.iter().any(|prompt| prompt.reference.is_some());
        let mut lines = Vec::new();
        let mut own = own.into_iter().zip(continuations);
        // Every rank computes as often as every other, perhaps nothing, so that the gathers match.
        for _ in 0..self.prompts.len().div_ceil(ranks) {
            let own = own.next();
            let reference = own.as_ref().and_then(|(index, _)| self.prompts[*index].reference.as_ref());
            let loss = if scored { Some(reference_loss(&mut model, adapters, reference)?) } else { None };
            let loss = loss.filter(|_| reference.is_some());
            if loss.as_ref().is_some_and(|loss| !loss.sum.is_finite()) {
                return Err(Error::Failure(NOT_FINITE.into()));
            }
            if let Some((index, continuation)) = own {
                let completion = self.tokenizer.decode(&continuation, true)?;
                lines.push(json!({"prompt_index": index, "completion": completion,
                    "loss_sum": loss.as_ref().map(|loss| loss.sum), "loss_tokens": loss.as_ref().map(|loss| loss.tokens)}));
            }
        }
        let mut all = Vec::new();
        for part in groups.shard.all_gather_host(Value::from(lines).to_string().as_bytes())? {
            let part: Vec<Value> = serde_json::from_slice(&part)
                .map_err(|error| Error::Failure(format!("what a rank generated did not arrive: {error}")))?;
            all.extend(part);
        }
        all.sort_by_key(|line| line["prompt_index"].as_u64());
        if rank == 0 { self.write(&all) } else { Ok(()) }
    }

    fn write(&self, lines: &[Value]) -> Result<()> {
        let text = match &self.request.prompts {
            Prompts::File { .. } => lines.iter().map(|line| format!("{line}\n")).collect::<String>(),
            _ => {
                lines.iter().filter_map(|line| Some(format!("{}\n", line["completion"].as_str()?))).collect()
            }
        };
        if let Prompts::File { out: Some(path), .. } = &self.request.prompts {
            return std::fs::write(path, text)
                .map_err(|error| Error::Failure(format!("{}: {error}", path.display())));
        }
        // A reader that has seen enough is no error.
        let _ = std::io::stdout().write_all(text.as_bytes());
        Ok(())
    }
}

/// The model directory that the adapter at `adapter` was trained on, by its own word.
fn base_of(adapter: Option<&Path>) -> Result<PathBuf> {
    let adapter =
        adapter.ok_or_else(|| Error::Input("--model is missing, and no --adapter names one".into()))?;
    let config = adapter.join(adapter_config::CONFIG_FILE);
    let read = adapter_config::read_config(adapter).map_err(|error| Error::Input(error.to_string()))?;
    let place = format!("{}: base_model_name_or_path", config.display());
    let base = read.base_model_name_or_path.map(PathBuf::from);
    let base = base.ok_or_else(|| Error::Input(format!("{place} names no model; give --model DIR")))?;
    if base.is_dir() {
        return Ok(base);
    }
    Err(Error::Input(format!("{place} is {}, which is no folder here; give --model DIR", base.display())))
}

/// The loss of a reference answer; of nothing when there is none. Collective.
fn reference_loss(
    model: &mut Transformer,
    adapters: &mut [&mut Adapter],
    reference: Option<&Reference>,
) -> Result<MicroBatchLoss> {
    let (ids, labels) = reference.map_or((&[][..], &[][..]), |reference| (&reference.ids, &reference.labels));
    let device = model.device().tensors();
    let batch = Batch::new(ids, labels, &[ids.len()], device);
    Ok(model.evaluate(&batch, adapters, &CrossEntropy { scale: 1.0 })?)
}
