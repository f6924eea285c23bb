//! The accept loop: connections within caps, each with deadlines for its handshake, its headers, its silence and its stalled
//! reads, over HTTP/1.1 or 2, with TLS or without; and an orderly end. Our own loop because `axum::serve` installs no timer,
//! without which hyper's deadlines do nothing. What a connection may do is decided in `activity.rs` and `attended.rs`; the
//! whole is described in `docs/hardening.md`.

use std::convert::Infallible;
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::{Request, Response};
use axum::response::IntoResponse;
use futures_util::FutureExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use crate::activity::{Activity, Verdict};
use crate::api_error::ApiError;
use crate::attended::{Arriving, Attendance, Outgoing};
use crate::backend::Backend;
use crate::batches::{self, Batches};
use crate::clients::{Clients, Peer};
use crate::config::GatewayConfig;
use crate::error::GatewayError;
use crate::gateway::Gateway;
use crate::model::ServedModel;
use crate::resume::Streams;
use crate::routes::{self, OPEN_ROUTES, Refusal};
use crate::stall::StallGuard;
use crate::tls::Tls;

/// Bytes of a request's head, and of hyper's read buffer. Clients send one or two KiB.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Header lines of a request.
const HEADERS_MAX: usize = 100;
/// Requests at once on one HTTP/2 connection.
const H2_STREAMS_MAX: u32 = 256;
/// Bytes of request bodies that a client may send ahead on one stream, and on one HTTP/2 connection: what a connection can
/// make the server hold unread. 256 KiB per round trip is 20 Mbit/s over 100 ms.
const H2_STREAM_WINDOW: u32 = 128 << 10;
const H2_CONNECTION_WINDOW: u32 = 256 << 10;
/// Bytes of an answer that wait on a stream whose window is shut.
const H2_SEND_BYTES_MAX: usize = 64 << 10;
/// Streams that were reset before they were looked at, and those reset for errors of the client's; one more ends the
/// connection.
const H2_RESETS_PENDING_MAX: usize = 20;
const H2_ERROR_RESETS_MAX: usize = 64;
/// What a slow body is given beyond the limit of handlers that have one, whose answers are better.
const BODY_GRACE: Duration = Duration::from_secs(1);
/// After an accept error (out of file descriptors, most likely) the loop waits this long rather than spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until `shutdown`, then lets running requests finish within the configured time and waits, as long again, for
/// their usage records. Fails at once if the settings or the models cannot be served on this listener's address.
pub async fn serve<B: Backend>(
    listener: TcpListener,
    config: GatewayConfig,
    backend: Arc<B>,
    models: Vec<ServedModel>,
    shutdown: CancellationToken,
) -> Result<(), GatewayError> {
    config.validate(listener.local_addr().map_err(GatewayError::Listener)?)?;
    let tls = config.tls.as_ref().map(Tls::load).transpose()?.map(Arc::new);
    let gateway = Arc::new(Gateway::new(config, backend, models)?);
    let config = &gateway.config;
    let streams = Streams::new(Duration::from_millis(config.stream_resume_ms));
    let router = routes::router(gateway.clone(), streams.clone());
    let server = Server {
        batches: batches::start(&gateway, router.clone(), shutdown.child_token()),
        router,
        streams,
        connections: Arc::new(Semaphore::new(config.connections_max)),
        requests: Arc::new(Semaphore::new(config.requests_max)),
        clients: Clients::new(
            config.trusted_clients.clone(),
            config.connections_per_client_max,
            config.requests_per_client_max,
        ),
        tls,
        tasks: TaskTracker::new(),
        closing: CancellationToken::new(),
        aborting: CancellationToken::new(),
        full: too_many_connections(),
        gateway,
    };
    let following = CancellationToken::new();
    let _over = following.clone().drop_guard();
    if let Some(tls) = &server.tls {
        tokio::spawn(tls.clone().follow(following));
    }
    server.accept(listener, &shutdown).await;
    server.drain().await;
    Ok(())
}

struct Server<B: Backend> {
    gateway: Arc<Gateway<B>>,
    router: Router,
    streams: Arc<Streams>,
    batches: Option<Arc<Batches<B>>>,
    connections: Arc<Semaphore>,
    /// One permit per request in work, of whatever route.
    requests: Arc<Semaphore>,
    clients: Arc<Clients>,
    tls: Option<Arc<Tls>>,
    tasks: TaskTracker,
    /// Connections finish what they have.
    closing: CancellationToken,
    /// Connections end now.
    aborting: CancellationToken,
    /// What one connection too many is told.
    full: String,
}

impl<B: Backend> Server<B> {
    async fn accept(&self, listener: TcpListener, shutdown: &CancellationToken) {
        loop {
            let accepted = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let (stream, addr) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Some((permit, peer)) = self.places(addr.ip()) else {
                if self.tls.is_none() {
                    // Fits any socket's buffer, so it needs no waiting; a client that is gone does not matter.
                    let _ = stream.try_write(self.full.as_bytes());
                }
                continue;
            };
            let connection = self.connection(peer);
            let (tls, handshake_max) = (self.tls.clone(), self.gateway.config.header_timeout());
            let stall_max = self.gateway.config.write_stall();
            let aborting = self.aborting.clone();
            let open = self.gateway.ledger.metrics.connections.clone();
            self.tasks.spawn(async move {
                open.inc();
                // Tokens are small and wanted at once.
                let _ = stream.set_nodelay(true);
                let stream = StallGuard::new(stream, stall_max);
                match tls {
                    None => connection.serve(stream).await,
                    Some(tls) => {
                        let shaken = tokio::select! {
                            biased;
                            () = aborting.cancelled() => None,
                            shaken = tokio::time::timeout(handshake_max, tls.acceptor.accept(stream)) => shaken.ok(),
                        };
                        match shaken {
                            Some(Ok(stream)) => connection.serve(stream).await,
                            Some(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                            None => {}
                        }
                    }
                }
                open.dec();
                drop(permit);
            });
        }
    }

    /// A place among all connections and among the client's.
    fn places(&self, addr: IpAddr) -> Option<(OwnedSemaphorePermit, Peer)> {
        let permit = self.connections.clone().try_acquire_owned().ok()?;
        Some((permit, self.clients.connect(addr)?))
    }

    fn connection(&self, peer: Peer) -> Connection {
        let config = &self.gateway.config;
        Connection {
            router: self.router.clone(),
            requests: self.requests.clone(),
            peer: Arc::new(peer),
            header_timeout: config.header_timeout(),
            body_timeout: config.body_timeout() + BODY_GRACE,
            stall_max: config.write_stall(),
            closing: self.closing.clone(),
            aborting: self.aborting.clone(),
        }
    }

    async fn drain(self) {
        let wait = self.gateway.config.drain();
        self.closing.cancel();
        // Streams without a reader are cancelled and settled; those that are read go on as the others.
        self.streams.close();
        self.tasks.close();
        if tokio::time::timeout(wait, self.tasks.wait()).await.is_err() {
            self.aborting.cancel();
            // Immediate: each connection's task only has to be dropped.
            self.tasks.wait().await;
        }
        if let Some(batches) = &self.batches {
            // They were told with the connections, so most of the time is over.
            batches.drain(wait).await;
        }
        if let Some(responses) = &self.gateway.responses {
            responses.drain(wait).await;
        }
        let settling = &self.gateway.ledger.settling;
        settling.close();
        if tokio::time::timeout(wait, settling.wait()).await.is_err() {
            tracing::error!(
                records = settling.len(),
                "usage records were not settled before the end"
            );
        } else if let Some(accounts) = &self.gateway.accounts {
            // Only now: a record that comes after its slice was returned is charged nothing.
            accounts.wallet.give_back().await;
        }
    }
}

/// One connection and what it needs of the server.
struct Connection {
    router: Router,
    requests: Arc<Semaphore>,
    peer: Arc<Peer>,
    header_timeout: Duration,
    body_timeout: Duration,
    stall_max: Duration,
    closing: CancellationToken,
    aborting: CancellationToken,
}

impl Connection {
    /// The connection's whole life, from its first byte of HTTP.
    async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self, stream: S) {
        let activity = Activity::new(self.header_timeout, Instant::now());
        let attendance = Attendance::new(activity, self.stall_max);
        let service = {
            let (attendance, router) = (attendance.clone(), self.router.clone());
            let (peer, requests, body_timeout) = (self.peer.clone(), self.requests.clone(), self.body_timeout);
            service_fn(move |request: Request<Incoming>| {
                answer(router.clone(), &attendance, &peer, &requests, request, body_timeout)
            })
        };
        let builder = builder(self.header_timeout);
        let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
        let mut looks = tokio::time::interval(attendance.look_every());
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut closed = false;
        loop {
            let close = tokio::select! {
                biased;
                () = self.aborting.cancelled() => return,
                () = self.closing.cancelled(), if !closed => true,
                result = connection.as_mut() => {
                    if let Err(error) = result {
                        tracing::debug!(error, "a connection ended");
                    }
                    return;
                }
                _ = looks.tick() => match attendance.look(Instant::now()) {
                    Verdict::Keep => false,
                    Verdict::Close => true,
                    Verdict::Drop => return,
                },
            };
            if close && !closed {
                closed = true;
                attendance.closing(Instant::now());
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Counts a request in, has it answered, and attends to the answer.
fn answer(
    router: Router,
    attendance: &Arc<Attendance>,
    peer: &Peer,
    requests: &Arc<Semaphore>,
    request: Request<Incoming>,
    body_timeout: Duration,
) -> impl Future<Output = Result<Response<Outgoing>, Infallible>> + Send + use<> {
    let (place, own) = (requests.clone().try_acquire_owned().ok(), peer.request());
    // Probes are answered when nothing else is: a full server is alive.
    let exempt = OPEN_ROUTES.contains(&request.uri().path());
    let refusal = match (&place, &own) {
        _ if exempt => None,
        (Some(_), Some(_)) => None,
        (None, _) => Some("This gateway already has as many requests in work as it may; retry."),
        (_, None) => Some("Your address already has as many requests in work here as it may; retry."),
    };
    let attended = attendance.request(request.method(), (place, own));
    let mut request = request.map(|body| Arriving::body(body, body_timeout));
    if let Some(message) = refusal {
        let error = ApiError::overloaded("queue_full", message, 1);
        request.extensions_mut().insert(Refusal(error));
    }
    async move {
        // Nothing should panic; if something does, it costs one answer, and its text stays in the log.
        let answered = AssertUnwindSafe(router.oneshot(request)).catch_unwind().await;
        let response = match answered {
            Ok(Ok(response)) => response,
            Err(_) => ApiError::internal().into_response(),
        };
        Ok(attended.answer(response))
    }
}

/// A whole HTTP/1.1 answer; which version the client speaks is not known yet.
fn too_many_connections() -> String {
    let error = ApiError {
        code: Some("too_many_connections"),
        ..ApiError::unavailable("Too many connections; retry.")
    };
    let body = error.body().to_string();
    format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn builder(header_timeout: Duration) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_STREAMS_MAX)
        .max_header_list_size(HEAD_BYTES_MAX as u32)
        .max_pending_accept_reset_streams(H2_RESETS_PENDING_MAX)
        .max_local_error_reset_streams(H2_ERROR_RESETS_MAX)
        .initial_stream_window_size(H2_STREAM_WINDOW)
        .initial_connection_window_size(H2_CONNECTION_WINDOW)
        .max_send_buf_size(H2_SEND_BYTES_MAX)
        .keep_alive_interval(header_timeout)
        .keep_alive_timeout(header_timeout);
    builder
}
