//! The terminal view of a cluster: what is known of it and what keys do (`model`), how that is drawn (`draw`), and the terminal itself (`screen`). Asks nobody anything.

pub mod draw;
pub mod model;
pub mod screen;
