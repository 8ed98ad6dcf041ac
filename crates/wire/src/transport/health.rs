//! `grpc.health.v1`: whether a node does its part, for whoever speaks gRPC and has a certificate of
//! the cluster.

use tonic::transport::Channel;
use tonic_health::ServingStatus;
pub use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::health_server;
use tonic_health::server::{HealthReporter, health_reporter};

/// The name that stands for everything a server does.
const ALL: &str = "";

/// What a server says of itself. Clones are the same server's.
#[derive(Clone)]
pub struct Health {
    reporter: HealthReporter,
    service: &'static str,
}

impl std::fmt::Debug for Health {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Health").field("service", &self.service).finish_non_exhaustive()
    }
}

/// The health of a server whose one service is `service`, by its full name, and what answers for
/// it. Nothing serves until [`Health::set`] says so.
pub async fn health(
    service: &'static str,
) -> (Health, health_server::HealthServer<impl health_server::Health>) {
    let (reporter, server) = health_reporter();
    let health = Health { reporter, service };
    health.set(false).await;
    (health, server)
}

impl Health {
    /// Says whether it serves.
    pub async fn set(&self, serving: bool) {
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        self.reporter.set_service_status(ALL, status).await;
        self.reporter.set_service_status(self.service, status).await;
    }

    /// Ends the streams of those who watch: a server that shuts down waits for them.
    pub async fn end(&self) {
        for name in [ALL, self.service] {
            let mut reporter = self.reporter.clone();
            reporter.clear_service_status(name).await;
        }
    }
}

/// A client of a node's health.
pub fn health_client(channel: Channel) -> HealthClient<Channel> {
    HealthClient::new(channel)
}
