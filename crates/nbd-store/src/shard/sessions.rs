//! The open sessions of a shard, by id and by volume.

use std::collections::{BTreeMap, BTreeSet};

use super::session::Session;
use crate::ids::{SessionId, VolumeId};

/// Sessions that changed: as they are, or `None` for one that has ended.
pub(crate) type SessionChanges = BTreeMap<SessionId, Option<Session>>;

#[derive(Debug)]
struct Open {
    session: Session,
    /// Whether `changed` lists it.
    is_changed: bool,
}

/// The sessions. Both indexes hold the same ones.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    by_id: BTreeMap<SessionId, Open>,
    by_volume: BTreeSet<(VolumeId, SessionId)>,
    /// What no checkpoint was given yet.
    changed: Vec<SessionId>,
}

impl Sessions {
    /// The session with this id.
    pub(crate) fn get(&self, id: SessionId) -> Option<&Session> {
        self.by_id.get(&id).map(|open| &open.session)
    }

    /// The same, to be changed. A session stays with its volume.
    pub(crate) fn get_mut(&mut self, id: SessionId) -> Option<&mut Session> {
        let open = self.by_id.get_mut(&id)?;
        if !open.is_changed {
            open.is_changed = true;
            self.changed.push(id);
        }
        Some(&mut open.session)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// All sessions, by id.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (SessionId, &Session)> {
        self.by_id.iter().map(|(id, open)| (*id, &open.session))
    }

    /// Those with higher ids than `after`, by id.
    pub(crate) fn after(&self, after: SessionId) -> impl Iterator<Item = (SessionId, &Session)> {
        let ids = self.by_id.range((std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded));
        ids.map(|(id, open)| (*id, &open.session))
    }

    /// Ids of the sessions of `volume`, those above `after`.
    pub(crate) fn of_volume(
        &self,
        volume: VolumeId,
        after: SessionId,
    ) -> impl Iterator<Item = SessionId> {
        let first = (std::ops::Bound::Excluded((volume, after)), std::ops::Bound::Unbounded);
        let all = self.by_volume.range(first).take_while(move |(of, _)| *of == volume);
        all.map(|(_, id)| *id)
    }

    /// Adds a session that the last checkpoint has. `false` if there is one with this id.
    #[must_use]
    pub(crate) fn load(&mut self, id: SessionId, session: Session) -> bool {
        self.by_volume.insert((session.volume, id));
        self.by_id.insert(id, Open { session, is_changed: false }).is_none()
    }

    /// Opens a session whose id is new.
    pub(crate) fn insert(&mut self, id: SessionId, session: Session) {
        assert!(self.load(id, session), "a session is opened once");
        // Noted as changed by that.
        self.get_mut(id);
    }

    /// Ends a session.
    pub(crate) fn remove(&mut self, id: SessionId) -> bool {
        let Some(Open { session, is_changed }) = self.by_id.remove(&id) else { return false };
        self.by_volume.remove(&(session.volume, id));
        if !is_changed {
            self.changed.push(id);
        }
        true
    }

    /// Ends those for which `ends` holds. Returns their number.
    pub(crate) fn remove_if(&mut self, ends: impl Fn(&Session) -> bool) -> usize {
        let ended: Vec<SessionId> =
            self.iter().filter(|(_, session)| ends(session)).map(|(id, _)| id).collect();
        ended.iter().for_each(|id| _ = self.remove(*id));
        ended.len()
    }

    /// Ends those of `volume`. Returns their number.
    pub(crate) fn remove_of(&mut self, volume: VolumeId) -> usize {
        let ended: Vec<SessionId> = self.of_volume(volume, SessionId::NONE).collect();
        ended.iter().for_each(|id| _ = self.remove(*id));
        ended.len()
    }

    /// What changed since this was asked last.
    pub(crate) fn take_changes(&mut self) -> SessionChanges {
        let mut changes = SessionChanges::new();
        for id in std::mem::take(&mut self.changed) {
            let open = self.by_id.get_mut(&id).map(|open| {
                open.is_changed = false;
                open.session.clone()
            });
            changes.insert(id, open);
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Epoch, Owner};

    fn session(volume: u64) -> Session {
        Session::new(Epoch(1), VolumeId(volume), Owner::default())
    }

    #[test]
    fn a_change_is_told_once() {
        let mut sessions = Sessions::default();
        let id = SessionId;
        assert!(sessions.load(id(1), session(1)) && sessions.load(id(2), session(2)));
        assert!(sessions.take_changes().is_empty());
        sessions.get_mut(id(1)).unwrap().epoch = Epoch(2);
        sessions.get_mut(id(1)).unwrap().epoch = Epoch(3);
        sessions.insert(id(3), session(2));
        assert!(sessions.remove(id(2)) && !sessions.remove(id(2)));
        // Gone and opened again.
        sessions.insert(id(2), session(1));
        let told = sessions.take_changes();
        let epochs: Vec<_> =
            told.iter().map(|(id, of)| (id.0, of.as_ref().unwrap().epoch.0)).collect();
        assert_eq!(epochs, [(1, 3), (2, 1), (3, 1)]);
        assert_eq!(told[&id(2)].as_ref().unwrap().volume, VolumeId(1));
        assert!(sessions.take_changes().is_empty());
        assert_eq!(sessions.remove_of(VolumeId(1)), 2);
        assert_eq!(sessions.take_changes(), [(id(1), None), (id(2), None)].into());
        assert_eq!(sessions.of_volume(VolumeId(2), SessionId::NONE).collect::<Vec<_>>(), [id(3)]);
    }
}
