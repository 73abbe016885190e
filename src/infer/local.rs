//! Sampling by the ranks of one command: all keep the same books, and tell each other what they have computed.

use super::{
    cache::{KvCache, page_bytes},
    compute::compute,
    request::{NewToken, SampleReply, SampleRequest},
    sampler::{Limits, Progress, Sampler},
    step::{PAGE, RankResult},
    stops::Decode,
};
use crate::{
    comm::Communicator,
    error::{Error, Result},
    lora::Adapter,
    model::transformer::Transformer,
};
use std::{cmp::Reverse, sync::Arc};

/// Sequences that a rank continues at a time: enough for the GEMMs to pay for a gather of the layers.
const SEQUENCES: usize = 64;
/// Tokens of prompts in a step of a rank, unless one prompt has more.
const PROMPT_TOKENS: usize = 4096;
/// Bytes of a rank's KV cache, unless one sequence needs more.
const CACHE_BYTES: usize = 4 << 30;

/// A model that all ranks of a group sample from, with an adapter or without.
pub struct Local<'a> {
    pub model: &'a mut Transformer,
    pub adapter: Option<&'a mut Adapter>,
    /// Each rank has data of its own.
    pub world: &'a dyn Communicator,
    pub decode: Arc<dyn Decode + Send + Sync>,
}

impl Local<'_> {
    /// The replies to `requests`, in their order, which are the same on every rank. `told` gets every new token with
    /// the number of its request. Collective.
    ///
    /// # Errors
    /// A request has a value out of its range, or its outputs are not finite.
    pub fn sample(
        &mut self,
        requests: &[SampleRequest],
        mut told: impl FnMut(usize, &NewToken),
    ) -> Result<Vec<SampleReply>> {
        let (rank, ranks) = (self.world.rank(), self.world.size());
        let (kind, device) = (self.model.options().compute.kind(), self.model.device().tensors());
        let limits = limits(requests, page_bytes(self.model.spec(), kind.elt_size_in_bytes()), ranks);
        let mut cache = KvCache::new(self.model.spec(), limits.pages as usize, kind, device);
        let mut sampler = Sampler::new(limits);
        let adapter = self.adapter.is_some().then_some(());
        for (ticket, request) in (0..).zip(requests) {
            let submitted = sampler.submit(ticket, adapter, request.clone(), Some(self.decode.clone()));
            submitted.map_err(|error| Error::Input(error.to_string()))?;
        }
        let mut replies = vec![None; requests.len()];
        while let Some(step) = sampler.plan(&|_| true) {
            let adapters = self.adapter.as_deref_mut().filter(|_| !step.adapters.is_empty());
            let adapters = &mut adapters.into_iter().collect::<Vec<_>>()[..];
            let own = compute(self.model, adapters, &mut cache, &step, rank)?;
            for event in sampler.apply(&exchanged(self.world, &own)?) {
                let request = event.ticket as usize;
                match event.what {
                    Progress::Token(token) => told(request, &token),
                    Progress::End(Ok(reply)) => replies[request] = Some(reply),
                    // Every rank knows; one says it.
                    Progress::End(Err(_)) if rank > 0 => return Err(Error::Elsewhere { code: 1 }),
                    Progress::End(Err(error)) => return Err(Error::Failure(error.to_string())),
                }
            }
        }
        let replies: Option<Vec<SampleReply>> = replies.into_iter().collect();
        replies.ok_or_else(|| Error::Failure("a prompt was left without an answer (a bug)".into()))
    }
}

/// The results of all ranks. Collective.
fn exchanged(world: &dyn Communicator, own: &RankResult) -> Result<Vec<RankResult>> {
    let lost = |error| Error::Failure(format!("the results of a rank did not arrive: {error}"));
    let bytes = postcard::to_stdvec(own).map_err(lost)?;
    world.all_gather_host(&bytes)?.iter().map(|bytes| postcard::from_bytes(bytes).map_err(lost)).collect()
}

/// Room for `requests`, whose prompts are not cut.
fn limits(requests: &[SampleRequest], page_bytes: usize, ranks: usize) -> Limits {
    let mut pages: Vec<usize> = requests
        .iter()
        .map(|request| (request.prompt.len() + request.max_new_tokens).div_ceil(PAGE) * request.count)
        .collect();
    pages.sort_by_key(|&pages| Reverse(pages));
    let most = pages.first().copied().unwrap_or(0);
    let pages = pages.iter().take(SEQUENCES).sum::<usize>().min((CACHE_BYTES / page_bytes).max(most));
    let longest = requests.iter().map(|request| request.prompt.len()).max().unwrap_or(0);
    let tokens = SEQUENCES + longest.max(PROMPT_TOKENS);
    Limits { ranks, pages: u32::try_from(pages).unwrap_or(u32::MAX), sequences: SEQUENCES, tokens }
}
