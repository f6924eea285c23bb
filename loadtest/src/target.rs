//! A base URL taken apart: where to connect, and which path prefix to put before the routes.

use crate::BenchError;
use hyper::Uri;

/// Where requests go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Host name or address to connect to, without brackets.
    pub host: String,
    /// Whether to speak TLS.
    pub tls: bool,
    /// TCP port.
    pub port: u16,
    /// The `host[:port]` for the `Host` header.
    pub authority: String,
    /// Path before `/v1/...`, without a trailing slash; mostly empty.
    pub prefix: String,
}

impl Target {
    /// Reads `http://host[:port][/prefix][/v1]`, or `https://`.
    pub fn parse(url: &str) -> Result<Self, BenchError> {
        let refuse = |reason: &str| BenchError::Url {
            url: url.into(),
            reason: reason.into(),
        };
        let uri: Uri = url
            .trim()
            .parse()
            .map_err(|_| refuse("it is not a URL; give something like http://127.0.0.1:8080"))?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(refuse("it must start with http:// or https://")),
        };
        let authority = uri.authority().ok_or_else(|| refuse("it names no host"))?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return Err(refuse("it names no host"));
        }
        if authority.as_str().contains('@') {
            return Err(refuse("a user name has no place in it; give the key by BATON_API_KEY"));
        }
        let path = uri.path().trim_end_matches('/');
        Ok(Self {
            host: host.into(),
            tls,
            port: authority.port_u16().unwrap_or(if tls { 443 } else { 80 }),
            authority: authority.as_str().into(),
            prefix: path.strip_suffix("/v1").unwrap_or(path).into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_come_apart() {
        let parts = |url: &str| Target::parse(url).map(|t| (t.host, t.port, t.prefix)).ok();
        let expect = |host: &str, port, prefix: &str| Some((host.to_owned(), port, prefix.to_owned()));
        assert_eq!(parts("http://127.0.0.1:8080"), expect("127.0.0.1", 8080, ""));
        assert_eq!(parts("http://localhost/v1/"), expect("localhost", 80, ""));
        assert_eq!(parts("http://[::1]:9/a/v1"), expect("::1", 9, "/a"));
        assert_eq!(parts("https://h/v1"), expect("h", 443, ""));
        assert!(Target::parse("https://h").is_ok_and(|target| target.tls));
        for bad in [
            "",
            "127.0.0.1:8080",
            "ftp://a",
            "http://",
            "http://u:p@h",
            "nonsense here",
        ] {
            assert_eq!(parts(bad), None, "{bad:?}");
        }
    }
}
