//! Hub, cache and token as the environment names them, by the variables and rules of `huggingface_hub`.

use super::{HubError, HubId, cache::Repository};
use std::path::{Path, PathBuf};

const ENDPOINT: &str = "https://huggingface.co";
/// The first that is set to a true value counts.
const OFFLINE: [&str; 2] = ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"];

/// Hub, cache and token.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Settings {
    /// Without a slash at its end.
    pub endpoint: String,
    /// Folder of all repositories.
    pub cache: PathBuf,
    pub token: Option<String>,
    /// The variable that forbids requests.
    pub offline: Option<&'static str>,
}

impl Settings {
    /// Reads the environment, and the file that `hf auth login` writes.
    ///
    /// # Errors
    /// [`HubError::NoHome`]
    pub fn from_env() -> Result<Self, HubError> {
        Self::read(|name| std::env::var(name).ok(), |path| std::fs::read_to_string(path).ok())
    }

    fn read(
        variable: impl Fn(&str) -> Option<String>,
        file: impl Fn(&Path) -> Option<String>,
    ) -> Result<Self, HubError> {
        let given = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let user = || given("HOME").map(PathBuf::from);
        // ~ is the home folder in these variables.
        let folder = |name: &str| {
            let text = given(name)?;
            match text.strip_prefix("~/") {
                Some(rest) => Some(user()?.join(rest)),
                None => Some(PathBuf::from(text)),
            }
        };
        let home = folder("HF_HOME")
            .or_else(|| Some(folder("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(user()?.join(".cache/huggingface")));
        let cache = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"].into_iter().find_map(folder);
        let cache = cache.or_else(|| Some(home.as_ref()?.join("hub"))).ok_or(HubError::NoHome)?;
        let token_file = folder("HF_TOKEN_PATH").or_else(|| Some(home?.join("token")));
        let token = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].into_iter().find_map(given);
        let token = token.or_else(|| file(&token_file?)).map(|text| text.trim().to_owned());
        let is_true = |name: &&str| {
            given(name).is_some_and(|value| {
                ["1", "ON", "YES", "TRUE"].contains(&value.trim().to_uppercase().as_str())
            })
        };
        let endpoint = given("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        Ok(Self {
            endpoint: endpoint.trim().trim_end_matches('/').to_owned(),
            cache,
            token: token.filter(|text| !text.is_empty()),
            offline: OFFLINE.into_iter().find(|name| is_true(name)),
        })
    }

    pub fn repository(&self, id: &HubId) -> Repository {
        Repository::new(&self.cache, id)
    }

    /// The error of a repository that the cache has not.
    pub fn not_cached(&self, id: &HubId) -> HubError {
        HubError::NotCached { kind: id.kind, cache: self.cache.clone(), offline: self.offline }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)], token_file: Option<(&str, &str)>) -> Result<Settings, HubError> {
        Settings::read(
            |name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()),
            |path| token_file.filter(|(name, _)| Path::new(name) == path).map(|(_, text)| text.to_owned()),
        )
    }

    /// As `huggingface_hub/constants.py` computes them.
    #[test]
    fn the_environment_means_what_it_means_to_huggingface_hub() {
        let home = ("HOME", "/root");
        let cache = |variables: &[(&str, &str)]| settings(variables, None).map(|found| found.cache);
        let of = |text: &str| PathBuf::from(text);
        assert_eq!(cache(&[home]).unwrap(), of("/root/.cache/huggingface/hub"));
        assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x")]).unwrap(), of("/x/huggingface/hub"));
        assert_eq!(cache(&[home, ("HF_HOME", "~/h"), ("XDG_CACHE_HOME", "/x")]).unwrap(), of("/root/h/hub"));
        assert_eq!(cache(&[home, ("HF_HOME", "/h"), ("HUGGINGFACE_HUB_CACHE", "/o")]).unwrap(), of("/o"));
        assert_eq!(cache(&[("HF_HUB_CACHE", "/c"), ("HUGGINGFACE_HUB_CACHE", "/o")]).unwrap(), of("/c"));
        assert!(matches!(cache(&[("HOME", "")]), Err(HubError::NoHome)));

        let found = settings(&[home], Some(("/root/.cache/huggingface/token", "hf_file\n"))).unwrap();
        assert_eq!((found.token.as_deref(), &*found.endpoint), (Some("hf_file"), ENDPOINT));
        let found = settings(&[home, ("HF_TOKEN", " hf_own ")], Some(("/t", "hf_file"))).unwrap();
        assert_eq!(found.token.as_deref(), Some("hf_own"));
        let found = settings(&[home, ("HF_TOKEN_PATH", "/t")], Some(("/t", "hf_file"))).unwrap();
        assert_eq!(found.token.as_deref(), Some("hf_file"));
        let found = settings(&[home, ("HF_ENDPOINT", "http://mirror:1/")], None).unwrap();
        assert_eq!((found.token, &*found.endpoint), (None, "http://mirror:1"));

        for (value, is_offline) in [("1", true), ("true", true), ("on", true), ("0", false), ("", false)] {
            let found = settings(&[home, ("HF_HUB_OFFLINE", value)], None).unwrap();
            assert_eq!(found.offline.is_some(), is_offline, "{value}");
        }
        let found = settings(&[home, ("TRANSFORMERS_OFFLINE", "YES")], None).unwrap();
        assert_eq!(found.offline, Some("TRANSFORMERS_OFFLINE"));
    }
}
