//! Panics of other people's readers at damaged files, which become errors.

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
};

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// The result of `read`; `None`: it panicked. Nothing that it has written to is used after that.
pub(super) fn guarded<T>(read: impl FnOnce() -> T) -> Option<T> {
    let before = GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(read));
    GUARDED.set(before);
    result.ok()
}

/// True while a panic of this thread becomes an error: a hook that ends the process has to let it pass.
pub fn is_guarded() -> bool {
    GUARDED.get()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Mutex, PoisonError};

    #[test]
    fn a_hook_knows_which_panic_becomes_an_error() {
        static SEEN: Mutex<Vec<bool>> = Mutex::new(Vec::new());
        let seen = || SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        std::panic::set_hook(Box::new(move |_| seen().push(is_guarded())));
        let cut: &[u8] = &[];
        assert_eq!(guarded(|| cut[0]), None);
        assert_eq!(guarded(|| 1), Some(1));
        assert!(catch_unwind(|| cut[0]).is_err());
        let _ = std::panic::take_hook();
        assert_eq!(*seen(), [true, false]);
    }
}
