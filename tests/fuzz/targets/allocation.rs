//! An allocator that counts, and has no more where a reader takes far more memory than its input.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    ptr,
};

/// Bytes that each byte of an input may take.
const EACH: usize = 4096;

thread_local! {
    /// Bytes that this thread may still take; `None`: it is not counted.
    static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    /// The fewest that were left since [`bounded`] began.
    static FEWEST: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, counted in [`bounded`]. Rust ends the process where it gets no memory, unless it has asked
/// whether it gets some.
pub struct Counted;

/// Counts `bytes`; false if the thread may not take as many.
fn take(bytes: usize) -> bool {
    let Ok(Some(left)) = LEFT.try_with(Cell::get) else { return true };
    let Some(left) = left.checked_sub(bytes) else { return false };
    LEFT.set(Some(left));
    FEWEST.set(FEWEST.get().min(left));
    true
}

fn give_back(bytes: usize) {
    if let Ok(Some(left)) = LEFT.try_with(Cell::get) {
        LEFT.set(Some(left.saturating_add(bytes)));
    }
}

// SAFETY: every call that gets memory gets the system's; null stands for none.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !take(layout.size()) {
            return ptr::null_mut();
        }
        // SAFETY: as of the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !take(layout.size()) {
            return ptr::null_mut();
        }
        // SAFETY: as of the caller.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        give_back(layout.size());
        // SAFETY: as of the caller.
        unsafe { System.dealloc(pointer, layout) };
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        give_back(layout.size());
        if !take(size) {
            take(layout.size());
            return ptr::null_mut();
        }
        // SAFETY: as of the caller.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Runs `read` on an input of `bytes`, which may have `free` bytes of memory at a time and some more for each of its
/// own. Returns the most that it had.
pub fn bounded(free: usize, bytes: usize, read: impl FnOnce()) -> usize {
    let all = free + EACH * bytes;
    LEFT.set(Some(all));
    FEWEST.set(all);
    read();
    LEFT.set(None);
    all - FEWEST.get()
}
