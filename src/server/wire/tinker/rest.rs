//! Lists of runs, checkpoints and sessions, and what may be done to a checkpoint.

use super::{
    Answer, Call,
    answers::{
        Checkpoint, Checkpoints, Cursor, ExternalWeightsUrls, Session, Sessions, TrainingRun, TrainingRuns,
    },
    calls::{Page, SetTtl, ttl},
    json,
    weights::SCHEME,
};
use crate::{
    checkpoint::saves,
    server::{
        checkpoints::{self, Stored},
        downloads,
        fault::Fault,
        labels::{self, About},
        paths::Kind,
        request::ModelId,
        runs::{self, Run},
        sessions::of_model,
        wire::iso_time,
    },
};
use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

/// Items of a list in one reply, at most.
const MOST_ITEMS: usize = 1000;

/// The last 0.x of the client whose lists of checkpoints must have no external weights in them.
const LAST_WITHOUT_EXTERNAL: u32 = 24;

const CHECKPOINT: &str = "training_runs/{run}/checkpoints/{kind}/{name}";

/// The part of `items` that a page has, and its cursor.
fn paged<T>(items: Vec<T>, page: Page) -> (Vec<T>, Cursor) {
    let Page { offset, limit } = page;
    let cursor = Cursor { offset, limit, total_count: items.len() };
    (items.into_iter().skip(offset).take(limit).collect(), cursor)
}

impl Call<'_> {
    /// `?limit=&offset=`
    fn page(&self) -> Result<Page, Fault> {
        let number = |name: &str, otherwise: usize| match self.query.get(name) {
            None => Ok(otherwise),
            Some(text) => text
                .parse()
                .map_err(|_| Fault::user(format!("{name}: expected an integer of at least 0, got {text:?}"))),
        };
        let Page { limit, offset } = Page::default();
        Ok(Page { limit: number("limit", limit)?.min(MOST_ITEMS), offset: number("offset", offset)? })
    }

    /// The checkpoint in a path: [`CHECKPOINT`] with `rest`.
    fn checkpoint(&self, rest: &str) -> Result<(Stored, About), Fault> {
        let [run, kind, name] = self.parts(&format!("{CHECKPOINT}{rest}"))?;
        let path = format!("{kind}/{name}");
        let absent = || Fault::not_found(format!("{SCHEME}://{run}/{path}: no such checkpoint"));
        let model = ModelId::new(run.as_str()).map_err(|_| absent())?;
        Kind::of(&kind).ok_or_else(absent)?;
        Ok(labels::find(&self.app.root(self.tenant)?, &path, &model)?)
    }

    /// False for checkpoints of a kind that the client cannot read in a list.
    fn knows(&self, stored: &Stored) -> bool {
        let version = self.headers.get("x-stainless-package-version");
        let text = version.and_then(|value| value.to_str().ok());
        let minor = text.and_then(|version| version.strip_prefix("0.")?.split('.').next()?.parse().ok());
        match stored.checkpoint.kind {
            Kind::Weights | Kind::Sampler => true,
            Kind::External => minor.is_none_or(|minor: u32| minor > LAST_WITHOUT_EXTERNAL),
            // No version has a word for it.
            Kind::Full => version.is_none(),
        }
    }

    fn change(&self, rest: &str, change: impl FnOnce(&mut About)) -> Answer {
        let (stored, _) = self.checkpoint(rest)?;
        labels::change(&self.app.root(self.tenant)?, &stored, change)?;
        Ok(None)
    }

    fn run(&self, run: Run) -> TrainingRun {
        let newest = |kind| {
            let found = run.saves.iter().rfind(|(stored, _)| stored.checkpoint.kind == kind);
            found.map(|(stored, about)| listed(stored, about))
        };
        TrainingRun {
            training_run_id: run.id.to_string(),
            base_model: self.app.settings.base_model.clone(),
            model_owner: self.tenant.name().to_owned(),
            is_lora: true,
            lora_rank: run.rank,
            corrupted: false,
            last_request_time: iso_time(run.last_request),
            last_checkpoint: newest(Kind::Weights),
            last_sampler_checkpoint: newest(Kind::Sampler),
            user_metadata: run.user_metadata.clone(),
        }
    }
}

/// A checkpoint as lists show it.
fn listed(stored: &Stored, about: &About) -> Checkpoint {
    Checkpoint {
        checkpoint_id: stored.checkpoint.id(),
        checkpoint_type: stored.checkpoint.kind.into(),
        time: iso_time(stored.time),
        tinker_path: stored.checkpoint.uri(SCHEME),
        size_bytes: stored.bytes,
        public: about.is_public,
        user_metadata: about.user_metadata.clone(),
        expires_at: about.expires.map(iso_time),
    }
}

pub fn runs(call: &Call) -> Answer {
    let (runs, cursor) = paged(runs::list(call.app, call.tenant)?, call.page()?);
    json(&TrainingRuns { training_runs: runs.into_iter().map(|run| call.run(run)).collect(), cursor })
}

pub fn run(call: &Call) -> Answer {
    let [run] = call.parts("training_runs/{run}")?;
    json(&call.run(runs::find(call.app, call.tenant, &run)?))
}

pub fn checkpoints_of_run(call: &Call) -> Answer {
    let [run] = call.parts("training_runs/{run}/checkpoints")?;
    let run = runs::find(call.app, call.tenant, &run)?;
    let known = run.saves.iter().filter(|(stored, _)| call.knows(stored));
    let checkpoints = known.map(|(stored, about)| listed(stored, about)).collect();
    json(&Checkpoints { checkpoints, cursor: None })
}

/// The checkpoints of all runs, newest first.
pub fn checkpoints(call: &Call) -> Answer {
    let runs = runs::list(call.app, call.tenant)?;
    let saves = runs.into_iter().flat_map(|run| run.saves);
    let mut saves: Vec<(Stored, About)> = saves.filter(|(stored, _)| call.knows(stored)).collect();
    saves.sort_by_key(|(stored, _)| std::cmp::Reverse(stored.time));
    let (saves, cursor) = paged(saves, call.page()?);
    let checkpoints = saves.iter().map(|(stored, about)| listed(stored, about)).collect();
    json(&Checkpoints { checkpoints, cursor: Some(cursor) })
}

pub fn delete(call: &Call) -> Answer {
    let (stored, _) = call.checkpoint("")?;
    labels::delete(&call.app.root(call.tenant)?, &stored)?;
    Ok(None)
}

/// Sets the time for which a checkpoint is kept from now on; null: for ever.
pub fn set_ttl(call: &Call) -> Answer {
    let SetTtl { ttl_seconds } = call.read()?;
    let seconds = ttl(ttl_seconds).map_err(|error| Fault::user(error.to_string()))?;
    let expires = seconds.and_then(|seconds| SystemTime::now().checked_add(Duration::from_secs(seconds)));
    call.change("/ttl", |about| about.expires = expires)
}

pub fn publish(call: &Call) -> Answer {
    call.change("/publish", |about| about.is_public = true)
}

pub fn unpublish(call: &Call) -> Answer {
    call.change("/publish", |about| about.is_public = false)
}

/// Addresses at which the files of a checkpoint of any kind can be had without a key.
pub fn external_urls(call: &Call) -> Answer {
    let (stored, _) = call.checkpoint("/external_weights_urls")?;
    let (_, manifest) =
        saves::published(&stored.folder).map_err(|error| checkpoints::refused(&stored, &error))?;
    let (now, mut urls, mut expires) = (SystemTime::now(), BTreeMap::new(), None);
    for file in manifest.files() {
        let path = downloads::path(call.tenant, &stored.checkpoint, file);
        let (signed, until) = call.app.signer.sign(&path, now)?;
        urls.insert(file.to_owned(), downloads::url(call.headers, &signed)?);
        expires = Some(until);
    }
    json(&ExternalWeightsUrls { urls, expires: iso_time(expires.unwrap_or(now)) })
}

pub fn sessions(call: &Call) -> Answer {
    let sessions = call.app.sessions();
    let ids = sessions.of(call.tenant).into_iter().map(str::to_owned).collect();
    json(&Sessions { sessions: paged(ids, call.page()?).0 })
}

pub fn session(call: &Call) -> Answer {
    let [id] = call.parts("sessions/{session}")?;
    let Some(about) = call.app.sessions().get(call.tenant, &id).map(|session| session.about.clone()) else {
        let shown: String = id.chars().take(64).collect();
        return Err(Fault::not_found(format!(
            "session {shown:?} is not known; sessions lists those that are"
        )));
    };
    let runs = runs::list(call.app, call.tenant)?;
    let sampler_ids = call.app.samplers().of_session(call.tenant, &id).map(str::to_owned).collect();
    let own = runs.iter().filter(|run| of_model(&run.id).is_some_and(|(session, _)| session == id));
    json(&Session {
        training_run_ids: own.map(|run| run.id.to_string()).collect(),
        sampler_ids,
        user_metadata: about.user_metadata,
        display_name: about.display_name,
    })
}
