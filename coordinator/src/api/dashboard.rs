//! The dashboard's files, which are part of the binary. They load nothing from anywhere else.

use axum::Router;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

/// What a page may load: this origin's files, nothing inline.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Path, kind and text of each file.
const FILES: [(&str, &str, &str); 19] = [
    ("/", "text/html; charset=utf-8", include_str!("../../dashboard/index.html")),
    ("/style.css", "text/css; charset=utf-8", include_str!("../../dashboard/style.css")),
    ("/favicon.svg", "image/svg+xml", include_str!("../../dashboard/favicon.svg")),
    ("/api.js", SCRIPT, include_str!("../../dashboard/api.js")),
    ("/app.js", SCRIPT, include_str!("../../dashboard/app.js")),
    ("/chart.js", SCRIPT, include_str!("../../dashboard/chart.js")),
    ("/dom.js", SCRIPT, include_str!("../../dashboard/dom.js")),
    ("/events.js", SCRIPT, include_str!("../../dashboard/events.js")),
    ("/format.js", SCRIPT, include_str!("../../dashboard/format.js")),
    ("/grid.js", SCRIPT, include_str!("../../dashboard/grid.js")),
    ("/job.js", SCRIPT, include_str!("../../dashboard/job.js")),
    ("/jobs.js", SCRIPT, include_str!("../../dashboard/jobs.js")),
    ("/live.js", SCRIPT, include_str!("../../dashboard/live.js")),
    ("/logs.js", SCRIPT, include_str!("../../dashboard/logs.js")),
    ("/nodes.js", SCRIPT, include_str!("../../dashboard/nodes.js")),
    ("/overview.js", SCRIPT, include_str!("../../dashboard/overview.js")),
    ("/parts.js", SCRIPT, include_str!("../../dashboard/parts.js")),
    ("/serving.js", SCRIPT, include_str!("../../dashboard/serving.js")),
    ("/submit.js", SCRIPT, include_str!("../../dashboard/submit.js")),
];

pub fn router() -> Router {
    FILES.into_iter().fold(Router::new(), |router, (path, kind, text)| {
        router.route(path, get(move || async move { page(kind, text) }))
    })
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
