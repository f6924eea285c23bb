//! The JSON body of a request to generate, field by field: types, ranges and sizes, for every endpoint that has such fields.
//! An error is a 400 that names the field. `null` means "not given". What a field means for a model is not checked here.

use serde_json::{Map, Value as Json};

use crate::api_error::ApiError;
use crate::config::GatewayConfig;
use crate::generation::request::{SamplingWishes, StopWishes};
use crate::json;

/// Bytes of one stop string. Its whole length may be held back from the client.
pub(crate) const STOP_BYTES_MAX: usize = 1024;
/// Bytes of a user's name, as records take them.
pub(crate) const USER_BYTES_MAX: usize = baton_state::bounds::TEXT_BYTES_MAX;
/// Most tokens that can be asked for: far above every context, and no arithmetic with it overflows.
pub(crate) const MAX_TOKENS_MAX: u64 = 1 << 30;
/// Bytes of a client's own cache salt: a hash in hex, twice over.
const CACHE_SALT_BYTES_MAX: usize = 256;
/// OpenAI's limits of metadata.
const METADATA_PAIRS_MAX: usize = 16;
const METADATA_NAME_CHARS_MAX: usize = 64;
const METADATA_VALUE_CHARS_MAX: usize = 512;

/// The fields of a body.
pub(crate) struct Params(pub Map<String, Json>);

type Result<T> = std::result::Result<T, ApiError>;

impl Params {
    /// Parses a body. Nesting is bounded by the parser.
    pub fn parse(body: &[u8]) -> Result<Self> {
        let Json::Object(mut fields) = json::parse(body)? else {
            return Err(ApiError::bad_request("The body must be a JSON object."));
        };
        fields.retain(|_, value| !value.is_null());
        Ok(Self(fields))
    }

    /// Refuses every field but these.
    pub fn only(&self, names: &[&str]) -> Result<()> {
        match self.0.keys().find(|name| !names.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => {
                let shown: String = name.chars().take(64).collect();
                Err(ApiError::unsupported(&shown, format!("Unknown field `{shown}`.")))
            }
        }
    }

    pub fn get(&self, name: &str) -> Option<&Json> {
        self.0.get(name)
    }

    pub fn take(&mut self, name: &str) -> Option<Json> {
        self.0.remove(name)
    }

    /// The model's name.
    pub fn model(&self) -> Result<String> {
        match self.get("model") {
            Some(Json::String(model)) => Ok(model.clone()),
            Some(_) => Err(ApiError::field("model", "`model` must be a string.")),
            None => Err(ApiError::field(
                "model",
                "`model` is missing. GET /v1/models lists what is served.",
            )),
        }
    }

    /// False if not given.
    pub fn boolean(&self, name: &str) -> Result<bool> {
        match self.get(name) {
            None => Ok(false),
            Some(Json::Bool(flag)) => Ok(*flag),
            Some(_) => Err(ApiError::field(name, format!("`{name}` must be true or false."))),
        }
    }

    pub fn boolean_or(&self, name: &str, default: bool) -> Result<bool> {
        if self.get(name).is_none() {
            Ok(default)
        } else {
            self.boolean(name)
        }
    }

    pub fn number(&self, name: &str, range: &str, allowed: impl Fn(f64) -> bool) -> Result<Option<f32>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        // The smallest values must not become 0 by rounding where 0 means something else.
        let checked = value.as_f64().filter(|value| allowed(*value)).map(|value| {
            if value > 0.0 {
                (value as f32).max(f32::MIN_POSITIVE)
            } else {
                value as f32
            }
        });
        match checked {
            Some(number) => Ok(Some(number)),
            None => Err(ApiError::field(name, format!("`{name}` must be a number {range}."))),
        }
    }

    /// From `min` to `max`.
    pub fn count(&self, name: &str, min: u64, max: u64) -> Result<Option<u32>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let count = value.as_u64().filter(|count| (min..=max).contains(count));
        match count.and_then(|count| u32::try_from(count).ok()) {
            Some(count) => Ok(Some(count)),
            None => Err(ApiError::field(
                name,
                format!("`{name}` must be an integer from {min} to {max}."),
            )),
        }
    }

    /// The first of these names that is given; several must agree. `advice` is the name to use.
    pub fn max_tokens(&self, names: &[&'static str], advice: &str) -> Result<Option<(&'static str, u32)>> {
        let mut chosen: Option<(&'static str, u32)> = None;
        for &name in names {
            match (self.count(name, 1, MAX_TOKENS_MAX)?, chosen) {
                (Some(count), Some((first, other))) if other != count => {
                    let message = format!("`{name}` and `{first}` differ; send only `{advice}`.");
                    return Err(ApiError::field(name, message));
                }
                (Some(count), None) => chosen = Some((name, count)),
                _ => {}
            }
        }
        Ok(chosen)
    }

    /// All that shapes the distribution, and the seed.
    pub fn sampling(&self) -> Result<SamplingWishes> {
        let penalty = |name| self.number(name, "from -2 to 2", |value| (-2.0..=2.0).contains(&value));
        Ok(SamplingWishes {
            temperature: self.number("temperature", "from 0 to 2", |value| (0.0..=2.0).contains(&value))?,
            top_p: self.number("top_p", "above 0 and at most 1", |value| value > 0.0 && value <= 1.0)?,
            top_k: self.top_k()?,
            min_p: self.number("min_p", "from 0 to 1", |value| (0.0..=1.0).contains(&value))?,
            presence_penalty: penalty("presence_penalty")?,
            frequency_penalty: penalty("frequency_penalty")?,
            repetition_penalty: self.number("repetition_penalty", "above 0 and at most 2", |value| {
                value > 0.0 && value <= 2.0
            })?,
            logit_bias: self.logit_bias()?,
            seed: self.seed()?,
        })
    }

    /// vLLM's: 0 and -1 both keep all.
    fn top_k(&self) -> Result<Option<u32>> {
        let Some(value) = self.get("top_k") else {
            return Ok(None);
        };
        match value.as_i64() {
            Some(-1) => Ok(Some(0)),
            Some(count) if (0..=i64::from(i32::MAX)).contains(&count) => Ok(u32::try_from(count).ok()),
            _ => Err(ApiError::field(
                "top_k",
                "`top_k` must be an integer of at least 0; 0 and -1 keep all tokens.",
            )),
        }
    }

    /// Any 64-bit integer, signed or not; a negative one stands for its two's complement.
    fn seed(&self) -> Result<Option<u64>> {
        let Some(value) = self.get("seed") else { return Ok(None) };
        let seed = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
        seed.map(Some)
            .ok_or_else(|| ApiError::field("seed", "`seed` must be a 64-bit integer."))
    }

    /// Token ids, as JSON names, to biases.
    fn logit_bias(&self) -> Result<Vec<(u32, f32)>> {
        let most = baton_proto::limits::LOGIT_BIAS_MAX;
        let wrong = || {
            let message = format!(
                "`logit_bias` must be an object of at most {most} token ids, each with a number from -100 to 100."
            );
            ApiError::field("logit_bias", message)
        };
        let biases = match self.get("logit_bias") {
            None => return Ok(Vec::new()),
            Some(Json::Object(biases)) if biases.len() <= most => biases,
            Some(_) => return Err(wrong()),
        };
        let mut parsed = Vec::with_capacity(biases.len());
        for (id, bias) in biases {
            // "7" and "07" would be one token twice.
            let id = id.parse::<u32>().ok().filter(|number| number.to_string() == *id);
            let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
            match (id, bias) {
                (Some(id), Some(bias)) => parsed.push((id, bias as f32)),
                _ => return Err(wrong()),
            }
        }
        Ok(parsed)
    }

    /// What ends a choice.
    pub fn stop(&self, config: &GatewayConfig) -> Result<StopWishes> {
        Ok(StopWishes {
            strings: self.strings("stop", config.stops_max)?,
            token_ids: self.token_ids("stop_token_ids", baton_proto::limits::STOP_TOKEN_IDS_MAX)?,
            include: self.boolean("include_stop_str_in_output")?,
            ignore_eos: self.boolean("ignore_eos")?,
            min_tokens: self.count("min_tokens", 0, MAX_TOKENS_MAX)?.unwrap_or(0),
        })
    }

    /// A stop string or several.
    pub fn strings(&self, name: &str, most: usize) -> Result<Vec<String>> {
        let wrong = || {
            let message = format!(
                "`{name}` must be a string or an array of at most {most} strings, each of 1 to {STOP_BYTES_MAX} bytes."
            );
            ApiError::field(name, message)
        };
        let strings = match self.get(name) {
            None => return Ok(Vec::new()),
            Some(Json::String(one)) => vec![one.clone()],
            Some(Json::Array(several)) if several.len() <= most => {
                let text = |value: &Json| value.as_str().map(str::to_owned).ok_or_else(wrong);
                several.iter().map(text).collect::<Result<_>>()?
            }
            Some(_) => return Err(wrong()),
        };
        if strings
            .iter()
            .any(|text| text.is_empty() || text.len() > STOP_BYTES_MAX)
        {
            return Err(wrong());
        }
        Ok(strings)
    }

    /// Token ids; whether the model has them is not known here.
    pub fn token_ids(&self, name: &str, most: usize) -> Result<Vec<u32>> {
        let wrong = || ApiError::field(name, format!("`{name}` must be an array of at most {most} token ids."));
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(Json::Array(ids)) if ids.len() <= most => {
                let id = |value: &Json| value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(wrong);
                ids.iter().map(id).collect()
            }
            Some(_) => Err(wrong()),
        }
    }

    /// Choices per prompt, within the server's limit; 1 if not given.
    pub fn n(&self, config: &GatewayConfig) -> Result<u32> {
        Ok(self.count("n", 1, config.n_max as u64)?.unwrap_or(1))
    }

    /// vLLM's: any integer, lower goes first. Far ones are taken as the end of the 32-bit range.
    pub fn priority(&self) -> Result<i32> {
        let Some(value) = self.get("priority") else {
            return Ok(0);
        };
        let end = |number: i64| number.clamp(-i64::from(i32::MAX), i64::from(i32::MAX)) as i32;
        let priority = value.as_i64().map(end).or_else(|| value.as_u64().map(|_| i32::MAX));
        priority.ok_or_else(|| ApiError::field("priority", "`priority` must be an integer; lower goes first."))
    }

    /// Goes into the usage record. Both names may be given; `safety_identifier` counts then.
    pub fn user(&self) -> Result<String> {
        let user = self.text("user", USER_BYTES_MAX)?;
        let safety = self.text("safety_identifier", USER_BYTES_MAX)?;
        Ok(safety.or(user).unwrap_or_default())
    }

    /// A prefix cache of its own.
    pub fn cache_salt(&self) -> Result<String> {
        let salt = self.text("cache_salt", CACHE_SALT_BYTES_MAX)?;
        match salt {
            Some(salt) if salt.is_empty() => Err(ApiError::field("cache_salt", "`cache_salt` must not be empty.")),
            salt => Ok(salt.unwrap_or_default()),
        }
    }

    /// A string of at most so many bytes.
    pub fn text(&self, name: &str, bytes_max: usize) -> Result<Option<String>> {
        match self.get(name) {
            None => Ok(None),
            Some(Json::String(text)) if text.len() <= bytes_max => Ok(Some(text.clone())),
            Some(_) => {
                let message = format!("`{name}` must be a string of at most {bytes_max} bytes.");
                Err(ApiError::field(name, message))
            }
        }
    }

    /// Labels for the client itself; checked and not kept.
    pub fn check_metadata(&self) -> Result<()> {
        let Some(value) = self.get("metadata") else {
            return Ok(());
        };
        let short = |(name, value): (&String, &Json)| {
            name.chars().count() <= METADATA_NAME_CHARS_MAX
                && value
                    .as_str()
                    .is_some_and(|text| text.chars().count() <= METADATA_VALUE_CHARS_MAX)
        };
        match value {
            Json::Object(pairs) if pairs.len() <= METADATA_PAIRS_MAX && pairs.iter().all(short) => Ok(()),
            _ => {
                let message = format!(
                    "`metadata` must be an object of at most {METADATA_PAIRS_MAX} strings of up to \
                     {METADATA_VALUE_CHARS_MAX} characters, with names of up to {METADATA_NAME_CHARS_MAX}."
                );
                Err(ApiError::field("metadata", message))
            }
        }
    }

    /// What a stream is to tell beside its text.
    pub fn stream_options(&self, stream: bool) -> Result<StreamOptions> {
        let options = match self.get("stream_options") {
            None => return Ok(StreamOptions::default()),
            Some(Json::Object(options)) => options,
            Some(_) => return Err(ApiError::field("stream_options", "`stream_options` must be an object.")),
        };
        if !stream {
            let message = "`stream_options` is only allowed with `stream: true`.";
            return Err(ApiError::field("stream_options", message));
        }
        let mut told = StreamOptions::default();
        for (name, value) in options {
            let place: String = format!("stream_options.{name}").chars().take(64).collect();
            let target = match name.as_str() {
                "include_usage" => &mut told.include_usage,
                "continuous_usage_stats" => &mut told.continuous_usage,
                "include_obfuscation" => &mut told.obfuscation,
                _ => return Err(ApiError::unsupported(&place, format!("Unknown field `{place}`."))),
            };
            match value {
                Json::Null => {}
                Json::Bool(flag) => *target = *flag,
                _ => {
                    return Err(ApiError::field(
                        place.clone(),
                        format!("`{place}` must be true or false."),
                    ));
                }
            }
        }
        // vLLM's: usage with each chunk is usage all the same.
        told.continuous_usage &= told.include_usage;
        Ok(told)
    }
}

/// Of `stream_options`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StreamOptions {
    pub include_usage: bool,
    /// With every chunk; only with `include_usage`.
    pub continuous_usage: bool,
    /// Chunks are padded, so that their length does not tell their text.
    pub obfuscation: bool,
}
