//! Web pages that a browser has open. On a machine that reaches the server it sends what any page asks it to; keys keep
//! the pages of others out, and without them the names in `Origin` and `Host` do.

use crate::server::fault::Fault;
use axum::http::{HeaderMap, StatusCode, header, request::Parts};
use std::net::{IpAddr, SocketAddr};

/// The hosts by which a server without keys answers.
#[derive(Clone, Debug)]
pub struct Hosts {
    /// It listens on this machine alone.
    is_local: bool,
    /// The configured host.
    own: String,
}

impl Hosts {
    pub fn new(address: SocketAddr, own: &str) -> Self {
        Self { is_local: address.ip().is_loopback(), own: own.trim_matches(['[', ']']).to_owned() }
    }

    /// # Errors
    /// The request comes from another site's page, or names a host that is not this one.
    pub fn check(&self, parts: &Parts) -> Result<(), Fault> {
        let forbidden = |detail: String| Err(Fault::new(StatusCode::FORBIDDEN, detail));
        let host = text(&parts.headers, header::HOST).or(parts.uri.authority().map(|host| host.as_str()));
        if let Some(origin) = parts.headers.get(header::ORIGIN) {
            let origin = String::from_utf8_lossy(origin.as_bytes());
            let site = origin.split_once("://").map(|(_, site)| site);
            if !site.zip(host).is_some_and(|(site, host)| site.eq_ignore_ascii_case(host)) {
                return forbidden(format!(
                    "Origin {origin:?}: pages of other sites may not use a server without keys; open this server's \
                     own page, or give it api_keys_file"
                ));
            }
        }
        match host.filter(|_| self.is_local) {
            Some(host) if !self.is_own(host) => forbidden(format!(
                "Host {host:?}: this server listens on its own machine alone; send to localhost or 127.0.0.1, or set \
                 api_host to the name"
            )),
            _ => Ok(()),
        }
    }

    fn is_own(&self, host: &str) -> bool {
        let name = match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
            _ => host,
        };
        let name = name.trim_matches(['[', ']']);
        name.eq_ignore_ascii_case("localhost")
            || name.eq_ignore_ascii_case(&self.own)
            || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::Request;

    fn check(hosts: &Hosts, host: &str, origin: Option<&str>) -> Result<(), Fault> {
        let request = Request::post("/api/v1/optim_step").header("host", host);
        let request = match origin {
            Some(origin) => request.header("origin", origin),
            None => request,
        };
        hosts.check(&request.body(()).unwrap().into_parts().0)
    }

    #[test]
    fn pages_of_other_sites_and_other_names_are_refused() {
        let local = Hosts::new("127.0.0.1:5555".parse().unwrap(), "box.lan");
        for host in ["localhost", "LOCALHOST:5555", "127.0.0.1:1", "[::1]:5555", "[::1]", "box.lan:5555"] {
            check(&local, host, None).unwrap_or_else(|fault| panic!("{host}: {fault}"));
            check(&local, host, Some(&format!("http://{host}"))).unwrap();
        }
        for host in ["evil.example", "evil.example:5555", "localhost.evil.example", "10.0.0.1:5555", ""] {
            let fault = check(&local, host, None).unwrap_err();
            assert_eq!(fault.status, StatusCode::FORBIDDEN, "{host}");
            check(&local, host, Some(&format!("http://{host}"))).unwrap_err();
        }
        let open = Hosts::new("0.0.0.0:5555".parse().unwrap(), "0.0.0.0");
        for hosts in [&local, &open] {
            for origin in ["http://evil.example", "null", "", "http://localhost:81", "file://"] {
                let fault = check(hosts, "localhost:80", Some(origin)).unwrap_err();
                assert!(fault.detail.contains("pages of other sites"), "{origin}: {fault}");
            }
        }
        check(&open, "evil.example", None).unwrap();
        check(&open, "box.lan", Some("https://box.lan")).unwrap();
    }
}
