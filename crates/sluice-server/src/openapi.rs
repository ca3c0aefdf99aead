//! The description of the API, made from the types and handlers themselves.

use utoipa::OpenApi;

#[derive(OpenApi)]
#[openapi(
    info(title = "Sluice", description = "OpenAI-compatible completions by a routed model with a constant cache"),
    paths(
        crate::http::models,
        crate::http::model,
        crate::http::completions,
        crate::http::chat_completions,
        crate::http::list_sessions,
        crate::http::new_session,
        crate::http::show_session,
        crate::http::session_bytes,
        crate::http::delete_session,
        crate::http::health,
        crate::http::ready,
        crate::http::metrics
    )
)]
struct Document;

/// The document.
pub(crate) fn document() -> utoipa::openapi::OpenApi {
    Document::openapi()
}
