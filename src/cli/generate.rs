//! The command `generate`.

use super::{DeviceChoice, GenerateArgs, ranks::on_all_ranks};
use crate::{
    error::{Error, Result},
    infer::Generation,
};
use std::process::ExitCode;

/// Carries the command out on this rank.
pub(super) fn run(args: &GenerateArgs) -> Result<ExitCode> {
    on_all_ranks(
        false,
        |_| {
            if args.device == DeviceChoice::Cuda {
                return Err(Error::Input(
                    "--device cuda: generating on GPUs is not built yet; use cpu".into(),
                ));
            }
            Generation::prepare(args.request.clone())
        },
        |generation, world| generation.execute(world).map(|()| ExitCode::SUCCESS),
    )
}
