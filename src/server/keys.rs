//! Keys of clients. The file holds hashes alone: a line is the SHA-256 of a key in hexadecimal, and perhaps the name
//! of the tenant behind a space. Keys with one name are of one tenant.

use super::registry::Tenant;
use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use subtle::{Choice, ConstantTimeEq};

/// The reason why a file of keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: std::io::Error },
    #[error(
        "{path}:{line}: expected the SHA-256 of a key in hexadecimal and perhaps a tenant of up to 32 letters, digits, \
         '_' and '-'; `printf %s KEY | sha256sum` prints the hash"
    )]
    Line { path: PathBuf, line: usize },
    #[error("{0}: expected at least one line with the SHA-256 of a key, found none")]
    Empty(PathBuf),
}

/// The keys of a server. Without any, all who reach it are one tenant.
#[derive(Debug, Default)]
pub struct Keys(Vec<([u8; 32], Tenant)>);

impl Keys {
    /// Reads a file of keys. Empty lines and those that begin with '#' are skipped.
    pub fn read(path: &Path) -> Result<Self, KeysError> {
        let text =
            std::fs::read_to_string(path).map_err(|error| KeysError::Io { path: path.into(), error })?;
        let lines = text.lines().enumerate().map(|(i, line)| (i + 1, line.trim()));
        let keys = lines
            .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
            .map(|(line, text)| parse(text).ok_or_else(|| KeysError::Line { path: path.into(), line }));
        let keys: Vec<_> = keys.collect::<Result<_, _>>()?;
        if keys.is_empty() { Err(KeysError::Empty(path.into())) } else { Ok(Self(keys)) }
    }

    /// True if clients need a key.
    pub fn are_needed(&self) -> bool {
        !self.0.is_empty()
    }

    /// The tenant that `X-API-Key` or `Authorization: Bearer` of a request belongs to.
    pub fn tenant(&self, headers: &HeaderMap) -> Option<Tenant> {
        if !self.are_needed() {
            return Some(Tenant::everyone());
        }
        let bearer = || {
            let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
            let (scheme, key) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
        };
        let key = headers.get("x-api-key").and_then(|value| value.to_str().ok()).or_else(bearer)?;
        let hash: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        // Every line is compared, so the time does not tell how far a key got.
        let mut found = None;
        for (known, tenant) in &self.0 {
            let is_same: Choice = known.ct_eq(&hash);
            if bool::from(is_same) {
                found = Some(tenant.clone());
            }
        }
        found
    }
}

/// The hash and the tenant of a line. One without a name has its own, from the hash.
fn parse(line: &str) -> Option<([u8; 32], Tenant)> {
    let mut words = line.split_whitespace();
    let (digits, name, None) = (words.next()?, words.next(), words.next()) else { return None };
    if digits.len() != 64 || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut hash = [0; 32];
    for (i, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).ok()?;
    }
    let own = format!("key-{}", &digits[..12].to_ascii_lowercase());
    Some((hash, Tenant::named(name.unwrap_or(&own))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::{HeaderName, HeaderValue};

    // `printf %s tml-one | sha256sum` and `printf %s two | sha256sum`
    const ONE: &str = "37186f648184032ea0967255741152df482798b3ac1956d2fa5726c5722acc8e";
    const TWO: &str = "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3";

    fn read(text: &str) -> Result<Keys, KeysError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys");
        std::fs::write(&path, text).unwrap();
        Keys::read(&path)
    }

    #[test]
    fn a_key_is_known_by_its_hash_in_either_header() {
        let keys = read(&format!("# keys\n\n{ONE} lab\n{}\n", TWO.to_uppercase())).unwrap();
        let tenant = |name: &'static str, value: &'static str| {
            let name = HeaderName::from_static(name);
            keys.tenant(&[(name, HeaderValue::from_static(value))].into_iter().collect())
        };
        assert_eq!(tenant("x-api-key", "tml-one"), Tenant::named("lab"));
        assert_eq!(tenant("authorization", "Bearer two"), Tenant::named(&format!("key-{}", &TWO[..12])));
        assert_eq!(tenant("authorization", "bearer  tml-one"), Tenant::named("lab"));
        for (name, value) in [
            ("x-api-key", "tml-On"),
            ("x-api-key", ""),
            ("x-api-key", ONE),
            ("authorization", "two"),
            ("authorization", "Basic two"),
            ("cookie", "two"),
        ] {
            assert_eq!(tenant(name, value), None, "{name}: {value}");
        }
        assert_eq!(keys.tenant(&HeaderMap::new()), None);
        assert_eq!(Keys::default().tenant(&HeaderMap::new()), Some(Tenant::everyone()));
    }

    #[test]
    fn a_line_that_is_no_hash_is_named() {
        for bad in [
            "tml-plain-key",
            &ONE[1..],
            &format!("{ONE} a b"),
            &format!("{ONE} a/b"),
            &format!("é{}", &ONE[2..]),
        ] {
            let error = read(&format!("{TWO}\n{bad}\n")).unwrap_err().to_string();
            assert!(error.contains("keys:2: expected the SHA-256 of a key"), "{error}");
        }
        assert!(matches!(read("# none\n"), Err(KeysError::Empty(_))));
    }
}
