//! Connections: how many there may be, how long and how large the head of a request may be, how long a client may not read what it
//! asked for. Whoever holds a connection without using it loses it; nothing here knows routes.

use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};

/// What a client may do with a connection.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// Connections at once; more wait with the system until one of them ends.
    pub most: usize,
    /// From the beginning of a connection, or from the end of an answer on it, to the end of the next head.
    pub head_timeout: Duration,
    /// Bytes of a head, and fields in it. A head that is larger is answered with 431.
    pub max_head: usize,
    /// How long a client may take nothing of an answer that is ready for it.
    pub write_timeout: Duration,
}

/// Fields of a head.
const MAX_FIELDS: usize = 64;

impl Default for ConnectionLimits {
    fn default() -> Self {
        // Descriptors are limited to 1,024 on many systems.
        Self { most: 512, head_timeout: Duration::from_secs(15), max_head: 32 << 10, write_timeout: Duration::from_secs(30) }
    }
}

/// Serve connections until `shutdown` completes, then until the answers that run are told.
pub(crate) async fn serve(listener: TcpListener, router: Router, limits: ConnectionLimits, shutdown: impl Future<Output = ()>) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(limits.head_timeout).max_buf_size(limits.max_head).max_headers(MAX_FIELDS);
    let (room, graceful) = (Arc::new(Semaphore::new(limits.most)), GracefulShutdown::new());
    let mut shutdown = pin!(shutdown);
    loop {
        let (stream, place) = tokio::select! {
            connection = accept(&listener, &room) => connection,
            () = &mut shutdown => break,
        };
        // Tokens are small and wanted at once.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection without TCP_NODELAY");
        }
        let io = TokioIo::new(Client {
            stream,
            timeout: limits.write_timeout,
            stuck: Box::pin(tokio::time::sleep(Duration::ZERO)),
            waits: false,
        });
        let connection = graceful.watch(http.serve_connection(io, TowerToHyperService::new(router.clone())));
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended early");
            }
            drop(place);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

/// The next connection, once there is room for it.
async fn accept(listener: &TcpListener, room: &Arc<Semaphore>) -> (TcpStream, OwnedSemaphorePermit) {
    let place = Arc::clone(room).acquire_owned().await.expect("nobody closes the semaphore");
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, place),
            // That client is gone already.
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) => {}
            Err(error) => {
                // Out of descriptors, most likely: asking again at once would ask for ever.
                tracing::error!(%error, "cannot accept connections");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    }
}

/// A client's end, which fails when it takes nothing for too long.
struct Client {
    stream: TcpStream,
    timeout: Duration,
    /// Runs while `waits`.
    stuck: Pin<Box<Sleep>>,
    /// The last attempt to write found no room.
    waits: bool,
}

impl Client {
    fn watch(&mut self, context: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.waits = false;
            return written;
        }
        if !self.waits {
            self.waits = true;
            self.stuck.as_mut().reset(Instant::now() + self.timeout);
        }
        match self.stuck.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing"))),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Client {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Client {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(context, written)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, parts: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, parts);
        self.watch(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
