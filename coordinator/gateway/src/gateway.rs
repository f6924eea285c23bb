//! What all connections share: settings, models, callers, limits. No HTTP, and nothing of a single request.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::accounts::Accounts;
use crate::api_error::ApiError;
use crate::auth::{Caller, Keys};
use crate::backend::{Backend, ModelInfo};
use crate::clock::unix_ms;
use crate::config::GatewayConfig;
use crate::error::GatewayError;
use crate::files::Files;
use crate::generation::draft::Ledger;
use crate::metrics::Metrics;
use crate::model::ServedModel;
use crate::model_card::{ModelCard, ModelList};
use crate::responses::Responses;

/// The state behind every route.
pub(crate) struct Gateway<B> {
    pub config: GatewayConfig,
    pub keys: Option<Keys>,
    pub accounts: Option<Arc<Accounts>>,
    /// Where there is a replicated state and a place for chunks.
    pub files: Option<Arc<Files>>,
    /// Stored responses, in the same place.
    pub responses: Option<Arc<Responses>>,
    pub ledger: Arc<Ledger<B>>,
    /// One permit per choice of a request in work.
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

impl<B: Backend> Gateway<B> {
    /// Checks the models against each other. Must be called inside a tokio runtime.
    pub fn new(config: GatewayConfig, backend: Arc<B>, models: Vec<ServedModel>) -> Result<Self, GatewayError> {
        let mut by_name = BTreeMap::new();
        for model in models {
            let name = model.name().to_owned();
            let model = match config.parsers.get(&name) {
                Some(choice) => model.with_parsers(choice)?,
                None => model,
            };
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
        if let Some(name) = config.parsers.keys().find(|name| !by_name.contains_key(*name)) {
            return Err(GatewayError::Setting {
                name: "parsers",
                problem: format!("names the model `{name}`, which is not served here"),
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
            responses: files
                .clone()
                .map(|files| Responses::new(files, config.responses.clone())),
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

    /// The model of that name, for who may use it.
    pub fn served(&self, name: &str, caller: &Caller) -> Result<&ServedModel, ApiError> {
        let model = self.models.get(name).ok_or_else(|| ApiError::model_not_found(name))?;
        if caller.allows(name) {
            Ok(model)
        } else {
            Err(ApiError::model_forbidden(name))
        }
    }

    /// The model's name, which may be left out where a caller has only one to choose.
    pub fn named(&self, name: Option<String>, caller: &Caller) -> Result<String, ApiError> {
        let mut allowed = self.models.keys().filter(|name| caller.allows(name));
        match (name, allowed.next(), allowed.next()) {
            (Some(name), ..) => Ok(name),
            (None, Some(only), None) => Ok(only.clone()),
            _ => Err(ApiError::field(
                "model",
                "`model` is missing. GET /v1/models lists what is served.",
            )),
        }
    }

    /// Whether a live worker serves a model.
    pub fn is_served(&self, model: &ServedModel) -> bool {
        self.known(model).is_some_and(|info| info.served)
    }

    /// One more than may be in work.
    pub fn too_many_in_work(&self) -> ApiError {
        let message = format!(
            "This gateway already has {} requests in work; retry.",
            self.config.in_flight_max
        );
        ApiError::overloaded("queue_full", message, 1)
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
    pub fn context_length(&self, model: &ServedModel) -> u32 {
        match self.known(model).map(|info| info.context_length) {
            Some(length) if length > 0 => length.min(model.context_length()),
            _ => model.context_length(),
        }
    }
}
