//! Downloads of saved adapters by programs that send no key: at addresses that are signed, and expire.

use super::{
    fault::Fault,
    labels,
    paths::{Checkpoint, Kind, inside},
    registry::Tenant,
    request::ModelId,
};
use crate::checkpoint::saves;
use axum::http::{HeaderMap, StatusCode, header};
use hmac::{Hmac, Mac};
use sha2::Sha256;
use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The prefix of the addresses.
pub const PREFIX: &str = "/api/v1/external_weights/";

/// Time for which a signed address is valid.
pub const LIFETIME: Duration = Duration::from_secs(3600);

/// Signs addresses by a key of the process.
pub struct Signer(Option<Hmac<Sha256>>);

impl Default for Signer {
    /// A signer with a random key. Without a source of random numbers it signs nothing.
    fn default() -> Self {
        let mut key = [0; 32];
        let filled = getrandom::fill(&mut key);
        Self(filled.ok().and_then(|()| Hmac::new_from_slice(&key).ok()))
    }
}

impl Signer {
    /// The code over a path and the second since 1970 at which its address expires.
    fn code(&self, path: &str, expires: u64) -> Result<Hmac<Sha256>, Fault> {
        let Some(code) = &self.0 else {
            let text = "this host gives no random numbers, so no address can be signed";
            return Err(Fault::new(StatusCode::INTERNAL_SERVER_ERROR, text));
        };
        Ok(code.clone().chain_update(expires.to_le_bytes()).chain_update(path))
    }

    /// `{expires}/{signature}/{path}`, valid for [`LIFETIME`] from `now`, and the time at which it expires.
    ///
    /// # Errors
    /// The host has no random numbers.
    pub fn sign(&self, path: &str, now: SystemTime) -> Result<(String, SystemTime), Fault> {
        let since = (now + LIFETIME).duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let signature = self.code(path, since)?.finalize().into_bytes();
        let signature: String = signature.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok((format!("{since}/{signature}/{path}"), UNIX_EPOCH + Duration::from_secs(since)))
    }

    /// The path in a signed address.
    ///
    /// # Errors
    /// The address was not signed by this process, or has expired.
    pub fn open<'a>(&self, address: &'a str, now: SystemTime) -> Result<&'a str, Fault> {
        let forbidden = |text| Fault::new(StatusCode::FORBIDDEN, text);
        let wrong = || forbidden("the address is not one that this server has signed since its start");
        let mut parts = address.splitn(3, '/');
        let (Some(expires), Some(signature), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(wrong());
        };
        let expires: u64 = expires.parse().map_err(|_| wrong())?;
        let byte = |at| u8::from_str_radix(signature.get(at..at + 2)?, 16).ok();
        let bytes: Option<Vec<u8>> = (0..signature.len()).step_by(2).map(byte).collect();
        self.code(path, expires)?.verify_slice(&bytes.ok_or_else(wrong)?).map_err(|_| wrong())?;
        if now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() >= expires {
            return Err(forbidden("the address has expired; ask for external_weights_urls again"));
        }
        Ok(path)
    }
}

/// The path of a file that is to be signed.
pub fn path(tenant: &Tenant, checkpoint: &Checkpoint, file: &str) -> String {
    format!("{}/{}/{}/{file}", tenant.name(), checkpoint.model, checkpoint.id())
}

/// The address of a signed path, at the host to which a client speaks.
///
/// # Errors
/// The client names no host.
pub fn url(headers: &HeaderMap, signed: &str) -> Result<String, Fault> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let is_host = |host: &&str| {
        !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || ".-_:[]".contains(c))
    };
    let Some(host) = text(header::HOST.as_str()).filter(is_host) else {
        return Err(Fault::user("Host: expected the name of this server, for addresses of downloads"));
    };
    // A proxy that speaks TLS says so.
    let scheme = if text("x-forwarded-proto") == Some("https") { "https" } else { "http" };
    Ok(format!("{scheme}://{host}{PREFIX}{signed}"))
}

/// The file that a path of [`path`] names, if it is one of a save.
pub fn file(output: &Path, has_keys: bool, path: &str) -> Option<PathBuf> {
    let mut parts = path.splitn(5, '/');
    let (tenant, model) = (parts.next()?, ModelId::new(parts.next()?).ok()?);
    let (kind, name, file) = (Kind::of(parts.next()?)?, parts.next()?, parts.next()?);
    let tenant = if has_keys { Tenant::named(tenant)? } else { Tenant::everyone() };
    let (stored, _) = labels::find(&tenant.root(output), &format!("{kind}/{name}"), &model).ok()?;
    let (_, manifest) = saves::published(&stored.folder).ok()?;
    if manifest.lists(file) { inside(&stored.folder, Path::new(file)).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_opens_until_it_expires_and_only_as_it_was_signed() {
        let (signer, now) = (Signer::default(), SystemTime::now());
        let (address, expires) = signer.sign("local/sess-1:train:0/weights/x/adapter.bin", now).unwrap();
        assert_eq!(signer.open(&address, now).unwrap(), "local/sess-1:train:0/weights/x/adapter.bin");
        assert!(signer.open(&address, expires - Duration::from_secs(1)).is_ok());
        assert!(signer.open(&address, expires).unwrap_err().detail.contains("expired"));
        let (time, rest) = address.split_once('/').unwrap();
        let later = format!("{}/{rest}", time.parse::<u64>().unwrap() + 1);
        let (signature, path) = rest.split_once('/').unwrap();
        for other in [
            address.replace("x/adapter", "y/adapter"),
            later,
            format!("{time}/{}/{path}", &signature[2..]),
            format!("{time}/{}/{path}", signature.replace(|_| true, "é")),
            format!("{time}//{path}"),
            format!("{time}/{path}"),
            String::new(),
        ] {
            assert_eq!(signer.open(&other, now).unwrap_err().status, StatusCode::FORBIDDEN, "{other}");
        }
        assert!(Signer::default().open(&address, now).is_err());
    }
}
