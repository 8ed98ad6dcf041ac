//! The command end to end: real processes on loopback, real models, nothing mocked.

mod bad_input;
mod bad_models;
mod cluster;
mod demo;
mod gguf;
mod golden;
mod harness;
