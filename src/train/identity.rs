//! Compares all ranks before they train or serve: program, configuration, model and data, and after a resume the steps
//! that are left. A rank with an old binary or another copy of a file would train, and nobody would know on what.

use super::Run;
use crate::{
    comm::Communicator,
    error::{Error, Result, agree},
    model::quantized,
};
use object::Object;
use serde::{Deserialize, Serialize};

/// Program and inputs of a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Version, and the linker's number of this very build.
    program: String,
    /// Resolved, as YAML.
    config: String,
    /// [`quantized::digest`]
    model: String,
    /// [`crate::data::Dataset::fingerprint`], and that of the rows that validate.
    data: String,
}

impl Run {
    /// Compares program and inputs of the ranks, before anything is read of an earlier run. Collective.
    ///
    /// # Errors
    /// The first rank that differs from rank 0 says in what; the others return [`Error::Elsewhere`].
    pub fn same_on_all_ranks(&self, world: &dyn Communicator) -> Result<()> {
        agree(world, self.identity())?.same_on_all_ranks(world)
    }

    /// Compares what the ranks have taken over from a step: fields of the configuration, and the steps that are left.
    /// Collective.
    ///
    /// # Errors
    /// See [`same_on_all_ranks`](Self::same_on_all_ranks).
    pub(super) fn same_plan_on_all_ranks(&self, world: &dyn Communicator) -> Result<()> {
        let (done, next) = self.standing();
        let left =
            format!("steps {done} to {}, from row {} of epoch {}", self.total_steps, next.row, next.epoch);
        let own = self.config.to_yaml() + &left;
        let all = world.all_gather_host(own.as_bytes())?;
        let first = all.first().map(|bytes| String::from_utf8_lossy(bytes)).unwrap_or_default();
        let differs = differing_line(&own, &first);
        same(
            world,
            differs.map(|(own, first)| format!("resumes otherwise than rank 0: `{own}`, not `{first}`")),
        )
    }

    /// Digest of the base as it is stored: of the model's tensors, and the format in which they are packed.
    pub(super) fn base_digest(&self) -> Result<String> {
        Ok(quantized::digest(self.source.as_ref(), self.spec.quantization.as_ref())?)
    }

    fn identity(&self) -> Result<Identity> {
        let data = self.dataset.fingerprint().to_owned() + &self.dataset.validation_fingerprint();
        Ok(Identity::new(self.config.to_yaml(), self.base_digest()?, data))
    }
}

impl Identity {
    /// This program with a resolved configuration as YAML, the digest of a model, and the fingerprint of data.
    pub fn new(config: String, model: String, data: String) -> Self {
        let program = format!("{} {}", env!("CARGO_PKG_VERSION"), build_id().unwrap_or_default());
        Self { program, config, model, data }
    }

    /// Compares the ranks. Collective.
    ///
    /// # Errors
    /// The first rank that differs from rank 0 says in what; the others return [`Error::Elsewhere`].
    pub fn same_on_all_ranks(&self, world: &dyn Communicator) -> Result<()> {
        let all = world.all_gather_host(&serde_json::to_vec(self).unwrap_or_default())?;
        let first = all.first().and_then(|bytes| serde_json::from_slice::<Self>(bytes).ok());
        // An identity that cannot be read is another program's.
        let another = || Some("runs another xorl-dist than rank 0: start one on all hosts".to_owned());
        let differs = first.map_or_else(another, |first| self.difference(&first));
        same(world, differs)
    }

    /// The first difference of a rank from the `first`, to stand behind the rank's number.
    fn difference(&self, first: &Self) -> Option<String> {
        if self.program != first.program {
            let (own, first) = (&self.program, &first.program);
            return Some(format!(
                "runs another xorl-dist ({own}) than rank 0 ({first}): start one on all hosts"
            ));
        }
        if let Some((own, first)) = differing_line(&self.config, &first.config) {
            return Some(format!("has another configuration than rank 0: `{own}`, not `{first}`"));
        }
        if self.model != first.model {
            return Some("sees other model files than rank 0: give all hosts the same".into());
        }
        (self.data != first.data).then(|| "sees other data than rank 0: give all hosts the same".into())
    }
}

/// The end of a comparison on all ranks: `differs` is this rank's difference from rank 0. Collective.
fn same(world: &dyn Communicator, differs: Option<String>) -> Result<()> {
    let verdict = match differs {
        None => Ok(()),
        Some(what) => Err(Error::Input(format!("rank {} {what}", world.rank()))),
    };
    agree(world, verdict)
}

/// The first line in which two texts differ, of both.
fn differing_line<'a>(own: &'a str, first: &'a str) -> Option<(&'a str, &'a str)> {
    if own == first {
        return None;
    }
    let differing = own.lines().zip(first.lines()).find(|(own, first)| own != first);
    Some(differing.map_or(("more", "less"), |(own, first)| (own.trim(), first.trim())))
}

/// The linker's number of this build; `None` where it was told to give none.
fn build_id() -> Option<String> {
    let file = std::fs::File::open("/proc/self/exe").ok()?;
    let headers = object::ReadCache::new(file);
    let program = object::File::parse(&headers).ok()?;
    Some(program.build_id().ok()??.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_thing_that_differs_is_named() {
        let first = Identity {
            program: "0.1.0 ab".into(),
            config: "train:\n  lr: 1e-4\n  seed: 42\n".into(),
            model: "m".into(),
            data: "d".into(),
        };
        assert_eq!(first.difference(&first), None);
        let with = |change: &dyn Fn(&mut Identity)| {
            let mut own = first.clone();
            change(&mut own);
            own.difference(&first).unwrap()
        };
        assert!(
            with(&|own| own.program = "0.1.0 cd".into())
                .contains("another xorl-dist (0.1.0 cd) than rank 0 (0.1.0 ab)")
        );
        let config = with(&|own| own.config = own.config.replace("1e-4", "2e-4"));
        assert!(config.contains("`lr: 2e-4`, not `lr: 1e-4`"), "{config}");
        assert!(with(&|own| own.model = "n".into()).contains("other model files"));
        assert!(with(&|own| own.data = "e".into()).contains("other data"));
    }

    #[test]
    fn this_program_has_a_number() {
        assert!(build_id().is_some_and(|id| id.len() >= 16));
    }
}
