//! The control mesh: a TCP connection from every rank to rank 0, for the watchdog and for commands.
//!
//! The watchdog ends all ranks when one has died, is silent, or does not enter a collective that others are in. It is
//! a thread on every rank that calls no MPI, because MPI may hang. Rank 0's thread receives the status of all ranks
//! and decides ([`judge`], pure). A slow phase (loading, data, saving, waiting for commands) is declared with
//! [`Watcher::slow`]: it has no deadline and needs signs of life only. The last collectives of each rank are written
//! to `{output_dir}/flight/` when the watchdog ends the run.
//!
//! Commands are bytes from rank 0 to all others ([`commands`]). They travel over the same connections in small parts
//! ([`frame`]), so that a large command does not delay a sign of life. [`rendezvous`] connects the ranks that know
//! the [`secret`] of the run, [`threads`] are the two kinds of control thread, and [`link`] is one end of a connection.

mod commands;
mod frame;
mod gather;
mod judge;
mod link;
mod rendezvous;
mod secret;
mod threads;
mod untrusted;

use super::{CommError, Communicator};
use crate::device::{DeviceError, Event};
pub use commands::{Command, CommandError, CommandReceiver, CommandSender, Commands, Delivery, WINDOW};
use link::Wakeup;
pub(super) use rendezvous::host;
use serde::{Deserialize, Serialize};
use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
pub use untrusted::read_stream;

/// Collectives kept in the flight record of a rank.
const KEPT: usize = 64;
/// Time for a device to abort its collectives, and for the thread to end. After it the process ends in any case.
const ABORT: Duration = Duration::from_secs(1);
/// `train.comm_timeout_s` until a configuration is read.
const TIMEOUT: Duration = Duration::from_secs(600);

/// State of a rank, as it reports it to rank 0.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Status {
    /// The current step, from 1; 0 before the first.
    step: usize,
    /// The slow phase that it is in, by name.
    slow: Option<String>,
    groups: Vec<Group>,
    /// The collective that the rank, or its device, is in.
    inside: Option<Inside>,
    /// An error that no call could return.
    fault: Option<String>,
}

/// Collectives of a rank over one of its groups.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Group {
    name: String,
    /// Distinguishes groups of one name.
    color: usize,
    /// Collectives entered so far.
    entered: u64,
    /// Name of the last one.
    operation: String,
}

/// A collective that has not ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Inside {
    /// Index into [`Status::groups`].
    group: usize,
    /// Its number among the group's collectives, from 1.
    number: u64,
    /// Time since the rank entered it.
    seconds: f64,
    /// The device is in it; the rank may have gone on.
    on_device: bool,
}

/// A communicator of a device, as the control thread sees it.
pub(super) trait DeviceComm: Send + Sync {
    /// An error since the last call, if there was one.
    fn fault(&self) -> Option<String>;
    /// Aborts its collectives. May hang, as they may.
    fn abort(&self);
}

/// A collective that was enqueued on the device.
struct UnderWay {
    group: usize,
    number: u64,
    since: Instant,
    done: Arc<Event>,
}

/// A collective in the flight record.
#[derive(Clone, Debug, Serialize)]
struct Flown {
    group: String,
    /// Its number among the group's collectives, from 1.
    number: u64,
    operation: &'static str,
    step: usize,
    /// Seconds since 1970.
    entered: f64,
    /// Seconds since 1970; `None`: it had not ended when the process did.
    left: Option<f64>,
}

/// State of this rank.
struct Local {
    status: Status,
    /// When the rank entered the collective that it is in.
    since: Instant,
    under_way: VecDeque<UnderWay>,
    devices: Vec<Arc<dyn DeviceComm>>,
    flight: VecDeque<Flown>,
    timeout: Duration,
    /// Directory of the flight record.
    output: Option<PathBuf>,
    /// Called before the watchdog ends the process.
    on_end: Option<Box<dyn FnOnce() + Send>>,
    /// The control thread and its wakeup.
    thread: Option<(JoinHandle<()>, Wakeup)>,
    closing: bool,
}

/// State of this rank, shared by its communicators and its control thread.
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
            on_end: None,
            thread: None,
            closing: false,
        };
        Self(Arc::new(Mutex::new(local)))
    }

    fn lock(&self) -> MutexGuard<'_, Local> {
        // Every change is valid on its own, also where a panic came after it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The status to report now.
    fn status(&self) -> Status {
        let fault = self.forget_done().err().map(|error| error.to_string());
        let local = self.lock();
        let mut status = local.status.clone();
        // The first unfinished collective of the device is what the rank waits for in the end.
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

    /// Removes finished collectives of the device. The driver is called without the lock: it may block, and then only
    /// the signs of life stop.
    ///
    /// # Errors
    /// The device reports an error.
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

    /// Aborts the collectives of devices, and waits for that [`ABORT`] at most.
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

    /// Writes the flight record to `{output_dir}/flight/rank_{rank}.json`, if that directory is known and exists.
    fn write_flight(&self, rank: usize, verdict: &str) {
        let local = self.lock();
        let Some(output) = local.output.as_ref().filter(|output| output.is_dir()) else { return };
        let folder = output.join("flight");
        let record = serde_json::json!({"rank": rank, "ended": verdict, "last": local.flight});
        // An error here is ignored: the process ends in any case, and its reason is on stderr.
        let _ = std::fs::create_dir_all(&folder).and_then(|()| {
            std::fs::write(folder.join(format!("rank_{rank}.json")), record.to_string() + "\n")
        });
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// This rank's part of the mesh. A world of one rank has none.
pub struct Control {
    shared: Shared,
    commands: Result<Commands, CommandError>,
    /// Says that some ranks are not watched. It is printed later: the mesh opens before there is a log.
    pub(super) warning: Option<String>,
}

impl Control {
    /// Opens the mesh over all ranks of `world`. Collective. Ranks that cannot reach rank 0 continue unwatched.
    pub(super) fn open(world: &dyn Communicator) -> Result<Self, CommError> {
        let shared = Shared::new();
        let rendezvous::Opened { thread, commands, warning } = rendezvous::open(world, &shared)?;
        shared.lock().thread = thread;
        Ok(Self { shared, commands, warning })
    }

    /// This rank's end of the command channel.
    pub(super) fn commands(&self) -> Result<Commands, CommandError> {
        self.commands.clone()
    }

    /// The handle by which the run reports its state.
    pub fn watcher(&self) -> Watcher {
        Watcher(Some(self.shared.clone()))
    }

    /// The handle by which the collectives of a group report.
    pub(super) fn group(&self, name: &str, color: usize) -> GroupWatch {
        let mut local = self.shared.lock();
        let groups = &mut local.status.groups;
        // Communicators of one group share a count: ranks enter the collectives of all of them in one order.
        let known = groups.iter().position(|group| (group.name.as_str(), group.color) == (name, color));
        let group = known.unwrap_or_else(|| {
            groups.push(Group { name: name.to_owned(), color, entered: 0, operation: String::new() });
            groups.len() - 1
        });
        GroupWatch { shared: self.shared.clone(), group }
    }

    /// Aborts the collectives of this rank's device.
    pub(super) fn abort(&self) {
        self.shared.abort();
    }

    /// Announces that this rank ends, in good order or with an error of its own, so that its silence is no fault.
    pub(super) fn close(&self) {
        let thread = {
            let mut local = self.shared.lock();
            local.closing = true;
            local.thread.take()
        };
        if let Some((thread, wakeup)) = thread {
            wakeup.wake();
            // The thread ends within a fraction of a second, unless a driver call blocks it.
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

/// Reports the state of a run to the watchdog; does nothing in a world of one rank.
#[derive(Clone, Default)]
pub struct Watcher(Option<Shared>);

impl Watcher {
    /// Sets how long a rank may be silent, or keep others waiting.
    pub fn set_timeout(&self, timeout: Duration) {
        self.with(|local| local.timeout = timeout);
    }

    /// Sets the directory of the flight record.
    pub fn set_output(&self, output_dir: &Path) {
        self.with(|local| local.output = Some(output_dir.to_owned()));
    }

    /// Has `act` called when the watchdog is about to end this process, about a second before it does.
    pub fn on_end(&self, act: impl FnOnce() + Send + 'static) {
        self.with(|local| local.on_end = Some(Box::new(act)));
    }

    /// Begins step `step`, from 1. Steps have a deadline.
    pub fn step(&self, step: usize) {
        self.with(|local| (local.status.step, local.status.slow) = (step, None));
    }

    /// Begins the slow phase `name`, without a deadline. It ends when the guard is dropped.
    pub fn slow(&self, name: &str) -> Slow {
        let mut before = None;
        self.with(|local| before = local.status.slow.replace(name.to_owned()));
        Slow { watcher: self.clone(), before }
    }

    /// Ends all ranks because of `fault`, if this rank is watched. Returns whether it is.
    pub fn fail(&self, fault: &str) -> bool {
        let mut watched = false;
        self.with(|local| {
            watched = local.thread.is_some();
            local.status.fault = Some(fault.to_owned());
        });
        watched
    }

    /// Calls `act`, which ends this process. Until then its watchdog judges no other rank that ends as well.
    pub fn last_act<T>(&self, act: impl FnOnce() -> T) -> T {
        let _watchdog_waits = self.0.as_ref().map(Shared::lock);
        act()
    }

    fn with(&self, change: impl FnOnce(&mut Local)) {
        if let Some(shared) = &self.0 {
            change(&mut shared.lock());
        }
    }
}

/// A slow phase, until this is dropped.
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

/// Reports the collectives of one group.
#[derive(Clone)]
pub(super) struct GroupWatch {
    shared: Shared,
    group: usize,
}

impl GroupWatch {
    /// Enters a collective. The rank is in it until the guard is dropped.
    pub(super) fn enter(&self, operation: &'static str) -> Within {
        self.start(operation);
        self.wait()
    }

    /// Starts a collective that the rank does not wait for yet.
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

    /// Waits for the collective that was started last, until the guard is dropped.
    pub(super) fn wait(&self) -> Within {
        self.within(false)
    }

    /// Enqueues the collective that was started last on the device, until the guard is dropped.
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

    /// Records that the device ends the collective that was started last with the event `done`.
    pub(super) fn under_way(&self, done: &Arc<Event>) {
        // Called here too, for ranks without a control thread. The control thread finds and reports the error.
        let _ = self.shared.forget_done();
        let mut local = self.shared.lock();
        let (group, number) = (self.group, local.status.groups[self.group].entered);
        local.under_way.push_back(UnderWay { group, number, since: Instant::now(), done: done.clone() });
    }

    /// Registers `device`: the control thread asks it for errors.
    pub(super) fn look_after(&self, device: Arc<dyn DeviceComm>) {
        self.shared.lock().devices.push(device);
    }
}

/// A collective that this rank is in, until this is dropped.
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

    fn control() -> Control {
        let commands = Ok(Commands::Sender(CommandSender::solo()));
        Control { shared: Shared::new(), commands, warning: None }
    }

    #[test]
    fn a_rank_reports_its_state() {
        let control = control();
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
        let control = control();
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
