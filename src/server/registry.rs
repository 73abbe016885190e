//! The adapters that clients know: who made one, its shape, and the requests that were taken for it. A tenant sees its
//! own alone.

use super::{
    order::OnArrival,
    request::{AdapterSpec, ModelId, ModelIdError},
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

/// The folder of the tenants' folders in the output directory.
const TENANTS: &str = "tenants";

/// The owner of adapters, futures and checkpoints: all clients of a server without keys, or the holders of a key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tenant(Option<Arc<str>>);

impl Tenant {
    /// The one tenant of a server without keys.
    pub fn everyone() -> Self {
        Self(None)
    }

    /// True of the one tenant of a server without keys.
    pub fn is_only(&self) -> bool {
        self.0.is_none()
    }

    /// A tenant by name: 1 to 32 letters, digits, '_' and '-', the first of them a letter or a digit.
    pub fn named(name: &str) -> Option<Self> {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "_-".contains(c);
        let starts = name.starts_with(|c: char| c.is_ascii_alphanumeric());
        (starts && name.len() <= 32 && name.chars().all(is_allowed)).then(|| Self(Some(name.into())))
    }

    /// The name of one of its adapters in the engine, where names of all tenants meet.
    ///
    /// # Errors
    /// The two names together are too long.
    pub fn engine_id(&self, model: &ModelId) -> Result<ModelId, ModelIdError> {
        match &self.0 {
            None => Ok(model.clone()),
            Some(tenant) => ModelId::new(format!("{tenant}:{model}")),
        }
    }

    /// The tenant and the name that it uses, of a name in the engine. `has_keys`: the server has several tenants.
    pub fn of_engine_id(id: &str, has_keys: bool) -> Option<(Self, ModelId)> {
        if !has_keys {
            return Some((Self::everyone(), ModelId::new(id).ok()?));
        }
        let (tenant, model) = id.split_once(':')?;
        Some((Self::named(tenant)?, ModelId::new(model).ok()?))
    }

    /// The folder that its paths are in.
    pub fn root(&self, output: &Path) -> PathBuf {
        match &self.0 {
            None => output.to_owned(),
            Some(tenant) => output.join(TENANTS).join(&**tenant),
        }
    }

    /// The folders of all tenants that have one.
    pub fn roots(output: &Path) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(output.join(TENANTS)).into_iter().flatten().flatten();
        let named = entries.filter(|entry| {
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            is_folder && entry.file_name().to_str().and_then(Self::named).is_some()
        });
        std::iter::once(output.to_owned()).chain(named.map(|entry| entry.path())).collect()
    }

    /// The name, for pages that list adapters.
    pub fn name(&self) -> &str {
        self.0.as_deref().unwrap_or("local")
    }
}

/// An adapter.
#[derive(Debug)]
pub struct Model {
    pub spec: AdapterSpec,
    pub last_request: SystemTime,
    /// The last heartbeat of its client.
    pub last_heartbeat: Option<SystemTime>,
    /// Ids of futures by number.
    pub requests: OnArrival<String>,
    /// False: it could not be made, or is unloaded. Changed by answers of the engine, which take no lock.
    exists: Arc<AtomicBool>,
}

/// The adapters of all tenants.
#[derive(Debug, Default)]
pub struct Registry {
    models: BTreeMap<(Tenant, ModelId), Model>,
    /// Adapters that a killed server has lost.
    lost: BTreeMap<(Tenant, ModelId), Loss>,
}

/// The source of the text for the client of a lost adapter. Its saves may go while it is lost.
#[derive(Clone, Debug)]
pub struct Loss {
    /// The tenant's folder.
    pub root: PathBuf,
    pub tell: fn(&Path, &ModelId) -> String,
}

impl Registry {
    /// An adapter of `tenant`.
    pub fn get(&mut self, tenant: &Tenant, model: &ModelId) -> Option<&mut Model> {
        let found = self.models.get_mut(&(tenant.clone(), model.clone()));
        found.filter(|model| model.exists.load(Ordering::Acquire))
    }

    /// Adds an adapter. The switch says that it exists, and turns false when it does not.
    pub fn add(&mut self, tenant: Tenant, model: ModelId, spec: AdapterSpec) -> Arc<AtomicBool> {
        // One that is gone goes, unless an answer that may bring it back still holds its switch.
        self.models
            .retain(|_, model| model.exists.load(Ordering::Acquire) || Arc::strong_count(&model.exists) > 1);
        let exists = Arc::new(AtomicBool::new(true));
        let last_request = SystemTime::now();
        let entry = Model {
            spec,
            last_request,
            last_heartbeat: None,
            requests: OnArrival::default(),
            exists: exists.clone(),
        };
        let key = (tenant, model);
        self.lost.remove(&key);
        self.models.insert(key, entry);
        exists
    }

    /// Notes that an adapter is lost until it is added again.
    pub fn lose(&mut self, tenant: Tenant, model: ModelId, loss: Loss) {
        self.lost.insert((tenant, model), loss);
    }

    pub fn is_lost(&self, tenant: &Tenant, model: &ModelId) -> bool {
        self.lost.contains_key(&(tenant.clone(), model.clone()))
    }

    /// The text for the client of a lost adapter.
    pub fn lost(&self, tenant: &Tenant, model: &ModelId) -> Option<String> {
        let Loss { root, tell } = self.lost.get(&(tenant.clone(), model.clone()))?;
        Some(tell(root, model))
    }

    /// The lost adapters of `tenant`, each with the text for its client.
    pub fn lost_of<'a>(&'a self, tenant: &'a Tenant) -> impl Iterator<Item = (&'a ModelId, String)> {
        let own = self.lost.iter().filter(move |((owner, _), _)| owner == tenant);
        own.map(|((_, id), Loss { root, tell })| (id, tell(root, id)))
    }

    /// The largest number of a request that was taken, of each adapter that has one.
    pub fn last_numbers(&self) -> impl Iterator<Item = (&Tenant, &ModelId, i64)> {
        self.models.iter().filter_map(|((tenant, id), model)| Some((tenant, id, model.requests.last()?)))
    }

    /// Takes an adapter away until the switch turns true again.
    pub fn withdraw(&mut self, tenant: &Tenant, model: &ModelId) -> Option<Arc<AtomicBool>> {
        let exists = self.get(tenant, model)?.exists.clone();
        exists.store(false, Ordering::Release);
        Some(exists)
    }

    /// Notes that the client of those adapters of `tenant` that are `its` is alive at `now`.
    pub fn heartbeat(&mut self, tenant: &Tenant, now: SystemTime, its: impl Fn(&ModelId) -> bool) {
        let own = self.models.iter_mut().filter(|((owner, id), _)| owner == tenant && its(id));
        own.for_each(|(_, model)| model.last_heartbeat = Some(now));
    }

    /// The adapters of all tenants with no request and no heartbeat for `time` before `now`.
    pub fn idle(&self, now: SystemTime, time: Duration) -> Vec<(Tenant, ModelId)> {
        // A clock that was set back says nothing.
        let is_silent = |since: SystemTime| now.duration_since(since).is_ok_and(|silent| silent >= time);
        let is_idle = |model: &Model| {
            let exists = model.exists.load(Ordering::Acquire);
            exists && is_silent(model.last_request) && model.last_heartbeat.is_none_or(is_silent)
        };
        self.models.iter().filter(|(_, model)| is_idle(model)).map(|(key, _)| key.clone()).collect()
    }

    /// The adapters of `tenant` by name.
    pub fn of<'a>(&'a self, tenant: &'a Tenant) -> impl Iterator<Item = (&'a ModelId, &'a Model)> {
        let own = self.models.iter().filter(move |((owner, _), _)| owner == tenant);
        own.filter(|(_, model)| model.exists.load(Ordering::Acquire)).map(|((_, id), model)| (id, model))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> AdapterSpec {
        AdapterSpec { rank: 4, alpha: 8.0, targets: None, train_attn: true, train_mlp: true, seed: 1 }
    }

    #[test]
    fn tenants_have_names_folders_and_adapters_of_their_own() {
        let (one, two) = (Tenant::named("one").unwrap(), Tenant::named("two").unwrap());
        let model = ModelId::new("sess-1:train:0").unwrap();
        let mut registry = Registry::default();
        registry.add(one.clone(), model.clone(), spec());
        assert!(registry.get(&one, &model).is_some() && registry.get(&two, &model).is_none());
        assert_eq!((registry.of(&one).count(), registry.of(&two).count()), (1, 0));
        let id = one.engine_id(&model).unwrap();
        assert_eq!(id.as_str(), "one:sess-1:train:0");
        assert_eq!(Tenant::of_engine_id(id.as_str(), true), Some((one.clone(), model.clone())));
        assert_eq!(Tenant::of_engine_id(model.as_str(), false), Some((Tenant::everyone(), model)));
        assert_eq!(one.root(Path::new("out")), Path::new("out/tenants/one"));
        assert_eq!(Tenant::everyone().root(Path::new("out")), Path::new("out"));
        assert!(one.engine_id(&ModelId::new("a".repeat(126)).unwrap()).is_err());
        for bad in ["", "-a", "a:b", "a/b", "..", "a.b", &"a".repeat(33)] {
            assert_eq!(Tenant::named(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_adapter_is_idle_after_its_last_request_and_heartbeat() {
        let (one, two) = (Tenant::named("one").unwrap(), Tenant::named("two").unwrap());
        let [a, b, c] = ["a", "b", "c"].map(|name| ModelId::new(name).unwrap());
        let mut registry = Registry::default();
        for (tenant, model) in [(&one, &a), (&one, &b), (&two, &a), (&two, &c)] {
            registry.add(tenant.clone(), model.clone(), spec());
        }
        let (start, seconds) = (SystemTime::now(), Duration::from_secs);
        let idle = |registry: &Registry, after| registry.idle(start + seconds(after), seconds(100));
        assert_eq!((idle(&registry, 90).len(), idle(&registry, 110).len()), (0, 4));
        registry.heartbeat(&one, start + seconds(60), |model| *model == a);
        registry.get(&one, &b).unwrap().last_request = start + seconds(80);
        registry.withdraw(&two, &c).unwrap();
        assert_eq!(idle(&registry, 110), [(two.clone(), a.clone())]);
        assert_eq!(idle(&registry, 170), [(one.clone(), a.clone()), (two.clone(), a.clone())]);
        assert_eq!(idle(&registry, 190).len(), 3);
        assert!(registry.idle(start - seconds(1), seconds(0)).is_empty());
    }

    #[test]
    fn an_adapter_that_is_withdrawn_comes_back_if_it_was_not_unloaded() {
        let (tenant, model) = (Tenant::everyone(), ModelId::new("a").unwrap());
        let mut registry = Registry::default();
        registry.add(tenant.clone(), model.clone(), spec());
        let exists = registry.withdraw(&tenant, &model).unwrap();
        assert!(registry.get(&tenant, &model).is_none() && registry.withdraw(&tenant, &model).is_none());
        exists.store(true, Ordering::Release);
        assert!(registry.get(&tenant, &model).is_some());
    }

    #[test]
    fn an_adapter_is_lost_until_it_is_added_again() {
        let (tenant, model) = (Tenant::everyone(), ModelId::new("a").unwrap());
        let mut registry = Registry::default();
        let loss = Loss { root: "o".into(), tell: |root, model| format!("{}: {model}", root.display()) };
        registry.lose(tenant.clone(), model.clone(), loss);
        assert_eq!(registry.lost(&tenant, &model).as_deref(), Some("o: a"));
        assert_eq!(registry.lost(&Tenant::named("other").unwrap(), &model), None);
        registry.add(tenant.clone(), model.clone(), spec());
        assert_eq!(registry.lost(&tenant, &model), None);
    }
}
