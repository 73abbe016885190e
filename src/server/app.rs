//! The state that HTTP and the wires share: the engine, futures, adapters, keys and limits. Requests of one adapter
//! reach the engine in the order in which they are submitted here.

use super::{
    downloads::Signer,
    fault::Fault,
    futures::{FutureLimits, Futures, Promise, Render},
    history::History,
    http::{Bodies, HttpLimits, Metrics},
    keys::Keys,
    order::{BodyHash, OnArrival},
    ordered::Orders,
    registry::{Registry, Tenant},
    request::{AdapterSpec, Answer, Engine, ModelId, OptimStep, Refusal, Reply, Request, Task},
    samplers::Samplers,
    sessions::Sessions,
    texts::Texts,
};
use axum::http::StatusCode;
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

/// The adapter of requests that name none.
pub const DEFAULT_MODEL: &str = "default";

/// The server's own values: names that clients are told, defaults and limits.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The base model's name, as clients are told and as `create_model` may give it.
    pub base_model: String,
    /// Other names of the base model that `create_model` may give: the path from which it was loaded.
    pub other_names: Vec<String>,
    /// The architecture in the model's configuration: `LlamaForCausalLM`.
    pub architecture: String,
    /// The host that the server was told to listen at.
    pub api_host: String,
    /// The folder of the tokenizer, absolute.
    pub tokenizer: PathBuf,
    /// The folder that all saves are in. It must exist.
    pub output_dir: PathBuf,
    pub vocab_size: usize,
    /// Tokens that end what is sampled, unless a request has others.
    pub end_token_ids: Vec<i64>,
    /// Tokens of a prompt and what is sampled behind it, at most.
    pub max_context: usize,
    /// The shape of an adapter where `create_model` does not say.
    pub adapter: AdapterSpec,
    /// The largest rank; `None`: the engine decides.
    pub max_rank: Option<usize>,
    /// Adapters that exist without `create_model`, with [`DEFAULT_MODEL`].
    pub model_ids: Vec<ModelId>,
    /// The step that `optim_step` asks for where it does not say.
    pub optim: OptimStep,
    /// Tokens of one datum, at most.
    pub max_datum: usize,
    /// Tokens of one request, at most.
    pub max_tokens: usize,
    pub futures: FutureLimits,
    pub http: HttpLimits,
}

impl Settings {
    /// Checks that `name`, which a client gave as `field`, is the base model.
    ///
    /// # Errors
    /// It is another.
    pub fn check_base(&self, field: &str, name: &str) -> Result<(), Fault> {
        if name == self.base_model || self.other_names.iter().any(|other| other == name) {
            return Ok(());
        }
        Err(Fault::user(format!("{field} {name:?}: this server trains {:?}", self.base_model)))
    }
}

/// A request that is taken in and gets a future.
pub struct Submission<'a> {
    pub tenant: &'a Tenant,
    pub model: &'a ModelId,
    /// The name of the call, for the queue's reason.
    pub call: &'a str,
    /// The sequence number, with the hash of call and body. `None`: never a repeat.
    pub number: Option<(i64, BodyHash)>,
    pub task: Task,
    pub render: Render,
}

/// The state of a server.
pub struct App {
    pub engine: Arc<dyn Engine>,
    pub futures: Arc<Futures>,
    pub settings: Settings,
    pub keys: Keys,
    pub metrics: Metrics,
    pub history: Arc<History>,
    pub signer: Signer,
    pub bodies: Bodies,
    pub texts: Texts,
    registry: Mutex<Registry>,
    sessions: Mutex<Sessions>,
    samplers: Mutex<Samplers>,
    pub(super) orders: Orders,
    is_draining: AtomicBool,
}

impl App {
    /// A server over `engine`, whose adapters clients find as they left them.
    pub fn new(engine: Arc<dyn Engine>, settings: Settings, keys: Keys) -> Arc<Self> {
        let (mut registry, mut sessions) = (Registry::default(), Sessions::default());
        for (id, model) in engine.state().models {
            if let Some((tenant, id)) = Tenant::of_engine_id(&id, keys.are_needed()) {
                sessions.restore(&tenant, &id);
                registry.add(tenant, id, model.spec);
            }
        }
        Arc::new(Self {
            engine,
            futures: Arc::new(Futures::new(settings.futures.clone())),
            bodies: Bodies::new(&settings.http),
            texts: Texts::new(settings.tokenizer.clone(), settings.vocab_size),
            settings,
            history: Arc::new(History::new(keys.are_needed())),
            keys,
            metrics: Metrics::default(),
            signer: Signer::default(),
            registry: Mutex::new(registry),
            sessions: Mutex::new(sessions),
            samplers: Mutex::default(),
            orders: Orders::default(),
            is_draining: AtomicBool::new(false),
        })
    }

    /// The largest number of a request that was taken for each adapter, by its name in the engine.
    pub fn last_numbers(&self) -> BTreeMap<ModelId, i64> {
        let ordered = self.last_in_order();
        let registry = self.registry();
        let numbers = registry.last_numbers().map(|(tenant, model, last)| (tenant.engine_id(model), last));
        let all = numbers.filter_map(|(id, last)| Some((id.ok()?, last))).chain(ordered);
        all.collect()
    }

    /// Refuses, for each adapter by its name in the engine, numbers up to the one that an earlier process took last: it
    /// cannot tell repeats.
    pub fn resume_numbers(&self, last: &BTreeMap<ModelId, i64>) {
        for (id, &last) in last {
            if let Some((tenant, model)) = Tenant::of_engine_id(id.as_str(), self.keys.are_needed())
                && let Some(known) = self.registry().get(&tenant, &model)
            {
                known.requests = OnArrival::resumed(last);
            }
        }
        self.resume_in_order(last);
    }

    pub fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its lock is taken before that of the registry.
    pub fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its lock is taken before that of the registry, and after that of the sessions.
    pub fn samplers(&self) -> MutexGuard<'_, Samplers> {
        self.samplers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The folder that the paths of `tenant` are in; made if it is not there.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn root(&self, tenant: &Tenant) -> Result<PathBuf, Fault> {
        let root = tenant.root(&self.settings.output_dir);
        match std::fs::create_dir_all(&root) {
            Ok(()) => Ok(root),
            Err(error) => Err(Fault::new(StatusCode::INTERNAL_SERVER_ERROR, format!("output_dir: {error}"))),
        }
    }

    /// Takes no more requests; those that were taken are carried out, but for those to sample, and have their futures
    /// when this returns.
    pub fn drain(&self) {
        let registry = self.registry();
        self.is_draining.store(true, Ordering::Release);
        // The lock of the orders is taken before that of the registry.
        drop(registry);
        self.refuse_held();
        self.engine.end_sampling();
    }

    /// True once the server takes no more requests, as it stops.
    pub fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Acquire)
    }

    pub(super) fn check_open(&self) -> Result<(), Fault> {
        let busy = |text: &str| Err(Fault::new(StatusCode::SERVICE_UNAVAILABLE, text));
        if self.is_draining() {
            return busy(
                "the server is stopping; it saves all adapters, so send the request again after its restart",
            );
        }
        if !self.engine.state().healthy {
            return busy("a rank of the server has failed; restart it, and go on from the last saved state");
        }
        Ok(())
    }

    /// # Errors
    /// The rank is larger than the server allows.
    pub fn check_rank(&self, rank: usize) -> Result<(), Fault> {
        match self.settings.max_rank.filter(|&most| rank > most) {
            None => Ok(()),
            Some(most) => Err(Fault::user(format!(
                "lora_config.rank: {rank} is more than this server's max_lora_rank, {most}"
            ))),
        }
    }

    /// Creates an adapter, or begins a new epoch of one that exists with this shape. Returns the id of the future.
    ///
    /// # Errors
    /// The adapter exists with another shape, or the server takes no request now.
    pub fn create(
        &self,
        tenant: &Tenant,
        model: &ModelId,
        spec: AdapterSpec,
        render: Render,
    ) -> Result<String, Fault> {
        let request = self.request(tenant, model, Task::Create(spec.clone()))?;
        let mut registry = self.registry();
        self.check_open()?;
        if let Some(known) = registry.get(tenant, model).filter(|known| known.spec != spec) {
            let AdapterSpec { rank, alpha, .. } = known.spec;
            return Err(Fault::user(format!(
                "model_id {model} exists with rank {rank} and alpha {alpha}, or other targets; give the same \
                 lora_config, another model_id, or unload it first"
            )));
        }
        let promise = self.futures.open(tenant.clone(), format!("create_model of {model}"), 0, render)?;
        let id = promise.id();
        let exists = match registry.get(tenant, model) {
            Some(known) => {
                known.requests.open_epoch();
                known.last_request = SystemTime::now();
                None
            }
            None => Some(registry.add(tenant.clone(), model.clone(), spec)),
        };
        self.send(request, promise, move |answer| {
            if let (Err(_), Some(exists)) = (answer, exists) {
                exists.store(false, Ordering::Release);
            }
        });
        Ok(id)
    }

    /// Submits a request for an adapter that exists, and returns the id of its future. A repeat gets the id of the
    /// first. `render` is not called for a repeat.
    ///
    /// # Errors
    /// No such adapter, a sequence number that is used, a full queue, or the server takes no request now.
    pub fn submit(&self, submission: Submission) -> Result<String, Fault> {
        let Submission { tenant, model, call, number, task, render } = submission;
        let (is_unload, bytes) = (task == Task::Unload, task.bytes());
        let request = self.request(tenant, model, task)?;
        let mut registry = self.registry();
        self.check_open()?;
        match is_unload && registry.is_lost(tenant, model) {
            // Made anew, it ends as any other does, and the journal forgets it.
            true => self.make(&mut registry, tenant, model)?,
            false => self.ensure(&mut registry, tenant, model)?,
        }
        let Some(known) = registry.get(tenant, model) else { return Err(unknown(&registry, tenant, model)) };
        if let Some((number, body)) = number {
            let repeat =
                known.requests.repeat(number, body).map_err(|error| Fault::user(error.to_string()))?;
            if let Some(id) = repeat {
                return Ok(id);
            }
        }
        let promise = self.futures.open(tenant.clone(), format!("{call} of {model}"), bytes, render)?;
        let id = promise.id();
        known.last_request = SystemTime::now();
        if let Some((number, body)) = number {
            known.requests.take(number, body, id.clone());
        }
        let exists = is_unload.then(|| registry.withdraw(tenant, model)).flatten();
        self.send(request, promise, move |answer| {
            if let (Err(_), Some(exists)) = (answer, exists) {
                exists.store(true, Ordering::Release);
            }
        });
        Ok(id)
    }

    /// The shape of an adapter of `tenant`.
    ///
    /// # Errors
    /// No such adapter.
    pub fn spec(&self, tenant: &Tenant, model: &ModelId) -> Result<AdapterSpec, Fault> {
        let mut registry = self.registry();
        let is_declared = self.is_declared(model) && !registry.is_lost(tenant, model);
        match registry.get(tenant, model) {
            Some(known) => Ok(known.spec.clone()),
            None if is_declared => Ok(self.settings.adapter.clone()),
            None => Err(unknown(&registry, tenant, model)),
        }
    }

    /// True for adapters that need no `create_model`.
    fn is_declared(&self, model: &ModelId) -> bool {
        model.as_str() == DEFAULT_MODEL || self.settings.model_ids.contains(model)
    }

    /// Creates the adapters of `model_ids` in a server without keys. With keys each tenant has its own, made when it
    /// first asks. So is [`DEFAULT_MODEL`] always, for a client may create it in another shape.
    ///
    /// # Errors
    /// The server takes no request.
    pub fn create_declared(&self) -> Result<(), Fault> {
        if self.keys.are_needed() {
            return Ok(());
        }
        let mut registry = self.registry();
        let models = self.settings.model_ids.iter().filter(|model| model.as_str() != DEFAULT_MODEL);
        models.into_iter().try_for_each(|model| self.ensure(&mut registry, &Tenant::everyone(), model))
    }

    /// Makes a declared adapter that does not exist yet and is not lost.
    pub(super) fn ensure(
        &self,
        registry: &mut Registry,
        tenant: &Tenant,
        model: &ModelId,
    ) -> Result<(), Fault> {
        let is_known = registry.get(tenant, model).is_some() || registry.is_lost(tenant, model);
        if is_known || !self.is_declared(model) { Ok(()) } else { self.make(registry, tenant, model) }
    }

    /// Makes an adapter of the server's own shape.
    fn make(&self, registry: &mut Registry, tenant: &Tenant, model: &ModelId) -> Result<(), Fault> {
        let spec = self.settings.adapter.clone();
        let request = self.request(tenant, model, Task::Create(spec.clone()))?;
        let exists = registry.add(tenant.clone(), model.clone(), spec);
        self.engine.submit(
            request,
            Box::new(move |answer| {
                if answer.is_err() {
                    exists.store(false, Ordering::Release);
                }
            }),
        );
        Ok(())
    }

    pub(super) fn request(&self, tenant: &Tenant, model: &ModelId, task: Task) -> Result<Request, Fault> {
        let model = tenant.engine_id(model).map_err(|error| Fault::user(error.to_string()))?;
        Ok(Request { model, task })
    }

    /// Sends a request to the engine. `after` sees the answer before the client does.
    pub(super) fn send(
        &self,
        request: Request,
        promise: Promise,
        after: impl FnOnce(&Answer) + Send + 'static,
    ) {
        let (noted, history) = (History::note(&request), self.history.clone());
        let relative = self.relative();
        let answered = Box::new(move |answer: Answer| {
            let answer = answer.map_err(relative);
            history.answered(&noted, &answer);
            after(&answer);
            promise.answer(answer);
        });
        self.engine.submit(request, answered);
    }

    /// Makes a refusal's paths those that clients know, which are relative to the output folder.
    pub fn relative(&self) -> impl Fn(Refusal) -> Refusal + Send + 'static {
        let output = self.settings.output_dir.clone();
        move |refusal| {
            let shown = |text: String| match output.canonicalize() {
                Ok(output) => text.replace(&format!("{}/", output.display()), ""),
                Err(_) => text,
            };
            match refusal {
                Refusal::User(text) => Refusal::User(shown(text)),
                Refusal::Server(text) => Refusal::Server(shown(text)),
                Refusal::Stopping => Refusal::Stopping,
            }
        }
    }
}

/// The refusal of a request for an adapter that is not there.
pub(super) fn unknown(registry: &Registry, tenant: &Tenant, model: &ModelId) -> Fault {
    if let Some(text) = registry.lost(tenant, model) {
        return Fault::user(text);
    }
    Fault::user(format!(
        "model_id {model} does not exist; make it with POST /api/v1/create_model, or name it in model_ids"
    ))
}

/// The error body of a reply that does not answer its request.
pub fn mismatched(reply: &Reply) -> super::futures::Body {
    let error = format!("the engine's reply does not answer the request: {reply:?}");
    super::futures::Body::json(&serde_json::json!({"error": error, "category": "server"}))
}
