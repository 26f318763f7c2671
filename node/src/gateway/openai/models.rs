//! `/v1/models`: what is served now.

use hyper::{Response, StatusCode};
use serde::Serialize;
use stoke_protocol::message::serve::Route;

use crate::gateway::asking::Desk;
use crate::gateway::error::Problem;
use crate::gateway::service::{Body, json};

#[derive(Serialize)]
struct List {
    object: &'static str,
    data: Vec<Model>,
}

#[derive(Serialize)]
struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
}

impl From<Route> for Model {
    fn from(route: Route) -> Self {
        Self { id: route.model, object: "model", created: route.created_ms / 1000, owned_by: "stoke" }
    }
}

pub(in crate::gateway) fn models(desk: &Desk) -> Response<Body> {
    let data = desk.table().models().into_iter().map(Model::from).collect();
    json(StatusCode::OK, &List { object: "list", data })
}

pub(in crate::gateway) fn model(desk: &Desk, name: &str) -> Result<Response<Body>, Problem> {
    let mut models = desk.table().models();
    match models.iter().position(|route| route.model == name) {
        Some(at) => Ok(json(StatusCode::OK, &Model::from(models.swap_remove(at)))),
        None => {
            let known: Vec<String> = models.into_iter().map(|route| route.model).collect();
            Err(Problem::unknown_model(name, &known))
        }
    }
}
