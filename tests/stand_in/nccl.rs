//! NCCL: collectives as work on streams. What the ranks of one have to agree on is said with the data; who says
//! otherwise makes its communicator fail, as NCCL does behind the back of whoever called.

use crate::{Fault, driver::enqueue, exchange::Place, folder, journal, world_rank};
use std::{
    cell::RefCell,
    collections::HashMap,
    ffi::{c_char, c_int, c_void},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering},
    },
    time::Duration,
};

const SUCCESS: c_int = 0;
const INVALID_ARGUMENT: c_int = 4;
const INVALID_USAGE: c_int = 5;
const REMOTE_ERROR: c_int = 6;

const UINT8: c_int = 1;
const FLOAT: c_int = 7;
const SUM: c_int = 0;

#[repr(C)]
pub struct UniqueId([u8; 128]);

struct Comm {
    /// Short, the same on all its ranks.
    name: String,
    rank: usize,
    size: usize,
    place: Place,
    /// Collectives so far.
    number: AtomicU64,
    /// Messages so far by (from, to, whether it is the sending end).
    messages: Mutex<HashMap<(usize, usize, bool), u64>>,
    state: AtomicI32,
}

/// Collectives of this process so far, of any communicator.
static COLLECTIVES: AtomicU64 = AtomicU64::new(0);

/// A send or a receive of a group.
struct Message {
    comm: Arc<Comm>,
    from: usize,
    to: usize,
    start: usize,
    bytes: usize,
    stream: usize,
    /// Whether it is sent; a rank may send to itself.
    out: bool,
}

thread_local! {
    static GROUP: RefCell<Option<Vec<Message>>> = const { RefCell::new(None) };
}

/// Memory that a stream's thread reads and writes, as a device does: whoever calls keeps it alive.
#[derive(Clone, Copy)]
struct Memory(usize, usize);

impl Memory {
    unsafe fn read(self) -> Vec<u8> {
        std::slice::from_raw_parts(std::ptr::with_exposed_provenance(self.0), self.1).to_vec()
    }

    unsafe fn write(self, bytes: &[u8]) {
        let start = std::ptr::with_exposed_provenance_mut::<u8>(self.0);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), start, bytes.len().min(self.1));
    }
}

unsafe fn comm(raw: *mut c_void) -> Option<Arc<Comm>> {
    (!raw.is_null()).then(|| {
        let raw = raw.cast_const().cast::<Comm>();
        Arc::increment_strong_count(raw);
        Arc::from_raw(raw)
    })
}

impl Comm {
    /// Whether this rank's device does its next piece of work. One that hangs never comes back.
    fn works(&self) -> bool {
        let number = COLLECTIVES.fetch_add(1, Ordering::AcqRel);
        match Fault::asked() {
            Fault::Fails { rank, from } if rank == world_rank() && number >= from => {
                self.state.store(REMOTE_ERROR, Ordering::Release);
                self.stand();
                false
            }
            Fault::Hangs { rank, from } if rank == world_rank() && number >= from => {
                self.stand();
                false
            }
            _ => true,
        }
    }

    /// Until the communicator is aborted.
    fn stand(&self) {
        while !self.place.stopped.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Every rank's bytes for collective `number`, if all of them mean the same, which `what` says.
    fn all(&self, number: u64, what: &str, own: Vec<u8>) -> Option<Vec<Vec<u8>>> {
        let name = |number: u64, rank: usize| format!("{number}-{rank}");
        self.place.put(&name(number, self.rank), &[what.as_bytes(), b"\n", &own].concat());
        let mut all = Vec::with_capacity(self.size);
        for rank in 0..self.size {
            let bytes = self.place.get(&name(number, rank)).ok()?;
            let end = bytes.iter().position(|&byte| byte == b'\n')?;
            if &bytes[..end] != what.as_bytes() {
                eprintln!(
                    "stand-in: rank {rank} of {} is in {}, rank {} in {what}",
                    self.name,
                    String::from_utf8_lossy(&bytes[..end]),
                    self.rank
                );
                self.state.store(INVALID_USAGE, Ordering::Release);
                self.stand();
                return None;
            }
            all.push(bytes[end + 1..].to_vec());
        }
        // All have read what came before this.
        if let Some(before) = number.checked_sub(1) {
            self.place.forget(&name(before, self.rank));
        }
        Some(all)
    }
}

/// Enters a collective of `count` elements a rank, of which each rank's `result` of all ranks' bytes goes to `output`.
unsafe fn collective(
    raw: *mut c_void,
    call: &str,
    (input, output): (Memory, Memory),
    (count, kind): (usize, c_int),
    stream: *mut c_void,
    result: impl FnOnce(&Comm, Vec<Vec<u8>>) -> Vec<u8> + Send + 'static,
) -> c_int {
    let Some(comm) = comm(raw) else { return INVALID_ARGUMENT };
    let number = comm.number.fetch_add(1, Ordering::AcqRel);
    let what = format!("{call} {count} {kind}");
    journal::write(&format!("{what} of {} #{number} on {}", comm.name, stream.addr()));
    let work = move || {
        if !comm.works() {
            return;
        }
        if let Some(all) = comm.all(number, &what, input.read()) {
            output.write(&result(&comm, all));
        }
    };
    if enqueue(stream.addr(), work) { SUCCESS } else { INVALID_ARGUMENT }
}

/// The sum of all ranks' floats.
fn sum(all: &[Vec<u8>]) -> Vec<u8> {
    let floats =
        |bytes: &[u8]| bytes.as_chunks().0.iter().map(|&four| f32::from_ne_bytes(four)).collect::<Vec<_>>();
    let mut total = floats(&all[0]);
    for part in &all[1..] {
        total.iter_mut().zip(floats(part)).for_each(|(total, part)| *total += part);
    }
    total.into_iter().flat_map(f32::to_ne_bytes).collect()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> c_int {
    *version = 22_907;
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetLastError(_comm: *mut c_void) -> *const c_char {
    c"an error of the stand-in".as_ptr()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> c_int {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let text = format!("comm-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::AcqRel));
    let mut bytes = [0; 128];
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    *id = UniqueId(bytes);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRank(
    out: *mut *mut c_void,
    size: c_int,
    id: UniqueId,
    rank: c_int,
) -> c_int {
    let name = String::from_utf8_lossy(&id.0).trim_end_matches('\0').to_owned();
    let place = Place { folder: folder().join(&name), stopped: AtomicBool::new(false) };
    if std::fs::create_dir_all(&place.folder).is_err() {
        return INVALID_ARGUMENT;
    }
    journal::write(&format!("init {name} {rank} of {size}"));
    let (rank, size) = (rank as usize, size as usize);
    let number = AtomicU64::new(0);
    let comm =
        Comm { name, rank, size, place, number, messages: Mutex::default(), state: AtomicI32::new(SUCCESS) };
    // Returns when all are here, as NCCL does.
    comm.place.put(&format!("here-{rank}"), &[]);
    if (0..size).any(|rank| comm.place.get(&format!("here-{rank}")).is_err()) {
        return REMOTE_ERROR;
    }
    *out = Arc::into_raw(Arc::new(comm)).cast_mut().cast();
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommAbort(raw: *mut c_void) -> c_int {
    let Some(comm) = comm(raw) else { return INVALID_ARGUMENT };
    journal::write(&format!("abort {}", comm.name));
    comm.place.stopped.store(true, Ordering::Release);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetAsyncError(raw: *mut c_void, state: *mut c_int) -> c_int {
    let Some(comm) = comm(raw) else { return INVALID_ARGUMENT };
    *state = comm.state.load(Ordering::Acquire);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllGather(
    input: *const c_void,
    output: *mut c_void,
    count: usize,
    kind: c_int,
    comm: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    if kind != UINT8 {
        return INVALID_ARGUMENT;
    }
    let Some(size) = self::comm(comm).map(|comm| comm.size) else { return INVALID_ARGUMENT };
    let memory = (Memory(input.expose_provenance(), count), Memory(output.expose_provenance(), size * count));
    collective(comm, "all_gather", memory, (count, kind), stream, |_, all| all.concat())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclReduceScatter(
    input: *const c_void,
    output: *mut c_void,
    count: usize,
    kind: c_int,
    how: c_int,
    comm: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    if kind != FLOAT || how != SUM {
        return INVALID_ARGUMENT;
    }
    let Some(size) = self::comm(comm).map(|comm| comm.size) else { return INVALID_ARGUMENT };
    let bytes = 4 * count;
    let memory = (Memory(input.expose_provenance(), size * bytes), Memory(output.expose_provenance(), bytes));
    collective(comm, "reduce_scatter", memory, (count, kind), stream, move |comm, all| {
        let pieces: Vec<Vec<u8>> = all
            .iter()
            .map(|bytes_of| bytes_of[comm.rank * bytes..(comm.rank + 1) * bytes].to_vec())
            .collect();
        sum(&pieces)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllReduce(
    input: *const c_void,
    output: *mut c_void,
    count: usize,
    kind: c_int,
    how: c_int,
    comm: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    if kind != FLOAT || how != SUM {
        return INVALID_ARGUMENT;
    }
    let memory =
        (Memory(input.expose_provenance(), 4 * count), Memory(output.expose_provenance(), 4 * count));
    collective(comm, "all_reduce", memory, (count, kind), stream, |_, all| sum(&all))
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupStart() -> c_int {
    GROUP.set(Some(Vec::new()));
    SUCCESS
}

/// Sends and receives of a group are one piece of work, all of which go on at once.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGroupEnd() -> c_int {
    let Some(messages) = GROUP.take() else { return INVALID_USAGE };
    let Some(first) = messages.first() else { return SUCCESS };
    let (comm, stream) = (first.comm.clone(), first.stream);
    let said: Vec<String> =
        messages.iter().map(|message| format!("{}>{}:{}", message.from, message.to, message.bytes)).collect();
    journal::write(&format!("exchange {} of {} on {stream}", said.join(","), comm.name));
    let numbered: Vec<(Message, String)> = messages
        .into_iter()
        .map(|message| {
            let mut messages = comm.messages.lock().expect("whole numbers");
            let number = messages.entry((message.from, message.to, message.out)).or_default();
            *number += 1;
            let name = format!("message-{}-{}-{number}", message.from, message.to);
            (message, name)
        })
        .collect();
    let work = move || {
        if !comm.works() {
            return;
        }
        for (message, name) in numbered.iter().filter(|(message, _)| message.out) {
            comm.place.put(name, &Memory(message.start, message.bytes).read());
        }
        for (message, name) in numbered.iter().filter(|(message, _)| !message.out) {
            let Ok(bytes) = comm.place.get(name) else { return };
            comm.place.forget(name);
            if bytes.len() != message.bytes {
                eprintln!("stand-in: {name} has {} bytes, {} are waited for", bytes.len(), message.bytes);
                comm.state.store(INVALID_USAGE, Ordering::Release);
                return comm.stand();
            }
            Memory(message.start, message.bytes).write(&bytes);
        }
    };
    if enqueue(stream, work) { SUCCESS } else { INVALID_ARGUMENT }
}

unsafe fn message(
    start: usize,
    bytes: usize,
    peer: c_int,
    raw: *mut c_void,
    stream: *mut c_void,
    out: bool,
) -> c_int {
    let Some(comm) = comm(raw) else { return INVALID_ARGUMENT };
    let (own, peer, stream) = (comm.rank, peer as usize, stream.addr());
    let (from, to) = if out { (own, peer) } else { (peer, own) };
    let message = Message { comm, from, to, start, bytes, stream, out };
    GROUP.with_borrow_mut(|group| match group {
        Some(group) => {
            group.push(message);
            SUCCESS
        }
        // Outside of a group two ranks that send to each other would wait for ever.
        None => INVALID_USAGE,
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclSend(
    start: *const c_void,
    count: usize,
    kind: c_int,
    peer: c_int,
    comm: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    if kind != UINT8 {
        return INVALID_ARGUMENT;
    }
    message(start.expose_provenance(), count, peer, comm, stream, true)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclRecv(
    start: *mut c_void,
    count: usize,
    kind: c_int,
    peer: c_int,
    comm: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    if kind != UINT8 {
        return INVALID_ARGUMENT;
    }
    message(start.expose_provenance(), count, peer, comm, stream, false)
}
