//! The JSON of the ledger: one shape for the verifiable export, the feed over HTTP and inclusion proofs.
//!
//! Names are those of the records. Hashes, keys and signatures are hexadecimal digits; amounts of money are strings of
//! whole nano-units, because many readers turn JSON numbers into doubles; everything else is numbers and strings. What is
//! empty or zero by nature (a user, postings, predicted tokens) is left out. Unknown fields are refused: nothing would
//! vouch for them.

use baton_proto::state::{
    Attempt, Charge, Checkpoint, Correction, LedgerRow, Posting, Price, UsageRecord, ledger_row::Body,
};
use serde::{Deserialize, Serialize};

/// Serialises a record whose JSON is described by a `…Def`, and back.
macro_rules! wrapper {
    ($(#[$doc:meta])* $name:ident, $record:ty, $def:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(#[serde(with = $def)] pub $record);
    };
}

wrapper!(
    /// A price as JSON.
    PriceJson, Price, "PriceDef"
);
wrapper!(
    /// A checkpoint as JSON.
    CheckpointJson, Checkpoint, "CheckpointDef"
);
wrapper!(
    /// A usage record as JSON.
    UsageJson, UsageRecord, "UsageRecordDef"
);
wrapper!(
    /// A correction as JSON.
    CorrectionJson, Correction, "CorrectionDef"
);
wrapper!(
    /// A charge as JSON.
    ChargeJson, Charge, "ChargeDef"
);

/// A row as JSON: either `usage` or `correction` is there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RowJson {
    sequence: u64,
    raft_index: u64,
    at_unix_ms: u64,
    #[serde(with = "bytes_hex")]
    id: bytes::Bytes,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    usage: Option<UsageJson>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    correction: Option<CorrectionJson>,
    charge: ChargeJson,
    #[serde(with = "bytes_hex")]
    previous_hash: bytes::Bytes,
    #[serde(with = "bytes_hex")]
    hash: bytes::Bytes,
}

impl RowJson {
    /// Number of the row.
    pub const fn sequence(&self) -> u64 {
        self.sequence
    }
}

impl From<LedgerRow> for RowJson {
    fn from(row: LedgerRow) -> Self {
        let (usage, correction) = match row.body {
            Some(Body::Usage(record)) => (Some(UsageJson(record)), None),
            Some(Body::Correction(correction)) => (None, Some(CorrectionJson(correction))),
            None => (None, None),
        };
        Self {
            sequence: row.sequence,
            raft_index: row.raft_index,
            at_unix_ms: row.at_unix_ms,
            id: row.id,
            usage,
            correction,
            charge: ChargeJson(row.charge.unwrap_or_default()),
            previous_hash: row.previous_hash,
            hash: row.hash,
        }
    }
}

impl From<RowJson> for LedgerRow {
    /// A row with both bodies or none comes out without one, which [`crate::verify`] refuses.
    fn from(row: RowJson) -> Self {
        let body = match (row.usage, row.correction) {
            (Some(UsageJson(record)), None) => Some(Body::Usage(record)),
            (None, Some(CorrectionJson(correction))) => Some(Body::Correction(correction)),
            _ => None,
        };
        Self {
            sequence: row.sequence,
            raft_index: row.raft_index,
            id: row.id,
            body,
            charge: Some(row.charge.0),
            previous_hash: row.previous_hash,
            hash: row.hash,
            at_unix_ms: row.at_unix_ms,
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "UsageRecord", deny_unknown_fields)]
struct UsageRecordDef {
    request_id: String,
    model: String,
    #[serde(with = "status")]
    status: i32,
    prompt_tokens: u32,
    cached_tokens: u32,
    completion_tokens: u32,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    prefill_worker_id: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    decode_worker_id: String,
    started_unix_ms: u64,
    settled_unix_ms: u64,
    attempts: u32,
    sampled_tokens: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    reasoning_tokens: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    accepted_prediction_tokens: u32,
    #[serde(default, skip_serializing_if = "is_zero")]
    rejected_prediction_tokens: u32,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    organization_id: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    project_id: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    key_id: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    user: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    revision: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    endpoint: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    service_tier: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "attempts")]
    attempt_list: Vec<Attempt>,
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "postings")]
    postings: Vec<Posting>,
    #[serde(default, skip_serializing_if = "bytes::Bytes::is_empty", with = "bytes_hex")]
    idempotency_key_sha256: bytes::Bytes,
    #[serde(default, skip_serializing_if = "bytes::Bytes::is_empty", with = "bytes_hex")]
    request_sha256: bytes::Bytes,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    price_id: String,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Attempt", deny_unknown_fields)]
struct AttemptDef {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    prefill_worker_id: String,
    decode_worker_id: String,
    decode_epoch: u64,
    tokens: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Posting", deny_unknown_fields)]
struct PostingDef {
    budget_id: String,
    slice_id: String,
    #[serde(with = "nano")]
    reserved_nano: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Correction", deny_unknown_fields)]
struct CorrectionDef {
    request_id: String,
    sequence: u64,
    prompt_tokens: i64,
    cached_tokens: i64,
    completion_tokens: i64,
    #[serde(with = "nano")]
    input_nano: i64,
    #[serde(with = "nano")]
    cached_input_nano: i64,
    #[serde(with = "nano")]
    output_nano: i64,
    reason: String,
    correction_id: String,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Charge", deny_unknown_fields)]
struct ChargeDef {
    price_id: String,
    currency: String,
    #[serde(with = "nano")]
    input_nano: u64,
    #[serde(with = "nano")]
    cached_input_nano: u64,
    #[serde(with = "nano")]
    output_nano: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Price", deny_unknown_fields)]
struct PriceDef {
    id: String,
    model: String,
    service_tier: String,
    currency: String,
    #[serde(with = "nano")]
    input_nano_per_mtok: u64,
    #[serde(with = "nano")]
    cached_input_nano_per_mtok: u64,
    #[serde(with = "nano")]
    output_nano_per_mtok: u64,
    effective_from_unix_ms: u64,
    effective_to_unix_ms: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Checkpoint", deny_unknown_fields)]
struct CheckpointDef {
    first_sequence: u64,
    last_sequence: u64,
    #[serde(with = "bytes_hex")]
    merkle_root: bytes::Bytes,
    #[serde(with = "bytes_hex")]
    last_hash: bytes::Bytes,
    at_unix_ms: u64,
    #[serde(with = "bytes_hex")]
    public_key: bytes::Bytes,
    #[serde(with = "bytes_hex")]
    signature: bytes::Bytes,
    #[serde(with = "bytes_hex")]
    previous_hash: bytes::Bytes,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Name of a usage status: `completed`, …; a number this version does not know prints as one.
pub fn status_name(status: i32) -> String {
    let known = status::NAMES.iter().find(|(_, number)| *number as i32 == status);
    known.map_or_else(|| status.to_string(), |(name, _)| (*name).to_owned())
}

mod status {
    use baton_proto::state::UsageStatus;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub const NAMES: [(&str, UsageStatus); 6] = [
        ("unspecified", UsageStatus::Unspecified),
        ("completed", UsageStatus::Completed),
        ("length", UsageStatus::Length),
        ("cancelled", UsageStatus::Cancelled),
        ("failed", UsageStatus::Failed),
        ("expired", UsageStatus::Expired),
    ];

    pub fn serialize<S: Serializer>(status: &i32, serializer: S) -> Result<S::Ok, S::Error> {
        super::status_name(*status).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i32, D::Error> {
        let text = String::deserialize(deserializer)?;
        let known = NAMES
            .iter()
            .find(|(name, _)| *name == text)
            .map(|(_, number)| *number as i32);
        known
            .or_else(|| text.parse().ok())
            .ok_or_else(|| D::Error::custom(format!("{text:?} is no status")))
    }
}

/// Bytes as hexadecimal digits.
pub(crate) mod bytes_hex {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub fn serialize<S: Serializer>(bytes: &bytes::Bytes, serializer: S) -> Result<S::Ok, S::Error> {
        crate::hex(bytes).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bytes::Bytes, D::Error> {
        let text = String::deserialize(deserializer)?;
        crate::from_hex(&text)
            .map(Into::into)
            .ok_or_else(|| D::Error::custom("not hexadecimal digits"))
    }
}

/// A hash as 64 hexadecimal digits.
pub(crate) mod hash_hex {
    use crate::Hash;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    pub fn serialize<S: Serializer>(hash: &Hash, serializer: S) -> Result<S::Ok, S::Error> {
        crate::hex(hash).serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Hash, D::Error> {
        let text = String::deserialize(deserializer)?;
        crate::hash_from_hex(&text).ok_or_else(|| D::Error::custom("not 64 hexadecimal digits"))
    }
}

/// A number as a string.
pub(crate) mod nano {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use std::{fmt::Display, str::FromStr};

    pub fn serialize<T: Display, S: Serializer>(nano: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(nano)
    }

    pub fn deserialize<'de, T: FromStr, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse()
            .map_err(|_| D::Error::custom(format!("{text:?} is no whole number of nano-units")))
    }
}

mod attempts {
    use super::{Attempt, AttemptDef};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct One(#[serde(with = "AttemptDef")] Attempt);

    pub fn serialize<S: Serializer>(list: &[Attempt], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(list.iter().cloned().map(One))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Attempt>, D::Error> {
        Ok(Vec::<One>::deserialize(deserializer)?
            .into_iter()
            .map(|one| one.0)
            .collect())
    }
}

mod postings {
    use super::{Posting, PostingDef};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct One(#[serde(with = "PostingDef")] Posting);

    pub fn serialize<S: Serializer>(list: &[Posting], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(list.iter().cloned().map(One))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Posting>, D::Error> {
        Ok(Vec::<One>::deserialize(deserializer)?
            .into_iter()
            .map(|one| one.0)
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{full_record, ledger};

    #[test]
    fn rows_come_back_as_they_were() {
        let ledger = ledger(7);
        for row in ledger.rows {
            let text = serde_json::to_string(&RowJson::from(row.clone())).expect("plain data");
            let back: RowJson = serde_json::from_str(&text).expect("its own");
            assert_eq!(LedgerRow::from(back), row);
        }
        let text = serde_json::to_string(&UsageJson(full_record())).expect("plain data");
        assert_eq!(
            serde_json::from_str::<UsageJson>(&text).expect("its own").0,
            full_record()
        );
        for checkpoint in ledger.checkpoints {
            let text = serde_json::to_string(&CheckpointJson(checkpoint.clone())).expect("plain data");
            assert_eq!(
                serde_json::from_str::<CheckpointJson>(&text).expect("its own").0,
                checkpoint
            );
        }
    }

    #[test]
    fn money_is_never_a_json_number_and_unknown_fields_are_refused() {
        let row = RowJson::from(ledger(1).rows.remove(0));
        let value = serde_json::to_value(&row).expect("plain data");
        assert!(value["charge"]["input_nano"].is_string());
        assert_eq!(value["usage"]["status"], "completed");
        let mut with_more = value.clone();
        with_more["usage"]["discount"] = 1.into();
        assert!(serde_json::from_value::<RowJson>(with_more).is_err());
        let mut number = value;
        number["charge"]["input_nano"] = 1.into();
        assert!(serde_json::from_value::<RowJson>(number).is_err());
    }

    #[test]
    fn a_status_of_a_later_version_survives() {
        let record = UsageRecord {
            status: 77,
            ..full_record()
        };
        let text = serde_json::to_string(&UsageJson(record)).expect("plain data");
        assert_eq!(serde_json::from_str::<UsageJson>(&text).expect("its own").0.status, 77);
    }
}
