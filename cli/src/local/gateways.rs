//! The files of a local cluster's gateways: whose tokens they take, and the certificate that they show. Owns what is given, kept and taken back; reads none
//! of them.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::failure::{Exit, Failure, OrFail};

/// Takes back what the cluster had.
const NONE: &str = "none";

/// The same for all nodes.
#[derive(clap::Args, Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct GatewayFiles {
    /// Who may ask the gateways: a file with a line `USER TOKEN` for each, or `none` [default: as this cluster had it; at first everybody on this machine]
    #[arg(long, value_name = "FILE")]
    pub gateway_tokens: Option<PathBuf>,

    /// TLS for the gateways: PEM file of their certificate chain, or `none` [default: as this cluster had it; at first none]
    #[arg(long, value_name = "FILE")]
    pub gateway_certificate: Option<PathBuf>,

    /// TLS for the gateways: PEM file of their key
    #[arg(long, value_name = "FILE")]
    pub gateway_key: Option<PathBuf>,
}

impl GatewayFiles {
    /// What is given now, and for the rest what the cluster had. Paths become absolute: agents have another folder.
    pub fn over(self, had: Self) -> Result<Self, Failure> {
        let tls_ends = self.gateway_certificate.as_deref() == Some(Path::new(NONE));
        let had_key = had.gateway_key.filter(|_| !tls_ends);
        let files = Self {
            gateway_tokens: chosen(self.gateway_tokens, had.gateway_tokens)?,
            gateway_certificate: chosen(self.gateway_certificate, had.gateway_certificate)?,
            gateway_key: chosen(self.gateway_key, had_key)?,
        };
        match (&files.gateway_certificate, &files.gateway_key) {
            (Some(_), None) | (None, Some(_)) => {
                Err(Failure::usage("TLS of the gateways needs both files: their certificate and their key")
                    .help("give --gateway-certificate FILE and --gateway-key FILE, or `--gateway-certificate none`"))
            }
            (Some(_), Some(_)) | (None, None) => Ok(files),
        }
    }

    /// As `stoke node` and the supervisor take them.
    pub fn arguments(&self) -> Vec<String> {
        let files = [
            ("--gateway-tokens", &self.gateway_tokens),
            ("--gateway-certificate", &self.gateway_certificate),
            ("--gateway-key", &self.gateway_key),
        ];
        let given = files.into_iter().filter_map(|(name, file)| Some((name, file.as_ref()?)));
        given.flat_map(|(name, file)| [name.to_owned(), file.display().to_string()]).collect()
    }
}

fn chosen(given: Option<PathBuf>, had: Option<PathBuf>) -> Result<Option<PathBuf>, Failure> {
    match given {
        Some(file) if file == Path::new(NONE) => Ok(None),
        Some(file) => {
            let path = std::path::absolute(&file).or_fail(Exit::Usage, format!("resolve path {}", file.display()))?;
            Ok(Some(path))
        }
        None => Ok(had),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(tokens: Option<&str>, certificate: Option<&str>, key: Option<&str>) -> GatewayFiles {
        let [gateway_tokens, gateway_certificate, gateway_key] =
            [tokens, certificate, key].map(|file| file.map(PathBuf::from));
        GatewayFiles { gateway_tokens, gateway_certificate, gateway_key }
    }

    #[test]
    fn what_a_cluster_had_stays_until_it_is_replaced_or_taken_back() {
        let had = files(Some("/t"), Some("/c"), Some("/k"));
        let nothing = GatewayFiles::default;
        assert_eq!(nothing().over(had.clone()).unwrap(), had);
        assert_eq!(
            files(Some("/t2"), None, None).over(had.clone()).unwrap(),
            files(Some("/t2"), Some("/c"), Some("/k"))
        );
        assert_eq!(files(Some("none"), Some("none"), None).over(had.clone()).unwrap(), nothing());
        assert_eq!(files(None, Some("/c"), None).over(nothing()).unwrap_err().exit, Exit::Usage);
        assert_eq!(had.arguments(), ["--gateway-tokens", "/t", "--gateway-certificate", "/c", "--gateway-key", "/k"]);
    }
}
