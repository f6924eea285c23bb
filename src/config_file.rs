//! Reads a process's TOML configuration with figment, environment variables over it. Reading is where a hostile or
//! broken file is caught: size, kind and syntax are checked here, meaning by the crate whose configuration it is.

use anyhow::{Context, bail};
use figment::Figment;
use figment::providers::{Env, Format, Toml};
use serde::de::DeserializeOwned;
use std::path::Path;

/// Largest configuration file. Real ones are a kilobyte.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Reads `path`; variables that start with `env_prefix` win over it (`None`: the environment is not looked at).
pub fn load<T: DeserializeOwned>(path: &Path, env_prefix: Option<&str>) -> anyhow::Result<T> {
    let name = path.display();
    let about = std::fs::metadata(path)
        .with_context(|| format!("cannot read the configuration {name}; give an existing file with --config"))?;
    if !about.is_file() {
        bail!("the configuration {name} is not a regular file; give a TOML file with --config");
    }
    if about.len() > CONFIG_BYTES_MAX {
        bail!("the configuration {name} is larger than 1 MiB; give a TOML file with --config");
    }
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the configuration {name}; it must be TOML in UTF-8"))?;
    let mut figment = Figment::from(Toml::string(&text));
    if let Some(prefix) = env_prefix {
        figment = figment.merge(Env::prefixed(prefix).split("__"));
    }
    figment
        .extract()
        .map_err(|error| anyhow::anyhow!("the configuration {name} is not usable: {error}; correct it and start again"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        port: u16,
    }

    fn read(text: &[u8]) -> Result<Sample, String> {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), text).expect("writable");
        load(file.path(), None).map_err(|e| format!("{e:#}"))
    }

    #[test]
    fn good_and_bad_files() {
        assert_eq!(read(b"port = 7"), Ok(Sample { port: 7 }));
        let message = |text: &[u8]| read(text).expect_err("is refused");
        assert!(message(b"port = 7\nprot = 8").contains("prot"));
        assert!(message(b"port = \"x\"").contains("port"));
        assert!(message(b"").contains("port"));
        assert!(message(b"port = ").contains("not usable"));
        assert!(message(b"\xff\xfe").contains("UTF-8"));
        assert!(message(&vec![b'#'; (CONFIG_BYTES_MAX + 1) as usize]).contains("1 MiB"));
        assert!(message("[".repeat(100_000).as_bytes()).contains("not usable"));
        let directory = load::<Sample>(Path::new("/"), None).expect_err("a directory is no file");
        assert!(directory.to_string().contains("not a regular file"));
    }
}
