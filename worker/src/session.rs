//! One Join stream to one coordinator: says who this worker is, reports until the stream breaks, takes orders. Which
//! coordinators are joined, and what follows from the end of a session, is membership's.

use crate::WorkerConfig;
use crate::block_teller::Next;
use crate::membership::Member;
use crate::server::Advertised;
use baton_identity::Role;
use baton_proto::cluster::cluster_client::ClusterClient;
use baton_proto::cluster::{
    BlockEvents, CoordinatorOrder, Coordinators, Leaving, Register, WorkerReport, coordinator_order, worker_report,
};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::Endpoint;

/// Time to reach a coordinator before the next one is tried.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time for a coordinator to answer a registration, which goes through Raft and may meet an election.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(8);
/// A coordinator is asked this often whether it is still there, and has as long to answer: after a cut of the network both
/// sides must find out, or the worker would wait for the system's retransmissions.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Reports under way: a heartbeat, a goodbye, a few messages of block events. A heartbeat goes before events.
const REPORTS_MAX: usize = 4;
/// Shortest heartbeat interval a coordinator may ask for.
const HEARTBEAT_MIN: Duration = Duration::from_millis(50);

/// What a session says to membership.
#[derive(Debug)]
pub(crate) enum Heard {
    /// The coordinator has this worker, under this epoch.
    Registered { epoch: u64, coordinators: Coordinators },
    /// The members are others now.
    Coordinators(Coordinators),
    /// It ended.
    Ended(End),
}

/// How a session ended.
#[derive(Debug)]
pub(crate) enum End {
    /// This worker is to stop: it was told to, or ordered.
    Stopped,
    /// The coordinator does not want this worker; it must not come again.
    Refused(String),
    /// The epoch is over.
    Fenced(String),
    /// The stream broke or never came up; the reason is for the log.
    Broken(String),
}

/// What sessions say, each with its address.
pub(crate) type HeardSender = mpsc::Sender<(String, Heard)>;

/// Runs one session. `epoch` is 0 to register. `joined` is set once the coordinator has this worker.
pub(crate) async fn run(
    member: &Member,
    addr: &str,
    epoch: u64,
    leave: &CancellationToken,
    heard: &HeardSender,
    joined: &mut bool,
) -> End {
    let Member {
        advertised,
        engine,
        drain_orders,
        blocks,
        ..
    } = member;
    let opened = tokio::select! {
        opened = open(member, addr, epoch) => opened,
        // Nobody there to say goodbye to.
        () = leave.cancelled() => return End::Stopped,
    };
    let (reports, mut orders) = match opened {
        Ok(opened) => opened,
        Err(end) => return end,
    };
    let answer_due = tokio::time::sleep(REGISTER_TIMEOUT);
    tokio::pin!(answer_due);
    // Until the coordinator says otherwise; replaced by its own interval on registration.
    let mut heartbeat = tokio::time::interval(Duration::from_millis(500));
    let mut told_draining = false;
    let mut heartbeat_due = false;
    let mut reader = blocks.reader();
    let mut events: Option<BlockEvents> = None;
    loop {
        tokio::select! {
            () = leave.cancelled() => break,
            () = &mut answer_due, if !*joined => return End::Broken("no answer to the registration".into()),
            order = orders.message() => match order {
                Ok(Some(order)) => match order.kind {
                    Some(coordinator_order::Kind::Registered(order)) => {
                        advertised.set_epoch(order.epoch);
                        let interval = Duration::from_millis(order.heartbeat_interval_ms.into());
                        heartbeat = tokio::time::interval(interval.max(HEARTBEAT_MIN));
                        *joined = true;
                        tracing::info!(coordinator = %addr, epoch = order.epoch, "registered");
                        // This coordinator, or this life, has heard nothing yet.
                        reader.restart();
                        let registered = Heard::Registered {
                            epoch: order.epoch,
                            coordinators: order.coordinators.unwrap_or_default(),
                        };
                        let _ = heard.send((addr.to_owned(), registered)).await;
                    }
                    Some(coordinator_order::Kind::Coordinators(coordinators)) => {
                        let _ = heard.send((addr.to_owned(), Heard::Coordinators(coordinators))).await;
                    }
                    Some(coordinator_order::Kind::ResyncBlocks(_)) => {
                        tracing::debug!(coordinator = %addr, "the coordinator asked for all block names anew");
                        reader.restart();
                    }
                    Some(coordinator_order::Kind::Refused(refused)) => return End::Refused(refused.reason),
                    Some(coordinator_order::Kind::Fenced(fenced)) => return End::Fenced(fenced.reason),
                    Some(coordinator_order::Kind::Shutdown(order)) => {
                        tracing::info!(reason = %order.reason, "the coordinator ordered a stop");
                        return End::Stopped;
                    }
                    Some(coordinator_order::Kind::Drain(order)) => {
                        tracing::info!(reason = %order.reason, deadline_ms = order.deadline_ms, "ordered to drain");
                        // Full: it drains already.
                        let _ = drain_orders.try_send(Duration::from_millis(order.deadline_ms.into()));
                    }
                    _ => tracing::debug!("an order of a kind this version does not know"),
                },
                Ok(None) => return End::Broken("the coordinator closed the stream".into()),
                Err(status) => return End::Broken(format!("the stream broke: {}", status.message())),
            },
            // Told at once, so that coordinators have the whole time left to move what runs here.
            () = engine.drains(), if *joined && !told_draining => {
                told_draining = true;
                heartbeat_due = true;
            }
            _ = heartbeat.tick(), if *joined => heartbeat_due = true,
            next = reader.next(), if *joined && events.is_none() => match next {
                Next::Events(next) => events = Some(next),
                Next::Over => return End::Stopped,
            },
            place = reports.reserve(), if heartbeat_due || events.is_some() => {
                let Ok(place) = place else {
                    return End::Broken("the stream closed".into());
                };
                let kind = match events.take_if(|_| !heartbeat_due) {
                    Some(events) => worker_report::Kind::BlockEvents(events),
                    None => {
                        heartbeat_due = false;
                        worker_report::Kind::Heartbeat(engine.heartbeat())
                    }
                };
                place.send(report(kind));
            }
        }
    }
    let leaving = Leaving {
        reason: "it was told to, and has nothing left".into(),
    };
    let _ = reports.send(report(worker_report::Kind::Leaving(leaving))).await;
    drop(reports);
    // The coordinator closes the stream once it has taken the goodbye.
    let _ = tokio::time::timeout(CONNECT_TIMEOUT, orders.message()).await;
    End::Stopped
}

type Opened = (mpsc::Sender<WorkerReport>, Streaming<CoordinatorOrder>);

/// Connects and sends the registration.
async fn open(member: &Member, addr: &str, epoch: u64) -> Result<Opened, End> {
    let broken = |what: &str, error: &dyn std::fmt::Display| End::Broken(format!("{what}: {error}"));
    let endpoint = Endpoint::from_shared(format!("https://{addr}"))
        .and_then(|endpoint| endpoint.tls_config(member.identity.tonic_client(Role::Coordinator)))
        .map_err(|error| broken("cannot set up TLS", &error))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true);
    // A process that stands still takes connections and answers none; tonic's limit covers the TCP handshake only.
    let channel = match tokio::time::timeout(2 * CONNECT_TIMEOUT, endpoint.connect()).await {
        Ok(connected) => connected.map_err(|error| broken("cannot connect", &error))?,
        Err(_) => return Err(End::Broken("no TLS handshake in time".into())),
    };
    let (reports, queued) = mpsc::channel(REPORTS_MAX);
    let register = report(worker_report::Kind::Register(Register {
        epoch,
        ..register_message(&member.config, &member.advertised)
    }));
    if reports.try_send(register).is_err() {
        return Err(End::Broken("the stream closed at once".into()));
    }
    let mut client = ClusterClient::new(channel);
    match tokio::time::timeout(CONNECT_TIMEOUT, client.join(ReceiverStream::new(queued))).await {
        Ok(Ok(response)) => Ok((reports, response.into_inner())),
        Ok(Err(status)) => Err(broken("join failed", &status.message())),
        Err(_) => Err(End::Broken(format!("no answer within {CONNECT_TIMEOUT:?}"))),
    }
}

fn report(kind: worker_report::Kind) -> WorkerReport {
    WorkerReport { kind: Some(kind) }
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
        epoch: 0,
    }
}
