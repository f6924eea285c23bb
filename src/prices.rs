//! `baton prices`: the price book of a running cluster, and price lists from and to files.

use crate::accounts::{self, Api};
use crate::cli::accounts::At;
use crate::cli::prices::{ImportArgs, PricesCommand};
use crate::up::{print, say};
use anyhow::{Context, bail};
use baton_ledger::money::Nano;
use baton_ledger::prices::list;
use baton_ledger::prices::litellm::{Settings, import};
use baton_proto::state::Price;
use serde_json::{Value, json};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

/// Largest list read; LiteLLM's is about 2 MiB.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Runs a command.
pub fn run(command: &PricesCommand) -> anyhow::Result<ExitCode> {
    match command {
        PricesCommand::Import(args) => convert(args),
        PricesCommand::Set(args) => {
            let price = json!({
                "model": args.model,
                "input": args.input,
                "cached_input": args.cached_input,
                "output": args.output,
                "currency": args.currency,
                "effective_from_unix_ms": args.effective_from,
            });
            put(&args.at, vec![price])
        }
        PricesCommand::Apply(args) => {
            let text = read(&args.file)?;
            let prices = list::parse(&text, now_ms())?;
            put(&args.at, prices.iter().map(body).collect())
        }
        PricesCommand::List(args) => accounts::run(&args.at.remote, async |api: &Api| {
            let mut path = "/v1/organization/prices?limit=1000".to_owned();
            if let Some(model) = &args.model {
                path += &format!("&model={}", accounts::escape(model));
            }
            show(&args.at, &api.list(&path).await?)
        }),
    }
}

/// Sends prices to a running cluster.
fn put(at: &At, prices: Vec<Value>) -> anyhow::Result<ExitCode> {
    accounts::run(&at.remote, async |api: &Api| {
        let mut set = Vec::with_capacity(prices.len());
        for price in &prices {
            let answer = api.post("/v1/organization/prices", price).await;
            let model = accounts::cell(&price["model"]);
            set.push(answer.with_context(|| format!("the price of {model}"))?);
        }
        show(at, &set)
    })
}

/// As the API takes it.
fn body(price: &Price) -> Value {
    let amount = |nano: u64| Nano::from(nano).to_string();
    json!({
        "model": price.model,
        "service_tier": price.service_tier,
        "currency": price.currency,
        "input": amount(price.input_nano_per_mtok),
        "cached_input": amount(price.cached_input_nano_per_mtok),
        "output": amount(price.output_nano_per_mtok),
        "effective_from_unix_ms": price.effective_from_unix_ms,
        "effective_to_unix_ms": (price.effective_to_unix_ms > 0).then_some(price.effective_to_unix_ms),
    })
}

fn show(at: &At, prices: &[Value]) -> anyhow::Result<()> {
    if at.json {
        print(&(serde_json::to_string_pretty(prices)? + "\n"));
        return Ok(());
    }
    let fields = [
        "model",
        "service_tier",
        "input",
        "cached_input",
        "output",
        "currency",
        "effective_from_unix_ms",
        "effective_to_unix_ms",
        "id",
    ];
    let header = [
        "MODEL",
        "TIER",
        "INPUT",
        "CACHED",
        "OUTPUT",
        "CURRENCY",
        "FROM (UNIX MS)",
        "TO",
        "PRICE",
    ];
    let rows = prices
        .iter()
        .map(|price| fields.map(|name| accounts::cell(&price[name])));
    print(&accounts::table(header, rows.collect()));
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<String> {
    let shown = path.display();
    let size = std::fs::metadata(path)
        .with_context(|| format!("cannot read {shown}"))?
        .len();
    if size > FILE_BYTES_MAX {
        bail!("{shown} is larger than any price list");
    }
    std::fs::read_to_string(path).with_context(|| format!("cannot read {shown}"))
}

fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

fn convert(args: &ImportArgs) -> anyhow::Result<ExitCode> {
    let text = read(&args.file)?;
    let settings = Settings {
        models: args.models.iter().cloned().collect(),
        effective_from_unix_ms: args.effective_from.unwrap_or_else(now_ms),
        round: args.round,
    };
    let imported = import(&text, &settings)?;
    for (model, note) in &imported.notes {
        say(&format!("{model}: {note}"));
    }
    let list = list::print(&imported.prices);
    match &args.output {
        None => print(&list),
        Some(path) => {
            let file = File::create_new(path).and_then(|mut file| file.write_all(list.as_bytes()));
            file.with_context(|| format!("cannot write {}", path.display()))?;
            say(&format!("{} prices in {}", imported.prices.len(), path.display()));
        }
    }
    Ok(ExitCode::SUCCESS)
}
