//! CUDA's driver: four devices, whose streams are threads and whose memory is the host's.

use crate::{Fault, journal};
use std::{
    alloc::{Layout, alloc, dealloc},
    collections::HashMap,
    ffi::{c_char, c_int, c_uint, c_void},
    sync::{
        Arc, Condvar, LazyLock, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc::{Sender, channel},
    },
    time::Duration,
};

const DEVICES: i32 = 4;
const TOTAL: usize = 8 << 30;
/// What a process finds used before it does anything.
const USED: usize = 1 << 30;

const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 1;
const INVALID_CONTEXT: c_int = 201;
const INVALID_HANDLE: c_int = 400;
const NOT_READY: c_int = 600;

type Work = Box<dyn FnOnce() + Send>;

/// How often an event was recorded, and which of these are done.
#[derive(Default)]
struct Event {
    recorded: AtomicU64,
    done: Mutex<u64>,
    came: Condvar,
}

impl Event {
    fn finish(&self, number: u64) {
        let mut done = self.done.lock().expect("a whole event");
        *done = number.max(*done);
        self.came.notify_all();
    }

    fn wait(&self, number: u64) {
        let mut done = self.done.lock().expect("a whole event");
        while *done < number {
            done = self.came.wait(done).expect("a whole event");
        }
    }
}

/// What handles stand for.
#[derive(Default)]
struct Handles {
    next: usize,
    streams: HashMap<usize, Sender<Work>>,
    events: HashMap<usize, Arc<Event>>,
    locked: HashMap<usize, usize>,
}

static HANDLES: LazyLock<Mutex<Handles>> = LazyLock::new(Mutex::default);

thread_local! {
    static CONTEXT: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

impl Handles {
    fn new_handle(&mut self) -> usize {
        self.next += 1;
        self.next * 16
    }
}

fn handles() -> std::sync::MutexGuard<'static, Handles> {
    HANDLES.lock().expect("whole handles")
}

fn has_context() -> bool {
    CONTEXT.get() != 0
}

/// Gives `stream` work, 0 being the thread that calls. Whether there is such a stream.
pub fn enqueue(stream: usize, work: impl FnOnce() + Send + 'static) -> bool {
    if stream == 0 {
        work();
        return true;
    }
    handles().streams.get(&stream).is_some_and(|stream| stream.send(Box::new(work)).is_ok())
}

/// Some microseconds below `most`, different ones each time.
fn jitter(most: u64) -> Duration {
    static STATE: AtomicU64 = AtomicU64::new(88_172_645_463_325_252);
    let mut x = STATE.load(Ordering::Relaxed) ^ u64::from(std::process::id());
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    STATE.store(x, Ordering::Relaxed);
    Duration::from_micros(x % most)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_flags: c_uint) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(_error: c_int, text: *mut *const c_char) -> c_int {
    *text = c"an error of the stand-in".as_ptr();
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    let asked = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    *count = asked.map_or(DEVICES, |devices| devices.split(',').filter(|id| !id.is_empty()).count() as c_int);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    *device = ordinal;
    if (0..DEVICES).contains(&ordinal) { SUCCESS } else { INVALID_VALUE }
}

/// Of all attributes the compute capability is asked for.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, _attribute: c_int, _device: c_int) -> c_int {
    *value = 9;
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(id: *mut [u8; 16], device: c_int) -> c_int {
    *id = [device as u8 + 1; 16];
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) -> c_int {
    journal::write(&format!("device {device}"));
    *context = std::ptr::without_provenance_mut(device as usize + 1);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: *mut c_void) -> c_int {
    CONTEXT.set(context.addr());
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut *mut c_void, flags: c_uint) -> c_int {
    if !has_context() {
        return INVALID_CONTEXT;
    }
    let (give, take) = channel::<Work>();
    let most = std::env::var("XORL_STAND_IN_JITTER_US").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    std::thread::spawn(move || {
        for work in take {
            if most > 0 {
                std::thread::sleep(jitter(most));
            }
            work();
        }
    });
    let mut handles = handles();
    let handle = handles.new_handle();
    handles.streams.insert(handle, give);
    journal::write(&format!("stream {handle} {}", if flags == 1 { "non-blocking" } else { "blocking" }));
    *stream = std::ptr::without_provenance_mut(handle);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: *mut c_void) -> c_int {
    if handles().streams.remove(&stream.addr()).is_some() { SUCCESS } else { INVALID_HANDLE }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: *mut c_void, event: *mut c_void, _flags: c_uint) -> c_int {
    let known = handles().events.get(&event.addr()).cloned();
    let Some(known) = known else { return INVALID_HANDLE };
    journal::write(&format!("wait {} {}", stream.addr(), event.addr()));
    if Fault::asked() == Fault::IgnoresWaits {
        return SUCCESS;
    }
    let number = known.recorded.load(Ordering::Acquire);
    if enqueue(stream.addr(), move || known.wait(number)) { SUCCESS } else { INVALID_HANDLE }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut *mut c_void, _flags: c_uint) -> c_int {
    if !has_context() {
        return INVALID_CONTEXT;
    }
    let mut handles = handles();
    let handle = handles.new_handle();
    handles.events.insert(handle, Arc::default());
    *event = std::ptr::without_provenance_mut(handle);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: *mut c_void) -> c_int {
    if handles().events.remove(&event.addr()).is_some() { SUCCESS } else { INVALID_HANDLE }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: *mut c_void, stream: *mut c_void) -> c_int {
    let known = handles().events.get(&event.addr()).cloned();
    let Some(known) = known else { return INVALID_HANDLE };
    journal::write(&format!("record {} {}", event.addr(), stream.addr()));
    let number = known.recorded.fetch_add(1, Ordering::AcqRel) + 1;
    if enqueue(stream.addr(), move || known.finish(number)) { SUCCESS } else { INVALID_HANDLE }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: *mut c_void) -> c_int {
    if !has_context() {
        return INVALID_CONTEXT;
    }
    let known = handles().events.get(&event.addr()).cloned();
    let Some(known) = known else { return INVALID_HANDLE };
    let done = *known.done.lock().expect("a whole event");
    if done == known.recorded.load(Ordering::Acquire) { SUCCESS } else { NOT_READY }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> c_int {
    (*free, *total) = (TOTAL - USED, TOTAL);
    SUCCESS
}

fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes.max(1), 4096).ok()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(start: *mut *mut c_void, bytes: usize, _flags: c_uint) -> c_int {
    let Some(layout) = layout(bytes) else { return INVALID_VALUE };
    *start = alloc(layout).cast();
    journal::write(&format!("lock {bytes}"));
    handles().locked.insert((*start).addr(), bytes);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(start: *mut c_void) -> c_int {
    let bytes = handles().locked.remove(&start.addr());
    let Some(layout) = bytes.and_then(layout) else { return INVALID_VALUE };
    journal::write("unlock");
    dealloc(start.cast(), layout);
    SUCCESS
}
