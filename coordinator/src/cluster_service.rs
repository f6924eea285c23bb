//! The gRPC service `Cluster.Join`: workers register, report and say goodbye here. One session per stream; what it
//! hears goes to the [`Cluster`], and it ends when the worker's life does.
//!
//! A worker registers through any one member of the group, and joins the others under the epoch it got. A session that claims
//! an epoch is believed only if the applied state has it.

use crate::cluster::{Cluster, Orders, Standing};
use baton_identity::{Role, require_role};
use baton_proto::PROTOCOL_VERSION;
use baton_proto::cluster::cluster_server::Cluster as ClusterRpc;
use baton_proto::cluster::{
    self, CoordinatorOrder, Fenced, Refused, Register, Registered, ResyncBlocks, WorkerReport, coordinator_order,
    worker_report,
};
use baton_state::view;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Time a worker has to register after opening a stream.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(5);
/// Orders under way to one worker: an answer, a goodbye, a resync now and then, and what an operator may ask for.
const ORDERS_MAX: usize = 4;
/// Longest id, name or address in a registration, in bytes. They are stored, logged and listed.
const TEXT_BYTES_MAX: usize = 256;

pub(crate) struct Service(pub(crate) Arc<Cluster>);

#[tonic::async_trait]
impl ClusterRpc for Service {
    type JoinStream = ReceiverStream<Result<CoordinatorOrder, Status>>;

    async fn join(&self, request: Request<Streaming<WorkerReport>>) -> Result<Response<Self::JoinStream>, Status> {
        require_role(&request, &[Role::Worker])?;
        let reports = request.into_inner();
        let (orders, outbound) = mpsc::channel(ORDERS_MAX);
        let cluster = self.0.clone();
        self.0.tasks.spawn(async move {
            let shutdown = cluster.shutdown.clone();
            tokio::select! {
                () = session(&cluster, reports, &orders) => {}
                () = shutdown.cancelled() => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(outbound)))
    }
}

async fn session(cluster: &Arc<Cluster>, mut reports: Streaming<WorkerReport>, orders: &Orders) {
    let first = match tokio::time::timeout(REGISTER_TIMEOUT, reports.message()).await {
        Ok(Ok(first)) => first,
        Ok(Err(_)) => return,
        Err(_) => return fail(orders, Status::deadline_exceeded("no registration within 5 s")).await,
    };
    let Some(WorkerReport {
        kind: Some(worker_report::Kind::Register(register)),
    }) = first
    else {
        return fail(orders, Status::invalid_argument("the first message must be a Register")).await;
    };
    if let Err(reason) = check(cluster, &register).and_then(|()| as_deployed(cluster, &register)) {
        tracing::warn!(worker_id = %register.worker_id, %reason, "a worker was refused");
        return refuse(orders, reason).await;
    }
    let worker_id = register.worker_id.clone();
    let joined = match register.epoch {
        0 => match cluster.register(register.clone(), orders.clone()).await {
            Ok((epoch, Some(session))) => Ok(Ok((epoch, session))),
            Ok((_, None)) => Ok(Err(Standing::Over)),
            Err(error) => Err(error),
        },
        epoch => {
            let rejoined = cluster.rejoin(register.clone(), orders.clone()).await;
            rejoined.map(|joined| joined.map(|session| (epoch, session)))
        }
    };
    let (epoch, session) = match joined {
        Ok(Ok(joined)) => joined,
        Ok(Err(standing)) => return turn_away(orders, standing, &register).await,
        Err(error) => return fail(orders, Status::unavailable(error.to_string())).await,
    };
    let register = Register { epoch, ..register };
    let registered = coordinator_order::Kind::Registered(Registered {
        epoch,
        heartbeat_interval_ms: cluster.config.heartbeat_interval_ms,
        lost_after_ms: cluster.config.lost_after_ms,
        coordinators: Some(cluster.group.coordinators()),
    });
    let _ = orders.send(order(registered)).await;
    loop {
        let report = tokio::select! {
            () = session.over.cancelled() => {
                // Lost for silence, by this member or by the group: it comes again, and is told then. Replaced by another
                // process: it must not, or two would fight over one id.
                if let Ok(Standing::Replaced) = cluster.standing(&register) {
                    refuse(orders, replaced(&worker_id)).await;
                }
                return;
            }
            () = orders.closed() => break,
            report = reports.message() => report,
        };
        match report.map(|report| report.map(|report| report.kind)) {
            Ok(Some(Some(worker_report::Kind::Heartbeat(heartbeat)))) => {
                cluster.heartbeat(&worker_id, epoch, heartbeat);
            }
            Ok(Some(Some(worker_report::Kind::BlockEvents(events)))) => {
                if cluster.block_events(epoch, &events) {
                    tracing::debug!(%worker_id, number = events.number, "block events were lost; asking for all");
                    let _ = orders
                        .send(order(coordinator_order::Kind::ResyncBlocks(ResyncBlocks {})))
                        .await;
                }
            }
            Ok(Some(Some(worker_report::Kind::Leaving(leaving)))) => {
                return cluster.left(&worker_id, epoch, &leaving.reason);
            }
            Ok(Some(Some(worker_report::Kind::Register(_)))) => {
                fail(orders, Status::invalid_argument("a second Register on one stream")).await;
                break;
            }
            Ok(Some(_)) => tracing::debug!(%worker_id, "a report of a kind this version does not know"),
            Ok(None) | Err(_) => break,
        }
    }
    cluster.join_closed(&worker_id, epoch, &session);
}

/// Why a registration cannot be taken, in a sentence for the worker's operator.
fn check(cluster: &Cluster, register: &Register) -> Result<(), String> {
    if register.protocol_version != PROTOCOL_VERSION {
        return Err(format!(
            "the worker speaks protocol version {}, this coordinator {PROTOCOL_VERSION}; run the same baton release",
            register.protocol_version
        ));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if register.worker_id.is_empty() || register.worker_id.len() > 64 || !register.worker_id.chars().all(plain) {
        return Err("the worker id must have 1 to 64 letters, digits, '-', '_' or '.'".into());
    }
    let names: Vec<&str> = cluster.config.models.iter().map(|model| model.name.as_str()).collect();
    if !names.contains(&register.model.as_str()) {
        return Err(format!(
            "the worker offers the model {:?}, this cluster serves {}; change model_name, or add it to the \
             coordinator's models",
            register.model.chars().take(TEXT_BYTES_MAX).collect::<String>(),
            names.join(", ")
        ));
    }
    if register.role() == cluster::Role::Unspecified {
        return Err("the worker names no role this coordinator knows".into());
    }
    for addr in [&register.addr, &register.transfer_addr] {
        let usable = addr
            .parse::<SocketAddr>()
            .is_ok_and(|addr| !addr.ip().is_unspecified() && addr.port() != 0);
        if !usable {
            return Err("the worker's addresses must be an ip:port that others can reach".into());
        }
    }
    if register.kv_digest.len() != 32 || register.total_blocks == 0 || register.block_size == 0 {
        return Err("the worker's KV digest or block counts are missing".into());
    }
    if register.device.len() > TEXT_BYTES_MAX {
        return Err(format!(
            "the worker's device description is longer than {TEXT_BYTES_MAX} bytes"
        ));
    }
    if !cluster.registry().has_room_for(&register.worker_id) {
        return Err(format!(
            "the cluster has {} workers already",
            crate::registry::WORKERS_MAX
        ));
    }
    Ok(())
}

/// Why the model that the worker has is not the one that is deployed under its name, if that says which. A revision that is
/// not a digest cannot be compared with anything.
fn as_deployed(cluster: &Cluster, register: &Register) -> Result<(), String> {
    let deployed = cluster
        .store
        .state()
        .and_then(|state| Ok(view::deployment(&state, &register.model)?));
    let Ok(deployed) = deployed.map(Option::unwrap_or_default) else {
        // The state cannot be read; nothing is registered then either.
        return Ok(());
    };
    let offered = baton_ledger::hex(&register.model_digest);
    let is_digest = deployed.revision.len() == 64 && deployed.revision.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_digest || deployed.revision.eq_ignore_ascii_case(&offered) {
        return Ok(());
    }
    Err(format!(
        "the worker has revision {offered} of {:?}, deployed is {}; give it that model, or deploy the other with `baton \
         deployments set {} --revision {offered}`",
        register.model, deployed.revision, register.model
    ))
}

/// The registration that was claimed does not stand.
async fn turn_away(orders: &Orders, standing: Standing, register: &Register) {
    let Register { worker_id, epoch, .. } = register;
    if standing == Standing::Replaced {
        return refuse(orders, replaced(worker_id)).await;
    }
    let reason = match standing {
        Standing::Ahead => format!("epoch {epoch} is not known here"),
        _ => format!("the registration of epoch {epoch} is over"),
    };
    tracing::info!(%worker_id, %reason, "a worker is to register anew");
    let _ = orders
        .send(order(coordinator_order::Kind::Fenced(Fenced { reason })))
        .await;
}

fn replaced(worker_id: &str) -> String {
    format!("another process has registered as {worker_id:?} since; give every worker its own id")
}

// tonic's Status is large, and it is what the stream takes.
#[allow(clippy::result_large_err)]
fn order(kind: coordinator_order::Kind) -> Result<CoordinatorOrder, Status> {
    Ok(CoordinatorOrder { kind: Some(kind) })
}

async fn refuse(orders: &Orders, reason: String) {
    let _ = orders
        .send(order(coordinator_order::Kind::Refused(Refused { reason })))
        .await;
}

async fn fail(orders: &Orders, status: Status) {
    let _ = orders.send(Err(status)).await;
}
