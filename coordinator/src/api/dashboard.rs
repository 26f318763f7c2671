//! The dashboard's files, which are part of the binary. They load nothing from anywhere else.

use axum::Router;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

/// What a page may load: this origin's files, nothing inline.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

pub fn router() -> Router {
    let file = |kind: &'static str, text: &'static str| get(move || async move { page(kind, text) });
    Router::new()
        .route("/", file("text/html; charset=utf-8", include_str!("../../dashboard/index.html")))
        .route("/app.js", file("text/javascript; charset=utf-8", include_str!("../../dashboard/app.js")))
        .route("/style.css", file("text/css; charset=utf-8", include_str!("../../dashboard/style.css")))
        .route("/favicon.svg", file("image/svg+xml", include_str!("../../dashboard/favicon.svg")))
}

fn page(kind: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, text).into_response()
}
