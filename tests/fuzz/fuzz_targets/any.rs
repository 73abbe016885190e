//! Runs the target that `XORL_FUZZ_TARGET` names. One program, for each has to be linked with libtorch.
#![no_main]

#[path = "../targets/mod.rs"]
mod targets;

use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;
use targets::{Counted, TARGETS, Target};

#[global_allocator]
static ALLOCATOR: Counted = Counted;

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = std::env::var("XORL_FUZZ_TARGET").unwrap_or_default();
    let names = || TARGETS.iter().map(|target| target.name).collect::<Vec<_>>().join(", ");
    TARGETS.iter().find(|target| target.name == name).unwrap_or_else(|| panic!("XORL_FUZZ_TARGET is {name:?}, expected one of {}", names()))
});

fuzz_target!(
    init: {
        LazyLock::force(&TARGET);
        // libFuzzer's hook ends the process also where the program catches the panic of a reader.
        std::panic::set_hook(Box::new(|panic| {
            if std::env::var_os("XORL_FUZZ_PANICS").is_some() {
                eprintln!("{panic}\n{}", std::backtrace::Backtrace::force_capture());
            }
        }));
    },
    |input: &[u8]| TARGET.run(input)
);
