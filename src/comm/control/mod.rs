//! The control mesh: what every rank is doing, told once in a while over TCP, and the watchdog that ends all ranks when one
//! has died, is silent, or does not come to a collective that others are in.
//!
//! A plain thread on every rank, which calls no MPI: MPI can hang, and this is for when it does. Rank 0's thread hears
//! all others ([`link`]) and decides ([`judge`], pure). What takes as long as it takes (loading, data, saving) is declared
//! with [`Watcher::slow`]: then only signs of life are asked for. The last collectives of each rank are kept, and written
//! to `{output_dir}/flight/` when the watchdog ends them.

mod judge;
mod link;

use super::{CommError, Communicator};
use crate::device::{DeviceError, Event};
pub(super) use link::host;
use serde::{Deserialize, Serialize};
use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Collectives that are kept of each rank.
const KEPT: usize = 64;
/// For a device to let go of its collectives, before the process ends all the same.
const ABORT: Duration = Duration::from_secs(1);
/// `train.comm_timeout_s` until a configuration is read.
const TIMEOUT: Duration = Duration::from_secs(600);

/// What a rank is doing, as others hear it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Status {
    /// The step that is being made, from 1; 0 before the first.
    step: usize,
    /// What it does that takes as long as it takes.
    slow: Option<String>,
    groups: Vec<Group>,
    /// The collective that it is in, or that its device is in.
    inside: Option<Inside>,
    /// What has failed where nobody was called.
    fault: Option<String>,
}

/// What a rank has done with one of its groups.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Group {
    name: String,
    /// Tells the groups of one name apart.
    color: usize,
    /// Collectives entered so far.
    entered: u64,
    /// The last of them.
    operation: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Inside {
    /// Place in [`Status::groups`].
    group: usize,
    /// Which of the group's, from 1.
    number: u64,
    seconds: f64,
    /// Whether a device is in it, which went on without the rank.
    on_device: bool,
}

/// A communicator whose collectives a device carries out, as the watchdog's thread sees it.
pub(super) trait DeviceComm: Send + Sync {
    /// What has failed in it since it was called last.
    fn fault(&self) -> Option<String>;
    /// Ends what is under way. May hang, as what it ends does.
    fn abort(&self);
}

/// A collective that a device has been given.
struct UnderWay {
    group: usize,
    number: u64,
    since: Instant,
    done: Arc<Event>,
}

/// A collective, for the flight record.
#[derive(Clone, Debug, Serialize)]
struct Flown {
    group: String,
    /// Which of the group's, from 1.
    number: u64,
    operation: &'static str,
    step: usize,
    /// Seconds since 1970.
    entered: f64,
    /// None: it was in it when it ended.
    left: Option<f64>,
}

/// What a rank knows of itself.
struct Local {
    status: Status,
    since: Instant,
    under_way: VecDeque<UnderWay>,
    devices: Vec<Arc<dyn DeviceComm>>,
    flight: VecDeque<Flown>,
    timeout: Duration,
    output: Option<PathBuf>,
    thread: Option<JoinHandle<()>>,
    closing: bool,
}

/// A rank's own record, shared by its communicators and its thread.
#[derive(Clone)]
struct Shared(Arc<Mutex<Local>>);

impl Shared {
    fn new() -> Self {
        let status = Status { slow: Some("start".into()), ..Status::default() };
        let local = Local {
            status,
            since: Instant::now(),
            under_way: VecDeque::new(),
            devices: Vec::new(),
            flight: VecDeque::new(),
            timeout: TIMEOUT,
            output: None,
            thread: None,
            closing: false,
        };
        Self(Arc::new(Mutex::new(local)))
    }

    fn lock(&self) -> MutexGuard<'_, Local> {
        // What is in it is whole at any time.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it is doing now.
    fn status(&self) -> Status {
        let fault = self.forget_done().err().map(|error| error.to_string());
        let local = self.lock();
        let mut status = local.status.clone();
        // A rank may be held by what its device does not get done.
        if let Some(&UnderWay { group, number, since, .. }) = local.under_way.front() {
            let seconds = since.elapsed().as_secs_f64();
            status.inside = Some(Inside { group, number, seconds, on_device: true });
        } else if let Some(inside) = &mut status.inside {
            inside.seconds = local.since.elapsed().as_secs_f64();
        }
        let devices = local.devices.clone();
        drop(local);
        let fault = fault.or_else(|| devices.iter().find_map(|device| device.fault()));
        Status { fault: status.fault.or(fault), ..status }
    }

    /// Forgets what devices have done. They are asked without the lock: a driver may take its time, and a rank that does not
    /// answer for it is silent.
    ///
    /// # Errors
    /// Something has gone wrong on a device.
    fn forget_done(&self) -> Result<(), DeviceError> {
        let all: Vec<Arc<Event>> =
            self.lock().under_way.iter().map(|collective| collective.done.clone()).collect();
        let mut done = Vec::new();
        for event in all {
            if event.is_done()? {
                done.push(event);
            }
        }
        self.lock().under_way.retain(|other| !done.iter().any(|event| Arc::ptr_eq(event, &other.done)));
        Ok(())
    }

    /// Ends what devices are in, and waits for that a little.
    fn abort(&self) {
        let devices = self.lock().devices.clone();
        if devices.is_empty() {
            return;
        }
        let (ended, wait) = mpsc::channel();
        let abort = move || {
            devices.iter().for_each(|device| device.abort());
            let _ = ended.send(());
        };
        if std::thread::Builder::new().name("abort".into()).spawn(abort).is_ok() {
            let _ = wait.recv_timeout(ABORT);
        }
    }

    /// Writes the last collectives to `{output_dir}/flight/rank_{rank}.json`, if there is such a place.
    fn write_flight(&self, rank: usize, verdict: &str) {
        let local = self.lock();
        let Some(output) = local.output.as_ref().filter(|output| output.is_dir()) else { return };
        let folder = output.join("flight");
        let record = serde_json::json!({"rank": rank, "ended": verdict, "last": local.flight});
        // The process ends in any case, and its reason is on stderr.
        let _ = std::fs::create_dir_all(&folder).and_then(|()| {
            std::fs::write(folder.join(format!("rank_{rank}.json")), record.to_string() + "\n")
        });
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// This rank's part of the mesh; nothing for a lone process.
pub struct Control {
    shared: Shared,
    /// Why somebody is not watched; nobody can be told before there is a log.
    pub(super) warning: Option<String>,
}

impl Control {
    /// Opens the mesh over all ranks of `world`. Collective. Ranks that cannot reach rank 0 go on unwatched.
    pub(super) fn open(world: &dyn Communicator) -> Result<Self, CommError> {
        let shared = Shared::new();
        let link::Opened { thread, warning } = link::open(world, &shared)?;
        shared.lock().thread = thread;
        Ok(Self { shared, warning })
    }

    /// What the run tells the watchdog.
    pub fn watcher(&self) -> Watcher {
        Watcher(Some(self.shared.clone()))
    }

    /// What collectives of the group `name` tell it.
    pub(super) fn group(&self, name: &str, color: usize) -> GroupWatch {
        let mut local = self.shared.lock();
        let groups = &mut local.status.groups;
        // Of several communicators of a group ranks enter all collectives in the same order too.
        let known = groups.iter().position(|group| (group.name.as_str(), group.color) == (name, color));
        let group = known.unwrap_or_else(|| {
            groups.push(Group { name: name.to_owned(), color, entered: 0, operation: String::new() });
            groups.len() - 1
        });
        GroupWatch { shared: self.shared.clone(), group }
    }

    /// Ends what this rank's device is in.
    pub(super) fn abort(&self) {
        self.shared.abort();
    }

    /// Says that this rank ends in good order, or with an error of its own: nobody should look for it.
    pub(super) fn close(&self) {
        let thread = {
            let mut local = self.shared.lock();
            local.closing = true;
            local.thread.take()
        };
        if let Some(thread) = thread {
            thread.thread().unpark();
            // It ends by itself within a fraction of a second, unless a driver holds it.
            let begin = Instant::now();
            while !thread.is_finished() && begin.elapsed() < ABORT {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.close();
    }
}

/// What a run tells the watchdog of itself.
#[derive(Clone, Default)]
pub struct Watcher(Option<Shared>);

impl Watcher {
    /// How long a peer may be silent, or keep others waiting.
    pub fn set_timeout(&self, timeout: Duration) {
        self.with(|local| local.timeout = timeout);
    }

    /// Where the last collectives go when the watchdog ends the run.
    pub fn set_output(&self, output_dir: &Path) {
        self.with(|local| local.output = Some(output_dir.to_owned()));
    }

    /// Step `step`, from 1, begins: from here on there is a deadline.
    pub fn step(&self, step: usize) {
        self.with(|local| (local.status.step, local.status.slow) = (step, None));
    }

    /// Until the guard is dropped `what` takes as long as it takes.
    pub fn slow(&self, what: &str) -> Slow {
        let mut before = None;
        self.with(|local| before = local.status.slow.replace(what.to_owned()));
        Slow { watcher: self.clone(), before }
    }

    /// Has all ranks end because of `fault`, if somebody watches; whether that is so.
    pub fn fail(&self, fault: &str) -> bool {
        let mut watched = false;
        self.with(|local| {
            watched = local.thread.is_some();
            local.status.fault = Some(fault.to_owned());
        });
        watched
    }

    fn with(&self, change: impl FnOnce(&mut Local)) {
        if let Some(shared) = &self.0 {
            change(&mut shared.lock());
        }
    }
}

/// A part of a run without a deadline, while it lives.
#[must_use]
pub struct Slow {
    watcher: Watcher,
    before: Option<String>,
}

impl Drop for Slow {
    fn drop(&mut self) {
        let before = self.before.take();
        self.watcher.with(|local| local.status.slow = before);
    }
}

/// What the collectives of one group tell.
#[derive(Clone)]
pub(super) struct GroupWatch {
    shared: Shared,
    group: usize,
}

impl GroupWatch {
    /// This rank enters a collective, and is in it until the guard is dropped.
    pub(super) fn enter(&self, operation: &'static str) -> Within {
        self.start(operation);
        self.wait()
    }

    /// This rank starts a collective and goes on.
    pub(super) fn start(&self, operation: &'static str) {
        let mut guard = self.shared.lock();
        let local = &mut *guard;
        let step = local.status.step;
        let group = &mut local.status.groups[self.group];
        group.entered += 1;
        operation.clone_into(&mut group.operation);
        let (name, number) = (group.name.clone(), group.entered);
        tracing::debug!("{operation} #{number} over {name}");
        if local.flight.len() == KEPT {
            local.flight.pop_front();
        }
        local.flight.push_back(Flown { group: name, number, operation, step, entered: now(), left: None });
    }

    /// This rank waits for what it has started.
    pub(super) fn wait(&self) -> Within {
        self.within(false)
    }

    /// This rank gives its device what it has started.
    pub(super) fn on_device(&self) -> Within {
        self.within(true)
    }

    fn within(&self, on_device: bool) -> Within {
        let mut local = self.shared.lock();
        let number = local.status.groups[self.group].entered;
        local.status.inside = Some(Inside { group: self.group, number, seconds: 0.0, on_device });
        local.since = Instant::now();
        Within(self.clone())
    }

    /// The collective that was started last is `done` when its device says so; the rank goes on meanwhile.
    pub(super) fn under_way(&self, done: &Arc<Event>) {
        // What has failed is told when the watchdog's thread looks; where there is none, nobody else forgets.
        let _ = self.shared.forget_done();
        let mut local = self.shared.lock();
        let (group, number) = (self.group, local.status.groups[self.group].entered);
        local.under_way.push_back(UnderWay { group, number, since: Instant::now(), done: done.clone() });
    }

    /// From now on the watchdog's thread asks `device` whether something has failed.
    pub(super) fn look_after(&self, device: Arc<dyn DeviceComm>) {
        self.shared.lock().devices.push(device);
    }
}

/// This rank is in a collective.
pub(super) struct Within(GroupWatch);

impl Drop for Within {
    fn drop(&mut self) {
        let mut guard = self.0.shared.lock();
        let local = &mut *guard;
        local.status.inside = None;
        let name = &local.status.groups[self.0.group].name;
        let last = local.flight.iter_mut().rev().find(|flown| flown.left.is_none() && flown.group == *name);
        if let Some(last) = last {
            last.left = Some(now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_tells_where_it_is() {
        let control = Control { shared: Shared::new(), warning: None };
        let (world, shard) = (control.group("world", 0), control.group("shard", 3));
        let watcher = control.watcher();
        assert_eq!(control.shared.status().slow.as_deref(), Some("start"));
        watcher.step(7);
        let within = shard.enter("all_gather");
        let status = control.shared.status();
        assert_eq!((status.step, status.slow, status.inside.map(|inside| inside.group)), (7, None, Some(1)));
        assert_eq!((status.groups[1].entered, status.groups[1].operation.as_str()), (1, "all_gather"));
        drop(within);
        world.start("barrier");
        {
            let _saving = watcher.slow("save");
            assert_eq!(control.shared.status().slow.as_deref(), Some("save"));
        }
        let status = control.shared.status();
        assert_eq!((status.slow, status.inside, status.groups[0].entered), (None, None, 1));
    }

    #[test]
    fn the_last_collectives_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let control = Control { shared: Shared::new(), warning: None };
        let shard = control.group("shard", 0);
        control.watcher().set_output(folder.path());
        (0..KEPT + 5).for_each(|_| drop(shard.enter("all_gather")));
        let _within = shard.enter("reduce_scatter");
        control.shared.write_flight(2, "it was late");
        let text = std::fs::read_to_string(folder.path().join("flight/rank_2.json")).unwrap();
        let record: serde_json::Value = serde_json::from_str(&text).unwrap();
        let last = record["last"].as_array().unwrap();
        assert_eq!((last.len(), last[0]["number"].as_u64()), (KEPT, Some(7)));
        assert!(last[KEPT - 2]["left"].as_f64() >= last[KEPT - 2]["entered"].as_f64());
        assert_eq!(last[KEPT - 1]["operation"], "reduce_scatter");
        assert!(last[KEPT - 1]["left"].is_null() && record["ended"] == "it was late");
    }
}
