//! How large what a command brings may be. A command as a whole is bounded by the store (64 KiB); these keep keys short
//! and reads even.

use crate::outcome::Refused;

/// Bytes of an id, a name or any other short text: long enough for URLs and model names of hubs.
pub const TEXT_BYTES_MAX: usize = 512;
/// Bytes of a deployment's settings.
pub const SETTINGS_BYTES_MAX: usize = 32 << 10;
/// Coordinators known at once. A Raft group has 3 to 7; the rest is room for learners and replacements.
pub const MEMBERS_MAX: usize = 64;
/// Models in a key's allow-list.
pub const KEY_MODELS_MAX: usize = 256;
/// Placements told of one request. A request that moved more often keeps its last ones.
pub const ATTEMPTS_MAX: usize = 64;
/// Budgets of one project as a whole, or of one key. A request is reserved from all that hold for it.
pub const BUDGETS_PER_KEY_MAX: usize = 8;
/// Budgets that one record posts to: those of its project and those of its key.
pub const POSTINGS_MAX: usize = 2 * BUDGETS_PER_KEY_MAX;
/// Open slices of one budget and period: some for each member.
pub const SLICES_PER_PERIOD_MAX: u128 = 64;
/// Prices of one model and tier. A price is looked up from the latest backwards past those that are over.
pub const PRICES_PER_MODEL_MAX: usize = 1024;
/// Chunks of one uploaded file: the command with all their names stays under the store's 64 KiB.
pub const FILE_CHUNKS_MAX: usize = 1024;
/// Bytes of one chunk: a message between members, and what a gateway holds of an upload in memory.
pub const CHUNK_BYTES_MAX: u64 = 4 << 20;
/// Chunks of a file that a batch writes: two neighbours together have a quarter of the largest size or more, so 2 GiB or more.
pub const OUTPUT_CHUNKS_MAX: u32 = 4096;
/// Lines of a batch, OpenAI's limit. A bit for each is kept.
pub const BATCH_LINES_MAX: u32 = 50_000;
/// Lines in one step of a batch's progress.
pub const BATCH_STEP_LINES_MAX: usize = 4096;
/// Batches that are not over, of all owners: every member looks through them.
pub const BATCHES_OPEN_MAX: u64 = 1024;
/// Batches remembered of one owner; one more forgets the oldest that is over.
pub const BATCHES_PER_OWNER_MAX: u64 = 10_000;
/// Errors told of an invalid input file.
pub const BATCH_ERRORS_MAX: usize = 100;
/// Labels of a batch, and bytes of a label's name and value: OpenAI's limits, in characters of up to four bytes.
pub const BATCH_LABELS_MAX: usize = 16;
/// See [`BATCH_LABELS_MAX`].
pub const BATCH_LABEL_BYTES_MAX: usize = 2048;
/// Nano-units per million tokens: one unit a token. So the charge of a record is below 2^63.
pub const PRICE_NANO_MAX: u64 = 1_000_000_000_000_000;

/// A text that may be empty.
pub(crate) fn text(what: &str, text: &str) -> Result<(), Refused> {
    if text.len() > TEXT_BYTES_MAX {
        let length = text.len();
        return Err(Refused::Invalid(format!(
            "{what} has {length} bytes; at most {TEXT_BYTES_MAX} are taken"
        )));
    }
    Ok(())
}

/// A text that names something.
pub(crate) fn name(what: &str, text: &str) -> Result<(), Refused> {
    if text.is_empty() {
        return Err(Refused::Invalid(format!("{what} is empty")));
    }
    self::text(what, text)
}

/// Bytes of a fixed length.
pub(crate) fn exactly(what: &str, bytes: &[u8], length: usize) -> Result<(), Refused> {
    if bytes.len() != length {
        let found = bytes.len();
        return Err(Refused::Invalid(format!("{what} has {found} bytes, not {length}")));
    }
    Ok(())
}

/// ISO 4217, in capitals.
pub(crate) fn currency(currency: &str) -> Result<(), Refused> {
    if currency.len() == 3 && currency.bytes().all(|byte| byte.is_ascii_uppercase()) {
        return Ok(());
    }
    Err(Refused::invalid("a currency is three capital letters, such as USD"))
}
