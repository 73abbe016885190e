//! The shares of training and sampling in the time of the ranks: pure.
//!
//! While both have work, the one that is behind its share goes next. So over any time in which both have work, each
//! gets its share, but for the length of one turn. A lead is not counted beyond [`MOST_LEAD`]: after one long turn,
//! such as a save, the other goes on for that time at most. So either waits for [`MOST_LEAD`] and one turn of the other
//! at most, and turns of more than that get more than their share.
//!
//! With one kind of work there is nothing to share: it gets everything, and owes nothing for it. A lead that it had
//! before stays, for a client that sends its next pass when it has the answer to the last one leaves gaps.

use std::time::Duration;

/// The share of sampling while there is training too.
pub const SHARE_OF_SAMPLING: f64 = 0.5;

/// Time by which one may be ahead of its share.
const MOST_LEAD: Duration = Duration::from_secs(10);

/// Kinds of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Passes and every other task of an adapter.
    Training,
    Sampling,
}

/// The time that was spent on either, against its share.
#[derive(Clone, Debug)]
pub struct Shares {
    sampling: f64,
    /// Seconds of the ranks that training is ahead of its share; negative: behind it.
    lead: f64,
    /// There was other work when the turn began.
    is_shared: bool,
}

impl Shares {
    /// `sampling`: the share of sampling, above 0 and below 1.
    pub fn new(sampling: f64) -> Self {
        Self { sampling, lead: 0.0, is_shared: false }
    }

    /// The work whose turn it is, of those that there are.
    pub fn next(&mut self, has_training: bool, has_sampling: bool) -> Option<Work> {
        self.is_shared = has_training && has_sampling;
        if !has_training && !has_sampling {
            self.lead = 0.0;
        }
        match (has_training, has_sampling) {
            (false, false) => None,
            (true, false) => Some(Work::Training),
            (false, true) => Some(Work::Sampling),
            (true, true) if self.lead > 0.0 => Some(Work::Sampling),
            (true, true) => Some(Work::Training),
        }
    }

    /// Says that a turn of `work` has taken `time`.
    pub fn spent(&mut self, work: Work, time: Duration) {
        let ahead = match work {
            Work::Training => self.sampling,
            Work::Sampling => self.sampling - 1.0,
        };
        let lead = self.lead + ahead * time.as_secs_f64();
        // The time in which the other makes up for it.
        let most = |share: f64| if self.is_shared { MOST_LEAD.as_secs_f64() * share } else { 0.0 };
        let (least, most) = (-most(self.sampling), most(1.0 - self.sampling));
        self.lead = lead.clamp(least.min(self.lead), most.max(self.lead));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_kind_of_work_gets_everything_and_owes_nothing() {
        let mut shares = Shares::new(SHARE_OF_SAMPLING);
        assert_eq!(shares.next(false, false), None);
        for _ in 0..100 {
            assert_eq!(shares.next(true, false), Some(Work::Training));
            shares.spent(Work::Training, Duration::from_secs(1));
        }
        assert_eq!(shares.next(false, true), Some(Work::Sampling));
        shares.spent(Work::Sampling, Duration::from_secs(1));
        assert_eq!(shares.next(true, true), Some(Work::Training));
        shares.spent(Work::Training, Duration::from_secs(1));
        assert_eq!(shares.next(true, true), Some(Work::Sampling));
    }

    /// A client that sends its next pass a moment after the answer to the last one, while others sample all the time.
    #[test]
    fn gaps_between_passes_cost_sampling_nothing() {
        let mut shares = Shares::new(SHARE_OF_SAMPLING);
        let (mut spent, mut next_pass) = ([0.0f64; 2], 0.0);
        while spent[0] + spent[1] < 1000.0 {
            let now = spent[0] + spent[1];
            match shares.next(now >= next_pass, true).unwrap() {
                Work::Training => {
                    shares.spent(Work::Training, Duration::from_secs(3));
                    spent[0] += 3.0;
                    next_pass = spent[0] + spent[1] + 0.01;
                }
                Work::Sampling => {
                    shares.spent(Work::Sampling, Duration::from_millis(20));
                    spent[1] += 0.02;
                }
            }
        }
        assert!((spent[0] - spent[1]).abs() < 10.0, "{spent:?}");
    }

    proptest! {
        /// Turns of any length: each gets its share but for a turn, and none waits longer than is said.
        #[test]
        fn each_gets_its_share_and_waits_no_longer_than_is_said(
            share in prop_oneof![Just(0.5), 0.1f64..0.9],
            training in proptest::collection::vec(1u64..9_000, 1..40),
            sampling in proptest::collection::vec(1u64..900, 1..40),
        ) {
            let (longest, mut shares) = (9.0, Shares::new(share));
            let (mut turns, mut spent, mut waited) = ([0, 0], [0.0, 0.0], [0.0f64, 0.0]);
            // Turns too short for a lead to reach its limit.
            let most = MOST_LEAD.as_secs_f64();
            let is_bounded = longest * share.max(1.0 - share) < most * share.min(1.0 - share);
            while spent[0] + spent[1] < 1000.0 {
                let work = shares.next(true, true).unwrap();
                let (own, lengths) = match work {
                    Work::Training => (0, &training),
                    Work::Sampling => (1, &sampling),
                };
                let time = Duration::from_millis(lengths[turns[own] % lengths.len()]);
                turns[own] += 1;
                shares.spent(work, time);
                let seconds = time.as_secs_f64();
                spent[own] += seconds;
                waited[own] = 0.0;
                waited[1 - own] += seconds;
                for (waited, longest) in waited.iter().zip([0.9, 9.0]) {
                    prop_assert!(*waited <= most + longest + 1e-6, "waited {waited}");
                }
                let expected = share * (spent[0] + spent[1]);
                prop_assert!(!is_bounded || (spent[1] - expected).abs() <= longest, "{spent:?} {share}");
            }
            prop_assert!(turns[0] > 0 && turns[1] > 0);
        }

        /// A turn that is longer than a lead may be: the other gets at least that time after it.
        #[test]
        fn a_long_turn_is_made_up_for_as_far_as_a_lead_goes(long in 10u64..1000) {
            let mut shares = Shares::new(SHARE_OF_SAMPLING);
            assert_eq!(shares.next(true, true), Some(Work::Training));
            shares.spent(Work::Training, Duration::from_secs(long));
            let mut given = 0.0f64;
            while shares.next(true, true) == Some(Work::Sampling) {
                shares.spent(Work::Sampling, Duration::from_millis(100));
                given += 0.1;
            }
            prop_assert!((given - 10.0).abs() < 0.2, "{given}");
        }
    }
}
