//! The coordinators of `baton up`: where each of them listens, how it is configured, and their start.
//!
//! A lone one takes a free port for the cluster and tells it. Members of a group must know each other's addresses before any
//! of them runs, so the ports are chosen here; should another program take one in between, the start fails and says so.

use super::data_dir::DataDir;
use super::plan::Plan;
use super::progress::Progress;
use super::supervisor::{Slot, Supervisor};
use super::{COORDINATOR_START_MAX, child, coordinator_serves, reachable, utf8, write_config};
use crate::cli::tenant::Tenant;
use anyhow::{Context, anyhow, bail};
use serde_json::{Value, json};
use std::net::{SocketAddr, TcpListener};
use tokio::time::timeout;

/// Where a coordinator listens.
#[derive(Debug, Clone, Copy)]
pub struct Seat {
    /// The API.
    pub http_addr: SocketAddr,
    /// Members and workers.
    pub cluster_addr: SocketAddr,
    /// Whether the API speaks TLS.
    pub tls: bool,
}

impl Seat {
    /// Base URL of its API, as this machine reaches it.
    pub fn url(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}", reachable(self.http_addr))
    }
}

/// Name of a coordinator, by its place from 0. Its id in the group is one more.
pub fn name(index: usize) -> String {
    format!("coordinator-{index}")
}

/// Starts the coordinators and waits until all listen.
pub async fn start(
    plan: &Plan,
    data: &DataDir,
    supervisor: &mut Supervisor,
    progress: &mut Progress,
) -> anyhow::Result<(Vec<Slot>, Vec<Seat>)> {
    check_size(plan.coordinators, data)?;
    let mut seats = seats(plan)?;
    let mut slots = Vec::new();
    for index in 0..seats.len() {
        progress.begin(&name(index), "starting");
        let spec = child(data, &name(index), "coordinator", &config(plan, data, &seats, index))?;
        slots.push(supervisor.start(spec)?);
    }
    let all = async {
        let mut serving = 0;
        while serving < slots.len() {
            let (slot, http_addr, cluster_addr) = coordinator_serves(supervisor, progress).await?;
            if let Some(index) = slots.iter().position(|other| *other == slot) {
                seats[index] = Seat {
                    http_addr,
                    cluster_addr,
                    tls: plan.tls.is_some(),
                };
                progress.done(&name(index), &format!("listening on {http_addr}"));
                serving += 1;
            }
        }
        anyhow::Ok(())
    };
    timeout(COORDINATOR_START_MAX, all).await.map_err(|_| {
        anyhow!(
            "the coordinators did not start within {} s; see their logs",
            COORDINATOR_START_MAX.as_secs()
        )
    })??;
    // Should one be restarted, it must come back where clients and workers know it.
    for index in 0..seats.len() {
        write_config(data, &name(index), &config(plan, data, &seats, index))?;
    }
    Ok((slots, seats))
}

/// Refuses to start with another number of coordinators than the data directory has state of: a member that is left out is
/// missing in every majority.
fn check_size(wanted: usize, data: &DataDir) -> anyhow::Result<()> {
    let found = (0..)
        .take_while(|index| data.state(&name(*index)).join("raft.redb").exists())
        .count();
    if found != 0 && found != wanted {
        bail!(
            "this data directory holds the state of {found} coordinators; start with --coordinators {found}, or choose \
             another directory with --data-dir"
        );
    }
    Ok(())
}

/// Where the coordinators are to listen: the API on the given port and those after it, or on free ones if it is 0.
fn seats(plan: &Plan) -> anyhow::Result<Vec<Seat>> {
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    if plan.coordinators == 1 {
        return Ok(vec![Seat {
            http_addr: plan.http_addr,
            cluster_addr: loopback,
            tls: plan.tls.is_some(),
        }]);
    }
    // Held until all are chosen, so that they differ.
    let mut held = Vec::new();
    let mut choose = |addr: SocketAddr| {
        let listener = TcpListener::bind(addr).with_context(|| {
            format!("cannot listen on {addr}, which one of the coordinators needs; choose other ports with --port")
        })?;
        let chosen = listener.local_addr()?;
        held.push(listener);
        anyhow::Ok(chosen)
    };
    (0..plan.coordinators)
        .map(|index| {
            let mut http_addr = plan.http_addr;
            if http_addr.port() != 0 {
                let port = u16::try_from(index)
                    .ok()
                    .and_then(|index| http_addr.port().checked_add(index));
                http_addr.set_port(port.context("--port is too high for so many coordinators")?);
            }
            Ok(Seat {
                http_addr: choose(http_addr)?,
                cluster_addr: choose(loopback)?,
                tls: plan.tls.is_some(),
            })
        })
        .collect()
}

/// A coordinator's settings, where `up` has an opinion; the rest are its defaults.
fn config(plan: &Plan, data: &DataDir, seats: &[Seat], index: usize) -> Value {
    let (seat, name) = (&seats[index], name(index));
    let mut config = json!({
        "name": name,
        "data_dir": utf8(&data.state(&name)),
        "http_addr": seat.http_addr,
        "cluster_addr": seat.cluster_addr,
        "identity_dir": utf8(&data.identity()),
        "models": [{"name": plan.model_name, "path": utf8(&plan.text_path)}],
    });
    if seats.len() > 1 {
        config["node_id"] = json!(index + 1);
        config["members"] = seats
            .iter()
            .enumerate()
            .map(|(index, seat)| {
                json!({
                    "id": index + 1,
                    "name": self::name(index),
                    "cluster_addr": seat.cluster_addr.to_string(),
                    "api_url": seat.url(),
                })
            })
            .collect();
    }
    if let Some(key) = &plan.api_key {
        config["api_key"] = json!(key);
    }
    if let Some(tokens) = plan.prefill_threshold {
        config["prefill_threshold_tokens"] = json!(tokens);
    }
    if !plan.tenants.is_empty() {
        let tenant = |t: &Tenant| json!({"name": t.name, "api_key": t.api_key, "weight": t.weight});
        let tenants: Vec<Value> = plan.tenants.iter().map(tenant).collect();
        config["gateway"]["tenants"] = json!(tenants);
    }
    if let Some((cert, key)) = &plan.tls {
        config["gateway"]["tls"] = json!({"cert_file": utf8(cert), "key_file": utf8(key)});
    }
    let targets = [
        ("ttft_target_ms", plan.ttft_target_ms),
        ("itl_target_ms", plan.itl_target_ms),
    ];
    for (name, target) in targets {
        if let Some(target) = target {
            config["admission"][name] = json!(target);
        }
    }
    config
}
