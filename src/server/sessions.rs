//! Sessions of clients: a program opens one, creates models in it by number, says now and then that it is alive, and
//! ends it. Models, saves and results outlive their session.

use super::{
    order::{BodyHash, OtherBody, Repeats},
    registry::Tenant,
    request::{ModelId, ModelIdError},
};
use std::{
    collections::BTreeMap,
    hash::{BuildHasher, RandomState},
    time::SystemTime,
};

/// Sessions that are remembered; the one that was silent for longest goes first.
const REMEMBERED: usize = 10_000;

/// The part of a model's id between its session and its number.
const TRAIN: &str = ":train:";

/// A session that takes no more models.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("session {0} has ended, or the server was started after it; make another client")]
pub struct Ended(pub String);

/// Why a session refuses a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Ended(#[from] Ended),
    #[error("model_{0}")]
    OtherBody(#[from] OtherBody),
}

/// The words of a client about its session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct About {
    pub user_metadata: Option<BTreeMap<String, String>>,
    pub display_name: Option<String>,
}

/// A session.
#[derive(Clone, Debug)]
pub struct Session {
    owner: Tenant,
    pub about: About,
    pub opened: SystemTime,
    /// The last sign of life of its client.
    pub seen: SystemTime,
    pub is_ended: bool,
    /// Futures of the requests that made its models.
    models: Repeats<String>,
}

/// The sessions of all tenants by id.
#[derive(Debug, Default)]
pub struct Sessions {
    sessions: BTreeMap<String, Session>,
}

/// The session and the number in the id of one of its models.
pub fn of_model(model: &ModelId) -> Option<(&str, u64)> {
    let (session, number) = model.as_str().split_once(TRAIN)?;
    Some((session, number.parse().ok()?))
}

/// The id of model `number` of a session. Clients compute it too.
///
/// # Errors
/// The session's id has a character that a model's may not have.
pub fn model_id(session: &str, number: u64) -> Result<ModelId, ModelIdError> {
    ModelId::new(format!("{session}{TRAIN}{number}"))
}

impl Sessions {
    /// Opens a session, and returns its id, which no other has, of an earlier process either.
    pub fn open(&mut self, owner: Tenant, about: About) -> String {
        let now = SystemTime::now();
        let id = format!("sess-{:016x}", RandomState::new().hash_one(now));
        self.insert(id.clone(), owner, about, now);
        id
    }

    /// Takes back the session of a model that was there before the process.
    pub fn restore(&mut self, owner: &Tenant, model: &ModelId) {
        if let Some((session, _)) = of_model(model)
            && !self.sessions.contains_key(session)
        {
            self.insert(session.to_owned(), owner.clone(), About::default(), SystemTime::now());
        }
    }

    fn insert(&mut self, id: String, owner: Tenant, about: About, now: SystemTime) {
        let session =
            Session { owner, about, opened: now, seen: now, is_ended: false, models: Repeats::default() };
        self.sessions.insert(id, session);
        while self.sessions.len() > REMEMBERED {
            let silent = self.sessions.iter().min_by_key(|(_, session)| (!session.is_ended, session.seen));
            let Some(silent) = silent.map(|(id, _)| id.clone()) else { return };
            self.sessions.remove(&silent);
        }
    }

    /// A session of `owner`.
    pub fn get(&self, owner: &Tenant, id: &str) -> Option<&Session> {
        self.sessions.get(id).filter(|session| session.owner == *owner)
    }

    fn live(&mut self, owner: &Tenant, id: &str) -> Result<&mut Session, Ended> {
        let found = self.sessions.get_mut(id).filter(|session| session.owner == *owner && !session.is_ended);
        let session = found.ok_or_else(|| Ended(id.chars().take(64).collect()))?;
        session.seen = SystemTime::now();
        Ok(session)
    }

    /// # Errors
    /// No such session, or it has ended.
    pub fn heartbeat(&mut self, owner: &Tenant, id: &str) -> Result<(), Ended> {
        self.live(owner, id).map(drop)
    }

    /// Ends a session; one that is not known has ended already.
    pub fn finish(&mut self, owner: &Tenant, id: &str) {
        if let Ok(session) = self.live(owner, id) {
            session.is_ended = true;
        }
    }

    /// The future of the request that made model `number`, if there was one. A request with the number and this body
    /// is a repeat.
    ///
    /// # Errors
    /// The session has ended, or the number was used with another body.
    pub fn repeat(
        &mut self,
        owner: &Tenant,
        id: &str,
        number: u64,
        body: BodyHash,
    ) -> Result<Option<String>, SessionError> {
        Ok(self.live(owner, id)?.models.repeat(number, body)?)
    }

    /// Remembers the future of a request that [`Self::repeat`] did not find.
    ///
    /// # Errors
    /// As there.
    pub fn take(
        &mut self,
        owner: &Tenant,
        id: &str,
        number: u64,
        body: BodyHash,
        future: String,
    ) -> Result<(), SessionError> {
        self.live(owner, id)?.models.submit(number, body, future)?;
        Ok(())
    }

    /// The sessions of `owner` with their ids, newest first.
    pub fn all_of(&self, owner: &Tenant) -> Vec<(&str, &Session)> {
        let own = self.sessions.iter().filter(|(_, session)| session.owner == *owner);
        let mut own: Vec<_> = own.map(|(id, session)| (id.as_str(), session)).collect();
        own.sort_by_key(|&(id, session)| std::cmp::Reverse((session.opened, id)));
        own
    }

    /// Ids of the sessions of `owner`, newest first.
    pub fn of(&self, owner: &Tenant) -> Vec<&str> {
        self.all_of(owner).into_iter().map(|(id, _)| id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(text: &str) -> BodyHash {
        BodyHash::of(text.as_bytes())
    }

    #[test]
    fn a_session_lives_until_it_is_finished_and_only_for_its_owner() {
        let (one, two) = (Tenant::named("one").unwrap(), Tenant::named("two").unwrap());
        let mut sessions = Sessions::default();
        let (first, second) =
            (sessions.open(one.clone(), About::default()), sessions.open(one.clone(), About::default()));
        assert_ne!(first, second);
        assert_eq!(sessions.heartbeat(&one, &first), Ok(()));
        assert_eq!(sessions.heartbeat(&two, &first), Err(Ended(first.clone())));
        assert_eq!((sessions.of(&one).len(), sessions.of(&two).len()), (2, 0));
        sessions.finish(&two, &first);
        assert_eq!(sessions.heartbeat(&one, &first), Ok(()));
        sessions.finish(&one, &first);
        assert_eq!(sessions.heartbeat(&one, &first), Err(Ended(first.clone())));
        assert!(sessions.get(&one, &first).is_some() && sessions.get(&two, &first).is_none());
    }

    #[test]
    fn a_number_makes_one_model() {
        let (all, mut sessions) = (Tenant::everyone(), Sessions::default());
        let id = sessions.open(all.clone(), About::default());
        assert_eq!(sessions.repeat(&all, &id, 0, hash("rank 8")), Ok(None));
        sessions.take(&all, &id, 0, hash("rank 8"), "future".into()).unwrap();
        assert_eq!(sessions.repeat(&all, &id, 0, hash("rank 8")), Ok(Some("future".into())));
        let other = sessions.repeat(&all, &id, 0, hash("rank 16")).unwrap_err().to_string();
        assert_eq!(other, "model_seq_id 0 was sent before with another body: a new request needs a new one");
        sessions.finish(&all, &id);
        assert!(sessions.repeat(&all, &id, 1, hash("")).is_err());
    }

    #[test]
    fn models_bring_their_sessions_back() {
        let (all, mut sessions) = (Tenant::everyone(), Sessions::default());
        for id in ["sess-1:train:0", "sess-1:train:1", "default", "x:train:y"] {
            sessions.restore(&all, &ModelId::new(id).unwrap());
        }
        assert_eq!(sessions.of(&all), ["sess-1"]);
        assert_eq!(of_model(&model_id("sess-1", 7).unwrap()), Some(("sess-1", 7)));
    }

    #[test]
    fn memory_of_sessions_is_bounded() {
        let (all, mut sessions) = (Tenant::everyone(), Sessions::default());
        let kept = sessions.open(all.clone(), About::default());
        for number in 0..REMEMBERED as u64 {
            let id = format!("ended-{number}");
            sessions.insert(id.clone(), all.clone(), About::default(), SystemTime::now());
            sessions.finish(&all, &id);
        }
        assert_eq!(sessions.of(&all).len(), REMEMBERED);
        assert_eq!(sessions.heartbeat(&all, &kept), Ok(()));
    }
}
