//! The loop of rank 0: takes requests, has them carried out on all ranks, answers.

mod moves;
mod sampling;

use sampling::Sampling;

use super::{
    EngineOptions, IDLE, LOADING, SAVING,
    check::{self, DataLimits},
    command::{self, Command, PlainLoss, PlainSave, Rows, Segment},
    handle::{Adapters, Asked, EngineHandle, Message},
    loss,
    models::{DatumAnswer, Models, Trained},
    plan::{Dealt, Kind, Limits, MicroBatch, Next, Plan},
    residence::Residence,
    room::Room,
    shares::{SHARE_OF_SAMPLING, Shares, Work},
};
use crate::{
    Error, Result,
    checkpoint::saves::bytes_below,
    comm::{CommandSender, Watcher},
    infer::stops::SharedDecode,
    plan::adapter::save_bytes,
    server::{
        request::{
            AdapterSpec, Contents, Load, ModelId, ModelState, OptimStep, Pass, PassReply, Refusal, Reply,
            SamplerState, Save, Task, Usage,
        },
        storage::Storage,
    },
};
use crossbeam::channel::Receiver;
use std::{borrow::Cow, collections::BTreeMap, sync::Arc, time::Instant};

/// Rank 0's part of the engine.
pub struct Driver {
    models: Models,
    options: EngineOptions,
    ranks: Ranks,
    requests: Receiver<Message>,
    handle: Arc<EngineHandle>,
    plan: Plan,
    residence: Residence,
    storage: Storage,
    usage: Usage,
    sampling: Sampling,
    shares: Shares,
    /// Files of adapters on disk so far.
    files: u64,
    /// Requests without an answer, by number.
    asked: BTreeMap<u64, Asked>,
    /// Passes that have begun.
    passes: BTreeMap<u64, Progress>,
    /// Requests so far.
    count: u64,
    stopping: bool,
}

/// The way to the other ranks.
pub struct Ranks {
    commands: CommandSender,
    watcher: Watcher,
    /// Commands so far.
    sent: usize,
    /// There are other ranks.
    others: bool,
}

impl Ranks {
    /// The way to the others of `world` ranks.
    pub fn new(commands: CommandSender, watcher: Watcher, world: usize) -> Self {
        Self { commands, watcher, sent: 0, others: world > 1 }
    }

    /// Sends `command`, which this rank carries out after it.
    fn tell(&mut self, command: &Command) -> Result<()> {
        self.sent += 1;
        self.watcher.step(self.sent);
        if self.others {
            command::send(&self.commands, command)?;
        }
        Ok(())
    }
}

/// A pass that has begun.
struct Progress {
    /// Results of each datum, once it is computed.
    data: Vec<DatumAnswer>,
    left: usize,
    valid: u64,
}

/// Reasons why a request has no reply.
enum Unmet {
    Refused(Refusal),
    /// This rank has failed, and all end.
    Failed(Error),
}

impl From<Refusal> for Unmet {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<Error> for Unmet {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl Driver {
    pub fn new(
        models: Models,
        options: EngineOptions,
        room: Room,
        ranks: Ranks,
        requests: Receiver<Message>,
        handle: Arc<EngineHandle>,
        decode: Option<SharedDecode>,
    ) -> Self {
        let limits =
            Limits { ranks: models.groups().mesh.data_parallel(), tokens: options.max_tokens_per_pass };
        let storage = Storage::new(options.output_dir.clone(), options.storage_limit);
        let usage = Usage { memory_limit: room.bytes, fits: room.fits(), ..Usage::default() };
        let sampling = Sampling::new(&models, &room, &options, decode);
        let driver = Self {
            models,
            sampling,
            shares: Shares::new(SHARE_OF_SAMPLING),
            residence: Residence::new(room.bytes.unwrap_or(u64::MAX)),
            storage,
            usage,
            files: 0,
            options,
            ranks,
            requests,
            handle,
            plan: Plan::new(limits),
            asked: BTreeMap::new(),
            passes: BTreeMap::new(),
            count: 0,
            stopping: false,
        };
        driver.show();
        driver
    }

    /// Carries out requests until it is told to stop and none is left.
    ///
    /// # Errors
    /// This rank has failed. Requests without an answer are refused when this is dropped.
    pub fn run(&mut self) -> Result<()> {
        loop {
            while let Ok(message) = self.requests.try_recv() {
                self.take(message)?;
            }
            self.begin_samples();
            let begun = Instant::now();
            let Some(work) = self.shares.next(!self.plan.is_empty(), self.sampling.has_work()) else {
                if self.stopping {
                    break;
                }
                self.sleep()?;
                continue;
            };
            match work {
                Work::Training => self.train()?,
                Work::Sampling => self.sample()?,
            }
            self.shares.spent(work, begun.elapsed());
        }
        self.ranks.tell(&Command::Stop)
    }

    /// Begins a request, or computes a micro-batch.
    fn train(&mut self) -> Result<()> {
        let residence = &self.residence;
        match self.plan.next(&|models| residence.fit_together(models)) {
            Some(Next::Begin { model, request }) => self.begin(&model, request),
            Some(Next::MicroBatch(micro_batch)) => self.compute(micro_batch),
            None => Ok(()),
        }
    }

    /// Sleeps until there is a request. A pass then waits for those of other adapters, if there are any.
    fn sleep(&mut self) -> Result<()> {
        let watcher = self.ranks.watcher.clone();
        let _idle = watcher.slow(IDLE);
        let message = self.requests.recv().unwrap_or(Message::Stop);
        let is_pass =
            matches!(&message, Message::Asked(asked) if matches!(asked.request.task, Task::Pass(_)));
        self.take(message)?;
        let until = Instant::now() + self.options.gather;
        let trained = self.models.adapters().values().filter(|held| held.trained.is_some()).count();
        while is_pass && self.plan.adapters() < trained {
            let Ok(message) = self.requests.recv_deadline(until) else { break };
            self.take(message)?;
        }
        Ok(())
    }

    fn take(&mut self, message: Message) -> Result<()> {
        match message {
            Message::Asked(asked) => self.take_task(asked),
            Message::Sample(sample) => self.take_sample(sample),
            Message::Cancel(ticket) => self.cancel(ticket)?,
            Message::EndSampling => self.end_sampling()?,
            Message::Stop => {
                self.end_sampling()?;
                self.stopping = true;
            }
        }
        Ok(())
    }

    fn take_task(&mut self, asked: Asked) {
        self.count += 1;
        let kind = match &asked.request.task {
            Task::Pass(pass) => Kind::Pass { backward: pass.backward },
            _ => Kind::Single,
        };
        self.plan.push(asked.request.model.clone(), self.count, kind);
        self.asked.insert(self.count, asked);
    }

    /// Begins request number `request`, whose turn it is. A pass is answered when its last datum is computed.
    fn begin(&mut self, model: &ModelId, request: u64) -> Result<()> {
        let Some(asked) = self.asked.remove(&request) else { return Ok(()) };
        let reply = match &asked.request.task {
            Task::Pass(pass) => match self.open(model, request, pass) {
                Ok(()) => {
                    self.asked.insert(request, asked);
                    return Ok(());
                }
                Err(refusal) => Err(refusal.into()),
            },
            Task::Create(spec) => self.create(model, spec),
            Task::OptimStep(step) => self.optim_step(model, step),
            Task::AbortGradients => self.abort(model),
            Task::Unload => self.unload(model),
            Task::Save(save) => self.save(model, save),
            Task::Load(load) => self.load(model, load),
            Task::Spill => self.leave(model),
            Task::Freeze(sampler) => self.freeze_as(model, sampler),
            Task::OpenSampler { folder } => self.open_sampler(model, folder),
        };
        self.show();
        match reply {
            Ok(reply) => asked.answer(Ok(reply)),
            Err(Unmet::Refused(refusal)) => asked.answer(Err(refusal)),
            Err(Unmet::Failed(error)) => return Err(error),
        }
        Ok(())
    }

    /// The adapter `model`, which is trained.
    fn known(&self, model: &ModelId) -> Result<&Trained, Refusal> {
        self.models.trained(model).ok_or_else(|| {
            Refusal::User(match self.models.adapters().contains_key(model) {
                true => format!("model_id {model} is a sampler, which is never trained; name its adapter"),
                false => format!("model_id {model} is unknown; make the adapter with create_model first"),
            })
        })
    }

    fn create(&mut self, model: &ModelId, spec: &AdapterSpec) -> Result<Reply, Unmet> {
        if let Ok(trained) = self.known(model) {
            if trained.spec == *spec {
                return Ok(Reply::Created);
            }
            let AdapterSpec { rank, alpha, .. } = trained.spec;
            return Err(Refusal::User(format!(
                "model_id {model} is an adapter of another shape, targets or seed (rank {rank}, alpha {alpha}); take \
                 another name, or unload it first"
            ))
            .into());
        }
        if self.models.adapters().contains_key(model) {
            let taken =
                format!("model_id {model} is a sampler; give the adapter another name, or unload it first");
            return Err(Refusal::User(taken).into());
        }
        let sites = self.models.sites(spec).map_err(|error| Refusal::User(format!("targets: {error}")))?;
        check::spec(spec, self.options.defaults.max_rank, sites.len())?;
        let need = self.models.need(spec).map_err(|error| Refusal::User(error.to_string()))?;
        self.check_fits(spec, need)?;
        self.make_room(&[], Some(need))?;
        self.ranks.tell(&Command::Create { model: model.clone(), spec: spec.clone() })?;
        self.models.create(model, spec)?;
        self.residence.add(model.clone(), need, moves::now());
        Ok(Reply::Created)
    }

    fn optim_step(&mut self, model: &ModelId, step: &OptimStep) -> Result<Reply, Unmet> {
        let factor = check::factor(step, self.known(model)?.valid)?;
        self.keep(model)?;
        self.make_room(std::slice::from_ref(model), None)?;
        self.ranks.tell(&Command::OptimStep { model: model.clone(), step: *step, factor })?;
        Ok(Reply::Stepped(self.models.optim_step(model, step, factor)?))
    }

    fn abort(&mut self, model: &ModelId) -> Result<Reply, Unmet> {
        let step = self.known(model)?.step;
        self.ranks.tell(&Command::Abort { model: model.clone() })?;
        self.models.abort(model)?;
        Ok(Reply::Aborted { step })
    }

    fn save(&mut self, model: &ModelId, save: &Save) -> Result<Reply, Unmet> {
        let accumulated = self.known(model)?.accumulated > 0;
        self.make_room(std::slice::from_ref(model), None)?;
        let held = self.models.adapters().get(model);
        let optimizer = &self.models.defaults().optimizer;
        let needed = match save.contents {
            Contents::Merged { dtype } => self.models.merged_bytes(dtype)?,
            contents => held.map_or(0, |held| {
                save_bytes(held.plan(), optimizer, contents == Contents::Training, accumulated) as u64
            }),
        };
        if !self.storage.is_own(&save.folder) {
            self.storage.check(needed, "the save").map_err(|full| Refusal::User(full.to_string()))?;
        }
        let replaced = bytes_below(&save.folder);
        self.ranks.tell(&Command::Save { model: model.clone(), save: PlainSave::from(save) })?;
        let _saving = self.ranks.watcher.clone().slow(SAVING);
        let reply = self.models.save(model, save)??;
        if let Reply::Saved { bytes, .. } = reply {
            self.storage.changed(replaced, bytes);
        }
        Ok(reply)
    }

    fn load(&mut self, model: &ModelId, load: &Load) -> Result<Reply, Unmet> {
        self.known(model)?;
        self.keep(model)?;
        self.make_room(std::slice::from_ref(model), None)?;
        self.ranks.tell(&Command::Load { model: model.clone(), load: load.clone() })?;
        let _loading = self.ranks.watcher.clone().slow(LOADING);
        Ok(self.models.load(model, load)??)
    }

    fn unload(&mut self, model: &ModelId) -> Result<Reply, Unmet> {
        self.present(model)?;
        self.keep(model)?;
        self.forget(model)?;
        Ok(Reply::Unloaded)
    }

    /// Forgets an adapter or a sampler on all ranks.
    fn forget(&mut self, model: &ModelId) -> Result<()> {
        if !self.residence.is_in_memory(model) {
            self.storage.changed(self.models.bytes_on_disk(model), 0);
        }
        self.ranks.tell(&Command::Unload { model: model.clone() })?;
        self.models.unload(model);
        self.residence.remove(model);
        Ok(())
    }

    /// Moves an adapter or a sampler to disk, unless it is there.
    fn leave(&mut self, model: &ModelId) -> Result<Reply, Unmet> {
        self.present(model)?;
        if self.residence.is_in_memory(model) {
            self.spill(model)?;
        }
        Ok(Reply::Spilled)
    }

    /// Gives the data of `pass` to the plan.
    fn open(&mut self, model: &ModelId, request: u64, pass: &Pass) -> Result<(), Refusal> {
        self.known(model)?;
        let limits =
            DataLimits { vocab_size: self.models.vocab_size(), max_tokens: self.options.max_tokens_per_pass };
        let checked = check::pass(pass, limits)?;
        self.plan.open(model, request, pass.backward, &checked.sizes);
        let data = vec![DatumAnswer::default(); pass.data.len()];
        self.passes.insert(request, Progress { data, left: pass.data.len(), valid: checked.valid });
        Ok(())
    }

    /// Computes `micro_batch` on all ranks, and answers the passes that end with it.
    fn compute(&mut self, micro_batch: MicroBatch) -> Result<()> {
        let absent = self.bring(&micro_batch.adapters)?;
        let Some(micro_batch) = self.without_absent(micro_batch, &absent)? else {
            self.show();
            return Ok(());
        };
        let ended = self.ended(&micro_batch);
        let mut rows = rows(&micro_batch, &self.asked);
        if micro_batch.backward {
            rows.ended =
                ended.iter().map(|&(adapter, request)| (adapter, self.passes[&request].valid)).collect();
        }
        self.ranks.tell(&Command::MicroBatch(Cow::Borrowed(&rows)))?;
        let answers = self.models.compute(&rows)?;
        self.handle.computed(answers.iter().map(|answer| answer.peak_rss_bytes).collect());
        for (dealt, answer) in micro_batch.ranks.iter().zip(answers) {
            for (Dealt { request, datum, .. }, computed) in dealt.iter().zip(answer.data) {
                let Some(progress) = self.passes.get_mut(request) else { continue };
                progress.data[*datum] = computed;
                progress.left -= 1;
            }
        }
        self.show();
        for (_, request) in ended {
            let (Some(asked), Some(Progress { data, valid, .. })) =
                (self.asked.remove(&request), self.passes.remove(&request))
            else {
                continue;
            };
            let loss = data.iter().map(|datum| datum.loss).sum();
            let log_probs: Vec<Vec<f32>> = data.into_iter().map(|datum| datum.log_probs).collect();
            let Task::Pass(pass) = &asked.request.task else { continue };
            let sequences: Vec<_> = pass.data.iter().map(loss::sequence).collect();
            // A pass that was computed has every input of its loss.
            let metrics = pass.loss.report(&sequences, &log_probs).unwrap_or_default();
            asked.answer(Ok(Reply::Passed(PassReply { loss, valid, log_probs, metrics })));
        }
        Ok(())
    }

    /// The passes whose last data are in `micro_batch`, with their adapters, by request.
    fn ended(&self, micro_batch: &MicroBatch) -> Vec<(usize, u64)> {
        let mut counts = BTreeMap::new();
        for dealt in micro_batch.ranks.iter().flatten() {
            counts.entry(dealt.request).or_insert((dealt.adapter, 0)).1 += 1;
        }
        let ends = |request: &u64, count| self.passes.get(request).is_some_and(|pass| pass.left == count);
        let ended = counts.into_iter().filter(|(request, (_, count))| ends(request, *count));
        ended.map(|(request, (adapter, _))| (adapter, request)).collect()
    }

    /// Shows the adapters to other threads.
    fn show(&self) {
        let mut adapters = Adapters { usage: self.usage(), ..Adapters::default() };
        for (model, held) in self.models.adapters() {
            let (name, in_memory) = (model.to_string(), self.residence.is_in_memory(model));
            let (bytes, last_used) = (self.residence.need(model).held, self.residence.last_used(model));
            if let Some(Trained { spec, step, accumulated, .. }) = &held.trained {
                let (spec, step, accumulated) = (spec.clone(), *step, *accumulated);
                adapters
                    .models
                    .insert(name, ModelState { spec, step, accumulated, in_memory, bytes, last_used });
            } else if !model.is_hidden() {
                let rank = held.rank();
                adapters.samplers.insert(name, SamplerState { rank, in_memory, bytes, last_used });
            }
        }
        self.handle.show(adapters);
    }
}

/// The data of `micro_batch`: a segment for neighbouring data of a request.
fn rows<'a>(micro_batch: &MicroBatch, asked: &'a BTreeMap<u64, Asked>) -> Rows<'a> {
    let MicroBatch { backward, k, adapters, ranks } = micro_batch;
    let (mut losses, mut loss_of) = (Vec::new(), BTreeMap::new());
    let mut segments = |dealt: &[Dealt]| {
        let mut segments: Vec<Segment> = Vec::new();
        for same in dealt.chunk_by(|a, b| a.request == b.request) {
            let Dealt { adapter, request, .. } = same[0];
            let Some(Task::Pass(pass)) = asked.get(&request).map(|asked| &asked.request.task) else {
                continue;
            };
            let loss = *loss_of.entry(request).or_insert_with(|| {
                losses.push(PlainLoss::from(&pass.loss));
                losses.len() - 1
            });
            let data = same.iter().map(|dealt| Cow::Borrowed(&pass.data[dealt.datum])).collect();
            segments.push(Segment { adapter, loss, data });
        }
        segments
    };
    let ranks = ranks.iter().map(|dealt| segments(dealt)).collect();
    Rows { backward: *backward, k: *k, adapters: adapters.clone(), losses, ranks, ended: Vec::new() }
}
