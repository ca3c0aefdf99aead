//! Errors as OpenAI's clients expect them: a status and `{"error": {"message", "type", "param", "code"}}`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

/// A request that is refused, or that failed.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    status: StatusCode,
    detail: ErrorDetail,
    retry_after: Option<u32>,
}

/// Body of an error.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct ErrorDetail {
    /// What was found, and what was expected.
    pub message: String,
    /// `invalid_request_error`, `authentication_error`, `rate_limit_error` or `server_error`.
    pub r#type: &'static str,
    /// Field of the request that is at fault.
    pub param: Option<String>,
    /// A word for programs.
    pub code: Option<&'static str>,
}

/// Envelope of an error.
#[derive(Serialize, ToSchema)]
pub(crate) struct ErrorBody {
    pub(crate) error: ErrorDetail,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        let detail = ErrorDetail { message: message.into(), r#type: kind, param: None, code };
        Self { status, detail, retry_after: None }
    }

    /// 400: a field has a value that it cannot have.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", Some("invalid_value"), message);
        error.detail.param = (!param.is_empty()).then(|| param.to_string());
        error
    }

    /// 400: the body is not the JSON that was expected.
    pub(crate) fn malformed(param: Option<String>, message: impl Into<String>) -> Self {
        let code = if param.is_some() { "invalid_type" } else { "invalid_json" };
        let mut error = Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", Some(code), message);
        error.detail.param = param;
        error
    }

    /// 400: the prompt, or the prompt and its answer, are too long.
    pub(crate) fn too_long(param: &str, found: usize, limit: usize) -> Self {
        let message =
            format!("found {found} tokens, prompt and answer together; expected at most {limit}. Shorten the prompt or max_tokens");
        let mut error = Self::invalid(param, message);
        error.detail.code = Some("context_length_exceeded");
        error
    }

    /// 401.
    pub(crate) fn unauthorised() -> Self {
        let message = "found no valid API key; expected `Authorization: Bearer KEY`";
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", Some("invalid_api_key"), message)
    }

    /// 404: something that is named is not there.
    pub(crate) fn not_found(param: &str, code: &'static str, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", Some(code), message);
        error.detail.param = (!param.is_empty()).then(|| param.to_string());
        error
    }

    /// 405.
    pub(crate) fn method() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", Some("method_not_allowed"), "this path has no such method")
    }

    /// 408: the body did not arrive.
    pub(crate) fn slow_body() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", Some("timeout"), "the body did not arrive in time, or not whole")
    }

    /// 409: somebody else uses it.
    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "invalid_request_error", Some("conflict"), message)
    }

    /// 413.
    pub(crate) fn too_large(limit: usize) -> Self {
        let message = format!("the body is larger than {limit} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", Some("request_too_large"), message)
    }

    /// 429.
    pub(crate) fn busy() -> Self {
        let message = "all slots are in use and the queue is full; try again later";
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", Some("server_busy"), message);
        Self { retry_after: Some(1), ..error }
    }

    /// 500.
    pub(crate) fn internal() -> Self {
        let message = "the server failed; its log has the reason under this request id";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", None, message)
    }

    /// 503: shutting down.
    pub(crate) fn unavailable(message: &str) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("unavailable"), message);
        Self { retry_after: Some(5), ..error }
    }

    /// Body alone, for an error behind a stream's first bytes.
    pub(crate) fn body(&self) -> ErrorBody {
        ErrorBody { error: self.detail.clone() }
    }

    /// Status, for logs and tests.
    pub fn status(&self) -> u16 {
        self.status.as_u16()
    }

    /// What is wrong.
    pub fn detail(&self) -> &ErrorDetail {
        &self.detail
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let retry_after = self.retry_after;
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
