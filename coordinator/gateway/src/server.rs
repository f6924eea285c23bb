//! The accept loop: connections within a cap, each with deadlines for its headers, its silence and its stalled reads, over
//! HTTP/1.1 or 2; and an orderly end. Our own loop because `axum::serve` installs no timer, without which hyper's
//! deadlines do nothing.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use crate::api_error::ApiError;
use crate::backend::Backend;
use crate::batches::{self, Batches};
use crate::config::GatewayConfig;
use crate::error::GatewayError;
use crate::gateway::Gateway;
use crate::model::ServedModel;
use crate::routes;
use crate::stall::StallGuard;

/// Bytes of a request's head, and of hyper's read buffer. Clients send one or two KiB.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Requests at once on one HTTP/2 connection.
const H2_STREAMS_MAX: u32 = 256;
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
    let gateway = Arc::new(Gateway::new(config, backend, models)?);
    let router = routes::router(gateway.clone());
    let server = Server {
        batches: batches::start(&gateway, router.clone(), shutdown.child_token()),
        router,
        connections: Arc::new(Semaphore::new(gateway.config.connections_max)),
        tasks: TaskTracker::new(),
        closing: CancellationToken::new(),
        aborting: CancellationToken::new(),
        full: too_many_connections(),
        gateway,
    };
    server.accept(listener, &shutdown).await;
    server.drain().await;
    Ok(())
}

struct Server<B: Backend> {
    gateway: Arc<Gateway<B>>,
    router: Router,
    batches: Option<Arc<Batches<B>>>,
    connections: Arc<Semaphore>,
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
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = self.connections.clone().try_acquire_owned() else {
                // Fits any socket's buffer, so it needs no waiting; a client that is gone does not matter.
                let _ = stream.try_write(self.full.as_bytes());
                continue;
            };
            let connection = self.connection(stream);
            let open = self.gateway.ledger.metrics.connections.clone();
            self.tasks.spawn(async move {
                open.inc();
                connection.await;
                open.dec();
                drop(permit);
            });
        }
    }

    /// One connection's whole life.
    fn connection(&self, stream: TcpStream) -> impl Future<Output = ()> + Send + use<B> {
        let config = &self.gateway.config;
        let header_timeout = config.header_timeout();
        let stall_max = Duration::from_millis(config.write_stall_ms_max);
        let (closing, aborting) = (self.closing.clone(), self.aborting.clone());
        let router = self.router.clone();
        async move {
            // Tokens are small and wanted at once.
            let _ = stream.set_nodelay(true);
            let spoke = Arc::new(AtomicBool::new(false));
            let service = {
                let spoke = spoke.clone();
                service_fn(move |request: Request<hyper::body::Incoming>| {
                    spoke.store(true, Ordering::Relaxed);
                    router.clone().oneshot(request.map(Body::new))
                })
            };
            let builder = builder(header_timeout);
            let io = TokioIo::new(StallGuard::new(stream, stall_max));
            let mut connection = pin!(builder.serve_connection(io, service));
            // hyper's own deadline starts only once it knows the HTTP version.
            let mut silence = pin!(tokio::time::sleep(header_timeout));
            let (mut closed, mut checked) = (false, false);
            loop {
                tokio::select! {
                    biased;
                    () = aborting.cancelled() => return,
                    () = closing.cancelled(), if !closed => {
                        closed = true;
                        connection.as_mut().graceful_shutdown();
                    }
                    result = connection.as_mut() => {
                        if let Err(error) = result {
                            tracing::debug!(error, "a connection ended");
                        }
                        return;
                    }
                    () = silence.as_mut(), if !checked => {
                        checked = true;
                        if !spoke.load(Ordering::Relaxed) {
                            return;
                        }
                    }
                }
            }
        }
    }

    async fn drain(self) {
        let wait = self.gateway.config.drain();
        self.closing.cancel();
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
        .max_buf_size(HEAD_BYTES_MAX)
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_STREAMS_MAX)
        .max_header_list_size(HEAD_BYTES_MAX as u32)
        .keep_alive_interval(header_timeout)
        .keep_alive_timeout(header_timeout);
    builder
}
