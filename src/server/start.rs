//! The start of a server: `server.yaml` is read and validated on every rank; then rank 0 alone opens what the server
//! needs besides the model. All of that comes before the model is loaded, so that mistakes are told within a second.

use super::{
    Server, ServerPlan,
    app::{DEFAULT_MODEL, Settings},
    front::Front,
    futures::FutureLimits,
    http::HttpLimits,
    keys::Keys,
    request::{AdapterSpec, ModelId, OptimStep},
};
use crate::{
    checkpoint::saves,
    comm::{Communicator, World},
    config::{self, FieldLocations, Override, ServerConfig},
    console::count,
    error::{Error, Result, agree},
    model::hf_config::HfModel,
    optim,
    train::{Identity, StopSignals, take_output},
};
use std::{
    io::ErrorKind,
    net::TcpListener,
    path::{Path, PathBuf},
    time::Duration,
};

/// Time for which an idle engine that gets a pass waits for those of other adapters: clients that send at once arrive
/// within it, and a pass takes longer.
const GATHER: Duration = Duration::from_millis(2);
/// Tokens of one request, at most. Its data and results then take some hundred MB.
const MAX_TOKENS: usize = 4 << 20;

/// The engine's part of a configuration.
pub fn plan(config: &ServerConfig) -> ServerPlan {
    ServerPlan {
        model: config.model.clone(),
        seed: config.seed,
        output_dir: config.output_dir.clone(),
        compute: config.compute.clone(),
        merge: config.model.merge_qkv && !config.unfuse_for_lora,
        quant: config.quant.clone(),
        exclude: config.qlora_exclude_modules.clone().unwrap_or_default(),
        targets: config.lora_target_modules.clone(),
        hybrid: config.moe_hybrid_shared_lora,
        b_init_std: config.lora_b_init_std,
        max_rank: config.max_lora_rank,
        rank: config.lora_rank,
        optimizer: optim::Settings::new(config.optimizer, &config.rule),
        adapter_memory: config.adapter_memory.map(|size| size.0),
        sampling_memory: config.sampling_memory.map(|size| size.0),
        deterministic_sampling: config.deterministic_sampling,
        storage_limit: config.storage_limit.map(|size| size.0),
        max_tokens_per_pass: config.max_tokens_per_pass,
        // Futures bound the requests that wait. One that has a future has a place in the engine.
        max_waiting: usize::MAX,
        gather: GATHER,
        comm_timeout: Duration::from_secs(config.comm_timeout_s as u64),
        debug: false,
    }
}

/// The part of a configuration that clients meet, for a base that `model` describes.
///
/// # Errors
/// `model_ids` has a name that no adapter may have, or the working directory is not known.
pub fn settings(config: &ServerConfig, model: &HfModel) -> Result<Settings> {
    let absolute = |path: PathBuf| {
        std::path::absolute(&path).map_err(|error| Error::Input(format!("{}: {error}", path.display())))
    };
    let files = config.model.files();
    let files = files.map_err(|error| Error::Input(format!("{}: {error}", error.key)))?;
    let names = config.model_ids.iter().map(ModelId::new).collect::<Result<Vec<_>, _>>();
    Ok(Settings {
        base_model: config.base_model(),
        other_names: vec![config.model.name(), absolute(files.config)?.display().to_string()],
        api_host: config.api_host.clone(),
        architecture: model.architecture.clone(),
        tokenizer: absolute(files.tokenizer)?,
        output_dir: config.output_dir.clone(),
        vocab_size: model.spec.vocab_size,
        end_token_ids: model.end_token_ids.clone(),
        max_context: model.max_positions.unwrap_or(config.max_tokens_per_pass),
        adapter: AdapterSpec {
            rank: config.lora_rank,
            alpha: config.lora_alpha,
            targets: config.lora_target_modules.clone(),
            train_attn: true,
            train_mlp: true,
            seed: config.seed,
        },
        max_rank: config.max_lora_rank,
        model_ids: names.map_err(|error| Error::Input(format!("model_ids: {error}")))?,
        optim: OptimStep {
            lr: config.default_lr(),
            betas: (config.adam_beta1, config.adam_beta2),
            eps: config.adam_epsilon,
            weight_decay: config.weight_decay,
            max_grad_norm: config.max_grad_norm,
            divide: true,
        },
        max_datum: config.max_tokens_per_pass,
        max_tokens: MAX_TOKENS,
        futures: FutureLimits::default(),
        http: HttpLimits {
            body: usize::try_from(config.max_request_bytes.0).unwrap_or(usize::MAX),
            ..HttpLimits::default()
        },
    })
}

/// Checks that `model_ids` names each adapter once.
fn check_names(names: &[String]) -> std::result::Result<(), String> {
    if names.iter().any(|name| name == DEFAULT_MODEL) {
        return Err(format!("{DEFAULT_MODEL} is there without being named; leave it out"));
    }
    let twice = names.iter().enumerate().find(|(at, name)| names[..*at].contains(name));
    twice.map_or(Ok(()), |(_, name)| Err(format!("{name} is named twice; leave one out")))
}

/// A server that is read and validated.
pub struct Start {
    config: ServerConfig,
    places: FieldLocations,
    server: Server,
    /// On rank 0, once it is opened.
    front: Option<Front>,
}

impl Start {
    /// Reads configuration and model for one of `world` ranks. Enters no collective and writes nothing. Warnings go to
    /// the log.
    pub fn read(path: &Path, overrides: &[Override], world: usize, debug: bool) -> Result<Self> {
        let loaded = config::load_server(path, overrides)?;
        loaded.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        let (config, places) = (loaded.config, loaded.places);
        check_names(&config.model_ids)
            .map_err(|text| Error::Input(format!("{}: {text}", places.of("server.model_ids"))))?;
        let server = Server::prepare(ServerPlan { debug, ..plan(&config) }, world)?;
        Ok(Self { config, places, server, front: None })
    }

    /// Compares the ranks, then opens keys, address and output_dir on rank 0, in this order: a server that ends here
    /// has written nothing but the lock. Collective.
    ///
    /// # Errors
    /// The error of the first rank that has one, and [`Error::Elsewhere`] on the others.
    pub fn open(&mut self, world: &dyn Communicator) -> Result<()> {
        let digest = self.server.digest().to_owned();
        Identity::new(self.config.to_yaml(), digest, String::new()).same_on_all_ranks(world)?;
        let is_root = world.rank() == 0;
        let opened = if is_root {
            self.keys().and_then(|keys| Ok((keys, self.listen()?))).map(Some)
        } else {
            Ok(None)
        };
        let opened = agree(world, opened)?;
        let place = self.places.of("server.output_dir").to_string();
        let lock = take_output(&self.config.output_dir, &place, None, world)?;
        let front = opened.zip(lock).map(|((keys, listener), lock)| {
            saves::recover_below(&self.config.output_dir)?;
            let idle = self.config.idle_session_timeout.map(Duration::from_secs_f64);
            Front::new(listener, keys, lock, settings(&self.config, self.server.model())?, idle)
        });
        self.front = agree(world, front.transpose())?;
        Ok(())
    }

    fn keys(&self) -> Result<Keys> {
        let Some(path) = &self.config.api_keys_file else { return Ok(Keys::default()) };
        let place = self.places.of("server.api_keys_file");
        Keys::read(path).map_err(|error| Error::Input(format!("{place}: {error}")))
    }

    fn listen(&self) -> Result<TcpListener> {
        let (host, port) = (&self.config.api_host, self.config.api_port);
        TcpListener::bind((host.trim_matches(['[', ']']), port)).map_err(|error| {
            let (field, why) = match error.kind() {
                ErrorKind::AddrInUse => (
                    "api_port",
                    "another program listens there; give another port, or 0 for a free one".into(),
                ),
                ErrorKind::PermissionDenied => ("api_port", format!("{error}; give a port above 1023")),
                _ => (
                    "api_host",
                    "it is no address of this machine; give one that is, such as 127.0.0.1".into(),
                ),
            };
            Error::Input(format!("{}: {host}:{port}: {why}", self.places.of(&format!("server.{field}"))))
        })
    }

    /// Loads the model and serves until `stop` is asked for; then all adapters are saved. Collective.
    pub fn execute(self, world: &World, stop: &StopSignals) -> Result<()> {
        let ranks = count(world.size(), "rank");
        let front = match self.front {
            Some(front) => {
                front.stop_at(stop)?;
                Some(front)
            }
            None => None,
        };
        let served = self.server.execute(world, move |engine| match front {
            Some(front) => front.serve(engine, &ranks),
            // The engine starts it on rank 0 alone, which has one.
            None => Err(Error::Failure("the front of the server was not opened (a bug)".into())),
        });
        served?.unwrap_or(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load_server_yaml;
    use serde_json::json;

    fn config(text: &str) -> ServerConfig {
        load_server_yaml(Path::new("server.yaml"), text, &[]).unwrap().config
    }

    fn model() -> HfModel {
        let json = json!({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 503,
            "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
            "initializer_range": 0.15, "tie_word_embeddings": false, "eos_token_id": 502,
            "max_position_embeddings": 32768});
        let serde_json::Value::Object(map) = json else { unreachable!() };
        HfModel::parse(Path::new("config.json"), map).unwrap()
    }

    #[test]
    fn every_field_that_the_engine_reads_reaches_it() {
        let plan = plan(&config(
            "model_path: m\noutput_dir: o\nseed: 7\nunfuse_for_lora: true\nlora_target_modules: [q_proj]\n\
             moe_hybrid_shared_lora: true\nlora_b_init_std: 0.5\nlora_rank: 8\nmax_lora_rank: 64\nadapter_memory: 2KB\n\
             sampling_memory: 4KB\ndeterministic_sampling: true\nstorage_limit: 3KB\nmax_tokens_per_pass: 99\n\
             comm_timeout_s: 5\nexpert_parallel_size: 2\nring_slots: 3\n",
        ));
        assert_eq!(
            (plan.model.model_path.as_deref(), &*plan.output_dir),
            (Some(Path::new("m")), Path::new("o"))
        );
        assert_eq!((plan.seed, plan.merge, plan.hybrid, plan.b_init_std), (7, false, true, 0.5));
        assert_eq!((plan.targets, plan.max_rank), (Some(vec!["q_proj".to_owned()]), Some(64)));
        assert_eq!((plan.rank, plan.adapter_memory, plan.storage_limit), (8, Some(2048), Some(3072)));
        assert_eq!((plan.sampling_memory, plan.deterministic_sampling), (Some(4096), Some(true)));
        assert_eq!((plan.max_tokens_per_pass, plan.comm_timeout), (99, Duration::from_secs(5)));
        assert_eq!((plan.compute.expert_parallel_size, plan.compute.ring_slots), (2, 3));
        assert!(super::plan(&config("model_path: m\n")).merge);
    }

    #[test]
    fn an_adapter_is_named_once_and_default_never() {
        let check = |names: &[&str]| check_names(&names.iter().map(|&name| name.into()).collect::<Vec<_>>());
        assert_eq!(check(&["a", "b"]), Ok(()));
        assert!(check(&["a", "default"]).unwrap_err().contains("default is there without being named"));
        assert!(check(&["a", "b", "a"]).unwrap_err().contains("a is named twice"));
    }

    #[test]
    fn every_field_that_clients_meet_reaches_them() {
        let text = "model_path: m\ntokenizer_path: t\nbase_model_name: org/m\noutput_dir: o\nseed: 7\nlora_rank: 8\n\
                    lora_alpha: 4\nlora_target_modules: [q_proj]\nmax_lora_rank: 64\nmodel_ids: [a, b]\nlr: 0.5\n\
                    adam_beta1: 0.1\nadam_beta2: 0.2\nadam_epsilon: 0.001\nweight_decay: 0.3\nmax_grad_norm: 2\n\
                    max_request_bytes: 1MB\n";
        let found = settings(&config(text), &model()).unwrap();
        assert_eq!((found.base_model.as_str(), found.architecture.as_str()), ("org/m", "Qwen3ForCausalLM"));
        let here = std::env::current_dir().unwrap();
        assert_eq!(found.other_names, ["m".to_owned(), here.join("m").display().to_string()]);
        assert_eq!((found.tokenizer, found.vocab_size), (here.join("t"), 503));
        assert_eq!((found.end_token_ids, found.max_context), (vec![502], 32768));
        let targets = Some(vec!["q_proj".to_owned()]);
        let spec = AdapterSpec { rank: 8, alpha: 4.0, targets, train_attn: true, train_mlp: true, seed: 7 };
        assert_eq!((found.adapter, found.max_rank, found.model_ids.len()), (spec, Some(64), 2));
        let optim = OptimStep {
            lr: 0.5,
            betas: (0.1, 0.2),
            eps: 0.001,
            weight_decay: 0.3,
            max_grad_norm: 2.0,
            divide: true,
        };
        assert_eq!((found.optim, found.http.body), (optim, 1 << 20));
        assert_eq!(settings(&config("model_path: m\n"), &model()).unwrap().base_model, "m");
    }
}
