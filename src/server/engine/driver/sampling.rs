//! Requests to sample, from their clients to the sampler and back, and the samplers themselves.

use super::{Driver, Unmet, moves::now};
use crate::{
    Result,
    infer::{
        sampler::{Counts, Event, Limits, Progress, Sampler, check},
        step::Step,
        stops::SharedDecode,
    },
    server::{
        engine::{
            EngineOptions,
            command::Command,
            handle::{Sample, SampleClient},
            models::{Held, Models},
            plan::Kind,
            room::Room,
            versions::Versions,
        },
        request::{ModelId, Refusal, Reply, SampleAnswer, SamplingState, Source, Ticket},
        store,
    },
};
use std::{borrow::Cow, collections::BTreeMap, path::Path};

/// Continuations of a rank that get tokens at a time, at most.
const SEQUENCES: usize = 256;

/// Tokens of a rank and step, at most: a long prompt is computed in parts, between which others get tokens.
const TOKENS: usize = 2048;

/// Requests to sample that have not ended.
pub struct Sampling {
    sampler: Sampler<u64>,
    /// The text of tokens; `None`: the model has no tokenizer.
    decode: Option<SharedDecode>,
    /// Tokens of a prompt with its continuation, at most.
    max_tokens: usize,
    versions: Versions,
    /// Copies of adapters so far.
    copies: u64,
    /// Those that wait for the tasks of their adapter before them, by number.
    behind: BTreeMap<u64, Sample>,
    /// Those that the sampler has, by ticket.
    running: BTreeMap<u64, Running>,
}

/// A request that the sampler has.
struct Running {
    client: SampleClient,
    /// The values that it samples from; `None`: the base alone.
    version: Option<u64>,
}

impl Sampling {
    /// No requests yet, over the pages of `room`.
    pub fn new(models: &Models, room: &Room, options: &EngineOptions, decode: Option<SharedDecode>) -> Self {
        let (ranks, pages) = (models.groups().mesh.data_parallel(), room.pages);
        let tokens = options.max_tokens_per_pass.min(TOKENS);
        let limits = Limits { ranks, pages, sequences: SEQUENCES.min(tokens / 2), tokens };
        Self {
            sampler: Sampler::new(limits),
            decode,
            max_tokens: room.tokens().min(options.max_positions.unwrap_or(usize::MAX)),
            versions: Versions::default(),
            copies: 0,
            behind: BTreeMap::new(),
            running: BTreeMap::new(),
        }
    }

    /// True if a step of the model would bring a request on.
    pub fn has_work(&self) -> bool {
        !self.sampler.is_empty()
    }
}

/// A refusal of a request with a mistake of its client.
fn mistake(error: impl ToString) -> Refusal {
    Refusal::User(error.to_string())
}

impl Driver {
    /// Takes a request, which waits for the tasks of its adapter before it.
    pub(super) fn take_sample(&mut self, sample: Sample) {
        let checked = check(&sample.request, self.models.vocab_size(), self.sampling.max_tokens);
        match (checked, &sample.source) {
            (Err(error), _) => sample.client.end(Err(mistake(error))),
            (Ok(()), Source::Base) => self.start(sample, None),
            (Ok(()), Source::Adapter(model)) => {
                self.count += 1;
                self.plan.push(model.clone(), self.count, Kind::Sample);
                self.sampling.behind.insert(self.count, sample);
            }
        }
        self.show_sampling();
    }

    /// Begins the requests whose turn it is, on the adapters as they are now.
    pub(super) fn begin_samples(&mut self) {
        for (model, request) in self.plan.samples() {
            // One that was cancelled is not there.
            let Some(sample) = self.sampling.behind.remove(&request) else { continue };
            match self.present(&model) {
                Ok(_) => {
                    let version = self.sampling.versions.begin(&model);
                    self.start(sample, Some(version));
                }
                Err(refusal) => sample.client.end(Err(refusal)),
            }
        }
    }

    /// Hands a request to the sampler.
    fn start(&mut self, sample: Sample, version: Option<u64>) {
        let Sample { request, client, .. } = sample;
        let (sampling, ticket) = (&mut self.sampling, client.ticket.0);
        match sampling.sampler.submit(ticket, version, request, sampling.decode.clone()) {
            Ok(()) => {
                sampling.running.insert(ticket, Running { client, version });
            }
            Err(error) => {
                if let Some(version) = version {
                    // The adapter itself, and no copy.
                    sampling.versions.end(version);
                }
                client.end(Err(mistake(error)));
            }
        }
    }

    /// One step of the model for the requests that run.
    pub(super) fn sample(&mut self) -> Result<()> {
        let (sampling, residence) = (&mut self.sampling, &self.residence);
        let versions = &sampling.versions;
        let fit = |of: &[&u64]| residence.fit_together(&versions.places(of.iter().copied()));
        let Some(step) = sampling.sampler.plan(&fit) else { return Ok(()) };
        let places: Vec<ModelId> = versions.places(&step.adapters).into_iter().cloned().collect();
        let absent = self.bring(&places)?;
        if !absent.is_empty() {
            for (version, model) in step.adapters.iter().zip(&places) {
                if let Some(refusal) = absent.get(model) {
                    self.end_all(|own| own == Some(*version), refusal)?;
                }
            }
            return Ok(());
        }
        let step = Step { adapters: places, ranks: step.ranks };
        self.ranks.tell(&Command::Sample(Cow::Borrowed(&step)))?;
        let results = self.models.sample(&step)?;
        for event in self.sampling.sampler.apply(&results) {
            self.hear(event)?;
        }
        self.show_sampling();
        Ok(())
    }

    /// Tells the client of `event`.
    fn hear(&mut self, Event { ticket, what }: Event) -> Result<()> {
        match what {
            Progress::Token(token) => {
                if let Some(running) = self.sampling.running.get_mut(&ticket) {
                    running.client.token(&token);
                }
                Ok(())
            }
            // The weights of its adapter are not finite: sent again, it would end the same way.
            Progress::End(reply) => self.end(ticket, reply.map_err(mistake)),
        }
    }

    /// Ends a request that the sampler no longer has.
    fn end(&mut self, ticket: u64, answer: SampleAnswer) -> Result<()> {
        let Some(Running { client, version }) = self.sampling.running.remove(&ticket) else { return Ok(()) };
        if let Some(copy) = version.and_then(|version| self.sampling.versions.end(version)) {
            self.forget(&copy)?;
        }
        self.show();
        self.show_sampling();
        client.end(answer);
        Ok(())
    }

    /// Ends the requests that run on versions of which `is_meant` is true, with `refusal`.
    fn end_all(&mut self, is_meant: impl Fn(Option<u64>) -> bool, refusal: &Refusal) -> Result<()> {
        let running = self.sampling.running.iter();
        let meant: Vec<u64> =
            running.filter(|(_, own)| is_meant(own.version)).map(|(&ticket, _)| ticket).collect();
        for ticket in meant {
            self.sampling.sampler.cancel(ticket);
            self.end(ticket, Err(refusal.clone()))?;
        }
        Ok(())
    }

    /// Ends a request, if it has not ended.
    pub(super) fn cancel(&mut self, ticket: Ticket) -> Result<()> {
        let refusal = Refusal::User("the request to sample was cancelled".into());
        let waits = self.sampling.behind.iter().find(|(_, sample)| sample.client.ticket == ticket);
        if let Some(sample) =
            waits.map(|(&request, _)| request).and_then(|at| self.sampling.behind.remove(&at))
        {
            self.show_sampling();
            sample.client.end(Err(refusal));
        } else if self.sampling.running.contains_key(&ticket.0) {
            self.sampling.sampler.cancel(ticket.0);
            self.end(ticket.0, Err(refusal))?;
        }
        Ok(())
    }

    /// Ends all requests: the server is stopping.
    pub(super) fn end_sampling(&mut self) -> Result<()> {
        for (_, sample) in std::mem::take(&mut self.sampling.behind) {
            sample.client.end(Err(Refusal::Stopping));
        }
        self.end_all(|_| true, &Refusal::Stopping)
    }

    /// Keeps the values of `model`, which are about to change, for the requests that sample from them. Those end with a
    /// refusal if the copy has no room.
    pub(super) fn keep(&mut self, model: &ModelId) -> Result<()> {
        let Some(version) = self.sampling.versions.of(model) else { return Ok(()) };
        self.sampling.copies += 1;
        let copy = ModelId::hidden(self.sampling.copies);
        match self.freeze(model, copy.clone()) {
            Ok(()) => {
                self.sampling.versions.copied(model, copy);
                Ok(())
            }
            Err(Unmet::Refused(why)) => {
                let text = format!(
                    "{model} changes, and there is no room for the values that this request began with: {why}; send \
                     it again"
                );
                self.end_all(|own| own == Some(version), &Refusal::Server(text))
            }
            Err(Unmet::Failed(error)) => Err(error),
        }
    }

    /// Makes the sampler `sampler` of `model` as it is now.
    fn freeze(&mut self, model: &ModelId, sampler: ModelId) -> Result<(), Unmet> {
        let need = self.models.need_of_sampler(self.present(model)?.plan());
        self.make_room(std::slice::from_ref(model), Some(need))?;
        self.ranks.tell(&Command::Freeze { model: model.clone(), sampler: sampler.clone() })?;
        self.models.freeze(model, sampler.clone())?;
        self.residence.add(sampler, need, now());
        Ok(())
    }

    /// Makes a sampler of an adapter, unless there is one of this name.
    pub(super) fn freeze_as(&mut self, model: &ModelId, sampler: &ModelId) -> Result<Reply, Unmet> {
        if !self.is_sampler(sampler)? {
            self.freeze(model, sampler.clone())?;
        }
        Ok(Reply::Sampler)
    }

    /// Makes a sampler of a save, unless there is one of this name.
    pub(super) fn open_sampler(&mut self, sampler: &ModelId, folder: &Path) -> Result<Reply, Unmet> {
        if self.is_sampler(sampler)? {
            return Ok(Reply::Sampler);
        }
        let _loading = self.ranks.watcher.clone().slow("load");
        let plan = self.models.plan_of_save(folder).map_err(|error| store::refusal(&error))?;
        let need = self.models.need_of_sampler(&plan);
        if !self.residence.fits_alone(need) {
            let (needed, room) = (need.held, self.residence.room());
            let text =
                format!("the sampler needs {needed} bytes of memory, and the server has {room} for adapters");
            return Err(Refusal::User(text).into());
        }
        self.make_room(&[], Some(need))?;
        self.ranks.tell(&Command::OpenSampler { model: sampler.clone(), folder: folder.to_owned() })?;
        self.models.open_sampler(sampler.clone(), folder)??;
        self.residence.add(sampler.clone(), need, now());
        Ok(Reply::Sampler)
    }

    /// The adapter or the sampler `model`.
    pub(super) fn present(&self, model: &ModelId) -> Result<&Held, Refusal> {
        self.models.adapters().get(model).ok_or_else(|| {
            Refusal::User(format!(
                "model_id {model} is unknown: there is no adapter and no sampler of this name"
            ))
        })
    }

    /// True if there is a sampler `sampler`.
    ///
    /// # Errors
    /// An adapter that is trained has this name.
    fn is_sampler(&self, sampler: &ModelId) -> Result<bool, Refusal> {
        match self.models.adapters().get(sampler).map(|held| held.trained.is_some()) {
            Some(true) => Err(Refusal::User(format!(
                "{sampler} is an adapter that is trained; give the sampler another name"
            ))),
            found => Ok(found.is_some()),
        }
    }

    fn show_sampling(&self) {
        let Counts { waiting, running, new_tokens: tokens, steps, .. } = self.sampling.sampler.counts();
        let waiting = waiting + self.sampling.behind.len();
        self.handle.sampled(SamplingState { waiting, running, tokens, steps });
    }
}
