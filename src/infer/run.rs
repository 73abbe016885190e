//! The command `generate`, whole: read a model, an adapter and prompts, continue them on all ranks.

use super::{
    local::Local,
    request::{Choice, Continuation, End, SampleRequest, Stop, Wanted},
    sampler::SampleError,
    stops::{Text, WithoutSpecialTokens},
};
use crate::{
    checkpoint::{
        base,
        peft::{AdapterFolder, StoredAdapter},
        state::TrainedBase,
        steps,
    },
    comm::World,
    config::ReduceGradients,
    console::{self, count, first_of},
    data::{Chat, ChatTemplate, Prompt, Reference, Tokenizer},
    dtype::DType,
    error::{Error, Result},
    hub,
    lora::Adapter,
    loss::CrossEntropy,
    model::{
        ModelSpec,
        base_plan::{Options, all_projections},
        hf_config::HfModel,
        quantized::Quantization,
        stored_base,
        transformer::{Batch, MicroBatchLoss, Transformer},
    },
    shard::ProcessGroups,
    weights::{SafetensorsSource, WeightSource},
};
use serde_json::{Value, json};
use std::{
    io::{BufRead, IsTerminal},
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};
use tch::Device;

/// A request to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// HF model directory, or a model of the hub; `None`: the base that the adapter names.
    pub model_dir: Option<PathBuf>,
    /// PEFT adapter directory, or that of a run: its newest step, with `/best` behind it its best.
    pub adapter_dir: Option<PathBuf>,
    pub prompts: Prompts,
    /// Message of the system before a chat.
    pub system: Option<String>,
    pub max_new_tokens: usize,
    pub choice: Choice,
    /// Key of the random numbers of the first prompt; the next has the next.
    pub seed: u64,
    /// Texts that end a continuation and are not shown.
    pub stop: Vec<String>,
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
    /// Each line of stdin is a user message of one chat; the answers go to stdout.
    Interactive,
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
    tokenizer: Arc<Tokenizer>,
    /// For an interactive chat.
    template: Option<ChatTemplate>,
    prompts: Vec<Prompt>,
    end_token_ids: Vec<i64>,
    adapter: Option<StoredAdapter>,
}

impl Generation {
    /// Reads everything but the weights. Enters no collective and writes nothing.
    pub fn prepare(request: Request) -> Result<Self> {
        let adapter =
            request.adapter_dir.as_deref().map(steps::adapter_at).transpose().map_err(Error::Input)?;
        let directory = &match &request.model_dir {
            Some(directory) => hub::locate(directory, true)
                .map_err(|error| Error::Input(format!("--model: {}: {error}", directory.display())))?,
            None => base_of(adapter.as_deref())?,
        };
        let hf = HfModel::open(directory)?;
        warn_of_settings(&hf, directory, &request.choice);
        if hf.end_token_ids.is_empty() && !hf.eos_token_ids.is_empty() {
            tracing::warn!(
                "{}: no token ends a generation, as in transformers: generation_config.json, or without one \
                 config.json, names no eos_token_id",
                directory.display()
            );
        }
        let mut spec = hf.spec;
        let source = stored_base::open(directory, &mut spec)?;
        if let Some(adapter) = &adapter
            && let Some(trained) = TrainedBase::of(adapter)?
        {
            spec.quantization = quantization_of(&trained, adapter, directory, &source)?;
        }
        let tokenizer = Arc::new(Tokenizer::load(directory)?);
        let template = || ChatTemplate::load(directory);
        let vocab = spec.vocab_size;
        let prompts = match &request.prompts {
            Prompts::Text(text) => vec![Prompt::text(text, &tokenizer, vocab)?],
            Prompts::Chat(text) => {
                let mut chat = system_chat(request.system.as_deref());
                chat.add("user", text);
                vec![Prompt::chat(chat, &tokenizer, &template()?, vocab)?]
            }
            Prompts::Interactive => Vec::new(),
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
        let template = match &request.prompts {
            Prompts::Interactive => Some(template()?),
            _ => None,
        };
        let end_token_ids = hf.end_token_ids;
        Ok(Self { request, spec, source, compute, tokenizer, template, prompts, end_token_ids, adapter })
    }

    /// Continues the prompts on all ranks, the base sharded over them; rank 0 writes.
    pub fn execute(self, world: &World) -> Result<()> {
        let (rank, ranks) = (world.rank(), world.size());
        let groups = ProcessGroups::one_block(world);
        let packed = self.spec.quantization.as_ref();
        if let Some(reason) = packed.and_then(|_| Quantization::refusal(groups.device.tensors())) {
            return Err(Error::Input(format!("--adapter: its base is quantised: {reason}")));
        }
        let options = Options {
            compute: self.compute,
            reduce: ReduceGradients::MicroBatch,
            // GPUs have no kernels for it.
            deterministic_sampling: groups.device.tensors() == Device::Cpu,
            ..Options::default()
        };
        let mut model = Transformer::new(self.spec.clone(), options, &groups)?;
        model.load(&self.source as &dyn WeightSource)?;
        let mut adapter = None;
        if let Some(StoredAdapter { sites, shapes, values }) = &self.adapter {
            let mut own = model.new_adapter(sites, shapes.clone());
            own.set(|parameter, range| values[&parameter.name][range].to_vec())?;
            adapter = Some(own);
        }
        if let Some(template) = &self.template {
            let mut local = self.local(&mut model, adapter.as_mut(), &groups);
            return self.converse(&mut local, template);
        }
        let requests: Vec<SampleRequest> =
            (0..).zip(&self.prompts).map(|(i, prompt)| self.request_of(prompt, i)).collect();
        let started = Instant::now();
        let mut local = self.local(&mut model, adapter.as_mut(), &groups);
        let replies = match &self.request.prompts {
            Prompts::File { .. } => local.sample(&requests, |_, _| ())?,
            _ => {
                for request in requests {
                    self.stream(&mut local, request, rank == 0)?;
                }
                return Ok(());
            }
        };
        let seconds = started.elapsed().as_secs_f64();
        let continuations: Vec<Continuation> =
            replies.into_iter().flat_map(|reply| reply.continuations).collect();

        // The reference of prompt i is computed by rank (i mod ranks).
        let adapters = &mut adapter.iter_mut().collect::<Vec<_>>()[..];
        let mut own = (rank..self.prompts.len()).step_by(ranks);
        let scored = self.prompts.iter().any(|prompt| prompt.reference.is_some());
        let mut lines = Vec::new();
        // Every rank computes as often as every other, perhaps nothing, so that the gathers match.
        for _ in 0..self.prompts.len().div_ceil(ranks) {
            let own = own.next();
            let reference = own.and_then(|index| self.prompts[index].reference.as_ref());
            let loss = if scored { Some(reference_loss(&mut model, adapters, reference)?) } else { None };
            let loss = loss.filter(|_| reference.is_some());
            if loss.as_ref().is_some_and(|loss| !loss.sum.is_finite()) {
                return Err(Error::Failure(SampleError::NotFinite.to_string()));
            }
            if let Some(index) = own {
                let completion = self.completion(&continuations[index])?;
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
        if rank > 0 {
            return Ok(());
        }
        let tokens = continuations.iter().map(|continuation| continuation.ids.len()).sum();
        tracing::info!("{}", summary(&all, tokens, seconds));
        self.write(&all)
    }

    fn local<'a>(
        &self,
        model: &'a mut Transformer,
        adapter: Option<&'a mut Adapter>,
        groups: &'a ProcessGroups,
    ) -> Local<'a> {
        // A text that ends a continuation may name a special token, which is not shown.
        let decode = self.tokenizer.clone();
        Local { model, adapter, world: groups.shard.as_ref(), decode }
    }

    /// The request to continue the prompt of number `index`.
    fn request_of(&self, prompt: &Prompt, index: u64) -> SampleRequest {
        let Request { max_new_tokens, choice, seed, ref stop, .. } = self.request;
        SampleRequest {
            prompt: prompt.ids.clone(),
            count: 1,
            max_new_tokens,
            choice,
            seed: seed.wrapping_add(index),
            stop: Stop { ids: self.end_token_ids.clone(), texts: stop.clone() },
            wanted: Wanted::default(),
        }
    }

    /// The text of a continuation, without what ended it.
    fn completion(&self, continuation: &Continuation) -> Result<String> {
        let Continuation { ids, end, .. } = continuation;
        let shown = if *end == End::Id { &ids[..ids.len().saturating_sub(1)] } else { ids };
        let mut text = self.tokenizer.decode(shown, true)?;
        if let End::Text(number) = end
            && let Some(at) = text.find(&self.request.stop[*number])
        {
            text.truncate(at);
        }
        Ok(text)
    }

    /// Continues one prompt. Where `shown`, its text goes to stdout while it comes, and a line break after it.
    fn stream(&self, local: &mut Local, request: SampleRequest, shown: bool) -> Result<String> {
        let mut text = Text::new(
            Arc::new(WithoutSpecialTokens(self.tokenizer.clone())),
            &request.prompt,
            &request.stop.texts,
        );
        let (ends, mut whole, mut told) = (request.stop.ids.clone(), String::new(), Ok(()));
        let mut tell = |part: &str| {
            whole.push_str(part);
            if shown && !part.is_empty() && told.is_ok() {
                told = console::tell(part);
            }
        };
        local.sample(&[request], |_, token| {
            if !ends.contains(&token.id) {
                tell(&text.push(token.id));
            }
        })?;
        tell(&text.finish());
        told?;
        if shown {
            console::tell("\n")?;
        }
        Ok(whole)
    }

    /// A chat with whoever writes lines to stdin, until they end.
    fn converse(&self, local: &mut Local, template: &ChatTemplate) -> Result<()> {
        let mut chat = system_chat(self.request.system.as_deref());
        let mut lines = std::io::stdin().lock().lines();
        let asks = std::io::stdin().is_terminal();
        for turn in 0.. {
            if asks {
                console::ask("> ");
            }
            let line = lines.next().transpose();
            let Some(line) = line.map_err(|error| Error::Failure(format!("stdin: {error}")))? else { break };
            if line.trim().is_empty() {
                continue;
            }
            chat.add("user", &line);
            let prompt = Prompt::chat(chat.clone(), &self.tokenizer, template, self.spec.vocab_size)?;
            let answer = self.stream(local, self.request_of(&prompt, turn), true)?;
            chat.add("assistant", &answer);
        }
        Ok(())
    }

    /// Writes the lines of a file of chats.
    fn write(&self, lines: &[Value]) -> Result<()> {
        let text = lines.iter().map(|line| format!("{line}\n")).collect::<String>();
        if let Prompts::File { out: Some(path), .. } = &self.request.prompts {
            return std::fs::write(path, text)
                .map_err(|error| Error::Failure(format!("{}: {error}", path.display())));
        }
        Ok(console::tell(&text)?)
    }
}

/// A chat with the message of the system alone, if there is one.
fn system_chat(system: Option<&str>) -> Chat {
    let mut chat = Chat::default();
    if let Some(system) = system {
        chat.add("system", system);
    }
    chat
}

/// Means of the answers to a file of chats, and the speed of `seconds` of sampling `tokens` tokens.
fn summary(lines: &[Value], tokens: usize, seconds: f64) -> String {
    let mean = tokens as f64 / lines.len() as f64;
    let prompts = count(lines.len(), "prompt");
    let mut text = format!(
        "{prompts} continued: {} in {seconds:.1} s, {:.1} tokens/s, mean {mean:.1} tokens",
        count(tokens, "token"),
        tokens as f64 / seconds,
    );
    let sum = |key: &str| lines.iter().filter_map(|line| line[key].as_f64()).sum::<f64>();
    let (loss, of) = (sum("loss_sum"), sum("loss_tokens"));
    if of > 0.0 {
        text +=
            &format!("; mean loss of the references {:.4} over {}", loss / of, count(of as usize, "token"));
    }
    text
}

/// Tells the settings of a generation_config.json that are not used.
fn warn_of_settings(hf: &HfModel, directory: &Path, choice: &Choice) {
    let file = format!("{}: generation_config.json", directory.display());
    if !hf.generation_unread.is_empty() {
        tracing::warn!("{file}: not built, not used: {}", first_of(&hf.generation_unread));
    }
    if choice.temperature == 0.0 && !hf.generation_sampling.is_empty() {
        let of_file: Vec<String> =
            hf.generation_sampling.iter().map(|(name, value)| format!("{name} {value}")).collect();
        let temperature = hf.generation_sampling.iter().find(|(name, _)| name == "temperature");
        let flags = hf.generation_sampling.iter().filter(|(name, _)| name.starts_with("top_"));
        let temperature = temperature.map_or(json!(1.0), |(_, value)| value.clone());
        let flags: String =
            flags.map(|(name, value)| format!(" --{} {value}", name.replace('_', "-"))).collect();
        tracing::warn!(
            "{file}: {} are not used: the most likely tokens are chosen; to sample, --temperature {temperature}{flags}",
            of_file.join(", ")
        );
    }
}

/// The storage in which the base in `directory` was trained on.
///
/// # Errors
/// It is another base than `adapter` was trained on, and merges have changed that one.
pub fn quantization_of(
    trained: &TrainedBase,
    adapter: &Path,
    directory: &Path,
    source: &dyn WeightSource,
) -> Result<Option<Quantization>> {
    if trained.merges == 0 && trained.quantization.is_none() {
        return Ok(None);
    }
    if trained.is(source)? {
        return Ok(trained.quantization.clone());
    }
    if trained.merges > 0 {
        return Err(Error::Input(format!(
            "{} was trained on a base that merges have changed: leave --model out, or give {}",
            adapter.display(),
            adapter.join(base::FOLDER).display()
        )));
    }
    tracing::warn!(
        "{} was trained on another base, packed: {} is used with the numbers of its files",
        adapter.display(),
        directory.display()
    );
    Ok(None)
}

/// The model directory that the adapter at `adapter` was trained on, by its own word.
fn base_of(adapter: Option<&Path>) -> Result<PathBuf> {
    let adapter =
        adapter.ok_or_else(|| Error::Input("--model is missing, and no --adapter names one".into()))?;
    steps::base_of(adapter).map_err(Error::Input)
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
