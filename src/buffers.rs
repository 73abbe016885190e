//! Host memory for activations and temporaries, reused from operation to operation and from step to step.
//!
//! A fresh allocation of megabytes costs a page fault for every 4 KiB, which was measured to cost as much as some of
//! the operations. So a pool of each thread keeps blocks that are free and gives them to the next buffer of about their
//! size. When none fits and all together would exceed the most bytes ever in use at a time, the longest unused blocks
//! go back to the system. A step then settles in one set of blocks and never takes more than its own peak. For that to
//! hold for the process, malloc must return freed blocks to the system: [`return_large_blocks`].
//!
//! A block goes back to a pool when libtorch frees the storage that lies in it: after the last tensor that views it.
//!
//! Tensors of other devices come from libtorch, which has such a pool for them.

use mimalloc::MiMalloc;
use std::{
    alloc::{GlobalAlloc, Layout, System, alloc, dealloc},
    cell::RefCell,
    cmp::Reverse,
    collections::VecDeque,
    ffi::{c_int, c_void},
    ops::{Deref, DerefMut},
    ptr::{NonNull, null, null_mut},
};
use tch::{Device, Kind, Tensor};

/// The program's allocator: blocks of at most 4 KiB by mimalloc, others by the system's malloc, which returns
/// them ([`return_large_blocks`]). Tokenising takes some small blocks a word.
pub struct SmallBlocks;

/// Bytes of a block up to which mimalloc, which keeps what is freed, has it.
const SMALL_BYTES: usize = 1 << 12;

// SAFETY: the size, which the caller gives again with a block, says which of two allocators has it.
unsafe impl GlobalAlloc for SmallBlocks {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as of the caller.
        unsafe { if layout.size() <= SMALL_BYTES { MiMalloc.alloc(layout) } else { System.alloc(layout) } }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let is_small = layout.size() <= SMALL_BYTES;
        // SAFETY: as of the caller.
        unsafe { if is_small { MiMalloc.alloc_zeroed(layout) } else { System.alloc_zeroed(layout) } }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        let is_small = layout.size() <= SMALL_BYTES;
        // SAFETY: the block is of the allocator that its size says.
        unsafe { if is_small { MiMalloc.dealloc(start, layout) } else { System.dealloc(start, layout) } }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        match (layout.size() <= SMALL_BYTES, size <= SMALL_BYTES) {
            // SAFETY: the block is of mimalloc, and stays there.
            (true, true) => unsafe { MiMalloc.realloc(start, layout, size) },
            // SAFETY: the block is of the system, and stays there.
            (false, false) => unsafe { System.realloc(start, layout, size) },
            // SAFETY: the caller keeps the rules of realloc, so `size` is a size of a layout, both blocks have the
            // bytes that are copied, and the old one is given back once, where the new one was had.
            _ => unsafe {
                let moved = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
                if !moved.is_null() {
                    moved.copy_from_nonoverlapping(start, size.min(layout.size()));
                    self.dealloc(start, layout);
                }
                moved
            },
        }
    }
}

/// Bytes below which malloc serves a buffer, which reuses small blocks well.
const LEAST_BYTES: usize = 1 << 18;

/// Bytes from which on malloc maps a block, which is unmapped when it is freed.
const MAPPED_BYTES: i32 = 1 << 20;

/// Free bytes at the end of the heap that malloc keeps.
const KEPT_BYTES: i32 = 1 << 26;

/// Alignment of a block: a cache line, as libtorch's own allocator gives.
const ALIGNMENT: usize = 64;

/// The index in libtorch's `cpu`; `cpu:0` would be another device to it.
const CPU_INDEX: i32 = -1;

/// Makes malloc return large blocks to the system at once. By default glibc raises the size from which it does so to 32
/// MiB over time. The heap's holes then made SmolLM2's peak RSS up to 25 % larger from run to run, at the same speed.
pub fn return_large_blocks() {
    // SAFETY: mallopt takes two numbers, and refuses parameters that it does not know.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
    }
}

/// Returns the free pages between malloc's live blocks to the system. malloc keeps them: after three minutes of 64
/// clients, the heap of a server's rank 0 had 21 MiB of them, three times as many as a minute and a half before.
pub fn return_free_pages() {
    // SAFETY: malloc_trim takes a number, and changes no block that is in use.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// An owned block of memory, of any content.
struct Block {
    start: NonNull<u8>,
    bytes: usize,
}

impl Block {
    /// `bytes` is not 0.
    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, ALIGNMENT)
            .unwrap_or_else(|error| panic!("a block of {bytes} bytes: {error}"))
    }

    fn new(bytes: usize) -> Self {
        let layout = Self::layout(bytes.max(1));
        // SAFETY: the layout has at least one byte.
        let start = unsafe { alloc(layout) };
        // A panic, as libtorch's allocator panics, and no abort: it ends all ranks in one line.
        let start = NonNull::new(start).unwrap_or_else(|| panic!("can't allocate memory for {bytes} bytes"));
        Self { start, bytes: layout.size() }
    }

    /// Gives the block to a tensor [bytes] u8, whose storage returns it to a pool when it is freed.
    fn into_tensor(self, bytes: usize) -> Tensor {
        assert!(bytes <= self.bytes, "{bytes} bytes of a block of {}", self.bytes);
        let block = std::mem::ManuallyDrop::new(self);
        // SAFETY: the block is `bytes` bytes and more, which are the storage's alone until libtorch calls `put_back`
        // with its address and size.
        unsafe { tensor_at(block.start, bytes, put_back, block.bytes) }
    }
}

/// A tensor [bytes] u8 in the memory at `start`. When its storage is freed, `free` is called with `start` and
/// `context`.
///
/// # Safety
/// The memory is `bytes` bytes that are the storage's alone until then.
unsafe fn tensor_at(
    start: NonNull<u8>,
    bytes: usize,
    free: unsafe extern "C" fn(*mut c_void, *mut c_void),
    context: usize,
) -> Tensor {
    let (size, stride, mut tensor) = (bytes as i64, 1, null_mut());
    // SAFETY: the caller gives the memory. libtorch copies size and stride, and sets `tensor` to a tensor of ours if it
    // returns 0.
    let code = unsafe {
        let (u8s, cpu, strided) =
            (aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), aoti_torch_layout_strided());
        let (start, owned) = (start.as_ptr().cast(), std::ptr::without_provenance_mut(context));
        torch_from_blob(
            start,
            1,
            &raw const size,
            &raw const stride,
            0,
            u8s,
            cpu,
            CPU_INDEX,
            &raw mut tensor,
            strided,
            null(),
            0,
            free,
            owned,
        )
    };
    assert_eq!(code, 0, "torch_from_blob of {bytes} bytes");
    // SAFETY: a handle of libtorch's C interface is an at::Tensor made by new, as tch's pointers are; this one is ours.
    unsafe { Tensor::from_ptr(tensor.cast()) }
}

/// Zeros on `device`. On the host a page of them takes memory when it is written first.
pub fn zeros_on_demand(shape: &[i64], kind: Kind, device: Device) -> Tensor {
    let bytes = shape.iter().product::<i64>() as usize * kind.elt_size_in_bytes();
    if device != Device::Cpu || bytes == 0 {
        return Tensor::zeros(shape, (kind, device));
    }
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the system's choice, of no file.
    let start = unsafe {
        libc::mmap(
            null_mut(),
            bytes,
            access,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    let mapped = NonNull::new(start.cast()).filter(|_| start != libc::MAP_FAILED);
    let start = mapped.unwrap_or_else(|| panic!("can't map {bytes} bytes"));
    // SAFETY: the mapping is `bytes` bytes, which nobody else knows, until `unmap` gets its address and size.
    let tensor = unsafe { tensor_at(start, bytes, unmap, bytes) };
    tensor.view_dtype(kind).view(shape)
}

/// Unmaps the memory of a freed storage.
unsafe extern "C" fn unmap(start: *mut c_void, bytes: *mut c_void) {
    // SAFETY: `zeros_on_demand` has mapped these bytes, and the last tensor in them has gone.
    unsafe { libc::munmap(start, bytes.addr()) };
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: `new` took the memory with this layout, and the block owns it.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.bytes)) };
    }
}

/// Puts the block of a freed storage into the pool of the thread that freed it.
unsafe extern "C" fn put_back(start: *mut c_void, bytes: *mut c_void) {
    let Some(start) = NonNull::new(start.cast()) else { return };
    let block = Block { start, bytes: bytes.addr() };
    if cfg!(debug_assertions) {
        // All ones are NaN in every floating-point kind: reading a new buffer before writing it is found out.
        // SAFETY: the block is `bytes` bytes, and the last tensor in it has gone.
        unsafe { block.start.write_bytes(0xff, block.bytes) };
    }
    // At the end of a thread its pool may be gone; the block is then freed.
    let _ = POOL.try_with(|pool| pool.borrow_mut().put(block));
}

// SAFETY: libtorch exports these functions with these signatures (torch/csrc/stable/c/shim.h, aoti_torch/c/shim.h), a
// stable C interface. tch has no tensor that frees its memory through a function of ours.
unsafe extern "C" {
    fn aoti_torch_dtype_uint8() -> i32;
    fn aoti_torch_device_type_cpu() -> i32;
    fn aoti_torch_layout_strided() -> i32;
    fn torch_from_blob(
        data: *mut c_void,
        dimensions: i64,
        sizes: *const i64,
        strides: *const i64,
        storage_offset: i64,
        dtype: i32,
        device_type: i32,
        device_index: i32,
        tensor: *mut *mut c_void,
        layout: i32,
        opaque_metadata: *const u8,
        opaque_metadata_size: i64,
        deleter: unsafe extern "C" fn(*mut c_void, *mut c_void),
        deleter_context: *mut c_void,
    ) -> c_int;
}

/// A thread's blocks.
#[derive(Default)]
struct Pool {
    /// Free blocks, the longest unused first.
    free: VecDeque<Block>,
    /// Bytes in use.
    used: usize,
    /// The most bytes in use at a time so far.
    most: usize,
}

thread_local! {
    static POOL: RefCell<Pool> = RefCell::default();
}

impl Pool {
    /// A block of at least `bytes`.
    fn take(&mut self, bytes: usize) -> Block {
        let fitting = self.free.iter().enumerate().map(|(i, block)| (block.bytes, Reverse(i)));
        // Among blocks of one size the one used last: it may still be in a cache.
        let best = fitting.filter(|&(size, _)| (bytes..=bytes + bytes / 4).contains(&size)).min();
        let found = best.and_then(|(_, Reverse(i))| self.free.remove(i));
        self.used += found.as_ref().map_or(bytes, |block| block.bytes);
        self.most = self.most.max(self.used);
        while self.used + self.unused() > self.most && self.free.pop_front().is_some() {}
        found.unwrap_or_else(|| Block::new(bytes))
    }

    fn put(&mut self, block: Block) {
        // The block may be one that another thread took.
        self.used = self.used.saturating_sub(block.bytes);
        self.free.push_back(block);
    }

    /// Bytes of free blocks.
    fn unused(&self) -> usize {
        self.free.iter().map(|block| block.bytes).sum()
    }
}

/// A tensor with memory of the pool, which gets it back when this and every view of it have been dropped.
#[derive(Debug)]
pub struct Buffer(Tensor);

impl Buffer {
    /// A tensor of any content.
    pub fn empty(shape: &[i64], kind: Kind, device: Device) -> Self {
        let bytes = shape.iter().product::<i64>() as usize * kind.elt_size_in_bytes();
        if device != Device::Cpu || bytes < LEAST_BYTES {
            return Self(Tensor::empty(shape, (kind, device)));
        }
        let block = POOL.with_borrow_mut(|pool| pool.take(bytes));
        Self(block.into_tensor(bytes).view_dtype(kind).view(shape))
    }

    /// A tensor of any content, of the shape, kind and device of `tensor`.
    pub fn like(tensor: &Tensor) -> Self {
        Self::empty(&tensor.size(), tensor.kind(), tensor.device())
    }
}

impl From<Tensor> for Buffer {
    /// A tensor with memory of libtorch's allocator.
    fn from(tensor: Tensor) -> Self {
        Self(tensor)
    }
}

impl Deref for Buffer {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut Tensor {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(elements: i64) -> (Buffer, usize) {
        let buffer = Buffer::empty(&[elements], Kind::Float, Device::Cpu);
        let address = buffer.data_ptr().addr();
        (buffer, address)
    }

    fn unused() -> usize {
        POOL.with_borrow(Pool::unused)
    }

    #[test]
    fn a_block_that_changes_its_size_keeps_its_bytes() {
        for [before, after] in [[100, 200], [100, 5000], [4096, 4097], [5000, 100], [5000, 9000]] {
            let layout = |bytes| Layout::from_size_align(bytes, 8).unwrap();
            // SAFETY: no size is 0, and each block is given back with the layout that it was had with.
            unsafe {
                let block = SmallBlocks.alloc_zeroed(layout(before));
                let bytes = std::slice::from_raw_parts_mut(block, before);
                assert!(bytes.iter().all(|&byte| byte == 0), "{before}");
                bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = i as u8);
                let block = SmallBlocks.realloc(block, layout(before), after);
                let bytes = std::slice::from_raw_parts(block, before.min(after));
                assert!(bytes.iter().enumerate().all(|(i, &byte)| byte == i as u8), "{before} to {after}");
                SmallBlocks.dealloc(block, layout(after));
            }
        }
    }

    #[test]
    fn zeros_on_demand_take_memory_when_they_are_written() {
        let resident = || {
            let status = std::fs::read_to_string("/proc/self/statm").unwrap();
            status.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
        };
        let before = resident();
        let zeros = zeros_on_demand(&[1 << 14, 1 << 14], Kind::Float, Device::Cpu);
        let _ = zeros.get(5000).fill_(1.5);
        assert_eq!(zeros.get(5001).abs().sum(Kind::Float).double_value(&[]), 0.0);
        assert_eq!(zeros.get(5000).sum(Kind::Float).double_value(&[]), 1.5 * f64::from(1 << 14));
        assert!(resident() < before + (200 << 20), "of 1 GiB");
        assert_eq!(zeros_on_demand(&[0, 3], Kind::Half, Device::Cpu).size(), [0, 3]);
    }

    #[test]
    fn dropped_blocks_are_reused() {
        let n = LEAST_BYTES as i64;
        let (first, at) = taken(n);
        drop(first);
        let (second, again) = taken(n - 5);
        assert_eq!((second.size(), again), (vec![n - 5], at));
        if cfg!(debug_assertions) {
            assert!(second.isnan().all().int64_value(&[]) == 1, "a new buffer is not a number");
        }
        let (third, elsewhere) = taken(n);
        assert_ne!(elsewhere, at);
        assert!(at.is_multiple_of(ALIGNMENT) && elsewhere.is_multiple_of(ALIGNMENT), "{at} {elsewhere}");
        drop(second);
        drop(third);
        assert_eq!(unused(), 8 * n as usize);
        // The block used last comes first.
        let (third, first_again) = taken(n);
        assert_eq!(first_again, elsewhere);
        drop(third);
        // A larger buffer takes the place of both blocks; a much smaller one does not use up a large block.
        let large = taken(2 * n).0;
        assert_eq!(unused(), 0);
        drop(large);
        let small = taken(n / 2).0;
        assert_eq!(unused(), 0);
        drop(small);
        assert_eq!(unused(), 2 * n as usize);
    }

    #[test]
    fn a_view_keeps_its_block_from_the_pool() {
        let n = LEAST_BYTES as i64;
        let (mut first, at) = taken(n);
        let _ = first.fill_(3.0);
        let view = first.narrow(0, 5, 2);
        drop(first);
        assert_eq!(unused(), 0);
        let (mut second, elsewhere) = taken(n);
        let _ = second.fill_(4.0);
        assert_ne!(elsewhere, at);
        assert_eq!(view, Tensor::from_slice(&[3f32, 3.0]));
        // The last view may go on another thread, and after its own.
        let view = std::thread::spawn(move || view.get(0)).join().unwrap();
        assert_eq!(unused(), 0);
        drop(view);
        assert_eq!(unused(), 4 * n as usize);
    }

    #[test]
    fn small_buffers_are_not_kept() {
        drop(taken(7));
        assert_eq!(unused(), 0);
    }
}
