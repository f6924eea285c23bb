//! FOCUS 1.2 (FinOps Open Cost and Usage Specification) as CSV: one line per row and class of tokens.
//!
//! All columns that the specification makes mandatory, and the conditional ones that apply to tokens; columns about
//! regions, commitments and capacity do not. An hour of UTC is the charge period and a month the billing period, both by
//! the ledger's time. The pricing unit is a million tokens, the consumed unit a token; `PricingQuantity` × `ListUnitPrice`
//! is `ListCost` up to the rounding of a nano-unit, and it is 0 where tokens are not billed. There are no discounts, so that
//! the four costs are the same. A correction is a charge of the category `Adjustment`, and of the class `Correction` if the row it
//! amends is of an earlier billing period (or came before this export). What has no price has the currency `XXX`, ISO 4217's for none. Columns that start with `x_`
//! are ours.

use super::{Export, ExportError, Flat, date_time};
use crate::charge::is_free;
use crate::money::Nano;
use crate::totals::Amounts;
use baton_proto::state::{LedgerRow, Price};
use std::collections::HashMap;
use std::io::Write;

/// Currency of what has no price.
const NO_CURRENCY: &str = "XXX";

/// The columns, in the order of the specification's names.
pub const COLUMNS: [&str; 42] = [
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingAccountType",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargeFrequency",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ConsumedQuantity",
    "ConsumedUnit",
    "ContractedCost",
    "ContractedUnitPrice",
    "EffectiveCost",
    "InvoiceIssuerName",
    "ListCost",
    "ListUnitPrice",
    "PricingCategory",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "ResourceId",
    "ResourceName",
    "ResourceType",
    "ServiceCategory",
    "ServiceName",
    "ServiceSubcategory",
    "SkuId",
    "SkuMeter",
    "SkuPriceId",
    "SubAccountId",
    "SubAccountName",
    "SubAccountType",
    "Tags",
    "x_RequestId",
    "x_LedgerSequence",
    "x_LedgerRowId",
];

/// A class of tokens: what it is called, how many there are, what they cost, and which price is theirs.
struct Class {
    name: &'static str,
    tokens: i64,
    nano: i128,
    unit_price: fn(&Price) -> u64,
}

/// Writes it.
#[derive(Debug)]
pub struct Focus<W: Write> {
    out: csv::Writer<W>,
    prices: HashMap<String, Price>,
    /// Start of the billing period of the last row, and the first row of that period as far as they came here.
    month: String,
    month_first: u64,
}

impl<W: Write> Focus<W> {
    /// Writes the header line.
    ///
    /// # Errors
    /// If `out` cannot be written.
    pub fn new(out: W) -> Result<Self, ExportError> {
        let mut out = csv::Writer::from_writer(out);
        out.write_record(COLUMNS)?;
        Ok(Self {
            out,
            prices: HashMap::new(),
            month: String::new(),
            month_first: 0,
        })
    }

    fn line(&mut self, flat: &Flat<'_>, class: &Class) -> Result<(), ExportError> {
        let usage = &flat.usage;
        let cost = Nano(class.nano).to_string();
        let currency = Some(flat.charge.currency.as_str()).filter(|currency| !currency.is_empty());
        let correction = flat.correction.is_some();
        let price = self.prices.get(&flat.charge.price_id);
        let unit_price = price.map_or(String::new(), |price| Nano::from((class.unit_price)(price)).to_string());
        // A quantity is priced in millions: the decimal point moves six places, and a nano-unit has nine.
        let billed = if is_free(usage) { 0 } else { class.tokens };
        let priced = Nano(i128::from(billed) * 1_000);
        let (hour, month) = (hour(flat.row.at_unix_ms), month(flat.row.at_unix_ms));
        let earlier = flat
            .correction
            .is_some_and(|amended| amended.sequence < self.month_first);
        let only_usage = |text: String| if correction { String::new() } else { text };
        let description = match flat.correction {
            Some(amended) => format!("Correction of row {}: {}", amended.sequence, amended.reason),
            None => format!("{} {} tokens of {}", class.tokens, class.name, usage.model),
        };
        let organization = if usage.organization_id.is_empty() {
            "default"
        } else {
            &usage.organization_id
        };
        let tags: serde_json::Map<String, serde_json::Value> = [
            ("key_id", &usage.key_id),
            ("user", &usage.user),
            ("endpoint", &usage.endpoint),
            ("revision", &usage.revision),
        ]
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| (name.to_owned(), value.as_str().into()))
        .collect();
        let record: [String; COLUMNS.len()] = [
            cost.clone(),
            organization.to_owned(),
            organization.to_owned(),
            "Organization".into(),
            currency.unwrap_or(NO_CURRENCY).to_owned(),
            month.1,
            month.0,
            if correction {
                "Adjustment".into()
            } else {
                "Usage".into()
            },
            if earlier { "Correction".into() } else { String::new() },
            description,
            "Usage-Based".into(),
            hour.1,
            hour.0,
            only_usage(class.tokens.to_string()),
            only_usage("Tokens".into()),
            cost.clone(),
            unit_price.clone(),
            cost.clone(),
            "baton".into(),
            cost,
            unit_price,
            only_usage("Standard".into()),
            only_usage(priced.to_string()),
            only_usage("1000000 Tokens".into()),
            "baton".into(),
            "baton".into(),
            usage.model.clone(),
            usage.model.clone(),
            only_usage("Model".into()),
            "AI and Machine Learning".into(),
            "baton inference".into(),
            "Generative AI".into(),
            only_usage(format!("{}/{}", usage.model, class.name)),
            only_usage(format!("{} tokens", class.name)),
            price.map_or(String::new(), |price| format!("{}/{}", price.id, class.name)),
            usage.project_id.clone(),
            usage.project_id.clone(),
            if usage.project_id.is_empty() {
                String::new()
            } else {
                "Project".into()
            },
            serde_json::Value::Object(tags).to_string(),
            usage.request_id.clone(),
            flat.row.sequence.to_string(),
            crate::hex(&flat.row.id),
        ];
        Ok(self.out.write_record(&record)?)
    }
}

impl<W: Write> Export for Focus<W> {
    fn price(&mut self, price: &Price) -> Result<(), ExportError> {
        self.prices.insert(price.id.clone(), price.clone());
        Ok(())
    }

    fn row(&mut self, row: &LedgerRow) -> Result<(), ExportError> {
        let (flat, amounts) = (Flat::of(row)?, Amounts::of(row));
        let (start, _) = month(row.at_unix_ms);
        if self.month != start {
            self.month = start;
            self.month_first = row.sequence;
        }
        let uncached = flat.prompt_tokens.saturating_sub(flat.cached_tokens);
        let classes = [
            Class {
                name: "input",
                tokens: uncached,
                nano: amounts.input_nano,
                unit_price: |price| price.input_nano_per_mtok,
            },
            Class {
                name: "cached input",
                tokens: flat.cached_tokens,
                nano: amounts.cached_input_nano,
                unit_price: |price| price.cached_input_nano_per_mtok,
            },
            Class {
                name: "output",
                tokens: flat.completion_tokens,
                nano: amounts.output_nano,
                unit_price: |price| price.output_nano_per_mtok,
            },
        ];
        for class in classes.iter().filter(|class| class.tokens != 0 || class.nano != 0) {
            self.line(&flat, class)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), ExportError> {
        Ok(self.out.flush()?)
    }

    fn finish(mut self: Box<Self>) -> Result<(), ExportError> {
        self.flush()
    }
}

/// Start and end of the hour of UTC around a time.
fn hour(unix_ms: u64) -> (String, String) {
    const HOUR_MS: u64 = 3_600_000;
    let start = unix_ms - unix_ms % HOUR_MS;
    (second(start), second(start.saturating_add(HOUR_MS)))
}

/// Start and end of the month of UTC around a time.
fn month(unix_ms: u64) -> (String, String) {
    let date = date_time(unix_ms).date();
    let (year, month) = (date.year(), u8::from(date.month()));
    let (next_year, next) = if month == 12 { (year + 1, 1) } else { (year, month + 1) };
    (
        format!("{year:04}-{month:02}-01T00:00:00Z"),
        format!("{next_year:04}-{next:02}-01T00:00:00Z"),
    )
}

/// A time to the second, as the specification writes it.
fn second(unix_ms: u64) -> String {
    let mut text = super::rfc3339(unix_ms);
    text.truncate("2026-11-24T15:00:00".len());
    text.push('Z');
    text
}

#[cfg(test)]
mod tests {
    use super::super::{Format, tests::exported};
    use super::*;
    use crate::money::parse_nano;
    use crate::totals::Totals;

    fn signed(text: &str) -> i128 {
        let (sign, amount) = text.strip_prefix('-').map_or((1, text), |amount| (-1, amount));
        sign * i128::from(parse_nano(amount).expect("a decimal"))
    }

    #[test]
    fn lines_add_up_and_multiply_out() {
        let bytes = exported(Format::Focus, 9);
        let mut reader = csv::Reader::from_reader(bytes.as_slice());
        let lines: Vec<HashMap<String, String>> = reader.deserialize().map(|line| line.expect("well-formed")).collect();
        // Rows 1, 2, 3, 6, 7, 9 have three classes, 5 has two (it failed before a token), 4 and 8 correct one.
        assert_eq!(lines.len(), 6 * 3 + 2 + 2);
        let mut totals = Totals::default();
        crate::tests::ledger(9).rows.iter().for_each(|row| totals.add(row));
        let billed: i128 = lines.iter().map(|line| signed(&line["BilledCost"])).sum();
        assert_eq!(billed, totals.currencies["USD"].total().0);
        for line in &lines {
            assert_eq!(line.len(), COLUMNS.len());
            for (column, value) in line {
                let nullable =
                    ["ChargeClass", "ContractedUnitPrice", "ListUnitPrice", "SkuPriceId"].contains(&column.as_str());
                assert!(
                    nullable || line["ChargeCategory"] == "Adjustment" || !value.is_empty(),
                    "{column}"
                );
            }
            if line["ChargeCategory"] == "Adjustment" || line["ListUnitPrice"].is_empty() {
                continue;
            }
            // Nano-units times nano-units is 10⁻¹⁸; the cost is that, rounded half to even to 10⁻⁹.
            let product =
                signed(&line["PricingQuantity"]).unsigned_abs() * signed(&line["ListUnitPrice"]).unsigned_abs();
            assert_eq!(
                crate::money::divide(product, 1_000_000_000),
                signed(&line["ListCost"]).unsigned_abs()
            );
        }
        let first = &lines[0];
        assert_eq!(first["ConsumedQuantity"], "6");
        assert_eq!(first["PricingQuantity"], "0.000006");
        assert_eq!(first["ListUnitPrice"], "20");
        assert_eq!(first["ChargePeriodStart"], "2025-11-24T16:00:00Z");
        assert_eq!(first["ChargePeriodEnd"], "2025-11-24T17:00:00Z");
        assert_eq!(first["BillingPeriodEnd"], "2025-12-01T00:00:00Z");
        let unpriced = lines
            .iter()
            .find(|line| line["x_LedgerSequence"] == "2")
            .expect("row 2");
        assert_eq!(
            (unpriced["BillingCurrency"].as_str(), unpriced["BilledCost"].as_str()),
            ("XXX", "0")
        );
    }

    #[test]
    fn only_corrections_of_earlier_months_are_of_the_class() {
        let mut rows = crate::tests::ledger(4).rows;
        let classes = |rows: &[LedgerRow]| {
            let mut out = Vec::new();
            let mut writer = Format::Focus.writer(&mut out).expect("memory is writable");
            rows.iter().for_each(|row| writer.row(row).expect("memory is writable"));
            writer.finish().expect("memory is writable");
            let mut reader = csv::Reader::from_reader(out.as_slice());
            let lines: Vec<HashMap<String, String>> =
                reader.deserialize().map(|line| line.expect("well-formed")).collect();
            let corrections = lines.into_iter().filter(|line| line["ChargeCategory"] == "Adjustment");
            corrections.map(|line| line["ChargeClass"].clone()).collect::<Vec<_>>()
        };
        assert_eq!(classes(&rows), [""]);
        assert_eq!(classes(&rows[3..]), ["Correction"]);
        // Row 4, the correction, in the next year.
        rows[3].at_unix_ms += 40 * 24 * 3_600_000;
        assert_eq!(classes(&rows), ["Correction"]);
    }

    #[test]
    fn december_ends_in_january() {
        let (start, end) = month(1_767_200_000_000);
        assert_eq!(
            (start.as_str(), end.as_str()),
            ("2025-12-01T00:00:00Z", "2026-01-01T00:00:00Z")
        );
    }
}
