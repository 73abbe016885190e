//! The values of adapters that requests sample from: pure.
//!
//! A request goes on with the values that its adapter has when it begins. All requests that begin between two updates
//! share a version of the adapter: the adapter itself, and after the next update a copy that was made before it.

use crate::server::request::ModelId;
use std::collections::BTreeMap;

/// The versions of adapters that requests sample from, by number.
#[derive(Debug, Default)]
pub struct Versions {
    versions: BTreeMap<u64, Version>,
    /// The version of each adapter as it is now, if it has requests.
    present: BTreeMap<ModelId, u64>,
    count: u64,
}

#[derive(Debug)]
struct Version {
    /// The adapter or its copy.
    place: ModelId,
    requests: usize,
}

impl Versions {
    /// Begins a request on `model` as it is now, and returns the version.
    pub fn begin(&mut self, model: &ModelId) -> u64 {
        let version = *self.present.entry(model.clone()).or_insert_with(|| {
            self.count += 1;
            self.count
        });
        let fresh = || Version { place: model.clone(), requests: 0 };
        self.versions.entry(version).or_insert_with(fresh).requests += 1;
        version
    }

    /// Ends a request on `version`. Returns the copy that nobody needs any more, if that is one.
    pub fn end(&mut self, version: u64) -> Option<ModelId> {
        let own = self.versions.get_mut(&version)?;
        own.requests -= 1;
        if own.requests > 0 {
            return None;
        }
        let Version { place, .. } = self.versions.remove(&version)?;
        if self.present.get(&place) == Some(&version) {
            self.present.remove(&place);
            return None;
        }
        Some(place)
    }

    /// The adapters and copies that have the values of `versions`, which have requests.
    pub fn places<'a>(&self, versions: impl IntoIterator<Item = &'a u64>) -> Vec<&ModelId> {
        versions.into_iter().filter_map(|version| Some(&self.versions.get(version)?.place)).collect()
    }

    /// The version of `model` as it is now, if it has requests.
    pub fn of(&self, model: &ModelId) -> Option<u64> {
        self.present.get(model).copied()
    }

    /// Says that the requests on `model` as it is now go on with `copy`.
    pub fn copied(&mut self, model: &ModelId, copy: ModelId) {
        let version = self.present.remove(model).and_then(|version| self.versions.get_mut(&version));
        if let Some(version) = version {
            version.place = copy;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> ModelId {
        ModelId::new(name).unwrap()
    }

    #[test]
    fn requests_between_two_updates_share_one_copy_which_goes_with_the_last() {
        let mut versions = Versions::default();
        let (a, b, copy, second) = (id("a"), id("b"), id("copy"), id("second"));
        let [first, same, other] = [&a, &a, &b].map(|model| versions.begin(model));
        assert!(first == same && first != other);
        assert_eq!((versions.of(&a), versions.places([&first, &other])), (Some(first), vec![&a, &b]));
        versions.copied(&a, copy.clone());
        assert_eq!((versions.of(&a), versions.places([&first])), (None, vec![&copy]));
        let new = versions.begin(&a);
        assert!(new != first && versions.places([&new]) == [&a]);
        versions.copied(&a, second.clone());
        assert_eq!((versions.end(first), versions.end(new)), (None, Some(second)));
        assert_eq!((versions.end(first), versions.places([&first])), (Some(copy), vec![]));
        // An adapter itself stays.
        assert_eq!((versions.end(other), versions.of(&b)), (None, None));
        assert_eq!(versions.end(other), None);
    }
}
