//! What all connections share, and a request's preparation: from body bytes to a job that fits the model. No HTTP.

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_proto::limits::PROMPT_TOKENS_MAX;
use baton_proto::worker::Sampling;
use serde_json::Value as Json;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::accounts::Accounts;
use crate::api_error::ApiError;
use crate::auth::{Caller, Keys};
use crate::backend::{Backend, Job, LatencyTargets, ModelInfo};
use crate::config::GatewayConfig;
use crate::error::GatewayError;
use crate::files::Files;
use crate::metrics::Metrics;
use crate::model::{ConversationError, ServedModel};
use crate::prompt::PromptError;
use crate::reader::TokenReader;
use crate::request::ChatRequest;
use crate::response::{ModelCard, ModelList};
use crate::run::{Ledger, unix_ms};
use crate::template::RenderError;
use crate::trace::{RequestNames, random_seed};

/// The state behind every route.
pub(crate) struct Gateway<B> {
    pub config: GatewayConfig,
    pub keys: Option<Keys>,
    pub accounts: Option<Arc<Accounts>>,
    /// Where there is a replicated state and a place for chunks.
    pub files: Option<Arc<Files>>,
    pub ledger: Arc<Ledger<B>>,
    /// One permit per chat request in work.
    pub in_flight: Arc<Semaphore>,
    /// One permit per long prompt being tokenised: as many as there are cores, so that they cannot crowd out the rest.
    pub preparing: Arc<Semaphore>,
    /// One permit per KiB of request body in memory.
    pub body_kib: Arc<Semaphore>,
    models: BTreeMap<String, ServedModel>,
    started_unix_s: u64,
    /// Ends what runs beside requests.
    over: CancellationToken,
}

impl<B> Drop for Gateway<B> {
    fn drop(&mut self) {
        self.over.cancel();
    }
}

/// What a request's head says of it.
#[derive(Clone)]
pub(crate) struct Origin {
    pub names: RequestNames,
    pub caller: Caller,
    pub targets: LatencyTargets,
}

/// A request that fits its model.
pub(crate) struct Prepared {
    pub job: Job,
    pub reader: TokenReader,
    pub stream: bool,
    pub include_usage: bool,
    /// The client said how many tokens it wants.
    pub max_tokens_asked: bool,
    /// The client gave a seed.
    pub seeded: bool,
    /// The client's user.
    pub user: String,
}

impl<B: Backend> Gateway<B> {
    /// Checks the models against each other. Must be called inside a tokio runtime.
    pub fn new(config: GatewayConfig, backend: Arc<B>, models: Vec<ServedModel>) -> Result<Self, GatewayError> {
        let mut by_name = BTreeMap::new();
        for model in models {
            let name = model.name().to_owned();
            if name.is_empty() || name.len() > 128 {
                return Err(GatewayError::Models {
                    problem: format!("the name `{name}` is not of 1 to 128 bytes"),
                });
            }
            if by_name.insert(name.clone(), model).is_some() {
                return Err(GatewayError::Models {
                    problem: format!("`{name}` is there twice"),
                });
            }
        }
        if by_name.is_empty() {
            return Err(GatewayError::Models {
                problem: "it is empty; configure at least one model".into(),
            });
        }
        let over = CancellationToken::new();
        let accounts = backend
            .accounts()
            .map(|store| Accounts::start(store, config.budget_lease_ms, over.clone()));
        let files = accounts
            .clone()
            .zip(backend.chunks())
            .map(|(accounts, chunks)| Files::new(accounts, chunks, config.files.clone()));
        let mut registry = prometheus_client::registry::Registry::default();
        backend.register_metrics(&mut registry);
        let ledger = Ledger {
            backend,
            metrics: Metrics::new(registry),
            settling: TaskTracker::new(),
            runtime: tokio::runtime::Handle::current(),
        };
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        Ok(Self {
            keys: Keys::new(&config),
            accounts,
            files,
            over,
            ledger: Arc::new(ledger),
            in_flight: Arc::new(Semaphore::new(config.in_flight_max)),
            preparing: Arc::new(Semaphore::new(cores)),
            body_kib: Arc::new(Semaphore::new(config.bodies_bytes_max.div_ceil(1024))),
            models: by_name,
            started_unix_s: unix_ms() / 1000,
            config,
        })
    }

    /// Parses, checks, renders and tokenises. Time in proportion to the body.
    pub fn prepare(&self, body: &[u8], origin: &Origin) -> Result<Prepared, ApiError> {
        let names = &origin.names;
        let request = ChatRequest::parse(body, self.config.messages_max)?;
        let model = self
            .models
            .get(&request.model)
            .ok_or_else(|| ApiError::model_not_found(&request.model))?;
        check_tools(model, &request.messages)?;
        if !origin.caller.allows(&request.model) {
            return Err(ApiError::model_forbidden(&request.model));
        }
        let context = self.context_length(model);
        let cache_salt = origin.caller.cache_salt();
        let prompt = model
            .prompt(request.messages, &cache_salt)
            .map_err(|error| conversation_error(error, names))?;
        let prompt_tokens = prompt.len();
        let room = u32::try_from(prompt_tokens)
            .ok()
            .and_then(|tokens| context.checked_sub(tokens))
            .unwrap_or(0);
        if room == 0 || prompt_tokens > PROMPT_TOKENS_MAX {
            return Err(ApiError::context_length(format!(
                "The model's context is {context} tokens and the messages are {prompt_tokens} tokens, which leaves no room \
                 for an answer. Shorten the messages."
            )));
        }
        if prompt.is_empty() {
            return Err(ApiError::field("messages", "The messages render to nothing."));
        }
        // An explicit wish that cannot be met is refused, as OpenAI and vLLM do, rather than cut short in silence.
        let max_tokens = match request.max_tokens {
            None => room,
            Some((_, wanted)) if wanted <= room => wanted,
            Some((name, wanted)) => {
                let total = prompt_tokens as u64 + u64::from(wanted);
                let message = format!(
                    "The model's context is {context} tokens, but {total} were asked for: {prompt_tokens} in the messages \
                     and {wanted} in `{name}`. Shorten one of them."
                );
                return Err(ApiError {
                    param: Some(name.into()),
                    ..ApiError::context_length(message)
                });
            }
        };
        let defaults = model.defaults();
        let (max_tokens_asked, seeded) = (request.max_tokens.is_some(), request.seed.is_some());
        let job = Job {
            request_id: names.request_id.clone(),
            traceparent: names.traceparent.clone(),
            model: request.model,
            prompt: prompt.into(),
            max_tokens,
            sampling: Sampling {
                temperature: request.temperature.unwrap_or(defaults.temperature),
                top_p: request.top_p.unwrap_or(defaults.top_p),
                top_k: request.top_k.unwrap_or(defaults.top_k),
                seed: request.seed.unwrap_or_else(random_seed),
                ..Sampling::default()
            },
            stop_token_ids: if request.ignore_eos {
                Vec::new()
            } else {
                model.eos_ids().to_vec()
            },
            cache_salt,
            tenant: origin.caller.tenant.clone(),
            priority: origin.caller.priority(-request.priority),
            targets: origin.targets,
        };
        let reader = TokenReader::new(model.detokenizer(), request.stop);
        Ok(Prepared {
            job,
            reader,
            stream: request.stream,
            include_usage: request.include_usage,
            max_tokens_asked,
            seeded,
            user: request.user,
        })
    }

    /// `GET /v1/models`: what is configured here, whether a worker serves it at the moment or not.
    pub fn models(&self, caller: &Caller) -> ModelList {
        let allowed = self.models.values().filter(|model| caller.allows(model.name()));
        ModelList {
            object: "list",
            data: allowed.map(|model| self.card(model)).collect(),
        }
    }

    /// `GET /v1/models/{id}`.
    pub fn model(&self, id: &str, caller: &Caller) -> Option<ModelCard> {
        let model = self.models.get(id).filter(|_| caller.allows(id));
        model.map(|model| self.card(model))
    }

    /// What exactly is served under a model's name, as its workers say.
    pub fn revision(&self, model: &str) -> String {
        self.ledger.backend.revision(model).unwrap_or_default()
    }

    /// What is missing to take requests, if anything: a leader of the coordinators, or a live worker for one of the models.
    pub fn missing(&self) -> Option<&'static str> {
        let backend = &self.ledger.backend;
        if !backend.has_quorum() {
            return Some("The coordinators have no leader at the moment.");
        }
        let served = |model: &ModelInfo| model.served && self.models.contains_key(&model.id);
        (!backend.models().iter().any(served)).then_some("No worker serves a model yet.")
    }

    /// What the cluster says of a model it has heard of.
    fn known(&self, model: &ServedModel) -> Option<ModelInfo> {
        let models = self.ledger.backend.models();
        models.into_iter().find(|info| info.id == model.name())
    }

    fn card(&self, model: &ServedModel) -> ModelCard {
        let known = self.known(model);
        ModelCard {
            id: model.name().to_owned(),
            object: "model",
            created: known.map_or(self.started_unix_s, |info| info.created_unix_s),
            owned_by: "baton",
            max_model_len: self.context_length(model),
        }
    }

    /// The smaller of what the model's files and its workers allow.
    fn context_length(&self, model: &ServedModel) -> u32 {
        match self.known(model).map(|info| info.context_length) {
            Some(length) if length > 0 => length.min(model.context_length()),
            _ => model.context_length(),
        }
    }
}

/// Earlier tool calls are for templates that can show them; another would drop them in silence.
fn check_tools(model: &ServedModel, messages: &[Json]) -> Result<(), ApiError> {
    let at = messages.iter().position(|message| message.get("tool_calls").is_some());
    match at {
        Some(at) if !model.template().mentions("tool_calls") => {
            let param = format!("messages[{at}].tool_calls");
            Err(ApiError::unsupported(
                &param,
                format!("`{param}`: this model's chat template has no tool calls."),
            ))
        }
        _ => Ok(()),
    }
}

fn conversation_error(error: ConversationError, names: &RequestNames) -> ApiError {
    let message = match error {
        ConversationError::Render(RenderError::Refused(reason)) => {
            let reason: String = reason.chars().take(512).collect();
            format!("The model's chat template refuses these messages: {reason}")
        }
        ConversationError::Render(RenderError::Failed(cause)) => {
            tracing::warn!(request_id = %names.request_id, cause, "a chat template failed");
            "The model's chat template cannot render these messages.".into()
        }
        ConversationError::Prompt(PromptError::Ambiguous) => {
            "The messages hold text that this model can only read as a control token. Leave it out.".into()
        }
        ConversationError::Prompt(PromptError::Tokenizer(cause)) => {
            tracing::warn!(request_id = %names.request_id, cause, "a tokenizer failed");
            "The messages cannot be tokenised.".into()
        }
    };
    ApiError::field("messages", message)
}
