//! Adapters that go to disk and come back, and the room that they take.

use super::{Driver, Unmet};
use crate::{
    Result,
    server::{
        engine::{
            command::Command,
            handle::Asked,
            plan::MicroBatch,
            residence::{Moves, Need},
        },
        request::{AdapterSpec, ModelId, Refusal, Task, Usage},
    },
};
use std::{
    collections::BTreeMap,
    time::{SystemTime, UNIX_EPOCH},
};

/// Phases of a rank that moves an adapter.
const SPILL: &str = "move to disk";
const RESTORE: &str = "return from disk";

/// Now, in Unix seconds.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The refusal of a request because another adapter, perhaps of another tenant, could not make room for its own.
fn without_room(unmet: Unmet) -> Unmet {
    match unmet {
        Unmet::Refused(refusal) => Refusal::Server(format!(
            "there is no room in memory, for an adapter that is not in use cannot go to disk: {refusal}"
        ))
        .into(),
        failed => failed,
    }
}

impl Driver {
    /// Brings `wanted` into memory, with room for one more adapter of `new`. Those that were used longest ago make
    /// room.
    ///
    /// # Errors
    /// An adapter cannot go to disk or come back. Each is in one of both places then.
    pub(super) fn make_room(&mut self, wanted: &[ModelId], new: Option<Need>) -> Result<(), Unmet> {
        let Some(Moves { spill, restore }) = self.residence.moves(wanted, new) else {
            let why = "the adapters of the request have no room in memory together";
            return Err(Refusal::Server(why.into()).into());
        };
        spill.iter().try_for_each(|model| self.spill(model)).map_err(without_room)?;
        restore.iter().try_for_each(|model| self.restore(model))?;
        self.residence.used(wanted, now());
        Ok(())
    }

    /// Brings those of `wanted` into memory that can come, and returns the reason of each other. An adapter that is
    /// there stays.
    ///
    /// # Errors
    /// This rank has failed.
    pub(super) fn bring(&mut self, wanted: &[ModelId]) -> Result<BTreeMap<ModelId, Refusal>> {
        let (mut present, away): (Vec<ModelId>, Vec<ModelId>) =
            wanted.iter().cloned().partition(|model| self.residence.is_in_memory(model));
        self.residence.used(&present, now());
        let mut absent = BTreeMap::new();
        for model in away {
            present.push(model.clone());
            match self.make_room(&present, None) {
                Ok(()) => {}
                Err(Unmet::Refused(refusal)) => {
                    present.pop();
                    absent.insert(model, refusal);
                }
                Err(Unmet::Failed(error)) => return Err(error),
            }
        }
        Ok(absent)
    }

    /// Moves an adapter that is in memory to disk.
    pub(super) fn spill(&mut self, model: &ModelId) -> Result<(), Unmet> {
        let bytes = self.models.bytes_on_disk(model);
        let checked = self.storage.check(bytes, "an adapter that leaves memory");
        checked.map_err(|full| Refusal::Server(full.to_string()))?;
        self.files += 1;
        let number = self.files;
        let _moving = self.ranks.watcher.clone().slow(SPILL);
        self.ranks.tell(&Command::Spill { model: model.clone(), number })?;
        self.models.spill(model, number)??;
        self.residence.moved(model, false);
        self.storage.changed(0, bytes);
        self.usage.spilled += 1;
        Ok(())
    }

    /// Brings an adapter back from disk.
    fn restore(&mut self, model: &ModelId) -> Result<(), Unmet> {
        let bytes = self.models.bytes_on_disk(model);
        let _moving = self.ranks.watcher.clone().slow(RESTORE);
        self.ranks.tell(&Command::Restore { model: model.clone() })?;
        self.models.restore(model)??;
        self.residence.moved(model, true);
        self.storage.changed(bytes, 0);
        self.usage.restored += 1;
        Ok(())
    }

    /// Checks that an adapter of `spec`, of `need`, fits in memory if all others leave.
    ///
    /// # Errors
    /// It does not; the text names the largest rank that does.
    pub(super) fn check_fits(&self, spec: &AdapterSpec, need: Need) -> Result<(), Refusal> {
        if self.residence.fits_alone(need) {
            return Ok(());
        }
        let fits = |rank: usize| {
            let need = self.models.need(&AdapterSpec { rank, ..spec.clone() });
            need.is_ok_and(|need| self.residence.fits_alone(need))
        };
        // The largest that fits is in `least..most`; 0: none.
        let (mut least, mut most) = (0, spec.rank);
        while most - least > 1 {
            let middle = least + (most - least) / 2;
            if fits(middle) { least = middle } else { most = middle }
        }
        let (room, needed) = (self.residence.room(), need.held.saturating_add(need.at_work));
        let free = room.saturating_sub(self.residence.held());
        let largest = match least {
            0 => "not even rank 1 fits; name fewer targets".to_owned(),
            rank => format!("the largest rank that fits is {rank}"),
        };
        Err(Refusal::User(format!(
            "rank {} on these targets needs {needed} bytes of memory, and the server has {room} for adapters ({free} \
             of them free now): {largest}",
            spec.rank
        )))
    }

    /// `micro_batch` without the adapters that are `absent` from memory. Every pass of theirs that has begun is
    /// answered with the reason; where a part of one was computed, the accumulated gradients of its adapter go too.
    pub(super) fn without_absent(
        &mut self,
        micro_batch: MicroBatch,
        absent: &BTreeMap<ModelId, Refusal>,
    ) -> Result<Option<MicroBatch>> {
        let mut refused = Vec::new();
        for (model, refusal) in absent {
            let begun = self.passes.keys().copied();
            let is_own =
                |request: &u64| self.asked.get(request).is_some_and(|asked| asked.request.model == *model);
            let own: Vec<u64> = begun.filter(is_own).collect();
            let is_partial = own.iter().any(|request| self.has_gradients_of(*request));
            let answer = if is_partial {
                self.ranks.tell(&Command::Abort { model: model.clone() })?;
                self.models.abort(model)?;
                Refusal::Server(format!(
                    "{refusal}; a part of its passes was computed, so that all gradients since the last step of {model} \
                     are dropped: send its passes again"
                ))
            } else {
                refusal.clone()
            };
            for request in own {
                self.plan.cancel(model, request);
                self.passes.remove(&request);
                if let Some(asked) = self.asked.remove(&request) {
                    asked.answer(Err(answer.clone()));
                }
                refused.push(request);
            }
        }
        Ok(micro_batch.without(&refused))
    }

    /// True if a part of the pass `request` has added to the gradients of its adapter.
    fn has_gradients_of(&self, request: u64) -> bool {
        let is_partial = self.passes.get(&request).is_some_and(|pass| pass.left < pass.data.len());
        let backward = |asked: &Asked| matches!(&asked.request.task, Task::Pass(pass) if pass.backward);
        is_partial && self.asked.get(&request).is_some_and(backward)
    }

    /// Memory and disk that adapters take now.
    pub(super) fn usage(&self) -> Usage {
        Usage {
            memory: self.residence.held(),
            storage: self.storage.used(),
            storage_limit: self.storage.limit(),
            ..self.usage.clone()
        }
    }
}
