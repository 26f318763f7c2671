//! A request that people can paste, to try a model that answers. Owns the line; sends nothing.

use std::net::IpAddr;
use std::path::Path;

use stoke_protocol::spec::Task;

use crate::local::gateways::GatewayFiles;
use crate::model;
use crate::output::quoted;

/// What a line asks.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Question {
    Chat,
    Text,
    Vectors,
    Classes,
}

impl Question {
    /// A chat where the model's files are here and have a template for one; every other model that makes text takes a text.
    pub fn of(task: Task, model: &str) -> Self {
        match task {
            Task::Generate if model::chats(Path::new(model)) => Self::Chat,
            Task::Generate => Self::Text,
            Task::Embed => Self::Vectors,
            Task::Infer => Self::Classes,
        }
    }
}

/// `door`: what is known here of the gateway's files, which is nothing on a cluster that others have started.
pub fn request((model, question): (&str, Question), gateway: &str, door: &GatewayFiles) -> String {
    let json = "-H 'content-type: application/json'";
    let (path, body) = match question {
        Question::Chat => (
            "/v1/chat/completions".to_owned(),
            format!(
                "{{\"model\": \"{model}\", \"max_tokens\": 100, \"temperature\": 0, \
                 \"messages\": [{{\"role\": \"user\", \"content\": \"What is a TLS certificate?\"}}]}}"
            ),
        ),
        Question::Text => (
            "/v1/completions".to_owned(),
            format!(
                "{{\"model\": \"{model}\", \"max_tokens\": 100, \"temperature\": 0, \"prompt\": \"A TLS certificate is\"}}"
            ),
        ),
        Question::Vectors => {
            ("/v1/embeddings".to_owned(), format!("{{\"model\": \"{model}\", \"input\": \"nginx/1.24.0 (Ubuntu)\"}}"))
        }
        Question::Classes => (
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
        let line = request(("m", Question::Vectors), "http://127.0.0.1:8400", &open);
        assert!(line.starts_with("curl -s http://127.0.0.1:8400/v1/embeddings -H 'content-type"), "{line}");
        assert!(
            !line.contains("Bearer") && line.ends_with("-d '{\"model\": \"m\", \"input\": \"nginx/1.24.0 (Ubuntu)\"}'"),
            "{line}"
        );
        assert!(request(("m", Question::Chat), "http://10.0.0.7:8400", &open).contains("Bearer TOKEN"));
        assert!(!request(("m", Question::Chat), "http://[::1]:8400", &open).contains("Bearer TOKEN"));
        let closed = GatewayFiles {
            gateway_tokens: Some("/t".into()),
            gateway_certificate: Some("/a b.pem".into()),
            gateway_key: Some("/k".into()),
        };
        let line = request(("m", Question::Classes), "https://127.0.0.1:8400", &closed);
        assert!(line.contains("--cacert '/a b.pem'") && line.contains("Bearer TOKEN"), "{line}");
    }

    #[test]
    fn a_model_without_a_chat_template_is_asked_for_a_text() {
        // It has no template.
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../jobs/reference/golden/lm/qwen2");
        assert_eq!(Question::of(Task::Generate, golden), Question::Text);
        assert_eq!(Question::of(Task::Generate, "/not/on/this/machine"), Question::Text);
        let line =
            request(("m", Question::of(Task::Generate, golden)), "http://127.0.0.1:8400", &GatewayFiles::default());
        assert!(
            line.contains("/v1/completions ") && line.contains("\"prompt\": ") && !line.contains("messages"),
            "{line}"
        );
        let folder = tempfile::tempdir().expect("a temporary folder");
        for file in std::fs::read_dir(golden).expect("a model") {
            let file = file.expect("a file");
            std::fs::copy(file.path(), folder.path().join(file.file_name())).expect("copied");
        }
        let config = "{\"chat_template\": \"{{ messages[0].content }}\"}";
        std::fs::write(folder.path().join("tokenizer_config.json"), config).expect("written");
        assert_eq!(Question::of(Task::Generate, &folder.path().to_string_lossy()), Question::Chat);
        assert_eq!(Question::of(Task::Embed, golden), Question::Vectors);
    }
}
