//! Adapters without requests, by a clock of the test.

use super::server::{Double, settings};
use serde_json::json;
use std::{
    cell::RefCell,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};
use xorl_dist::server::{
    app::App,
    futures::Body,
    keys::Keys,
    registry::Tenant,
    request::{Engine, ModelId, Reply, Task},
    sweep::{self, Sweep},
};

const IDLE: Duration = Duration::from_secs(7200);

/// The adapters that were told to leave memory.
fn told_to_leave(engine: &Double) -> Vec<String> {
    let asked = engine.asked().into_iter().filter(|request| request.task == Task::Spill);
    asked.map(|request| request.model.to_string()).collect()
}

fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < until, "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn idle_adapters_leave_memory_once_and_heartbeats_keep_them() {
    let output = tempfile::tempdir().unwrap();
    let engine = Double::start();
    let app = App::new(engine.clone(), settings(output.path()), Keys::default());
    let (tenant, spec) = (Tenant::everyone(), app.settings.adapter.clone());
    let make = |name: &str| {
        let model = ModelId::new(name).unwrap();
        let render = Box::new(|_: &Reply, _| Body::json(&json!({})));
        app.create(&tenant, &model, spec.clone(), render).unwrap();
    };
    ["quiet", "alive", "busy"].into_iter().for_each(make);
    eventually("all are made", || engine.state().models.len() == 3);
    let start = SystemTime::now();
    let sweep = |after: u64| sweep::once(&app, Some(IDLE), &|_, _| (), start + Duration::from_secs(after));
    sweep(7100);
    let alive = |after: u64| {
        let its = |model: &ModelId| model.as_str() == "alive";
        app.registry().heartbeat(&tenant, start + Duration::from_secs(after), its);
    };
    alive(7000);
    app.registry().get(&tenant, &ModelId::new("busy").unwrap()).unwrap().last_request =
        start + Duration::from_secs(7100);
    sweep(7210);
    eventually("the quiet one has left", || told_to_leave(&engine) == ["quiet"]);
    eventually("it is on disk", || !engine.state().models["quiet"].in_memory);
    // Those on disk are left alone.
    sweep(7220);
    alive(14000);
    sweep(14400);
    eventually("the busy one has left", || told_to_leave(&engine) == ["quiet", "busy"]);
    sweep::once(&app, None, &|_, _| (), start + Duration::from_secs(1 << 30));
    thread::sleep(Duration::from_millis(50));
    assert_eq!(told_to_leave(&engine), ["quiet", "busy"]);
}

#[test]
fn saves_of_every_tenant_are_looked_through() {
    let output = tempfile::tempdir().unwrap();
    for folder in ["tenants/one", "tenants/two", "tenants/.hidden", "weights/a"] {
        fs::create_dir_all(output.path().join(folder)).unwrap();
    }
    let app = App::new(Double::start(), settings(output.path()), Keys::default());
    let (seen, now) = (RefCell::new(Vec::new()), SystemTime::now());
    let expire = |root: &Path, at: SystemTime| {
        assert_eq!(at, now);
        seen.borrow_mut().push(root.strip_prefix(output.path()).unwrap().to_owned());
    };
    sweep::once(&app, None, &expire, now);
    let mut seen = seen.into_inner();
    seen.sort();
    assert_eq!(seen, ["", "tenants/one", "tenants/two"].map(PathBuf::from));
}

#[test]
fn a_sweep_goes_on_until_it_is_dropped() {
    let output = tempfile::tempdir().unwrap();
    let app = App::new(Double::start(), settings(output.path()), Keys::default());
    let sweeps = Arc::new(AtomicUsize::new(0));
    let (own, count) = (sweeps.clone(), || sweeps.load(SeqCst));
    let expire = move |_: &Path, _| {
        own.fetch_add(1, SeqCst);
    };
    let (looked, started) = (sweeps.clone(), Instant::now());
    let first = Sweep::start(app.clone(), None, move |_: &Path, _| {
        looked.fetch_add(1, SeqCst);
    });
    eventually("the first sweep comes at the start", || count() == 1);
    assert!(started.elapsed() < Duration::from_secs(5));
    drop(first);
    let sweep = Sweep::start(app.clone(), Some(Duration::from_millis(20)), expire).unwrap();
    eventually("it sweeps", || count() > 3);
    drop(sweep);
    let seen = count();
    thread::sleep(Duration::from_millis(60));
    assert_eq!(count(), seen);
    assert!(app.metrics.text(&app).contains("xorl_models_in_memory 0"));
}
