//! stub
pub mod exchange;
