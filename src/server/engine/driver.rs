//! The loop of rank 0: takes requests, has them carried out on all ranks, answers.

mod moves;

use super::{
    EngineOptions, IDLE,
    check::{self, DataLimits},
    command::{self, Command, PlainLoss, PlainSave, Rows, Segment},
    handle::{Asked, EngineHandle, Message},
    loss,
    models::{DatumAnswer, Models, Trained},
    plan::{Dealt, Kind, Limits, MicroBatch, Next, Plan},
    residence::Residence,
    room::Room,
};
use crate::{
    Error, Result,
    checkpoint::saves::bytes_below,
    comm::{CommandSender, Watcher},
    plan::adapter::save_bytes,
    server::{
        request::{
            AdapterSpec, Load, ModelId, ModelState, OptimStep, Pass, PassReply, Refusal, Reply, Save, Task,
            Usage,
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
struct Ranks {
    commands: CommandSender,
    watcher: Watcher,
    /// Commands so far.
    sent: usize,
    /// There are other ranks.
    others: bool,
}

impl Ranks {
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
        commands: CommandSender,
        requests: Receiver<Message>,
        handle: Arc<EngineHandle>,
        watcher: Watcher,
    ) -> Self {
        let others = models.groups().world.size() > 1;
        let limits =
            Limits { ranks: models.groups().mesh.data_parallel(), tokens: options.max_tokens_per_pass };
        let storage = Storage::new(options.output_dir.clone(), options.storage_limit);
        let usage = Usage { memory_limit: room.bytes, fits: room.fits(), ..Usage::default() };
        let driver = Self {
            models,
            residence: Residence::new(room.bytes.unwrap_or(u64::MAX)),
            storage,
            usage,
            files: 0,
            options,
            ranks: Ranks { commands, watcher, sent: 0, others },
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
                self.take(message);
            }
            let residence = &self.residence;
            match self.plan.next(&|models| residence.fit_together(models)) {
                Some(Next::Begin { model, request }) => self.begin(&model, request)?,
                Some(Next::MicroBatch(micro_batch)) => self.compute(micro_batch)?,
                None if self.stopping => break,
                None => self.sleep(),
            }
        }
        self.ranks.tell(&Command::Stop)
    }

    /// Sleeps until there is a request. A pass then waits for those of other adapters, if there are any.
    fn sleep(&mut self) {
        let watcher = self.ranks.watcher.clone();
        let _idle = watcher.slow(IDLE);
        let message = self.requests.recv().unwrap_or(Message::Stop);
        let is_pass =
            matches!(&message, Message::Asked(asked) if matches!(asked.request.task, Task::Pass(_)));
        self.take(message);
        let until = Instant::now() + self.options.gather;
        while is_pass && self.plan.adapters() < self.models.adapters().len() {
            let Ok(message) = self.requests.recv_deadline(until) else { break };
            self.take(message);
        }
    }

    fn take(&mut self, message: Message) {
        let Message::Asked(asked) = message else {
            self.stopping = true;
            return;
        };
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
            Task::Freeze(_) | Task::OpenSampler { .. } => Err(Refusal::Server("not built".into()).into()),
        };
        self.show();
        match reply {
            Ok(reply) => asked.answer(Ok(reply)),
            Err(Unmet::Refused(refusal)) => asked.answer(Err(refusal)),
            Err(Unmet::Failed(error)) => return Err(error),
        }
        Ok(())
    }

    /// The adapter `model`.
    fn known(&self, model: &ModelId) -> Result<&Trained, Refusal> {
        self.models.adapters().get(model).ok_or_else(|| {
            Refusal::User(format!("model_id {model} is unknown; make the adapter with create_model first"))
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
        let plan = self.models.plan_of(model);
        let needed = plan.map_or(0, |plan| save_bytes(plan, save.training_state, accumulated) as u64);
        if !self.storage.is_own(&save.folder) {
            self.storage.check(needed, "the save").map_err(|full| Refusal::User(full.to_string()))?;
        }
        let replaced = bytes_below(&save.folder);
        let _saving = self.ranks.watcher.clone().slow("save");
        self.ranks.tell(&Command::Save { model: model.clone(), save: PlainSave::from(save) })?;
        let reply = self.models.save(model, save)??;
        if let Reply::Saved { bytes, .. } = reply {
            self.storage.changed(replaced, bytes);
        }
        Ok(reply)
    }

    fn load(&mut self, model: &ModelId, load: &Load) -> Result<Reply, Unmet> {
        self.known(model)?;
        self.make_room(std::slice::from_ref(model), None)?;
        let _loading = self.ranks.watcher.clone().slow("load");
        self.ranks.tell(&Command::Load { model: model.clone(), load: load.clone() })?;
        Ok(self.models.load(model, load)??)
    }

    fn unload(&mut self, model: &ModelId) -> Result<Reply, Unmet> {
        self.known(model)?;
        if !self.residence.is_in_memory(model) {
            self.storage.changed(self.models.bytes_on_disk(model), 0);
        }
        self.ranks.tell(&Command::Unload { model: model.clone() })?;
        self.models.unload(model);
        self.residence.remove(model);
        Ok(Reply::Unloaded)
    }

    /// Moves an adapter to disk, unless it is there.
    fn leave(&mut self, model: &ModelId) -> Result<Reply, Unmet> {
        self.known(model)?;
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
        let of = |(model, trained): (&ModelId, &Trained)| {
            let state = ModelState {
                spec: trained.spec.clone(),
                step: trained.step,
                accumulated: trained.accumulated,
                in_memory: self.residence.is_in_memory(model),
                bytes: self.residence.need(model).held,
                last_used: self.residence.last_used(model),
            };
            (model.to_string(), state)
        };
        self.handle.show(self.models.adapters().iter().map(of).collect(), self.usage());
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
