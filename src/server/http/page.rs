//! The page at `/`: files of the program, sent without a key. What the page shows, it asks for with one.

use crate::page;
use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use sha2::{Digest, Sha256};
use std::sync::LazyLock;

/// Scripts, styles and calls of this server alone; no frame and no form leads elsewhere.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Headers of every file. Browsers ask each time whether it has changed.
const HEADERS: [(HeaderName, &str); 4] = [
    (header::CACHE_CONTROL, "no-cache"),
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
];

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// A file of the page.
struct File {
    path: &'static str,
    content_type: &'static str,
    text: &'static str,
    /// A hash of the text, in quotation marks.
    tag: String,
}

impl File {
    fn new(path: &'static str, content_type: &'static str, text: &'static str) -> Self {
        let hash: String = Sha256::digest(text).iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Self { path, content_type, text, tag: format!("\"{hash}\"") }
    }

    /// True if the client has this version.
    fn is_known(&self, headers: &HeaderMap) -> bool {
        let tags = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|tags| tags.to_str().ok());
        let mut tags = tags.flat_map(|tags| tags.split(',')).map(str::trim);
        tags.any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == self.tag)
    }
}

static FILES: LazyLock<[File; 8]> = LazyLock::new(|| {
    [
        File::new("/", "text/html; charset=utf-8", include_str!("../page/index.html")),
        File::new("/page/style.css", "text/css; charset=utf-8", page::STYLE),
        File::new("/page/page.js", SCRIPT, include_str!("../page/page.js")),
        File::new("/page/curves.js", SCRIPT, page::CURVES),
        File::new("/page/nodes.js", SCRIPT, page::NODES),
        File::new("/page/theme.js", SCRIPT, page::THEME),
        File::new("/page/try.js", SCRIPT, include_str!("../page/try.js")),
        File::new("/page/icon.svg", "image/svg+xml", include_str!("../page/icon.svg")),
    ]
});

/// The file of the page at `path`; `None`: there is none.
pub fn file(path: &str, headers: &HeaderMap) -> Option<Response> {
    let file = FILES.iter().find(|file| file.path == path)?;
    let mut response = match file.is_known(headers) {
        true => StatusCode::NOT_MODIFIED.into_response(),
        false => Body::from(file.text).into_response(),
    };
    let own = [(header::CONTENT_TYPE, file.content_type), (header::ETAG, &file.tag)];
    for (name, value) in HEADERS.into_iter().chain(own) {
        response.headers_mut().extend(HeaderValue::from_str(value).map(|value| (name, value)));
    }
    Some(response)
}
