//! SIGKILLs at random times. `ci/long.sh kills [N]`

use super::story::Story;
use crate::common::{rank_process, signal, started};
use std::{
    io::Read,
    time::{Duration, Instant},
};
use xorl_dist::rng::Stream;

/// Kills of all ranks and of one in turns, at times from the start of a process to its end.
fn kill_at_random(ranks: usize, kills: usize) {
    let mut story = Story::new(ranks);
    let random = Stream::new(std::process::id().into(), "kills");
    let begin = Instant::now();
    let (mut done, mut starts, mut finished, mut all) = (0, 0, 0, 0);
    // A whole run takes some seconds; most kills meet its steps, some its start.
    let mut longest = Duration::from_secs(4);
    while done < kills {
        starts += 1;
        let mut child = started(story.command());
        let since = Instant::now();
        let wait = longest.as_micros() as u64;
        std::thread::sleep(Duration::from_micros(random.below(starts, wait)));
        let victims: Vec<u32> = if ranks == 1 {
            vec![child.id()]
        } else if starts % 2 == 0 {
            // The launcher first: it would end the others in its own way.
            let ranks = (0..ranks).filter_map(|rank| rank_process(child.id(), rank));
            std::iter::once(child.id()).chain(ranks.collect::<Vec<_>>()).collect()
        } else {
            rank_process(child.id(), random.below(starts + (1 << 40), ranks as u64) as usize)
                .into_iter()
                .collect()
        };
        victims.iter().for_each(|&victim| signal(victim, libc::SIGKILL));
        let status = child.wait().unwrap();
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        // Orphans of a launcher that was killed have closed stderr when this returns.
        let place = format!("kill {done} of {ranks} ranks");
        assert!(!said.contains("panicked"), "{place}: {said}");
        if status.success() {
            longest = since.elapsed();
            finished += 1;
            story.finish(&place);
            continue;
        }
        if victims.is_empty() {
            // Before the launcher had started the rank.
            panic!("{place}: it ended by itself: {said}");
        }
        done += 1;
        all += usize::from(ranks > 1 && victims.len() > 1);
        story.check(&place);
    }
    let output = story.command().output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    story.finish("the last");
    println!(
        "world {ranks}: {done} SIGKILLs ({all} of all ranks at once) in {starts} starts, {:.0} s: 0 torn, 0 lost, all \
         resumed; {} runs ended, each bit-identical to the undisturbed one",
        begin.elapsed().as_secs_f64(),
        finished + 1
    );
}

#[test]
#[ignore = "minutes"]
fn mpi_kills_at_random_times() {
    let kills = std::env::var("XORL_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(100);
    kill_at_random(1, kills / 2);
    kill_at_random(2, kills - kills / 2);
}
