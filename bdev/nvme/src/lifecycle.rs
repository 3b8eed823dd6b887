//! States of a controller and what moves it from one to another: the table that the crate's head and `docs/nvme.md` show.

/// Where a controller is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    /// Being reset and enabled for the first time; nobody knows it yet.
    Attaching = 0,
    /// I/O flows.
    Ready = 1,
    /// Queues stand still while the controller is reset; I/O waits and is sent again.
    Resetting = 2,
    /// A reset failed; I/O ends with an error at once. A reset that is asked for may bring it back.
    Failed = 3,
    /// The drive is gone: I/O ends with an error that says so, its devices are being removed.
    Removed = 4,
    /// Its devices are closed, it is being shut down.
    Detaching = 5,
    /// Given back to the system.
    Gone = 6,
}

/// What happens to a controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Enabled, identified, queues made.
    Up,
    /// One of these did not work in time.
    BringUpFailed,
    /// A reset is needed: an abort that did not help, a fatal status, a completion that nobody waits for, or somebody asked.
    ResetNeeded,
    /// Registers read as all ones, or the system asks for the drive back.
    Vanished,
    /// Somebody asked to detach it and its devices are closed.
    Detach,
    /// The drive was given back.
    Released,
}

impl State {
    /// All states.
    pub const ALL: [State; 7] = [
        State::Attaching,
        State::Ready,
        State::Resetting,
        State::Failed,
        State::Removed,
        State::Detaching,
        State::Gone,
    ];

    /// The state after an event; `None` when it changes nothing.
    pub const fn on(self, event: Event) -> Option<State> {
        use Event as E;
        use State as S;
        Some(match (self, event) {
            (S::Attaching | S::Resetting, E::Up) => S::Ready,
            (S::Attaching, E::BringUpFailed) => S::Detaching,
            (S::Resetting, E::BringUpFailed) => S::Failed,
            (S::Ready | S::Failed, E::ResetNeeded) => S::Resetting,
            (S::Ready | S::Resetting | S::Failed, E::Vanished) => S::Removed,
            (S::Attaching, E::Vanished) => S::Detaching,
            (S::Ready | S::Failed | S::Removed, E::Detach) => S::Detaching,
            (S::Detaching, E::Released) => S::Gone,
            _ => return None,
        })
    }

    pub(crate) const fn from_u8(n: u8) -> State {
        State::ALL[if n as usize >= State::ALL.len() { 6 } else { n as usize }]
    }

    /// As in `bdev_nvme_get_controllers`.
    pub const fn name(self) -> &'static str {
        match self {
            State::Attaching => "attaching",
            State::Ready => "enabled",
            State::Resetting => "resetting",
            State::Failed => "failed",
            State::Removed => "removed",
            State::Detaching => "deleting",
            State::Gone => "deleted",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENTS: [Event; 6] = [
        Event::Up,
        Event::BringUpFailed,
        Event::ResetNeeded,
        Event::Vanished,
        Event::Detach,
        Event::Released,
    ];

    /// Every state with every event, against the rules in words.
    #[test]
    fn exhaustive() {
        for state in State::ALL {
            for event in EVENTS {
                let bringing_up = matches!(state, State::Attaching | State::Resetting);
                let known = matches!(state, State::Ready | State::Resetting | State::Failed);
                let want = match event {
                    Event::Up => bringing_up.then_some(State::Ready),
                    Event::BringUpFailed if state == State::Attaching => Some(State::Detaching),
                    Event::BringUpFailed => bringing_up.then_some(State::Failed),
                    Event::ResetNeeded => (known && !bringing_up).then_some(State::Resetting),
                    Event::Vanished if state == State::Attaching => Some(State::Detaching),
                    Event::Vanished => known.then_some(State::Removed),
                    Event::Detach => {
                        ((known && !bringing_up) || state == State::Removed).then_some(State::Detaching)
                    }
                    Event::Released => (state == State::Detaching).then_some(State::Gone),
                };
                assert_eq!(state.on(event), want, "{state:?} {event:?}");
            }
            assert_eq!(State::from_u8(state as u8), state);
        }
    }

    /// The table in the documentation is this one.
    #[test]
    fn the_documented_table_is_the_code() {
        let text = include_str!("../../../docs/nvme.md");
        for state in State::ALL {
            for event in EVENTS {
                if let Some(next) = state.on(event) {
                    let row = text.lines().find(|l| {
                        let cells: Vec<&str> = l.split('|').map(str::trim).collect();
                        cells.len() > 4
                            && cells[1] == format!("{state:?}")
                            && cells[2] == format!("{event:?}")
                            && cells[3] == format!("{next:?}")
                    });
                    assert!(row.is_some(), "docs/nvme.md lacks | {state:?} | {event:?} | {next:?} |");
                }
            }
        }
    }
}
