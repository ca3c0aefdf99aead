//! Attention of each query to its routed keys and its local window, in one softmax.
pub mod routing;
pub use routing::{Routing, Visibility};
