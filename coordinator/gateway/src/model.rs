//! What the gateway needs of a model directory: tokenizer, chat template, context length, the tokens that end a turn,
//! and the sampling defaults its maker recommends. Weights are the workers' business.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value as Json;
use tokenizers::Tokenizer;

use crate::detokenizer::{Detokenizer, Special, TokenTexts};
use crate::error::GatewayError;
use crate::family::{Family, ParserChoice};
use crate::grammar::Spell;
use crate::prompt::{ControlTokens, PromptError};
use crate::segment_cache::SegmentCache;
use crate::template::{ChatTemplate, Conversation, RenderError, TemplateTokens};

/// Largest tokenizer or configuration file read. The largest in use (260k-word vocabularies) are about 35 MB.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// A model that the gateway can talk to.
#[derive(Clone)]
pub struct ServedModel {
    name: String,
    context_length: u32,
    eos_ids: Vec<u32>,
    defaults: SamplingDefaults,
    texts: Arc<TokenTexts>,
    control: Arc<ControlTokens>,
    segments: Arc<SegmentCache>,
    template: ChatTemplate,
    family: Family,
}

/// Sampling parameters where a request has none: the model's `generation_config.json`, else OpenAI's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct SamplingDefaults {
    pub temperature: f32,
    pub top_p: f32,
    pub top_k: u32,
    /// 1 changes nothing.
    pub repetition_penalty: f32,
}

/// Bytes of a rendered prompt's end that tell how the answer begins.
const TAIL_BYTES: usize = 256;

/// A conversation as the model reads it.
#[derive(Debug)]
pub(crate) struct RenderedPrompt {
    pub tokens: Vec<u32>,
    /// The end of the text: whether it opens a thought.
    pub tail: String,
}

/// Why a conversation has no prompt.
#[derive(Debug)]
pub(crate) enum ConversationError {
    Render(RenderError),
    Prompt(PromptError),
}

impl ServedModel {
    /// Loads a model directory as Hugging Face lays it out. Blocking: up to seconds for a large vocabulary.
    pub fn load(name: &str, dir: &Path) -> Result<Self, GatewayError> {
        let tokenizer_path = dir.join("tokenizer.json");
        let unusable = |path: &Path, problem: String| GatewayError::Parse {
            path: path.to_owned(),
            problem,
        };
        let mut tokenizer = Tokenizer::from_bytes(read(&tokenizer_path)?)
            .map_err(|error| unusable(&tokenizer_path, error.to_string()))?;
        // A tokenizer saved for training may cut or pad; a prompt is never either.
        tokenizer
            .with_truncation(None)
            .map_err(|error| unusable(&tokenizer_path, error.to_string()))?;
        tokenizer.with_padding(None);

        let config_path = dir.join("config.json");
        let config = json(&config_path)?;
        let context_length = context_length(&config).ok_or_else(|| {
            unusable(
                &config_path,
                "`max_position_embeddings` is missing or not a positive integer".into(),
            )
        })?;
        let tokenizer_config = optional_json(&dir.join("tokenizer_config.json"))?;
        let generation_config = optional_json(&dir.join("generation_config.json"))?;

        let tokens = template_tokens(&tokenizer_config);
        let eos_ids = eos_ids(&tokenizer, &config, &generation_config, &tokens);
        if eos_ids.is_empty() {
            let problem = "no `eos_token_id` here or in generation_config.json: the model could not end its turn";
            return Err(unusable(&config_path, problem.into()));
        }
        let (template_path, source) = template_source(dir, &tokenizer_config)?;
        let template = ChatTemplate::new(&source, tokens)
            .map_err(|error| unusable(&template_path, format!("the chat template does not compile: {error}")))?;
        let control = ControlTokens::new(&tokenizer, &eos_ids).map_err(|error| unusable(&tokenizer_path, error))?;
        Ok(Self {
            name: name.to_owned(),
            context_length,
            eos_ids,
            defaults: defaults(&generation_config),
            texts: Arc::new(TokenTexts::new(tokenizer)),
            control: Arc::new(control),
            segments: Arc::new(SegmentCache::new()),
            family: Family::of(&source),
            template,
        })
    }

    /// The name clients send in `model`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Tokens that prompt and completion may have together, by the model's configuration.
    pub fn context_length(&self) -> u32 {
        self.context_length
    }

    /// Ids of the tokens that end a turn.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Text, with what the tokenizer puts before a text if `special`, as ids. Control tokens that are spelled are read as
    /// such.
    pub(crate) fn encode_plain(&self, text: &str, special: bool) -> Result<Vec<u32>, String> {
        let encoding = self.texts.tokenizer().encode_fast(text, special);
        encoding
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| error.to_string())
    }

    /// Ids as text.
    pub(crate) fn decode(&self, ids: &[u32], show_special: bool) -> String {
        let special = if show_special { Special::Shown } else { Special::Hidden };
        let mut detokenizer = Detokenizer::new(self.texts.clone(), special);
        let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
        text.push_str(&detokenizer.finish());
        text
    }

    /// A token as the vocabulary spells it.
    pub(crate) fn spelling(&self, id: u32) -> Option<String> {
        self.texts.tokenizer().id_to_token(id)
    }

    pub(crate) fn defaults(&self) -> SamplingDefaults {
        self.defaults
    }

    pub(crate) fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// One more than the largest token id that the tokenizer knows.
    pub(crate) fn vocabulary_size(&self) -> u32 {
        self.texts.vocabulary_size()
    }

    /// Reads one sequence.
    pub(crate) fn detokenizer(&self, special: Special) -> Detokenizer {
        Detokenizer::new(self.texts.clone(), special)
    }

    /// Tokenises a text as the tokenizer would: spelled control tokens are control tokens, and what the tokenizer puts
    /// before a text is put. Takes time in proportion to the text.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>, String> {
        self.encode_plain(text, true)
    }

    /// How its family writes tool calls and thoughts.
    pub(crate) fn family(&self) -> &Family {
        &self.family
    }

    /// With an operator's choice of parsers.
    ///
    /// # Errors
    /// No parser has such a name.
    pub(crate) fn with_parsers(mut self, choice: &ParserChoice) -> Result<Self, GatewayError> {
        self.family = self.family.chosen(choice)?;
        Ok(self)
    }

    /// The special tokens that any of these texts holds.
    pub(crate) fn special_in(&self, texts: &[&str]) -> Arc<[u32]> {
        self.texts.special_in(texts).into()
    }

    /// Renders and tokenises a conversation of the tenant with that salt; gives the end of the rendered text too (see
    /// [`RenderedPrompt`]). Takes time in proportion to its text.
    pub(crate) fn prompt(
        &self,
        mut conversation: Conversation,
        salt: &[u8],
    ) -> Result<RenderedPrompt, ConversationError> {
        let guarded = self
            .control
            .guard(&mut conversation)
            .map_err(ConversationError::Prompt)?;
        let rendered = self.template.render(&conversation).map_err(ConversationError::Render)?;
        let tokens = self
            .control
            .encode(self.texts.tokenizer(), &rendered, &guarded, &self.segments, salt)
            .map_err(ConversationError::Prompt)?;
        let start = rendered.len().saturating_sub(TAIL_BYTES);
        let start = (start..=rendered.len())
            .find(|&at| rendered.is_char_boundary(at))
            .unwrap_or(rendered.len());
        Ok(RenderedPrompt {
            tokens,
            tail: rendered[start..].to_owned(),
        })
    }
}

impl Spell for ServedModel {
    fn special(&self, text: &str) -> Option<u32> {
        self.texts.special(text)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, GatewayError> {
    let failed = |source| GatewayError::Read {
        path: path.to_owned(),
        source,
    };
    let bytes = std::fs::metadata(path).map_err(failed)?.len();
    if bytes > FILE_BYTES_MAX {
        let problem = format!("it has {bytes} bytes; at most {FILE_BYTES_MAX} are read");
        return Err(GatewayError::Parse {
            path: path.to_owned(),
            problem,
        });
    }
    std::fs::read(path).map_err(failed)
}

fn json(path: &Path) -> Result<Json, GatewayError> {
    let parsed = serde_json::from_slice(&read(path)?);
    parsed.map_err(|error| GatewayError::Parse {
        path: path.to_owned(),
        problem: error.to_string(),
    })
}

fn optional_json(path: &Path) -> Result<Json, GatewayError> {
    if path.exists() { json(path) } else { Ok(Json::Null) }
}

fn context_length(config: &Json) -> Option<u32> {
    let length = config
        .get("max_position_embeddings")
        .or_else(|| config.get("text_config")?.get("max_position_embeddings"));
    length
        .and_then(Json::as_u64)
        .and_then(|length| u32::try_from(length).ok())
        .filter(|&length| length > 0)
}

/// `bos_token` and the like, as the template's variables. A token is a string or an object with `content`.
fn template_tokens(tokenizer_config: &Json) -> TemplateTokens {
    let names = [
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
        "sep_token",
        "cls_token",
        "mask_token",
    ];
    let text = |token: &Json| {
        token
            .as_str()
            .or_else(|| token.get("content")?.as_str())
            .map(str::to_owned)
    };
    let tokens = names
        .iter()
        .filter_map(|&name| Some((name.to_owned(), text(tokenizer_config.get(name)?)?)));
    TemplateTokens(tokens.collect())
}

fn eos_ids(tokenizer: &Tokenizer, config: &Json, generation_config: &Json, tokens: &TemplateTokens) -> Vec<u32> {
    let mut ids = Vec::new();
    for file in [generation_config, config] {
        match file.get("eos_token_id") {
            Some(Json::Array(several)) => ids.extend(several.iter().filter_map(Json::as_u64)),
            Some(one) => ids.extend(one.as_u64()),
            None => {}
        }
    }
    let named = tokens
        .0
        .iter()
        .find(|(name, _)| name == "eos_token")
        .and_then(|(_, text)| tokenizer.token_to_id(text));
    let mut ids: Vec<u32> = ids
        .into_iter()
        .filter_map(|id| u32::try_from(id).ok())
        .chain(named)
        .collect();
    ids.sort_unstable();
    ids.dedup();
    ids.truncate(baton_proto::limits::STOP_TOKEN_IDS_MAX);
    ids
}

/// The template: `chat_template.jinja`, else `chat_template` of tokenizer_config.json (a string, or a list of named
/// ones of which `default` is taken).
fn template_source(dir: &Path, tokenizer_config: &Json) -> Result<(PathBuf, String), GatewayError> {
    let file = dir.join("chat_template.jinja");
    if file.exists() {
        let source = String::from_utf8(read(&file)?);
        let source = source.map_err(|_| GatewayError::Parse {
            path: file.clone(),
            problem: "it is not UTF-8".into(),
        })?;
        return Ok((file, source));
    }
    let source = match tokenizer_config.get("chat_template") {
        Some(Json::String(source)) => Some(source.as_str()),
        Some(Json::Array(named)) => named
            .iter()
            .find(|entry| entry.get("name").and_then(Json::as_str) == Some("default"))
            .and_then(|entry| entry.get("template")?.as_str()),
        _ => None,
    };
    let source = source.ok_or_else(|| GatewayError::NoTemplate { dir: dir.to_owned() })?;
    Ok((dir.join("tokenizer_config.json"), source.to_owned()))
}

fn defaults(generation_config: &Json) -> SamplingDefaults {
    let number = |name: &str| {
        generation_config
            .get(name)
            .and_then(Json::as_f64)
            .map(|number| number as f32)
    };
    // `do_sample: false`, said outright, means greedy; left out it says nothing.
    let greedy = generation_config.get("do_sample") == Some(&Json::Bool(false));
    SamplingDefaults {
        temperature: match number("temperature") {
            _ if greedy => 0.0,
            Some(temperature) if (0.0..=2.0).contains(&temperature) => temperature,
            _ => 1.0,
        },
        top_p: number("top_p")
            .filter(|top_p| *top_p > 0.0 && *top_p <= 1.0)
            .unwrap_or(1.0),
        top_k: generation_config
            .get("top_k")
            .and_then(Json::as_u64)
            .and_then(|top_k| u32::try_from(top_k).ok())
            .unwrap_or(0),
        repetition_penalty: number("repetition_penalty")
            .filter(|penalty| *penalty > 0.0 && *penalty <= 2.0)
            .unwrap_or(1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{CHATML, write_model};
    use serde_json::json;

    fn said(text: &str) -> Conversation {
        Conversation {
            messages: vec![json!({"role": "user", "content": text})],
            ..Conversation::default()
        }
    }

    #[test]
    fn loads_what_the_files_say() {
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path());
        let model = ServedModel::load("m", dir.path()).unwrap();
        assert_eq!(
            (model.name(), model.context_length(), model.eos_ids()),
            ("m", 4096, &[257][..])
        );
        assert_eq!(
            model.defaults(),
            SamplingDefaults {
                temperature: 1.0,
                top_p: 1.0,
                top_k: 0,
                repetition_penalty: 1.0
            }
        );
        let prompt = model.prompt(said("hi"), b"").unwrap().tokens;
        assert_eq!(prompt.len(), "user\nhi\nassistant\n".len() + 3);
    }

    #[test]
    fn a_template_may_be_a_file_or_one_of_several() {
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path());
        let config =
            json!({"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": CHATML}]});
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        ServedModel::load("m", dir.path()).unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), "{}").unwrap();
        assert!(matches!(
            ServedModel::load("m", dir.path()),
            Err(GatewayError::NoTemplate { .. })
        ));
        std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages[0].content }}").unwrap();
        let model = ServedModel::load("m", dir.path()).unwrap();
        assert_eq!(model.prompt(said("hi"), b"").unwrap().tokens.len(), 2);
    }

    #[test]
    fn each_fault_is_one_clear_sentence() {
        let faults = [
            ("tokenizer.json", None, "cannot be read"),
            ("tokenizer.json", Some("{}"), "not usable"),
            ("config.json", None, "cannot be read"),
            ("config.json", Some("{\"eos_token_id\": 1}"), "max_position_embeddings"),
            ("config.json", Some("{\"max_position_embeddings\": 8}"), "end its turn"),
            (
                "tokenizer_config.json",
                Some("{\"chat_template\": \"{% if %}\"}"),
                "does not compile",
            ),
        ];
        for (file, content, expected) in faults {
            let dir = tempfile::tempdir().unwrap();
            write_model(dir.path());
            match content {
                Some(content) => std::fs::write(dir.path().join(file), content).unwrap(),
                None => std::fs::remove_file(dir.path().join(file)).unwrap(),
            }
            if file == "config.json" {
                std::fs::write(
                    dir.path().join("tokenizer_config.json"),
                    json!({"chat_template": CHATML}).to_string(),
                )
                .unwrap();
            }
            let error = ServedModel::load("m", dir.path()).err().expect(expected).to_string();
            assert!(error.contains(expected) && error.contains(file), "{error}");
        }
    }

    #[test]
    fn a_greedy_model_is_greedy_unless_asked() {
        assert_eq!(
            defaults(&json!({"do_sample": false, "temperature": 0.7})).temperature,
            0.0
        );
        assert_eq!(defaults(&json!({"temperature": 0.7})).temperature, 0.7);
        assert_eq!(
            defaults(&json!({"temperature": 7, "top_p": 0, "top_k": 20})),
            SamplingDefaults {
                temperature: 1.0,
                top_p: 1.0,
                top_k: 20,
                repetition_penalty: 1.0
            }
        );
    }

    /// The model in the repository, where it is there.
    #[test]
    fn the_demo_model_reads_as_its_tokenizer_does() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/model");
        if !dir.join("tokenizer.json").exists() {
            return;
        }
        let model = ServedModel::load("demo", &dir).unwrap();
        let prompt = model.prompt(said("My code is 7341."), b"").unwrap().tokens;
        let rendered = "<|im_start|>user\nMy code is 7341.<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(
            prompt,
            model.texts.tokenizer().encode(rendered, false).unwrap().get_ids()
        );
        let mut detokenizer = model.detokenizer(Special::Hidden);
        let text: String = prompt.iter().map(|&id| detokenizer.push(id)).collect();
        assert_eq!(text, "user\nMy code is 7341.\nassistant\n");
    }
}
