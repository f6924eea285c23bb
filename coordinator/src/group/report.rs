//! How the members are doing: this one from its own store, the others by asking them.

use super::{Group, lane};
use baton_gateway::{CoordinatorGroup, CoordinatorRole, CoordinatorStatus};
use baton_proto::raft::raft_client::RaftClient;
use baton_proto::raft::{MemberStatus, StatusRequest};
use baton_proto::state::Member;
use baton_raftstore::RaftStoreError;
use futures_util::future::join_all;
use std::fmt::Write as _;
use std::time::Duration;

/// Longest wait for another member's word: an operator waits for the slowest.
const ANSWER_MAX: Duration = Duration::from_millis(700);

impl Group {
    /// This member's word of itself.
    pub(crate) fn status(&self) -> Result<MemberStatus, RaftStoreError> {
        let status = self.store.status();
        let position = self.store.position()?;
        Ok(MemberStatus {
            id: self.id(),
            leader_id: status.leader_id,
            term: status.term,
            applied_index: position.applied_index,
            state_hash: position.hash.to_vec().into(),
            settled: position.settled,
            voters: self.voters(),
            learners: self.learners(),
        })
    }

    /// All members' words, as far as they can be had in time.
    pub(crate) async fn report(&self) -> Result<CoordinatorGroup, RaftStoreError> {
        let own = self.status()?;
        let members = self.book.members();
        let asked = members.iter().map(|member| self.ask(member));
        let answers = join_all(asked).await;
        let furthest = answers.iter().flatten().map(|status| status.applied_index).max();
        let furthest = furthest.unwrap_or(0).max(own.applied_index);
        let is_member = |id: &u64| own.voters.contains(id) || own.learners.contains(id);
        let coordinators = members
            .iter()
            .zip(&answers)
            .filter(|(member, _)| is_member(&member.id))
            .map(|(member, answer)| {
                let reachable = answer.is_some();
                let status = answer.clone().unwrap_or_default();
                CoordinatorStatus {
                    id: member.id,
                    name: member.name.clone(),
                    role: match member.id {
                        id if id == own.leader_id => CoordinatorRole::Leader,
                        id if own.learners.contains(&id) => CoordinatorRole::Learner,
                        _ => CoordinatorRole::Follower,
                    },
                    reachable,
                    cluster_addr: member.cluster_addr.clone(),
                    api_url: member.api_url.clone(),
                    term: status.term,
                    applied_index: status.applied_index,
                    lag: if reachable { furthest - status.applied_index } else { 0 },
                    state_hash: status.state_hash.iter().fold(String::new(), |mut text, byte| {
                        let _ = write!(text, "{byte:02x}");
                        text
                    }),
                    settled: status.settled,
                }
            });
        Ok(CoordinatorGroup {
            answered_by: own.id,
            leader_id: own.leader_id,
            coordinators: coordinators.collect(),
        })
    }

    async fn ask(&self, member: &Member) -> Option<MemberStatus> {
        if member.id == self.id() {
            return self.status().ok();
        }
        let asked = async {
            let channel = lane::connect(&self.peering, member).await.ok()?;
            let answer = RaftClient::new(channel).status(StatusRequest {}).await.ok()?;
            Some(answer.into_inner())
        };
        tokio::time::timeout(ANSWER_MAX, asked).await.ok().flatten()
    }
}
