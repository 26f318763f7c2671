//! The parsers of what clients send, for those who feed them anything. Each must return for every input; what it finds stays inside.

/// A body of `/v1/chat/completions`.
pub fn chat(body: &[u8]) {
    drop(super::openai::chat_question(body, 0));
}

/// A body of `/v1/completions`.
pub fn completion(body: &[u8]) {
    drop(super::openai::completion_question(body, 0));
}

/// A body of `/v1/embeddings`.
pub fn embedding(body: &[u8]) {
    drop(super::openai::embedding_texts(body));
}

/// A body of `/v2/models/.../infer`: two bytes that say where its JSON ends, if they are not both zero, and the body.
pub fn tensors(bytes: &[u8]) {
    let Some((length, body)) = bytes.split_first_chunk() else { return };
    let length = Some(usize::from(u16::from_le_bytes(*length))).filter(|length| *length > 0);
    drop(super::inference::read_request("m", "", body, length));
}

/// The body of a gRPC call.
pub fn call(body: &[u8]) {
    if let Ok(message) = super::inference::unwrapped(body) {
        drop(super::inference::read_call(message));
    }
}
