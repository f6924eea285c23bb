//! The worker's side of cluster membership: register with a coordinator, report load, register again when the stream
//! breaks.
//!
//! ```text
//! Connecting ──Registered(epoch)──▶ Member ──stream breaks──▶ Connecting (next coordinator, growing pause)
//!     │                               │
//!     └──Refused──▶ the process ends  └──Shutdown, or drained (`drain.rs`)──▶ Leaving, the process ends
//! ```
//!
//! Each registration gets a new epoch. Requests keep running while the stream is down: membership says where new work
//! goes, not whether old work lives.

use crate::block_feed::{BlockFeed, Taken};
use crate::drain::DrainOrders;
use crate::engine_thread::{Command, EngineHandle};
use crate::server::{Advertised, Startup};
use crate::{WorkerConfig, WorkerError};
use baton_identity::{Identity, Role};
use baton_proto::cluster::cluster_client::ClusterClient;
use baton_proto::cluster::{Leaving, Register, WorkerReport, coordinator_order, worker_report};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

/// Time to reach a coordinator before the next one is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A coordinator is asked this often whether it is still there, and has as long to answer: after a cut of the network both
/// sides must find out, or the worker would wait for the system's retransmissions.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// First pause between attempts; doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause between attempts: a returning coordinator sees its workers within this.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Reports under way: one heartbeat, a goodbye and a few messages of block events; a heartbeat that finds no place is
/// skipped, block events leave it one.
const REPORTS_MAX: usize = 6;
/// Places that block events leave free.
const REPORTS_RESERVED: usize = 2;
/// Block events are told at most this often, so that those of several steps share a message. A router knows of a block
/// that much later; until then its own record of what it placed stands in.
const EVENTS_INTERVAL: Duration = Duration::from_millis(25);
/// Shortest heartbeat interval a coordinator may ask for.
const HEARTBEAT_MIN: Duration = Duration::from_millis(50);

/// What a member is and knows.
pub(crate) struct Member<'a> {
    pub(crate) config: &'a WorkerConfig,
    pub(crate) identity: &'a Identity,
    pub(crate) advertised: &'a Advertised,
    pub(crate) engine: &'a EngineHandle,
    /// Takes orders to drain, each with its deadline.
    pub(crate) drain_orders: DrainOrders,
}

/// How one registration ended.
enum End {
    Stopped,
    /// The stream broke or never came up; the reason is for the log.
    Broken(String),
}

/// Keeps this worker registered until `leave`, or until a coordinator refuses it or orders it to stop.
pub(crate) async fn run(
    member: &Member<'_>,
    startup: &(dyn Fn(Startup) + Send + Sync),
    leave: &CancellationToken,
) -> Result<(), WorkerError> {
    let mut pause = PAUSE_MIN;
    for &addr in member.config.coordinator_addrs.iter().cycle() {
        let mut registered = false;
        let end = join(member, addr, leave, |epoch| {
            registered = true;
            startup(Startup::Registered { epoch });
        });
        match end.await? {
            End::Stopped => return Ok(()),
            End::Broken(reason) => {
                tracing::warn!(coordinator = %addr, %reason, "not registered with the coordinator; trying again");
            }
        }
        pause = if registered {
            PAUSE_MIN
        } else {
            (pause * 2).min(PAUSE_MAX)
        };
        tokio::select! {
            () = leave.cancelled() => return Ok(()),
            () = tokio::time::sleep(pause) => {}
        }
    }
    Err(WorkerError::Config(
        "coordinator_addrs is empty; name at least one coordinator".into(),
    ))
}

async fn join(
    member: &Member<'_>,
    addr: SocketAddr,
    leave: &CancellationToken,
    mut registered: impl FnMut(u64),
) -> Result<End, WorkerError> {
    let Member {
        config,
        identity,
        advertised,
        engine,
        drain_orders,
    } = member;
    let broken = |what: &str, error: &dyn std::fmt::Display| Ok(End::Broken(format!("{what}: {error}")));
    let endpoint = match Endpoint::from_shared(format!("https://{addr}"))
        .and_then(|endpoint| endpoint.tls_config(identity.tonic_client(Role::Coordinator)))
    {
        Ok(endpoint) => endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true),
        Err(error) => return broken("cannot set up TLS", &error),
    };
    let channel = match endpoint.connect().await {
        Ok(channel) => channel,
        Err(error) => return broken("cannot connect", &error),
    };
    let (reports, queued) = mpsc::channel(REPORTS_MAX);
    let register = WorkerReport {
        kind: Some(worker_report::Kind::Register(register_message(config, advertised))),
    };
    if reports.send(register).await.is_err() {
        return Ok(End::Broken("the stream closed at once".into()));
    }
    let mut client = ClusterClient::new(channel);
    let mut orders = match tokio::time::timeout(CONNECT_TIMEOUT, client.join(ReceiverStream::new(queued))).await {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return broken("join failed", &status.message()),
        Err(_) => return Ok(End::Broken(format!("no answer within {CONNECT_TIMEOUT:?}"))),
    };
    // Until the coordinator says otherwise; replaced by its own interval on registration.
    let mut heartbeat = tokio::time::interval(Duration::from_millis(500));
    let mut registered_here = false;
    let mut told_draining = false;
    let heartbeat_report = || WorkerReport {
        kind: Some(worker_report::Kind::Heartbeat(engine.heartbeat())),
    };
    let mut events_sent = 0u64;
    let mut events_due = Instant::now();
    loop {
        tokio::select! {
            () = leave.cancelled() => {
                let leaving = Leaving { reason: "it was told to, and has nothing left".into() };
                let _ = reports.send(WorkerReport { kind: Some(worker_report::Kind::Leaving(leaving)) }).await;
                drop(reports);
                // The coordinator closes the stream once it has taken the goodbye.
                let _ = tokio::time::timeout(CONNECT_TIMEOUT, orders.message()).await;
                return Ok(End::Stopped);
            }
            order = orders.message() => match order {
                Ok(Some(order)) => match order.kind {
                    Some(coordinator_order::Kind::Registered(order)) => {
                        advertised.set_epoch(order.epoch);
                        let interval = Duration::from_millis(order.heartbeat_interval_ms.into());
                        heartbeat = tokio::time::interval(interval.max(HEARTBEAT_MIN));
                        registered_here = true;
                        tracing::info!(coordinator = %addr, epoch = order.epoch, "registered");
                        registered(order.epoch);
                        // This coordinator, or this life, has heard nothing yet.
                        engine.blocks().restart();
                    }
                    Some(coordinator_order::Kind::ResyncBlocks(_)) => {
                        tracing::debug!("the coordinator asked for all block names anew");
                        engine.blocks().restart();
                    }
                    Some(coordinator_order::Kind::Refused(refused)) => return Err(WorkerError::Refused(refused.reason)),
                    Some(coordinator_order::Kind::Shutdown(order)) => {
                        tracing::info!(reason = %order.reason, "the coordinator ordered a stop");
                        return Ok(End::Stopped);
                    }
                    Some(coordinator_order::Kind::Drain(order)) => {
                        tracing::info!(reason = %order.reason, deadline_ms = order.deadline_ms, "ordered to drain");
                        // Full: it drains already.
                        let _ = drain_orders.try_send(Duration::from_millis(order.deadline_ms.into()));
                    }
                    _ => tracing::debug!("an order of a kind this version does not know"),
                },
                Ok(None) => return Ok(End::Broken("the coordinator closed the stream".into())),
                Err(status) => return broken("the stream broke", &status.message()),
            },
            // Told at once, so that coordinators have the whole time left to move what runs here.
            () = engine.drains(), if registered_here && !told_draining => {
                told_draining = true;
                let _ = reports.send(heartbeat_report()).await;
            }
            () = due(engine.blocks(), events_due), if registered_here => {
                events_due = Instant::now() + EVENTS_INTERVAL;
                // Without room they wait, and are told anew if they wait too long.
                while reports.capacity() > REPORTS_RESERVED {
                    match engine.blocks().take() {
                        Taken::Nothing => break,
                        // Waits for room in the command queue at most, as every command does.
                        Taken::Ask => engine.send(Command::TellBlocks).await,
                        Taken::Message(mut events) => {
                            events_sent += 1;
                            events.number = events_sent;
                            let report = WorkerReport { kind: Some(worker_report::Kind::BlockEvents(events)) };
                            let _ = reports.try_send(report);
                        }
                    }
                }
            }
            _ = heartbeat.tick(), if registered_here => {
                // A full queue means that the last heartbeat has not left yet: a newer one would not help.
                let _ = reports.try_send(heartbeat_report());
            }
        }
    }
}

/// Resolves when there are block events to tell and the last ones left long enough ago.
async fn due(blocks: &BlockFeed, not_before: Instant) {
    tokio::time::sleep_until(not_before).await;
    blocks.ready().await;
}

fn register_message(config: &WorkerConfig, advertised: &Advertised) -> Register {
    Register {
        protocol_version: baton_proto::PROTOCOL_VERSION,
        worker_id: config.worker_id.clone(),
        role: config.role.to_proto() as i32,
        model: config.model_name.clone(),
        kv_digest: advertised.kv_digest.to_vec().into(),
        addr: advertised.addr.to_string(),
        transfer_addr: advertised.transfer_addr.to_string(),
        pid: std::process::id(),
        total_blocks: advertised.total_blocks,
        block_size: u32::try_from(advertised.geometry.block_size).unwrap_or(u32::MAX),
        context_length: u32::try_from(advertised.context_length).unwrap_or(u32::MAX),
        kv_bytes_per_block: advertised.geometry.block_bytes() as u64,
        device: "cpu".into(),
        model_digest: advertised.model_digest.to_vec().into(),
    }
}
