//! Pages of a rank's KV cache: the free ones, and the number of sequences that use each of the others. Pure.

/// The pages of a rank, `0..pages`.
#[derive(Clone, Debug)]
pub struct Pages {
    /// The one that is taken next comes last.
    free: Vec<u32>,
    /// Sequences that use each page.
    users: Vec<u32>,
}

impl Pages {
    pub fn new(pages: u32) -> Self {
        Self { free: (0..pages).rev().collect(), users: vec![0; pages as usize] }
    }

    /// Pages that nobody uses.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages with one user each; `None`, and none taken, where there are not as many.
    pub fn take(&mut self, pages: usize) -> Option<Vec<u32>> {
        let taken = self.free.split_off(self.free.len().checked_sub(pages)?);
        taken.iter().for_each(|&page| self.users[page as usize] = 1);
        Some(taken)
    }

    /// One more user of pages that are in use.
    pub fn share(&mut self, pages: &[u32]) {
        for &page in pages {
            debug_assert!(self.users[page as usize] > 0, "page {page} is free");
            self.users[page as usize] += 1;
        }
    }

    /// One user less; a page without users is free.
    pub fn release(&mut self, pages: &[u32]) {
        for &page in pages {
            let users = &mut self.users[page as usize];
            debug_assert!(*users > 0, "page {page} is free");
            *users -= 1;
            if *users == 0 {
                self.free.push(page);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn a_shared_page_is_free_after_its_last_user() {
        let mut pages = Pages::new(4);
        let prompt = pages.take(3).unwrap();
        pages.share(&prompt[..2]);
        pages.release(&prompt);
        assert_eq!(pages.free(), 2);
        assert_eq!(pages.take(3), None);
        assert_eq!(pages.free(), 2, "a refusal takes nothing");
        pages.release(&prompt[..2]);
        let mut all = pages.take(4).unwrap();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3]);
        assert_eq!(pages.take(0), Some(vec![]));
    }

    #[test]
    #[should_panic(expected = "page 0 is free")]
    fn a_page_is_not_released_twice() {
        let mut pages = Pages::new(1);
        let taken = pages.take(1).unwrap();
        pages.release(&taken);
        pages.release(&taken);
    }

    proptest! {
        #[test]
        fn no_page_has_two_owners_and_all_come_back(
            steps in proptest::collection::vec((0u8..3, 0usize..9), 0..200),
        ) {
            let mut pages = Pages::new(16);
            let (mut held, mut users) = (Vec::<Vec<u32>>::new(), BTreeMap::<u32, usize>::new());
            for (what, n) in steps {
                match what {
                    0 => if let Some(taken) = pages.take(n) {
                        for &page in &taken {
                            prop_assert!(page < 16);
                            prop_assert_eq!(users.insert(page, 1), None, "page {} was in use", page);
                        }
                        held.push(taken);
                    } else {
                        prop_assert!(users.len() + n > 16);
                    },
                    1 if !held.is_empty() => {
                        let shared = held[n % held.len()].clone();
                        pages.share(&shared);
                        shared.iter().for_each(|page| *users.get_mut(page).unwrap() += 1);
                        held.push(shared);
                    }
                    2 if !held.is_empty() => {
                        let released = held.swap_remove(n % held.len());
                        pages.release(&released);
                        for page in &released {
                            *users.get_mut(page).unwrap() -= 1;
                        }
                        users.retain(|_, users| *users > 0);
                    }
                    _ => {}
                }
                prop_assert_eq!(pages.free(), 16 - users.len());
            }
        }
    }
}
