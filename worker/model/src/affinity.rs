//! Cores of a rank: a group of threads stays on cores of its own, so that the system moves none onto another rank's.
//!
//! Linux only; elsewhere, and where this process does not have its cores to itself, threads run where the system puts them.

#[cfg(target_os = "linux")]
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Cores that some threads may run on.
#[derive(Clone)]
pub(crate) struct Cores {
    #[cfg(target_os = "linux")]
    set: CpuSet,
}

/// Sets the calling thread's cores back to what they were.
pub(crate) struct Pinned {
    #[cfg(target_os = "linux")]
    before: CpuSet,
}

#[cfg(target_os = "linux")]
impl Cores {
    /// Divides the cores of this process in order: so many for each group. `None` unless the groups have as many
    /// threads as there are cores: with more they must share them, and with fewer this process shares the machine, and
    /// which cores are free only the system knows.
    pub fn divide(groups: &[usize]) -> Option<Vec<Cores>> {
        let allowed = sched_getaffinity(None).ok()?;
        let mut cores = (0..CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core));
        let threads = groups.iter().try_fold(0usize, |sum, n| sum.checked_add(*n))?;
        if allowed.count() as usize != threads {
            return None;
        }
        let take = |n: &usize| {
            let mut set = CpuSet::new();
            cores.by_ref().take(*n).for_each(|core| set.set(core));
            Cores { set }
        };
        Some(groups.iter().map(take).collect())
    }

    /// Keeps the calling thread, and threads that it starts meanwhile, on these cores until the guard is dropped. `None` if
    /// the system refuses.
    pub fn pin(&self) -> Option<Pinned> {
        let before = sched_getaffinity(None).ok()?;
        sched_setaffinity(None, &self.set).ok()?;
        Some(Pinned { before })
    }
}

#[cfg(target_os = "linux")]
impl Drop for Pinned {
    fn drop(&mut self) {
        // Refused only if those cores were taken from the process meanwhile; then the system has already moved it.
        let _ = sched_setaffinity(None, &self.before);
    }
}

#[cfg(not(target_os = "linux"))]
impl Cores {
    pub fn divide(_groups: &[usize]) -> Option<Vec<Cores>> {
        None
    }

    pub fn pin(&self) -> Option<Pinned> {
        None
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn cores_are_divided_only_if_all_are_used_and_given_back() {
        let allowed = sched_getaffinity(None).unwrap();
        let count = allowed.count() as usize;
        assert!(Cores::divide(&[count, 1]).is_none());
        assert!(Cores::divide(&[usize::MAX, 2]).is_none());
        let groups = [count / 2, count - count / 2];
        let cores = Cores::divide(&groups).unwrap();
        let shared = (0..CpuSet::MAX_CPU).filter(|c| cores.iter().all(|group| group.set.is_set(*c)));
        assert_eq!(shared.count(), 0);
        for (group, size) in cores.iter().zip(groups) {
            assert_eq!(group.set.count() as usize, size);
            let pinned = group.pin();
            assert_eq!(pinned.is_some(), size > 0, "no thread runs nowhere");
            if size > 0 {
                assert_eq!(sched_getaffinity(None).unwrap(), group.set);
            }
            drop(pinned);
            assert_eq!(sched_getaffinity(None).unwrap(), allowed);
        }
    }
}
