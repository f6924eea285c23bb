//! A worker and several coordinators: it registers once, joins all under one epoch, and begins anew when it is fenced.

mod support;

use baton_identity::{Authority, Role};
use baton_proto::cluster::cluster_server::{Cluster, ClusterServer};
use baton_proto::cluster::{
    CoordinatorOrder, Coordinators, Fenced, Registered, WorkerReport, coordinator_order, worker_report,
};
use baton_worker::WorkerRole;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::{Cell, slow_engine, within};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// What the coordinators of one test share.
#[derive(Default)]
struct Group {
    /// The last epoch given; an older one that is claimed is fenced.
    epoch: AtomicU64,
    addrs: Mutex<Vec<String>>,
}

/// What one coordinator has heard.
#[derive(Default)]
struct Heard {
    /// Epochs claimed, 0 for registrations.
    claims: Mutex<Vec<u64>>,
    heartbeats: AtomicU64,
    resets: AtomicU64,
    goodbyes: AtomicU64,
    /// Orders to the latest stream.
    orders: Mutex<Option<mpsc::Sender<Result<CoordinatorOrder, Status>>>>,
}

#[derive(Clone)]
struct Coordinator {
    group: Arc<Group>,
    heard: Arc<Heard>,
    gone: CancellationToken,
}

fn order(kind: coordinator_order::Kind) -> Result<CoordinatorOrder, Status> {
    Ok(CoordinatorOrder { kind: Some(kind) })
}

impl Coordinator {
    async fn session(
        self,
        mut reports: Streaming<WorkerReport>,
        orders: mpsc::Sender<Result<CoordinatorOrder, Status>>,
    ) {
        while let Ok(Some(report)) = reports.message().await {
            match report.kind {
                Some(worker_report::Kind::Register(register)) => {
                    self.heard.claims.lock().unwrap().push(register.epoch);
                    let epoch = match register.epoch {
                        0 => self.group.epoch.fetch_add(1, Ordering::SeqCst) + 1,
                        epoch => epoch,
                    };
                    let kind = if epoch == self.group.epoch.load(Ordering::SeqCst) {
                        coordinator_order::Kind::Registered(Registered {
                            epoch,
                            heartbeat_interval_ms: 50,
                            lost_after_ms: 1000,
                            coordinators: Some(Coordinators {
                                cluster_addrs: self.group.addrs.lock().unwrap().clone(),
                                applied_index: epoch,
                            }),
                        })
                    } else {
                        coordinator_order::Kind::Fenced(Fenced { reason: "old".into() })
                    };
                    let _ = orders.send(order(kind)).await;
                }
                Some(worker_report::Kind::Heartbeat(_)) => drop(self.heard.heartbeats.fetch_add(1, Ordering::SeqCst)),
                Some(worker_report::Kind::BlockEvents(events)) => {
                    self.heard.resets.fetch_add(events.reset.into(), Ordering::SeqCst);
                }
                Some(worker_report::Kind::Leaving(_)) => {
                    self.heard.goodbyes.fetch_add(1, Ordering::SeqCst);
                    return;
                }
                None => {}
            }
        }
    }

    fn orders(&self) -> mpsc::Sender<Result<CoordinatorOrder, Status>> {
        self.heard.orders.lock().unwrap().clone().expect("a stream")
    }

    fn claims(&self) -> Vec<u64> {
        self.heard.claims.lock().unwrap().clone()
    }

    fn heartbeats(&self) -> u64 {
        self.heard.heartbeats.load(Ordering::SeqCst)
    }
}

#[tonic::async_trait]
impl Cluster for Coordinator {
    type JoinStream = ReceiverStream<Result<CoordinatorOrder, Status>>;

    async fn join(&self, request: Request<Streaming<WorkerReport>>) -> Result<Response<Self::JoinStream>, Status> {
        let (orders, replies) = mpsc::channel(4);
        *self.heard.orders.lock().unwrap() = Some(orders.clone());
        let (session, gone) = (self.clone().session(request.into_inner(), orders), self.gone.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = session => {}
                () = gone.cancelled() => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(replies)))
    }
}

async fn start(cell: &Cell, group: &Arc<Group>) -> (Coordinator, SocketAddr) {
    let identity = Authority::load_or_create(cell.identity_dir())
        .unwrap()
        .issue(Role::Coordinator, "c")
        .unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    group.addrs.lock().unwrap().push(addr.to_string());
    let coordinator = Coordinator {
        group: group.clone(),
        heard: Arc::default(),
        gone: CancellationToken::new(),
    };
    let server = tonic::transport::Server::builder()
        .tls_config(identity.tonic_server())
        .unwrap()
        .add_service(ClusterServer::new(coordinator.clone()))
        .serve_with_incoming(TcpListenerStream::new(listener));
    let gone = coordinator.gone.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = server => {}
            () = gone.cancelled() => {}
        }
    });
    (coordinator, addr)
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    within(what, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_registration_and_a_stream_to_every_coordinator() {
    let cell = Cell::new().await;
    let group = Arc::new(Group::default());
    let (first, first_addr) = start(&cell, &group).await;
    let (second, second_addr) = start(&cell, &group).await;
    let mut config = cell.config("w", WorkerRole::Combined);
    // It knows one, and is told of the other.
    config.coordinator_addrs = vec![first_addr];
    let worker = cell
        .worker_with(config, slow_engine(Duration::from_millis(1)), [7; 32])
        .await;
    until("both hear it", || first.heartbeats() > 2 && second.heartbeats() > 2).await;
    assert_eq!(first.claims(), [0], "registered once");
    assert_eq!(second.claims(), [1], "and joined under that epoch");
    let resets = |coordinator: &Coordinator| coordinator.heard.resets.load(Ordering::SeqCst) > 0;
    until("both know its blocks", || resets(&first) && resets(&second)).await;

    // The one it registered through goes: the other still hears it, under the same epoch.
    first.gone.cancel();
    let heard = second.heartbeats();
    until("the other still hears it", || second.heartbeats() > heard + 5).await;
    assert_eq!(second.claims(), [1]);

    // Its epoch is over, as after a removal: at the next stream it is told, and registers anew, with whoever is there.
    group.epoch.store(7, Ordering::SeqCst);
    let (third, third_addr) = start(&cell, &group).await;
    *group.addrs.lock().unwrap() = vec![second_addr.to_string(), third_addr.to_string()];
    let told = Coordinators {
        cluster_addrs: group.addrs.lock().unwrap().clone(),
        applied_index: 2,
    };
    second
        .orders()
        .send(order(coordinator_order::Kind::Coordinators(told)))
        .await
        .unwrap();
    until("it registers anew", || {
        second.claims().contains(&0) || third.claims().contains(&0)
    })
    .await;
    until("both hear it under the new epoch", || {
        second.claims().contains(&8) || third.claims().contains(&8)
    })
    .await;
    assert_eq!(group.epoch.load(Ordering::SeqCst), 8, "once");

    worker.stop().await;
    let goodbyes = |coordinator: &Coordinator| coordinator.heard.goodbyes.load(Ordering::SeqCst) == 1;
    until("all are told goodbye", || goodbyes(&second) && goodbyes(&third)).await;
}
