//! A request that people can paste, to try a model that answers. Owns the line; sends nothing.

use std::net::IpAddr;

use stoke_protocol::spec::Task;

use crate::local::gateways::GatewayFiles;
use crate::output::quoted;

/// `door`: what is known here of the gateway's files, which is nothing on a cluster that others have started.
pub fn request((model, task): (&str, Task), gateway: &str, door: &GatewayFiles) -> String {
    let json = "-H 'content-type: application/json'";
    let (path, body) = match task {
        Task::Generate => (
            "/v1/chat/completions".to_owned(),
            format!(
                "{{\"model\": \"{model}\", \"max_tokens\": 100, \"temperature\": 0, \
                 \"messages\": [{{\"role\": \"user\", \"content\": \"What is a TLS certificate?\"}}]}}"
            ),
        ),
        Task::Embed => {
            ("/v1/embeddings".to_owned(), format!("{{\"model\": \"{model}\", \"input\": \"nginx/1.24.0 (Ubuntu)\"}}"))
        }
        Task::Infer => (
            format!("/v2/models/{model}/infer"),
            "{\"inputs\": [{\"name\": \"line\", \"shape\": [1], \"datatype\": \"BYTES\", \"data\": [\"example.org\"]}]}".to_owned(),
        ),
    };
    let mut line = format!("curl -s {gateway}{path} {json}");
    if let Some(certificate) = door.gateway_certificate.as_ref().filter(|_| gateway.starts_with("https://")) {
        line += &format!(" --cacert {}", quoted(&certificate.to_string_lossy()));
    }
    if door.gateway_tokens.is_some() || !is_of_this_machine(gateway) {
        line += " -H 'authorization: Bearer TOKEN'";
    }
    format!("{line} -d '{body}'")
}

/// A gateway that others reach asks for tokens: it would not have started without.
fn is_of_this_machine(gateway: &str) -> bool {
    let host = gateway.split_once("://").map_or(gateway, |(_, rest)| rest);
    let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
    host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_door_with_tokens_and_tls_is_got_past() {
        let open = GatewayFiles::default();
        let line = request(("m", Task::Embed), "http://127.0.0.1:8400", &open);
        assert!(line.starts_with("curl -s http://127.0.0.1:8400/v1/embeddings -H 'content-type"), "{line}");
        assert!(
            !line.contains("Bearer") && line.ends_with("-d '{\"model\": \"m\", \"input\": \"nginx/1.24.0 (Ubuntu)\"}'"),
            "{line}"
        );
        assert!(request(("m", Task::Generate), "http://10.0.0.7:8400", &open).contains("Bearer TOKEN"));
        assert!(!request(("m", Task::Generate), "http://[::1]:8400", &open).contains("Bearer TOKEN"));
        let closed = GatewayFiles {
            gateway_tokens: Some("/t".into()),
            gateway_certificate: Some("/a b.pem".into()),
            gateway_key: Some("/k".into()),
        };
        let line = request(("m", Task::Infer), "https://127.0.0.1:8400", &closed);
        assert!(line.contains("--cacert '/a b.pem'") && line.contains("Bearer TOKEN"), "{line}");
    }
}
