//! Limits that both ends of a wire hold to (promise P5). Each says why it has its value.

/// Longest prompt, in tokens, that fits one message: 1 Mi tokens, above every context length in use; 4 bytes each as
/// varints stays under [`MESSAGE_BYTES_MAX`].
pub const PROMPT_TOKENS_MAX: usize = 1 << 20;

/// Largest gRPC message in bytes. A prompt of [`PROMPT_TOKENS_MAX`] ids plus its block list fits.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Stop token ids in one request. Models list a handful; more is a mistake or an attack.
pub const STOP_TOKEN_IDS_MAX: usize = 64;

/// Most likely tokens told beside a sampled one: OpenAI's limit.
pub const TOP_LOGPROBS_MAX: u32 = 20;

/// Tokens with a bias in one request: OpenAI's clients send at most 300; vLLM takes 1,024.
pub const LOGIT_BIAS_MAX: usize = 1024;

/// Bytes of a grammar or schema on the wire. Schemas of real applications are a few KiB; the largest published ones some 100 KiB.
pub const GRAMMAR_BYTES_MAX: usize = 256 << 10;

/// Blocks that one hint names, 16 bytes each: a prompt of 16k tokens in the usual blocks, and more than a worker reads ahead.
pub const READ_AHEAD_BLOCKS_MAX: usize = 1024;

/// Requests one caller may have open on one worker stream. Above any batch a worker can run or queue.
pub const REQUESTS_PER_STREAM_MAX: usize = 4096;
