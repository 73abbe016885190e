//! Adapters that go to disk and come back, and the room that they take.

use super::{Driver, Unmet};
use crate::{
    Result,
    server::{
        engine::{
            command::Command,
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
        spill.iter().try_for_each(|model| self.spill(model))?;
        restore.iter().try_for_each(|model| self.restore(model))?;
        self.residence.used(wanted, now());
        Ok(())
    }

    /// Moves an adapter that is in memory to disk.
    pub(super) fn spill(&mut self, model: &ModelId) -> Result<(), Unmet> {
        let bytes = self.models.bytes_on_disk(model);
        let what = format!("{model}, which leaves memory to make room,");
        self.storage.check(bytes, &what).map_err(|full| Refusal::Server(full.to_string()))?;
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

    /// `micro_batch` without the adapters that could not come into memory. Their passes are answered with `refusal`; a
    /// pass of which a part was computed takes the accumulated gradients of its adapter with it.
    pub(super) fn without_absent(
        &mut self,
        micro_batch: MicroBatch,
        refusal: &Refusal,
    ) -> Result<Option<MicroBatch>> {
        let of = |adapter: usize| &micro_batch.adapters[adapter];
        let absent: BTreeMap<u64, ModelId> = micro_batch
            .ranks
            .iter()
            .flatten()
            .filter(|dealt| !self.residence.is_in_memory(of(dealt.adapter)))
            .map(|dealt| (dealt.request, of(dealt.adapter).clone()))
            .collect();
        for (request, model) in &absent {
            self.plan.cancel(model, *request);
            let (Some(asked), Some(progress)) = (self.asked.remove(request), self.passes.remove(request))
            else {
                continue;
            };
            let backward = matches!(&asked.request.task, Task::Pass(pass) if pass.backward);
            let answer = if backward && progress.left < progress.data.len() {
                self.ranks.tell(&Command::Abort { model: model.clone() })?;
                self.models.abort(model)?;
                Refusal::Server(format!(
                    "{refusal}; a part of this pass was computed, so that all gradients since the last step of {model} \
                     are dropped: send its passes again"
                ))
            } else {
                refusal.clone()
            };
            asked.answer(Err(answer));
        }
        Ok(micro_batch.without(&absent.into_keys().collect::<Vec<_>>()))
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
