//! Changes of the group that an operator asks for, and the hand-over of a member that stops. The leader does them; any other
//! member passes them on.

use super::{Group, lane};
use baton_gateway::{BackendError, GroupChange};
use baton_proto::raft::raft_client::RaftClient;
use baton_proto::raft::{ChangeRequest, change_request};
use baton_proto::state::{Member, PutMember, RemoveMember, command};
use baton_raftstore::{MembershipChange, MembershipRefused, RaftStoreError};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// Longest time for a change, a newcomer's catching up included. An operator can ask again: what is done stays done.
const CHANGE_MAX: Duration = Duration::from_secs(60);
/// Pause before a change is tried again: the newcomer is behind, another change is under way, or there is no leader.
const CHANGE_PAUSE: Duration = Duration::from_millis(200);
/// Longest time that a member which stops gives the others to take the leadership. After that they elect one.
const HAND_OVER_MAX: Duration = Duration::from_secs(2);

/// Longest wait for a new leader to be heard here.
const HEARD_MAX: Duration = Duration::from_secs(1);

/// Why a change was not made now.
enum Not {
    /// It may work in a moment.
    Yet(String),
    /// It makes no sense.
    Ever(String),
}

impl From<RaftStoreError> for Not {
    fn from(error: RaftStoreError) -> Self {
        match error {
            RaftStoreError::NoLeader
            | RaftStoreError::LeaderChanged
            | RaftStoreError::Timeout { .. }
            | RaftStoreError::Overloaded { .. }
            | RaftStoreError::Membership(MembershipRefused::UnderWay | MembershipRefused::Behind { .. }) => {
                Self::Yet(error.to_string())
            }
            _ => Self::Ever(error.to_string()),
        }
    }
}

impl Group {
    /// Makes a change, here or through the leader.
    pub(crate) async fn change(&self, change: GroupChange) -> Result<(), BackendError> {
        let refused = |reason: String| BackendError::Refused { reason };
        let kind = match change {
            GroupChange::Add(new) => change_request::Kind::Add(Member {
                id: new.id,
                name: new.name,
                cluster_addr: new.cluster_addr,
                api_url: new.api_url,
                ..Member::default()
            }),
            GroupChange::Remove { id } => change_request::Kind::Remove(id),
            GroupChange::Transfer { to } => change_request::Kind::Transfer(to),
        };
        if let change_request::Kind::Add(new) = &kind {
            self.check_new(new).map_err(refused)?;
        }
        let deadline = Instant::now() + CHANGE_MAX;
        loop {
            let before = self.store.status().leader_id;
            let tried = match before {
                0 => Err(Not::Yet("the group has no leader at the moment".into())),
                leader if leader == self.id() => self.change_here(&kind).await,
                leader => self.change_there(leader, &kind).await,
            };
            match tried {
                Ok(()) => {
                    if let change_request::Kind::Transfer(to) = kind {
                        self.follow_leader(before, to).await;
                    }
                    return Ok(());
                }
                Err(Not::Ever(reason)) => return Err(refused(reason)),
                Err(Not::Yet(reason)) if Instant::now() >= deadline => {
                    return Err(BackendError::Unavailable { reason });
                }
                Err(Not::Yet(reason)) => tracing::debug!(%reason, "a change of the group has to wait"),
            }
            sleep(CHANGE_PAUSE).await;
        }
    }

    /// Waits a moment for the new leader's word, so that whoever asked is told of it.
    async fn follow_leader(&self, before: u64, to: u64) {
        let mut status = self.store.watch();
        let heard = status.wait_for(|status| match to {
            0 => status.leader_id != 0 && status.leader_id != before,
            to => status.leader_id == to,
        });
        let _ = timeout(HEARD_MAX, heard).await;
    }

    fn check_new(&self, new: &Member) -> Result<(), String> {
        if new.id == 0 || baton_identity::Role::Coordinator.named(&new.name).is_none() {
            return Err("a coordinator needs an id other than 0 and a name of letters, digits and '-'".into());
        }
        if !crate::config::is_host_and_port(&new.cluster_addr) {
            return Err(format!(
                "{:?} is no \"host:port\" that others could reach",
                new.cluster_addr
            ));
        }
        match self.book.get(new.id) {
            Some(known) if known.name != new.name => Err(format!(
                "member {} is {:?}; give the new one an id that was never used",
                new.id, known.name
            )),
            _ => Ok(()),
        }
    }

    /// One attempt of this member, which leads.
    async fn change_here(&self, kind: &change_request::Kind) -> Result<(), Not> {
        let propose = async |kind| self.store.propose(crate::cluster::command(kind)).await;
        match kind {
            change_request::Kind::Add(new) => {
                let put = PutMember {
                    member: Some(new.clone()),
                };
                propose(command::Kind::PutMember(put)).await?;
                // This member's messages go there at once.
                let _ = self.book.greeted(new);
                self.store.change_members(MembershipChange::AddLearner(new.id)).await?;
                self.store.change_members(MembershipChange::Promote(new.id)).await?;
            }
            change_request::Kind::Remove(id) if *id == self.id() => {
                self.store.transfer(None).await?;
                return Err(Not::Yet("the leadership was handed over first".into()));
            }
            change_request::Kind::Remove(id) => {
                if !self.store.members().contains(*id) {
                    return Err(Not::Ever(format!("member {id} is not in the group")));
                }
                self.store.change_members(MembershipChange::Remove(*id)).await?;
                propose(command::Kind::RemoveMember(RemoveMember { id: *id })).await?;
            }
            change_request::Kind::Transfer(to) if *to == self.id() => {}
            change_request::Kind::Transfer(to) => {
                self.store.transfer((*to != 0).then_some(*to)).await?;
            }
        }
        Ok(())
    }

    async fn change_there(&self, leader: u64, kind: &change_request::Kind) -> Result<(), Not> {
        // Whoever is furthest of the others: this one is, if it is asked and is not the leader.
        let member = self
            .book
            .get(leader)
            .ok_or_else(|| Not::Yet("the leader is not known here".into()))?;
        let channel = lane::connect(&self.peering, &member).await.map_err(Not::Yet)?;
        let request = ChangeRequest {
            kind: Some(kind.clone()),
        };
        let answer = timeout(CHANGE_MAX, RaftClient::new(channel).change(request)).await;
        match answer {
            Err(_) => Err(Not::Yet("the leader does not answer".into())),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) if status.code() == tonic::Code::InvalidArgument => {
                Err(Not::Ever(status.message().to_owned()))
            }
            Ok(Err(status)) => Err(Not::Yet(status.message().to_owned())),
        }
    }

    /// A change that another member passed on.
    // tonic's Status is large, and it is what a service returns.
    #[allow(clippy::result_large_err)]
    pub(super) async fn passed_on(&self, request: ChangeRequest) -> Result<(), tonic::Status> {
        let kind = request
            .kind
            .ok_or_else(|| tonic::Status::invalid_argument("an unknown change"))?;
        if !self.store.status().leads {
            return Err(tonic::Status::failed_precondition("this member does not lead"));
        }
        self.change_here(&kind).await.map_err(|not| match not {
            Not::Yet(reason) => tonic::Status::failed_precondition(reason),
            Not::Ever(reason) => tonic::Status::invalid_argument(reason),
        })
    }

    /// Before this member stops: somebody else shall lead, so that nobody has to notice by a timeout.
    pub(crate) async fn hand_over(&self) {
        if !self.store.status().leads || self.is_alone() {
            return;
        }
        match timeout(HAND_OVER_MAX, self.store.transfer(None)).await {
            Ok(Ok(leader)) => tracing::info!(leader, "handed the leadership over"),
            Ok(Err(error)) => tracing::warn!(%error, "the leadership was not handed over"),
            Err(_) => tracing::warn!("nobody took the leadership in time"),
        }
    }
}
