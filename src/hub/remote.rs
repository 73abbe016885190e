//! Requests to the hub: the files of a revision, what it says of a file, bytes of a file from a position on.

use super::{HubError, HubId, Kind, settings::Settings};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use std::{fs, io::Read, path::PathBuf, time::Duration};
use ureq::{
    Agent, Body,
    config::RedirectAuthHeaders,
    http::{HeaderMap, Response, StatusCode, header},
    tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem},
};

const CONNECT: Duration = Duration::from_secs(10);
/// Time for which a connection may be silent.
const SILENT: Duration = Duration::from_secs(60);
/// Bytes of an answer that is read whole, at most.
const ANSWER: u64 = 64 << 20;
/// Bundles of the authorities that a machine trusts: Debian's, Fedora's, SUSE's, Alpine's.
const BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];
/// Redirects within the hub before a file's own address, at most.
const REDIRECTS: usize = 5;
/// Characters that do not stand for themselves in a part of an address, and in a path.
const NAME: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
const PATH: &AsciiSet = &NAME.remove(b'/');
const COMMIT: &str = "x-repo-commit";
const LINKED_ETAG: &str = "x-linked-etag";
const LINKED_SIZE: &str = "x-linked-size";
const ERROR_CODE: &str = "x-error-code";
const ERROR_MESSAGE: &str = "x-error-message";

/// The hub, as one repository's id addresses it.
pub(super) struct Remote<'a> {
    settings: &'a Settings,
    id: &'a HubId,
    agent: Agent,
}

/// A revision, as the hub describes it.
pub(super) struct Revision {
    pub commit: String,
    /// Names of all its files.
    pub files: Vec<String>,
}

/// A file, as the hub describes it.
#[derive(Clone, Debug)]
pub(super) struct RemoteFile {
    pub name: String,
    pub address: String,
    /// Name of its blob: the sha256 of a large file.
    pub etag: String,
    /// In bytes.
    pub size: u64,
}

impl<'a> Remote<'a> {
    pub fn new(settings: &'a Settings, id: &'a HubId) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .tls_config(TlsConfig::builder().root_certs(roots()).build())
            // Of a redirect to a store of files, which takes no token.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_resolve(Some(CONNECT))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(SILENT))
            .timeout_per_read(Some(SILENT))
            .user_agent(concat!("xorl-dist/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { settings, id, agent: config.new_agent() }
    }

    /// The commit and the files of the revision.
    ///
    /// # Errors
    /// The repository is absent or not to be read, the hub is not reached, or its answer is not understood.
    pub fn revision(&self) -> Result<Revision, HubError> {
        #[derive(Deserialize)]
        struct Answer {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let Settings { endpoint, .. } = self.settings;
        // A slash in a branch's name is none of the path.
        let revision = utf8_percent_encode(self.id.revision(), NAME);
        let kind = match self.id.kind {
            Kind::Model => "models",
            Kind::DataSet => "datasets",
        };
        let address = format!("{endpoint}/api/{kind}/{}/revision/{revision}", self.id.name);
        let mut response = self.send(&address, 0)?;
        self.accepted(&address, &response)?;
        let text = response.body_mut().with_config().limit(ANSWER).read_to_string();
        let text = text.map_err(unreachable(&address))?;
        let answer: Answer = serde_json::from_str(&text)
            .map_err(|error| HubError::Answer { address: address.clone(), reason: error.to_string() })?;
        if !super::cache::is_commit(&answer.sha) {
            return Err(HubError::Answer { address, reason: "its commit is no hash".into() });
        }
        let files = answer.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        Ok(Revision { commit: answer.sha, files })
    }

    /// Describes the file `name` of `commit`.
    ///
    /// # Errors
    /// As [`Remote::revision`].
    pub fn describe(&self, commit: &str, name: &str) -> Result<RemoteFile, HubError> {
        let path = utf8_percent_encode(name, PATH);
        let own = format!("{}/{}/resolve/{commit}/{path}", self.settings.endpoint, self.id.path());
        let mut address = own.clone();
        for _ in 0..REDIRECTS {
            let request = self.agent.head(&address).header(header::ACCEPT_ENCODING, "identity");
            let request = self.with_token(request).config().max_redirects(0).build();
            let response = request.call().map_err(unreachable(&address))?;
            let text = |name: &str| text(response.headers(), name);
            // A model that was renamed is elsewhere on the hub; a store of files is another host.
            if let (true, Some(location)) = (response.status().is_redirection(), text("location"))
                && location.starts_with('/')
            {
                address = format!("{}{location}", self.settings.endpoint);
                continue;
            }
            if !response.status().is_redirection() {
                self.accepted(&address, &response)?;
            }
            let answer = |reason: &str| HubError::Answer { address: address.clone(), reason: reason.into() };
            if text(COMMIT).is_none_or(|found| found != commit) {
                return Err(answer("it does not name the commit that was asked for"));
            }
            let etag = text(LINKED_ETAG).or_else(|| text("etag")).unwrap_or_default();
            let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
            if etag.is_empty()
                || !etag.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
            {
                return Err(answer("it gives no ETag"));
            }
            // The length of a redirect is its own.
            let length = || text("content-length").filter(|_| response.status().is_success());
            let size = text(LINKED_SIZE).or_else(length).and_then(|size| size.parse().ok());
            let size = size.ok_or_else(|| answer("it does not give the file's size"))?;
            return Ok(RemoteFile { name: name.to_owned(), address: own, etag, size });
        }
        Err(HubError::Answer { address: own, reason: "it redirects too often".into() })
    }

    /// The bytes of `file` from `from` on; all of it where the hub sends no ranges. Gives the position of the first
    /// byte, too.
    ///
    /// # Errors
    /// As [`Remote::revision`].
    pub fn open(&self, file: &RemoteFile, from: u64) -> Result<(u64, impl Read + use<>), HubError> {
        let address = &file.address;
        let mut response = self.send(address, from)?;
        if from > 0 && !starts_at(&response, from) {
            response = self.send(address, 0)?;
        }
        self.accepted(address, &response)?;
        let start = if response.status() == StatusCode::PARTIAL_CONTENT { from } else { 0 };
        Ok((start, response.into_body().into_reader()))
    }

    fn send(&self, address: &str, from: u64) -> Result<Response<Body>, HubError> {
        let request = self.with_token(self.agent.get(address)).header(header::ACCEPT_ENCODING, "identity");
        let request =
            if from > 0 { request.header(header::RANGE, format!("bytes={from}-")) } else { request };
        request.call().map_err(unreachable(address))
    }

    fn with_token<T>(&self, request: ureq::RequestBuilder<T>) -> ureq::RequestBuilder<T> {
        match &self.settings.token {
            Some(token) => request.header(header::AUTHORIZATION, format!("Bearer {token}")),
            None => request,
        }
    }

    /// The error that an answer stands for, if it is one.
    fn accepted(&self, address: &str, response: &Response<Body>) -> Result<(), HubError> {
        if response.status().is_success() {
            return Ok(());
        }
        let Settings { endpoint, token, .. } = self.settings;
        let (has_token, kind) = (token.is_some(), self.id.kind);
        let (status, endpoint) = (response.status().as_u16(), endpoint.clone());
        let code = text(response.headers(), ERROR_CODE).unwrap_or_default();
        let message = text(response.headers(), ERROR_MESSAGE).unwrap_or_default();
        Err(match (status, &*code) {
            (401 | 403, "GatedRepo") => {
                HubError::Gated { page: format!("{endpoint}/{}", self.id.path()), has_token }
            }
            (404, "RevisionNotFound") => {
                HubError::Revision { kind, endpoint, revision: self.id.revision().to_owned() }
            }
            (401, _) if message.starts_with("Invalid credentials") => HubError::Token { kind, endpoint },
            (401 | 403 | 404, _) => HubError::Absent { kind, endpoint, has_token },
            _ => HubError::Status { address: address.to_owned(), status },
        })
    }
}

/// Authorities that this machine trusts, among them that of a network that looks into TLS; Mozilla's where it has no
/// bundle.
fn roots() -> RootCerts {
    let named = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let mut bundles = named.into_iter().chain(BUNDLES.map(PathBuf::from));
    let pem = bundles.find_map(|path| fs::read(path).ok()).unwrap_or_default();
    let certificates = parse_pem(&pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    let certificates: Vec<Certificate<'static>> = certificates.collect();
    if certificates.is_empty() { RootCerts::WebPki } else { certificates.into() }
}

/// False for an answer to a request for a range that is another range, or that there is none.
fn starts_at(response: &Response<Body>, from: u64) -> bool {
    match response.status() {
        StatusCode::PARTIAL_CONTENT => text(response.headers(), "content-range")
            .is_some_and(|range| range.starts_with(&format!("bytes {from}-"))),
        status => status != StatusCode::RANGE_NOT_SATISFIABLE,
    }
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

fn unreachable(address: &str) -> impl FnOnce(ureq::Error) -> HubError + '_ {
    |error| HubError::Unreachable { address: address.to_owned(), reason: error.to_string() }
}
