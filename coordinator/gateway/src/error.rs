//! Why a gateway cannot start or stopped. Refusals of single requests are `ApiError`s, not these.

use std::net::SocketAddr;
use std::path::PathBuf;

/// Everything that keeps the gateway from serving.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// Beyond loopback, everybody on the network could use the model.
    #[error(
        "refusing to serve on {addr} without an API key; set `api_key`, or bind a loopback address such as 127.0.0.1"
    )]
    OpenToAll {
        /// The address asked for.
        addr: SocketAddr,
    },
    /// A setting that cannot work.
    #[error("the gateway setting `{name}` {problem}")]
    Setting {
        /// The setting's name.
        name: &'static str,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// Two models under one name, or none at all.
    #[error("the model list cannot be served: {problem}")]
    Models {
        /// What is wrong with it.
        problem: String,
    },
    /// A model file could not be read.
    #[error("the model file {} cannot be read ({source}); check the model directory", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A model file does not hold what it should.
    #[error("the model file {} is not usable: {problem}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A model without a chat template cannot chat.
    #[error(
        "the model in {} has no chat template; add `chat_template` to its tokenizer_config.json or a chat_template.jinja beside it",
        dir.display()
    )]
    NoTemplate {
        /// The model directory.
        dir: PathBuf,
    },
    /// The listening socket broke.
    #[error("the HTTP listener failed: {0}")]
    Listener(#[source] std::io::Error),
}
