//! How much the groups that serve have to do: nothing of that is replicated, their leaders know.

use std::time::Duration;

use cluster::{GroupId, Route};
use identity::{Expect, Tls};
use tokio::task::JoinSet;
use wire::{pb, transport};

use crate::client::Control;

/// How long a leader may take to say it.
const ANSWER: Duration = Duration::from_secs(1);

/// Fills in what the leaders of groups that serve say; of one that does not answer in time nothing
/// is known.
pub(crate) async fn ask(control: &Control, status: &mut pb::StatusReply) {
    let state = control.view().borrow().clone();
    let routes = state.deployments().keys().flat_map(|name| state.routes(name));
    let mut asking = JoinSet::new();
    for route in routes {
        let tls = control.tls().clone();
        asking.spawn(async move {
            let load = tokio::time::timeout(ANSWER, load(&route, &tls)).await;
            (route.group, route.epoch, load.ok().flatten())
        });
    }
    for (GroupId(id), epoch, load) in asking.join_all().await {
        let same = |one: &&mut pb::GroupStatus| (one.group, one.epoch) == (id, epoch.0);
        if let Some(group) = status.groups.iter_mut().find(same) {
            group.load = load;
        }
    }
}

async fn load(route: &Route, tls: &Tls) -> Option<pb::GroupLoad> {
    let expect = Expect::Node(route.leader.0);
    let channel = transport::connect(&route.leader_address, expect, tls).await.ok()?;
    let request = pb::CountsRequest { group: route.group.0, epoch: route.epoch.0 };
    let counts = transport::worker_client(channel).counts(request).await.ok()?.into_inner();
    Some(pb::GroupLoad { waiting: counts.waiting, running: counts.running })
}
