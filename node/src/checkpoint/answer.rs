//! What an object store's failure means to a person: what it answered, and which variable or right mends it. Owns those words; never passes on
//! a whole answer, in which stores repeat keys, signatures and addresses with tokens (I35).

use std::error::Error;

use super::store::{self, Kind, Settings};

/// What is shown of a store's own words.
const WORDS_CHARS_MAX: usize = 200;

/// Why a request failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Answer {
    /// The credentials are missing, wrong, have expired or are not enough.
    Denied { said: String, mend: String },
    /// The bucket or container does not exist.
    NoBucket { said: String },
    /// Anything else; the request was tried again while that could help.
    Other { said: String },
}

pub(super) fn answer(kind: Kind, error: &object_store::Error) -> Answer {
    let (settings, whose) = store::given();
    read(kind, &texts(error), &settings, whose)
}

/// An error with its causes, outermost first.
fn texts(error: &object_store::Error) -> Vec<String> {
    let mut texts = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(error) = cause {
        texts.push(error.to_string());
        cause = error.source();
    }
    texts
}

fn read(kind: Kind, texts: &[String], settings: &Settings, whose: &str) -> Answer {
    let whole = texts.concat();
    let status = between(&whole, "status code: ", ":").map(str::trim).filter(|status| status.len() < 40);
    let code = between(&whole, "<Code>", "</Code>").unwrap_or_default();
    let words = between(&whole, "<Message>", "</Message>").and_then(|words| words.lines().next()).unwrap_or_default();
    let said: Vec<&str> =
        [status.unwrap_or_default(), code, words].into_iter().filter(|part| !part.is_empty()).collect();
    let said: String = said.join(", ").chars().take(WORDS_CHARS_MAX).collect();
    let number = status.and_then(|status| status.get(..3)).unwrap_or_default();
    if !has_identity(kind, settings) && (number.is_empty() || matches!(number, "401" | "403")) {
        let said = if said.is_empty() { "no credentials were found".to_owned() } else { said };
        return Answer::Denied {
            said,
            mend: format!("{} in {whose}, or give the machine an identity", variables(kind)),
        };
    }
    if matches!(number, "401" | "403") || mend_of_code(kind, code).is_some() {
        let mend = mend_of_code(kind, code).unwrap_or(rights(kind));
        return Answer::Denied { said, mend: format!("{mend} (credentials come from {whose})") };
    }
    if matches!(code, "NoSuchBucket" | "ContainerNotFound") || number == "404" {
        return Answer::NoBucket { said };
    }
    if number.is_empty() {
        // The innermost cause names no address, and none of what was sent.
        let cause = texts.last().map(String::as_str).unwrap_or_default();
        let cause: String = cause.lines().next().unwrap_or_default().chars().take(WORDS_CHARS_MAX).collect();
        return Answer::Other { said: format!("the store does not answer ({cause})") };
    }
    Answer::Other { said }
}

fn between<'a>(text: &'a str, start: &str, end: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(start)?;
    Some(rest.split_once(end).map_or(rest, |(part, _)| part))
}

/// Whether something was said about who asks. Without, the machine's own identity is asked, which only machines of that provider have.
fn has_identity(kind: Kind, settings: &Settings) -> bool {
    let names: &[&str] = match kind {
        Kind::File => return true,
        Kind::S3 => &[
            "AWS_ACCESS_KEY_ID",
            "AWS_WEB_IDENTITY_TOKEN_FILE",
            "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        ],
        Kind::Azure => &[
            "AZURE_STORAGE_ACCOUNT_KEY",
            "AZURE_STORAGE_ACCESS_KEY",
            "AZURE_STORAGE_SAS_TOKEN",
            "AZURE_STORAGE_SAS_KEY",
            "AZURE_STORAGE_TOKEN",
            "AZURE_CLIENT_SECRET",
            "AZURE_FEDERATED_TOKEN_FILE",
        ],
        Kind::Google => &["GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_KEY"],
    };
    names.iter().any(|name| settings.contains_key(*name))
}

/// What no client can be made without, if it was not said.
pub(super) fn missing(kind: Kind, settings: &Settings, whose: &str) -> Option<String> {
    (kind == Kind::Azure && !settings.contains_key("AZURE_STORAGE_ACCOUNT_NAME")).then(|| {
        let variables = variables(kind);
        format!("no storage account is named: {variables} in {whose}; the name alone where the machine has an identity")
    })
}

fn variables(kind: Kind) -> &'static str {
    match kind {
        Kind::File => "",
        Kind::S3 => "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        Kind::Azure => "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
        Kind::Google => "set GOOGLE_APPLICATION_CREDENTIALS",
    }
}

fn mend_of_code(kind: Kind, code: &str) -> Option<&'static str> {
    Some(match (kind, code) {
        (Kind::S3, "InvalidAccessKeyId") => "the store does not know AWS_ACCESS_KEY_ID: correct it",
        (Kind::S3, "SignatureDoesNotMatch") => "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID: correct it",
        (Kind::S3, "ExpiredToken" | "ExpiredTokenException" | "InvalidToken" | "TokenRefreshRequired") => {
            "the credentials have expired: set a new AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or use an identity that \
             renews itself (a role of the machine, AWS_WEB_IDENTITY_TOKEN_FILE)"
        }
        (Kind::Azure, "AuthenticationFailed" | "InvalidAuthenticationInfo" | "NoAuthenticationInformation") => {
            "the key or token is wrong or has expired: set AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or AZURE_CLIENT_SECRET anew"
        }
        (_, "RequestTimeTooSkewed") => "this machine's clock is wrong: set it",
        _ => return None,
    })
}

fn rights(kind: Kind) -> &'static str {
    match kind {
        Kind::File => "",
        Kind::S3 => {
            "allow s3:GetObject, s3:PutObject, s3:DeleteObject, s3:AbortMultipartUpload and s3:ListBucket, or correct AWS_ACCESS_KEY_ID \
             and AWS_SECRET_ACCESS_KEY"
        }
        Kind::Azure => "give the role \"Storage Blob Data Contributor\", or correct AZURE_STORAGE_ACCOUNT_KEY",
        Kind::Google => "give the role \"Storage Object User\", or correct GOOGLE_APPLICATION_CREDENTIALS",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        [("AWS_ACCESS_KEY_ID", "AKIAX"), ("AWS_SECRET_ACCESS_KEY", "s3cr3t")]
            .map(|(name, value)| (name.into(), value.into()))
            .into()
    }

    fn said(status: &str, body: &str) -> Vec<String> {
        let inner = format!("Server returned non-2xx status code: {status}: {body}");
        vec![format!("Error performing PUT http://b.example/x?sig=s3cr3t in 2s - {inner}"), inner]
    }

    #[test]
    fn a_denied_request_names_the_variable_and_repeats_no_secret() {
        let body = "<Error><Code>SignatureDoesNotMatch</Code><Message>It does not match.</Message><AWSAccessKeyId>AKIAX</AWSAccessKeyId></Error>";
        let Answer::Denied { said, mend } = read(Kind::S3, &said("403 Forbidden", body), &settings(), "the agent")
        else {
            panic!("not denied")
        };
        assert_eq!(said, "403 Forbidden, SignatureDoesNotMatch, It does not match.");
        assert!(mend.starts_with("AWS_SECRET_ACCESS_KEY does not belong"), "{mend}");
        assert!(!format!("{said}{mend}").contains("AKIAX"));
    }

    #[test]
    fn expired_credentials_are_told_from_a_bad_request() {
        let expired = said("400 Bad Request", "<Error><Code>ExpiredToken</Code></Error>");
        assert!(
            matches!(read(Kind::S3, &expired, &settings(), "x"), Answer::Denied { mend, .. } if mend.contains("expired"))
        );
        let other = said("400 Bad Request", "<Error><Code>EntityTooSmall</Code></Error>");
        let said = "400 Bad Request, EntityTooSmall".to_owned();
        assert_eq!(read(Kind::S3, &other, &settings(), "x"), Answer::Other { said });
    }

    #[test]
    fn without_credentials_it_is_said_what_to_set() {
        let texts = vec!["Generic S3 error: IMDS".to_owned(), "connection refused".to_owned()];
        assert!(
            matches!(read(Kind::S3, &texts, &Settings::new(), "x"), Answer::Denied { mend, .. } if mend.contains("AWS_ACCESS_KEY_ID"))
        );
        let Answer::Other { said } = read(Kind::S3, &texts, &settings(), "x") else {
            panic!("a store that is down denies nothing")
        };
        assert_eq!(said, "the store does not answer (connection refused)");
        let problem = missing(Kind::Azure, &settings(), "the agent's environment").expect("an account is needed");
        for name in ["AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "the agent's environment"] {
            assert!(problem.contains(name), "{problem}");
        }
        let account = [("AZURE_STORAGE_ACCOUNT_NAME".to_owned(), "a".to_owned())].into();
        assert_eq!(missing(Kind::Azure, &account, "x"), None);
        assert_eq!(missing(Kind::S3, &Settings::new(), "x"), None);
    }
}
