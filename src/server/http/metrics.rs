//! Metrics in Prometheus' text form.

use crate::server::app::App;
use prometheus::{
    Encoder, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};
use std::time::Duration;

/// Counts of requests since the start.
pub struct Metrics {
    registry: Registry,
    requests: Option<IntCounterVec>,
    seconds: Option<HistogramVec>,
}

impl Default for Metrics {
    fn default() -> Self {
        let requests = Opts::new("xorl_http_requests_total", "Requests by call and status");
        let seconds =
            HistogramOpts::new("xorl_http_request_seconds", "Time to answer a request, long polls included");
        let mut metrics = Self {
            registry: Registry::new(),
            requests: IntCounterVec::new(requests, &["call", "status"]).ok(),
            seconds: HistogramVec::new(seconds, &["call"]).ok(),
        };
        // Names that are valid and differ are always taken.
        if let (Some(requests), Some(seconds)) = (&metrics.requests, &metrics.seconds) {
            let added = metrics.registry.register(Box::new(requests.clone()));
            if added.and(metrics.registry.register(Box::new(seconds.clone()))).is_err() {
                metrics.requests = None;
            }
        }
        metrics
    }
}

impl Metrics {
    /// Counts a request. `call` is one of few names.
    pub fn count(&self, call: &str, status: u16, took: Duration) {
        if let Some(requests) = &self.requests {
            requests.with_label_values(&[call, &status.to_string()]).inc();
        }
        if let Some(seconds) = &self.seconds {
            seconds.with_label_values(&[call]).observe(took.as_secs_f64());
        }
    }

    /// All metrics of a server as text.
    pub fn text(&self, app: &App) -> String {
        let (futures, engine) = (app.futures.counts(), app.engine.state());
        let accumulated: u64 = engine.models.values().map(|model| model.accumulated).sum();
        let steps: u64 = engine.models.values().map(|model| model.step).sum();
        let (usage, in_memory) =
            (&engine.usage, engine.models.values().filter(|model| model.in_memory).count());
        let samplers_in_memory = engine.samplers.values().filter(|sampler| sampler.in_memory).count();
        let sampling = &engine.sampling;
        let peak_rss = engine.peak_rss_bytes.iter().copied().max().unwrap_or(0);
        let gauges = [
            ("xorl_futures_pending", "Requests that wait or are carried out", futures.pending as u64),
            ("xorl_futures_kept", "Results that are kept", futures.kept as u64),
            ("xorl_futures_kept_bytes", "Bytes of the results that are kept", futures.bytes as u64),
            ("xorl_http_body_bytes", "Bytes of bodies that are held", app.bodies.bytes() as u64),
            ("xorl_engine_healthy", "1 while all ranks run", u64::from(engine.healthy)),
            ("xorl_engine_waiting", "Requests that the engine has", engine.waiting as u64),
            ("xorl_engine_answered", "Requests that the engine has answered", engine.answered),
            ("xorl_models", "Adapters", engine.models.len() as u64),
            ("xorl_model_steps", "Updates of all adapters", steps),
            ("xorl_model_passes_accumulated", "Passes since the last updates of all adapters", accumulated),
            ("xorl_models_in_memory", "Adapters in memory; the others wait on disk", in_memory as u64),
            ("xorl_models_fit", "Adapters of the default shape that fit in memory", usage.fits.unwrap_or(0)),
            ("xorl_adapter_bytes", "Memory of a rank that adapters hold", usage.memory),
            ("xorl_adapter_limit_bytes", "Memory of a rank for adapters", usage.memory_limit.unwrap_or(0)),
            ("xorl_adapters_spilled", "Times that an adapter went to disk", usage.spilled),
            ("xorl_adapters_restored", "Times that an adapter came back from disk", usage.restored),
            ("xorl_samplers", "Samplers", engine.samplers.len() as u64),
            (
                "xorl_samplers_in_memory",
                "Samplers in memory; the others wait on disk",
                samplers_in_memory as u64,
            ),
            ("xorl_sampling_waiting", "Requests to sample that wait for a place", sampling.waiting as u64),
            ("xorl_sampling_running", "Continuations that get tokens", sampling.running as u64),
            ("xorl_sampling_tokens", "Tokens that were sampled", sampling.tokens),
            ("xorl_sampling_steps", "Steps of the model that sampled", sampling.steps),
            ("xorl_output_bytes", "Bytes of output_dir", usage.storage),
            ("xorl_peak_rss_bytes", "Largest resident memory of a rank", peak_rss),
        ];
        let mut families = self.registry.gather();
        for (name, help, value) in gauges {
            if let Ok(gauge) = IntGauge::new(name, help) {
                gauge.set(value.try_into().unwrap_or(i64::MAX));
                families.extend(prometheus::core::Collector::collect(&gauge));
            }
        }
        let mut text = Vec::new();
        let _ = TextEncoder::new().encode(&families, &mut text);
        String::from_utf8_lossy(&text).into_owned()
    }
}
