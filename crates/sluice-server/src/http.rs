//! Routes, and what every request goes through: an id, a key, limits, a log line, a count.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes, to_bytes};
use axum::extract::rejection::PathRejection;
use axum::extract::{Extension, MatchedPath, Path, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::sse::{KeepAlive, Sse};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use sluice_engine::Sequence;
use sluice_spec::{ModelConfig, RoutingConfig};
use tower_http::catch_panic::CatchPanicLayer;

use crate::ServerConfig;
use crate::answer::{Answer, EventStream, Labels};
use crate::api::{
    ChatRequest, Completion, CompletionRequest, Deleted, ModelEntry, ModelList, SessionEntry, SessionList, SessionRequest, parse,
};
use crate::auth::Tenant;
use crate::connections;
use crate::error::{ApiError, ErrorBody};
use crate::metrics::{Metrics, RouteLabels};
use crate::plan::{self, ModelFacts, Plan, SessionStateView};
use crate::sessions::{Loan, SessionState, Sessions};
use crate::worker::{Job, SubmitFailure, Update, Worker};

/// A header under which a client may name its request, and finds the name again.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Everything that handlers share.
pub(crate) struct App {
    facts: ModelFacts,
    worker: Worker,
    sessions: Arc<Sessions>,
    metrics: Arc<Metrics>,
    config: ServerConfig,
    /// A sequence without tokens, to restore sessions into.
    empty: Sequence,
    n_layers: usize,
    routing: RoutingConfig,
    started: u64,
    draining: AtomicBool,
}

impl App {
    pub(crate) fn new(
        facts: ModelFacts,
        worker: Worker,
        sessions: Arc<Sessions>,
        metrics: Arc<Metrics>,
        config: ServerConfig,
        empty: Sequence,
        model: &ModelConfig,
        routing: RoutingConfig,
    ) -> Self {
        let draining = AtomicBool::new(false);
        Self { facts, worker, sessions, metrics, config, empty, n_layers: model.n_layers, routing, started: now(), draining }
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    fn labels(&self) -> Labels {
        let RoutingConfig { window, top_k, route_every, .. } = self.routing;
        Labels {
            model: self.facts.name.clone(),
            fingerprint: format!("sluice-{}-w{window}-k{top_k}-r{route_every}", env!("CARGO_PKG_VERSION")),
            tokenizer: Arc::clone(&self.facts.tokenizer),
            n_layers: self.n_layers,
            now: now(),
        }
    }

    fn submit(&self, tenant: Tenant, plan: &mut Plan) -> Result<Job, ApiError> {
        if self.is_draining() {
            return Err(ApiError::unavailable("the server is shutting down"));
        }
        let empty = sluice_engine::scheduler::Request::new(Vec::new(), 0);
        let mut request = std::mem::replace(&mut plan.request, empty);
        request.owner = tenant.0.into();
        self.worker.submit(request, std::mem::take(&mut plan.stops)).map_err(|failure| match failure {
            SubmitFailure::Busy => ApiError::busy(),
            SubmitFailure::Dead => ApiError::unavailable("the engine has stopped"),
        })
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

type Shared = State<Arc<App>>;
/// Whose key let a request in.
type Sender = Extension<Tenant>;

/// Serve until `shutdown` completes and running answers are told, or the time for that is over.
pub(crate) async fn run(app: Arc<App>, listener: TcpListener, shutdown: impl Future<Output = ()> + Send + 'static) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let (drain, limits) = (app.config.drain, app.config.connections);
    let (stopping, stopped) = tokio::sync::oneshot::channel();
    let own = Arc::clone(&app);
    let shutdown = async move {
        shutdown.await;
        own.draining.store(true, Ordering::SeqCst);
        tracing::info!("draining");
        let _ = stopping.send(());
    };
    let serving = connections::serve(listener, router(app), limits, shutdown);
    let overdue = async move {
        // Without the signal there is no deadline.
        match stopped.await {
            Ok(()) => tokio::time::sleep(drain).await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = serving => {}
        () = overdue => tracing::warn!(seconds = drain.as_secs(), "not everything was answered in time"),
    }
    Ok(())
}

fn router(app: Arc<App>) -> Router {
    let api = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{id}", get(model))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/sessions", get(list_sessions).post(new_session))
        .route("/v1/sessions/{id}", get(show_session).delete(delete_session))
        .route("/v1/sessions/{id}/snapshot", get(session_bytes))
        .route("/metrics", get(metrics))
        .route_layer(from_fn_with_state(Arc::clone(&app), require_key));
    Router::new()
        .merge(api)
        .route("/", get(page))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/openapi.json", get(openapi))
        .fallback(|| async { ApiError::not_found("", "unknown_url", "found no such path; /openapi.json lists them") })
        .method_not_allowed_fallback(|| async { ApiError::method() })
        .layer(CatchPanicLayer::custom(|_: Box<dyn std::any::Any + Send>| ApiError::internal().into_response()))
        .layer(from_fn_with_state(Arc::clone(&app), observe))
        .with_state(app)
}

/// Names, times, logs and counts a request.
async fn observe(State(app): Shared, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let given = request.headers().get(&REQUEST_ID).and_then(|id| id.to_str().ok());
    // A client's own name for it is taken if it is harmless in a log.
    let harmless = |id: &&str| (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    let id = given.filter(harmless).map_or_else(|| uuid::Uuid::new_v4().simple().to_string(), str::to_string);
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map_or("(none)", MatchedPath::as_str).to_string();
    let mut response = next.run(request).await;
    let status = response.status();
    tracing::info!(request_id = %id, %method, route, status = status.as_u16(), seconds = started.elapsed().as_secs_f64(), "request");
    app.metrics.requests.get_or_create(&RouteLabels { route, status: status.as_u16() }).inc();
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

async fn require_key(State(app): Shared, mut request: Request, next: Next) -> Response {
    let header = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    let Some(tenant) = app.config.keys.admit(header) else { return ApiError::unauthorised().into_response() };
    request.extensions_mut().insert(tenant);
    next.run(request).await
}

/// A body of at most `limit` bytes.
async fn read_body(app: &App, headers: &HeaderMap, body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|n| n.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|n| n > limit as u64) {
        return Err(ApiError::too_large(limit));
    }
    let read = tokio::time::timeout(app.config.body_timeout, to_bytes(body, limit)).await.map_err(|_| ApiError::slow_body())?;
    read.map_err(|error| {
        let is_limit = error.into_inner().downcast_ref::<http_body_util::LengthLimitError>().is_some();
        if is_limit { ApiError::too_large(limit) } else { ApiError::slow_body() }
    })
}

/// Work that takes longer than a moment, off the threads that talk to clients.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> Result<T, ApiError> + Send + 'static) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::internal())?
}

/// A name in the path of a request.
type NameInPath = Result<Path<String>, PathRejection>;

fn name(given: NameInPath) -> Result<String, ApiError> {
    given.map(|Path(id)| id).map_err(|_| ApiError::not_found("", "unknown_url", "found a name that is not UTF-8"))
}

/// Lend the session that a request names.
fn lend(app: &App, tenant: Tenant, id: Option<&str>) -> Result<Option<(SessionState, Loan)>, ApiError> {
    id.map(|id| app.sessions.lend(tenant, id)).transpose()
}

/// Continue a text.
#[utoipa::path(post, path = "/v1/completions", request_body = CompletionRequest,
    responses((status = 200, body = Completion), (status = "default", body = ErrorBody)))]
pub(crate) async fn completions(
    State(app): Shared,
    Extension(tenant): Sender,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let body = read_body(&app, &headers, body, app.config.max_body).await?;
    let own = Arc::clone(&app);
    let planned = aside(move || {
        let body: CompletionRequest = parse(&body)?;
        let session = lend(&own, tenant, body.session_id.as_deref())?;
        let view = session.as_ref().map(|(state, _)| SessionStateView::from(state));
        Ok((plan::completion(&own.facts, &body, view.as_ref())?, session.map(|(state, loan)| (loan, state.created))))
    });
    let (plan, session) = planned.await?;
    answer(&app, tenant, plan, session).await
}

/// Continue a conversation.
#[utoipa::path(post, path = "/v1/chat/completions", request_body = ChatRequest,
    responses((status = 200, body = Completion), (status = "default", body = ErrorBody)))]
pub(crate) async fn chat_completions(
    State(app): Shared,
    Extension(tenant): Sender,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let body = read_body(&app, &headers, body, app.config.max_body).await?;
    let own = Arc::clone(&app);
    let planned = aside(move || {
        let body: ChatRequest = parse(&body)?;
        let session = lend(&own, tenant, body.session_id.as_deref())?;
        let view = session.as_ref().map(|(state, _)| SessionStateView::from(state));
        Ok((plan::chat(&own.facts, &body, view.as_ref())?, session.map(|(state, loan)| (loan, state.created))))
    });
    let (plan, session) = planned.await?;
    answer(&app, tenant, plan, session).await
}

/// Have a plan computed and tell the answer, at once or as it comes.
async fn answer(app: &App, tenant: Tenant, mut plan: Plan, session: Option<(Loan, u64)>) -> Result<Response, ApiError> {
    let answer = Answer::new(app.labels(), &plan, session);
    let job = app.submit(tenant, &mut plan)?;
    if plan.stream {
        let stream = Sse::new(EventStream::new(answer, job)).keep_alive(KeepAlive::new().interval(Duration::from_secs(15)));
        return Ok(([(header::CACHE_CONTROL, "no-store"), (HeaderName::from_static("x-accel-buffering"), "no")], stream).into_response());
    }
    Ok(Json(answer.collect(job).await?).into_response())
}

/// Read a prompt or a conversation and keep the state; or, with a body of another type than JSON, take up the bytes of a
/// session.
#[utoipa::path(post, path = "/v1/sessions",
    request_body(content((SessionRequest = "application/json"), (Vec<u8> = "application/octet-stream"))),
    responses((status = 200, body = SessionEntry), (status = "default", body = ErrorBody)))]
pub(crate) async fn new_session(
    State(app): Shared,
    Extension(tenant): Sender,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<SessionEntry>, ApiError> {
    if headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/octet-stream") {
        // A snapshot is at most the cache, with scores and positions, beside the text.
        let limit = app.config.max_body + 2 * app.empty.cache_bytes();
        let body = read_body(&app, &headers, body, limit).await?;
        let empty = Box::new(app.empty.clone());
        let max_context = app.facts.max_context;
        let state = aside(move || {
            let state = SessionState::from_bytes(&body, empty)?;
            if state.sequence.position() > max_context {
                return Err(ApiError::too_long("", state.sequence.position(), max_context));
            }
            Ok(state)
        });
        return keep_session(&app, tenant, state.await?);
    }
    let body = read_body(&app, &headers, body, app.config.max_body).await?;
    let own = Arc::clone(&app);
    let mut plan = aside(move || plan::session(&own.facts, &parse::<SessionRequest>(&body)?)).await?;
    let mut job = app.submit(tenant, &mut plan)?;
    while let Some(update) = job.updates.recv().await {
        match update {
            Update::Finished { sequence: Some(sequence), .. } => {
                job.finish_one();
                let Plan { text, messages, .. } = plan;
                return keep_session(&app, tenant, SessionState { sequence, text, messages, created: now() });
            }
            Update::Refused(error) => return Err(ApiError::invalid("", error.to_string())),
            _ => {}
        }
    }
    Err(ApiError::internal())
}

fn keep_session(app: &App, tenant: Tenant, state: SessionState) -> Result<Json<SessionEntry>, ApiError> {
    let (created, tokens, cache_bytes) = (state.created, state.sequence.position(), state.sequence.cache_bytes());
    let id = app.sessions.add(tenant, state)?;
    app.metrics.sessions.set(app.sessions.len() as i64);
    Ok(Json(session_entry(app, id, created, tokens, cache_bytes)))
}

fn session_entry(app: &App, id: String, created: u64, tokens: usize, cache_bytes: usize) -> SessionEntry {
    SessionEntry { id, object: "session", created, model: app.facts.name.clone(), tokens, cache_bytes }
}

/// Sessions that are held.
#[utoipa::path(get, path = "/v1/sessions", responses((status = 200, body = SessionList)))]
pub(crate) async fn list_sessions(State(app): Shared, Extension(tenant): Sender) -> Json<SessionList> {
    let sessions = app.sessions.list(tenant).into_iter();
    let data = sessions.map(|(id, created, tokens, bytes)| session_entry(&app, id, created, tokens, bytes)).collect();
    Json(SessionList { object: "list", data })
}

/// One session.
#[utoipa::path(get, path = "/v1/sessions/{id}", params(("id" = String, Path)),
    responses((status = 200, body = SessionEntry), (status = "default", body = ErrorBody)))]
pub(crate) async fn show_session(State(app): Shared, Extension(tenant): Sender, id: NameInPath) -> Result<Json<SessionEntry>, ApiError> {
    let id = name(id)?;
    let state = app.sessions.get(tenant, &id)?;
    Ok(Json(session_entry(&app, id, state.created, state.sequence.position(), state.sequence.cache_bytes())))
}

/// A session as bytes, which `POST /v1/sessions` takes up again, on this server or another with the same model.
#[utoipa::path(get, path = "/v1/sessions/{id}/snapshot", params(("id" = String, Path)),
    responses((status = 200, body = Vec<u8>, content_type = "application/octet-stream"), (status = "default", body = ErrorBody)))]
pub(crate) async fn session_bytes(State(app): Shared, Extension(tenant): Sender, id: NameInPath) -> Result<Response, ApiError> {
    let id = name(id)?;
    let state = app.sessions.get(tenant, &id)?;
    let bytes = aside(move || Ok(state.to_bytes())).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes).into_response())
}

/// Forget a session.
#[utoipa::path(delete, path = "/v1/sessions/{id}", params(("id" = String, Path)),
    responses((status = 200, body = Deleted), (status = "default", body = ErrorBody)))]
pub(crate) async fn delete_session(State(app): Shared, Extension(tenant): Sender, id: NameInPath) -> Result<Json<Deleted>, ApiError> {
    let id = name(id)?;
    app.sessions.remove(tenant, &id)?;
    app.metrics.sessions.set(app.sessions.len() as i64);
    Ok(Json(Deleted { id, object: "session.deleted", deleted: true }))
}

/// The model that is served.
#[utoipa::path(get, path = "/v1/models", responses((status = 200, body = ModelList)))]
pub(crate) async fn models(State(app): Shared) -> Json<ModelList> {
    Json(ModelList { object: "list", data: vec![model_entry(&app)] })
}

/// One model.
#[utoipa::path(get, path = "/v1/models/{id}", params(("id" = String, Path)),
    responses((status = 200, body = ModelEntry), (status = "default", body = ErrorBody)))]
pub(crate) async fn model(State(app): Shared, id: NameInPath) -> Result<Json<ModelEntry>, ApiError> {
    let id = name(id)?;
    if id != app.facts.name {
        return Err(ApiError::not_found("model", "model_not_found", format!("found no such model; expected `{}`", app.facts.name)));
    }
    Ok(Json(model_entry(&app)))
}

fn model_entry(app: &App) -> ModelEntry {
    ModelEntry {
        id: app.facts.name.clone(),
        object: "model",
        created: app.started,
        owned_by: "sluice",
        max_context: app.facts.max_context,
        n_layers: app.n_layers,
        window: app.routing.window,
        top_k: app.routing.top_k,
        chat: app.facts.template.is_some(),
    }
}

/// Whether the process and its engine are alive.
#[utoipa::path(get, path = "/health", responses((status = 200), (status = 503, body = ErrorBody)))]
pub(crate) async fn health(State(app): Shared) -> Result<&'static str, ApiError> {
    if app.worker.is_alive() { Ok("ok\n") } else { Err(ApiError::unavailable("the engine has stopped")) }
}

/// Whether new requests are taken.
#[utoipa::path(get, path = "/ready", responses((status = 200), (status = 503, body = ErrorBody)))]
pub(crate) async fn ready(State(app): Shared) -> Result<&'static str, ApiError> {
    if app.is_draining() {
        return Err(ApiError::unavailable("the server is shutting down"));
    }
    if app.worker.is_alive() { Ok("ready\n") } else { Err(ApiError::unavailable("the engine has stopped")) }
}

/// Counters in the text format of Prometheus.
#[utoipa::path(get, path = "/metrics", responses((status = 200, body = String)))]
pub(crate) async fn metrics(State(app): Shared) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], app.metrics.render()).into_response()
}

async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(crate::openapi::document())
}

async fn page() -> Response {
    // Everything is in the page; it talks to this server and to nothing else.
    let policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; \
                  base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    ([(header::CONTENT_SECURITY_POLICY, policy)], Html(include_str!("page.html"))).into_response()
}
