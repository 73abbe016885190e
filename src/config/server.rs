//! `server.yaml`: the training server. Its fields stand at the top of the file; on the command line their section is
//! `server`.

use super::bytes::ByteSize;
use super::compat::Compat;
use super::compute::ComputeArgs;
use super::error::{FieldLocations, Problem};
use super::file::{Broken, ConfigFile};
use super::lora::QuantArgs;
use super::model::ModelArgs;
use super::nearest::{self, Hint};
use super::optimizer::{Optimizer, OptimizerArgs};
use super::paths::{self, NamedPath};
use super::section::{Section, section};
use super::{compat_server, lora, train};
use std::net::IpAddr;
use std::path::PathBuf;

section! {
    /// A complete, resolved server configuration.
    pub struct ServerConfig {
        ..model: ModelArgs;
        /// Name of the base model that clients are told and may ask for, such as its name on the Hugging Face hub.
        /// null: `model_path`.
        base_model_name: Option<String> = None;
        /// Folder of everything that clients save; shared by all ranks.
        output_dir: PathBuf = "outputs".into();
        /// Address to listen on. Another than of this machine alone needs `api_keys_file`.
        api_host: String = "127.0.0.1".into();
        /// Port to listen on. 0: one that is free.
        api_port: u16 = 5555 => Port;
        /// File with the hash of each API key. null: no key is asked for.
        api_keys_file: Option<PathBuf> = None;
        /// Adapters that are made at the start, besides `default`.
        model_ids: Vec<String> = Vec::new() => ModelIds;
        /// Must stay true: the base is frozen by design.
        enable_lora: bool = true;
        /// Rank of an adapter whose client gives none.
        lora_rank: usize = 16 => OneOrMore;
        /// Alpha of an adapter whose client gives none. An adapter's output is scaled by its alpha / rank.
        lora_alpha: f64 = 32.0 => Positive;
        /// Targets of an adapter whose client gives none: leaf names (`q_proj`, `qkv_proj`), globs over dotted paths
        /// (`layers.[0-7].*.q_proj`), or `all-linear`. null: the default of the model's family.
        lora_target_modules: Option<Vec<String>> = None => NonEmpty;
        /// Largest rank that a client may ask for. null: the largest that memory holds.
        max_lora_rank: Option<usize> = None => OneOrMore;
        /// Standard deviation that B starts with. 0: B starts at zero, so training starts at the base model.
        lora_b_init_std: f64 = 0.0 => NonNegative;
        /// Experts share the A of gate_proj, up_proj and gate_up_proj, and the B of down_proj; the other factor is each
        /// expert's own.
        moe_hybrid_shared_lora: bool = false;
        /// Compute q, k, v and gate, up as separate GEMMs. Results and adapter keys stay the same.
        unfuse_for_lora: bool = false;
        ..quant: QuantArgs;
        /// Linear layers that are not quantised, named as in `lora_target_modules`.
        qlora_exclude_modules: Option<Vec<String>> = None;
        /// Seed of the initial values of an adapter whose client gives none.
        seed: u64 = 42;
        /// Optimizer of all adapters: `adamw` (decoupled decay, fp32 moments), `anyprecision_adamw` (moments in
        /// `optimizer_dtype`), `sgd`, `signsgd` (steps along the sign of the gradient) or `muon` (orthogonal steps of
        /// every A and B). A number of an update that it does not read is ignored.
        optimizer: Optimizer = Optimizer::Adamw;
        ..rule: OptimizerArgs;
        /// Learning rate of an update that gives none; with muon, `muon_lr` is.
        lr: f64 = 1e-5 => Positive;
        /// Decoupled weight decay of an update that gives none.
        weight_decay: f64 = 0.01 => NonNegative;
        /// Limit of the global gradient norm in an update that gives none. 0 or less: no clipping.
        max_grad_norm: f64 = 1.0;
        /// Decay of the first moment in an update that gives none.
        adam_beta1: f64 = 0.9 => BelowOne;
        /// Decay of the second moment in an update that gives none.
        adam_beta2: f64 = 0.95 => BelowOne;
        /// Added to the root of the second moment in an update that gives none.
        adam_epsilon: f64 = 1e-8 => Positive;
        /// Bytes of a rank's memory for adapters, such as 8GB; those that have no room wait on disk. null: what the
        /// base and a pass leave when the server starts.
        adapter_memory: Option<ByteSize> = None;
        /// Bytes of a rank's memory for the keys and values of prompts that are continued, such as 2GB; requests that
        /// have no room wait. null: a quarter of what the base and a pass leave, and no more than 256 sequences of 2048
        /// tokens need.
        sampling_memory: Option<ByteSize> = None;
        /// Samples are the same to the bit alone and beside any other requests, and a pass of `forward` or of a policy
        /// loss over a sample gives its log-probabilities again, so that ratios are 1 before the first update.
        /// One request is faster with it, many requests, long prompts and passes of policy losses are slower. null:
        /// true on CPUs, false on GPUs, which have no kernels for it.
        deterministic_sampling: Option<bool> = None;
        /// Seconds without a request or heartbeat after which an adapter waits on disk until its next request. null:
        /// never.
        idle_session_timeout: Option<f64> = Some(7200.0) => Positive;
        /// Bytes of `output_dir` above which a save is refused, such as 500GB; 1GB is 1024³ bytes. null: no limit.
        storage_limit: Option<ByteSize> = Some(ByteSize(10 << 40));
        /// Bytes of a request's body at most, decompressed.
        max_request_bytes: ByteSize = ByteSize(64 << 20);
        /// Tokens of a rank's micro-batch at most, and of one datum.
        max_tokens_per_pass: usize = 16384 => OneOrMore;
        ..compute: ComputeArgs;
        /// Seconds for which a rank may be silent, or keep others waiting in a collective, before all ranks end with a
        /// line that names it. Loading, saving and waiting for requests have no limit.
        comm_timeout_s: usize = 600 => OneOrMore;
    }
}

impl ServerConfig {
    /// The name of the base model that clients are told.
    pub fn base_model(&self) -> String {
        self.base_model_name.clone().unwrap_or_else(|| self.model.name())
    }

    /// The problem of an `api_host` that is more than an address.
    fn host_problem(&self) -> Option<Problem> {
        let text = self.api_host.split_once("://").map_or(&*self.api_host, |(_, rest)| rest);
        let host = text.split('/').next().unwrap_or_default();
        let (host, port) = match host.rsplit_once(':') {
            Some((host, port)) if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) => {
                (host, Some(port))
            }
            _ => (host, None),
        };
        let is_ip = self.api_host.parse::<IpAddr>().is_ok();
        let is_alone = is_ip || host == self.api_host;
        let port = port.map_or_else(String::new, |port| format!(", and api_port: {port}"));
        (!is_alone).then(|| {
            let words = format!("{:?} is not an address alone; write api_host: {host}{port}", self.api_host);
            Problem::Conflict(words)
        })
    }

    /// The learning rate of an update that gives none.
    pub fn default_lr(&self) -> f64 {
        if self.optimizer == Optimizer::Muon { self.rule.muon_lr } else { self.lr }
    }

    /// Every field with its value, as YAML that loads to the same configuration.
    pub fn to_yaml(&self) -> String {
        // Plain numbers, texts, lists and maps always have a YAML form.
        serde_yaml::to_string(self).unwrap_or_default()
    }
}

/// True for a name that an adapter may have on the server: 1 to 128 letters, digits, '.', '_', '-' and ':', the first
/// of them a letter or a digit.
pub fn is_model_id(text: &str) -> bool {
    text.len() <= 128
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-:".contains(c))
}

/// True for an address that only this machine reaches.
fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || address.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

impl ConfigFile for ServerConfig {
    const SECTIONS: &'static [&'static str] = &["server"];
    const IS_FLAT: bool = true;
    const COMPAT: Compat = compat_server::SERVER;

    fn sections(&self) -> Vec<&dyn Section> {
        vec![self]
    }

    fn section_mut(&mut self, name: &str) -> Option<&mut dyn Section> {
        (name == "server").then_some(self)
    }

    fn complete(&mut self, _: &FieldLocations) {}

    fn broken_rules(&self) -> Vec<Broken> {
        let mut broken: Vec<Broken> = Vec::new();
        let mut rule = |fields: &'static [&'static str], problem: Option<Problem>| {
            broken.extend(problem.map(|problem| (fields, problem)));
        };
        rule(&["server.model_path", "server.config_path"], self.model.missing());
        rule(&["server.revision"], self.model.revision_problem());
        rule(&["server.api_host"], self.host_problem());
        let open =
            self.host_problem().is_none() && !is_loopback(&self.api_host) && self.api_keys_file.is_none();
        let words = "lets other machines in, which needs api_keys_file; or leave it at 127.0.0.1";
        rule(
            &["server.api_host", "server.api_keys_file"],
            open.then(|| Problem::Conflict(format!("{:?} {words}", self.api_host))),
        );
        let above = self.max_lora_rank.filter(|most| self.lora_rank > *most);
        rule(
            &["server.lora_rank", "server.max_lora_rank"],
            above.map(|most| Problem::Conflict(format!("{} is above max_lora_rank {most}", self.lora_rank))),
        );
        rule(&["server.adam_epsilon"], train::epsilon_problem(self.adam_epsilon));
        rule(&["server.muon_ns_steps"], self.rule.ns_steps_problem());
        rule(&["server.ulysses_parallel_size"], self.compute.sequence_problem());
        rule(&["server.lora_target_modules"], lora::targets_problem(self.lora_target_modules.as_deref()));
        rule(&["server.quant_group_size", "server.quant_format"], self.quant.group_problem());
        rule(&["server.enable_lora"], lora::enabled_problem(self.enable_lora));
        broken
    }

    fn named_paths(&self) -> Vec<NamedPath<'_>> {
        let mut named = paths::of_model("server", &self.model);
        named.extend(NamedPath::new(
            "server.api_keys_file",
            self.api_keys_file.as_deref(),
            paths::Kind::Keys,
        ));
        named
    }

    fn unknown_field(_: &str, key: &str) -> Hint {
        nearest::server_field(key)
    }

    fn unknown_section(name: &str) -> Hint {
        nearest::server_section(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_an_address_alone() {
        let said = |host: &str| {
            let config = ServerConfig { api_host: host.into(), ..ServerConfig::default() };
            config.host_problem().map(|problem| problem.to_string())
        };
        for host in ["127.0.0.1", "::1", "[::1]", "fe80::1:22", "localhost", "0.0.0.0", "node-7.cluster"] {
            assert_eq!(said(host), None, "{host}");
        }
        for (host, words) in [
            ("http://127.0.0.1", "write api_host: 127.0.0.1"),
            ("https://localhost:80/v1", "write api_host: localhost, and api_port: 80"),
            ("0.0.0.0:5555", "write api_host: 0.0.0.0, and api_port: 5555"),
            ("[::1]:5555", "write api_host: [::1], and api_port: 5555"),
        ] {
            assert!(said(host).is_some_and(|said| said.ends_with(words)), "{host}: {:?}", said(host));
        }
    }

    #[test]
    fn addresses_of_this_machine_alone_are_told_from_others() {
        for host in ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost", "LocalHost"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in
            ["0.0.0.0", "::", "10.0.0.7", "example.org", "127.0.0.1.example.org", "localhost.example.org"]
        {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
