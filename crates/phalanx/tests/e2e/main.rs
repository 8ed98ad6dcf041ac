//! The command end to end: real processes on loopback, real models, nothing mocked.

mod bad_input;
mod bad_models;
mod bench;
mod chaos;
mod cluster;
mod control_plane;
mod damage;
mod demo;
mod deploy;
mod gguf;
mod golden;
mod harness;
mod health;
mod inspect;
mod keyed;
mod links;
mod network;
mod partition;
mod pods;
mod ports;
mod rotation;
mod survive;
mod swap;
mod wire_tap;
