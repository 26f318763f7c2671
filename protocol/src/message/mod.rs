//! Every message that crosses a process boundary. Wiring only; one file a conversation. Each variant says who sends it, when, and what
//! answers it. bincode numbers variants by order: append, never reorder; any change bumps `codec::PROTOCOL_VERSION`.

pub mod client;
pub mod join;
pub mod load;
pub mod node;
pub mod peer;
pub mod rank;
pub mod serve;
pub mod split;
