//! Detection of the launcher that started this process, from the environment alone, before MPI is initialised. Pure.

/// The launch, as the environment describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Launch {
    /// The variable found, and its number of ranks if it has one.
    found: Option<(&'static str, Option<usize>)>,
}

/// Variables of the launchers with the number of ranks, nearest launcher first: mpirun inside a slurm step sees slurm's
/// variables too. Slurm's step size counts, not the job's: srun does not launch a plain program in a batch script.
const SIZES: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", SLURM_STEP];
const SLURM_STEP: &str = "SLURM_STEP_NUM_TASKS";
/// Rank variable of PMIx launchers, which set no size.
const PMIX_RANK: &str = "PMIX_RANK";

/// Detects the launch. `variable` reads the process environment, or a test's table.
pub(super) fn detect(variable: impl Fn(&str) -> Option<String>) -> Launch {
    let size = |name: &'static str| Some((name, variable(name)?.trim().parse().ok()?));
    for name in SIZES {
        if let Some((name, ranks)) = size(name) {
            return Launch { found: Some((name, Some(ranks))) };
        }
    }
    Launch { found: variable(PMIX_RANK).map(|_| (PMIX_RANK, None)) }
}

/// Variables of the launchers with the rank among those of the host.
const LOCAL_RANKS: [&str; 3] = ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"];

/// The local rank that the launcher sets, and its variable. `variable` is as for [`detect`].
pub(super) fn local_rank(variable: impl Fn(&str) -> Option<String>) -> Option<(&'static str, usize)> {
    LOCAL_RANKS.iter().find_map(|name| Some((*name, variable(name)?.trim().parse().ok()?)))
}

/// Variables of the launchers with the rank of a process.
const RANKS: [&str; 4] = ["OMPI_COMM_WORLD_RANK", "PMI_RANK", PMIX_RANK, "SLURM_PROCID"];

/// The rank that a launcher has given this process. `variable` is as for [`detect`].
pub(super) fn rank(variable: impl Fn(&str) -> Option<String>) -> Option<usize> {
    if detect(&variable).is_by_hand() {
        return None;
    }
    RANKS.iter().find_map(|name| variable(name)?.trim().parse().ok())
}

impl Launch {
    /// Returns true without a launcher, and for one that started a single process.
    pub(super) fn is_single(self) -> bool {
        matches!(self.found, None | Some((_, Some(0 | 1))))
    }

    /// Returns true without a launcher.
    pub(super) fn is_by_hand(self) -> bool {
        self.found.is_none()
    }

    /// Returns true if signals reach a rank as they are sent: it was started by hand or by srun. mpirun handles TERM
    /// and INT itself, and kills its ranks about a second later.
    pub(super) fn leaves_signals(self) -> bool {
        matches!(self.found, None | Some((SLURM_STEP, _)))
    }

    /// The variable and its number of ranks, if MPI has fewer (`actual`).
    pub(super) fn contradicts(self, actual: usize) -> Option<(&'static str, usize)> {
        match self.found {
            Some((name, Some(ranks))) if ranks > actual => Some((name, ranks)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(variables: &[(&str, &str)]) -> Launch {
        detect(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string()))
    }

    #[test]
    fn a_process_without_launcher_is_single() {
        assert!(launch(&[]).is_single() && launch(&[]).is_by_hand());
        assert!(!launch(&[("SLURM_STEP_NUM_TASKS", "1")]).is_by_hand());
        assert!(launch(&[("OMPI_COMM_WORLD_SIZE", "1")]).is_single());
        assert!(launch(&[("SLURM_STEP_NUM_TASKS", "1")]).is_single());
        assert!(!launch(&[("PMIX_RANK", "0")]).is_single());
    }

    #[test]
    fn the_nearest_launcher_sets_the_local_rank() {
        let table = |name: &str| match name {
            "SLURM_LOCALID" => Some("0".to_owned()),
            "OMPI_COMM_WORLD_LOCAL_RANK" => Some("3".to_owned()),
            _ => None,
        };
        assert_eq!(local_rank(table), Some(("OMPI_COMM_WORLD_LOCAL_RANK", 3)));
        assert_eq!(local_rank(|_| None), None);
    }

    #[test]
    fn the_rank_is_known_before_mpi_starts() {
        let rank = |variables: &[(&str, &str)]| {
            rank(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string()))
        };
        assert_eq!(rank(&[]), None);
        // A batch script has a number too, and is no rank.
        assert_eq!(rank(&[("SLURM_PROCID", "0")]), None);
        assert_eq!(rank(&[("OMPI_COMM_WORLD_SIZE", "2"), ("OMPI_COMM_WORLD_RANK", "1")]), Some(1));
        assert_eq!(rank(&[("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_PROCID", "1")]), Some(1));
    }

    #[test]
    fn only_mpirun_handles_signals_itself() {
        assert!(launch(&[]).leaves_signals());
        assert!(launch(&[("SLURM_STEP_NUM_TASKS", "2"), ("PMIX_RANK", "0")]).leaves_signals());
        assert!(!launch(&[("OMPI_COMM_WORLD_SIZE", "1"), ("SLURM_STEP_NUM_TASKS", "2")]).leaves_signals());
        assert!(!launch(&[("PMI_SIZE", "2")]).leaves_signals());
    }

    #[test]
    fn a_launcher_that_mpi_does_not_know_is_named() {
        assert_eq!(launch(&[("PMI_SIZE", "4")]).contradicts(1), Some(("PMI_SIZE", 4)));
        assert_eq!(launch(&[("PMI_SIZE", "4")]).contradicts(4), None);
        // mpirun -n 2 inside an allocation of 4 tasks: mpirun's number counts.
        let nested = launch(&[("OMPI_COMM_WORLD_SIZE", "2"), ("SLURM_STEP_NUM_TASKS", "4")]);
        assert_eq!(nested.contradicts(2), None);
    }
}
