//! The life of a controller's CC and CSTS (NVMe Base 2.0 sections 3.5.3, 3.6.1, 3.7.2) as one transition table.
//!
//! ```text
//!                Enable               Started
//!   Disabled ------------> Enabling ----------> Ready
//!    ^   |  ^                  |                  |
//!    |   |  | Quiesced         | Disable          | Shutdown
//!    |   |  +------ Resetting <+------------------+--> ShuttingDown --ShutdownDone--> ShutDown
//!    |   | Shutdown     ^  ^                              |                              |
//!    |   v              |  +------------ Disable ---------+------------ Disable ---------+
//!    | Idle (SHST = 10b, EN = 0)
//!    +---  Enable goes to Enabling
//!   any state --Fatal--> Failed --Disable--> Resetting;  any state --SubsystemReset--> Resetting
//! ```
//!
//! `Resetting` drains the queues before RDY falls. Every move that is not in [`TABLE`] is refused.

use crate::property::{Cc, Csts};

/// States of a controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// EN = 0, RDY = 0.
    Disabled,
    /// EN = 1, RDY = 0: starting.
    Enabling,
    /// EN = 1, RDY = 1: commands are executed.
    Ready,
    /// EN = 1, SHST = 01b.
    ShuttingDown,
    /// EN = 1, SHST = 10b: a reset is needed before it can be used again.
    ShutDown,
    /// EN = 0, RDY = 0, SHST = 10b: shut down while disabled.
    Idle,
    /// EN = 0, RDY = 1: a controller level reset drains.
    Resetting,
    /// CFS = 1: a reset is needed.
    Failed,
}

/// What moves a controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// CC.EN 0 to 1.
    Enable,
    /// The controller is initialized.
    Started,
    /// CC.EN 1 to 0: controller level reset.
    Disable,
    /// Commands are drained and queues are gone.
    Quiesced,
    /// CC.SHN written 01b or 10b.
    Shutdown,
    /// Caches are flushed, nothing is in flight.
    ShutdownDone,
    /// NSSR written with "NVMe", or the transport's reset.
    SubsystemReset,
    /// The controller cannot go on, or was enabled with an illegal configuration.
    Fatal,
}

impl State {
    /// All states.
    pub const ALL: [Self; 8] = [
        Self::Disabled,
        Self::Enabling,
        Self::Ready,
        Self::ShuttingDown,
        Self::ShutDown,
        Self::Idle,
        Self::Resetting,
        Self::Failed,
    ];

    /// The state after `event`, `None` if the move is not legal here.
    pub fn on(self, event: Event) -> Option<Self> {
        TABLE.iter().find(|(from, on, _)| (*from, *on) == (self, event)).map(|&(_, _, to)| to)
    }

    /// RDY, CFS and SHST as Property Get shows them.
    pub const fn csts(self) -> Csts {
        let csts = Csts(0);
        match self {
            Self::Disabled | Self::Enabling => csts,
            Self::Ready | Self::Resetting => csts.with_rdy(1),
            Self::ShuttingDown => csts.with_rdy(1).with_shst(0b01),
            Self::ShutDown => csts.with_rdy(1).with_shst(0b10),
            Self::Idle => csts.with_shst(0b10),
            Self::Failed => csts.with_cfs(1),
        }
    }

    /// Whether commands other than Fabrics commands are executed.
    pub const fn executes_commands(self) -> bool {
        matches!(self, Self::Ready)
    }
}

impl Event {
    /// All events.
    pub const ALL: [Self; 8] = [
        Self::Enable,
        Self::Started,
        Self::Disable,
        Self::Quiesced,
        Self::Shutdown,
        Self::ShutdownDone,
        Self::SubsystemReset,
        Self::Fatal,
    ];

    /// What a write of `new` over `old` asks for, in this order. A reset wins over a shutdown notification in
    /// the same write; a notification counts when it changes to 01b or 10b.
    pub fn of_cc_write(old: Cc, new: Cc) -> [Option<Self>; 2] {
        let enable = match (old.en(), new.en()) {
            (0, 1) => Some(Self::Enable),
            (1, 0) => return [Some(Self::Disable), None],
            _ => None,
        };
        let notified = new.shn() != old.shn() && matches!(new.shn(), 0b01 | 0b10);
        [enable, notified.then_some(Self::Shutdown)]
    }
}

/// Every legal move: from, event, to.
pub const TABLE: &[(State, Event, State)] = {
    use Event::*;
    use State::*;
    &[
        (Disabled, Enable, Enabling),
        (Disabled, Shutdown, Idle),
        (Disabled, SubsystemReset, Resetting),
        (Disabled, Fatal, Failed),
        (Enabling, Started, Ready),
        (Enabling, Disable, Resetting),
        (Enabling, Shutdown, ShuttingDown),
        (Enabling, SubsystemReset, Resetting),
        (Enabling, Fatal, Failed),
        (Ready, Disable, Resetting),
        (Ready, Shutdown, ShuttingDown),
        (Ready, SubsystemReset, Resetting),
        (Ready, Fatal, Failed),
        (ShuttingDown, ShutdownDone, ShutDown),
        // Normal turned into abrupt.
        (ShuttingDown, Shutdown, ShuttingDown),
        (ShuttingDown, Disable, Resetting),
        (ShuttingDown, SubsystemReset, Resetting),
        (ShuttingDown, Fatal, Failed),
        (ShutDown, Shutdown, ShutDown),
        (ShutDown, Disable, Resetting),
        (ShutDown, SubsystemReset, Resetting),
        (ShutDown, Fatal, Failed),
        (Idle, Shutdown, Idle),
        (Idle, Enable, Enabling),
        (Idle, SubsystemReset, Resetting),
        (Idle, Fatal, Failed),
        (Resetting, Quiesced, Disabled),
        (Resetting, SubsystemReset, Resetting),
        (Resetting, Fatal, Failed),
        (Failed, Disable, Resetting),
        (Failed, SubsystemReset, Resetting),
        (Failed, Fatal, Failed),
    ]
};

#[cfg(test)]
mod tests {
    use super::*;

    /// Every state with every event, against the rules in words rather than the table.
    #[test]
    fn exhaustive() {
        use Event as E;
        use State as S;
        for state in State::ALL {
            for event in Event::ALL {
                let running = matches!(state, S::Enabling | S::Ready | S::ShuttingDown | S::ShutDown);
                let want = match event {
                    E::Fatal => Some(S::Failed),
                    E::SubsystemReset => Some(S::Resetting),
                    E::Disable => (running || state == S::Failed).then_some(S::Resetting),
                    E::Enable => matches!(state, S::Disabled | S::Idle).then_some(S::Enabling),
                    E::Started => (state == S::Enabling).then_some(S::Ready),
                    E::Quiesced => (state == S::Resetting).then_some(S::Disabled),
                    E::ShutdownDone => (state == S::ShuttingDown).then_some(S::ShutDown),
                    E::Shutdown => match state {
                        S::Disabled | S::Idle => Some(S::Idle),
                        S::ShutDown => Some(S::ShutDown),
                        _ if running => Some(S::ShuttingDown),
                        _ => None,
                    },
                };
                assert_eq!(state.on(event), want, "{state:?} {event:?}");
            }
        }
    }

    #[test]
    fn the_table_names_each_move_once() {
        for (i, a) in TABLE.iter().enumerate() {
            assert!(TABLE[..i].iter().all(|b| (a.0, a.1) != (b.0, b.1)), "{a:?}");
        }
    }

    #[test]
    fn only_ready_states_show_rdy_and_only_one_executes() {
        let shown = State::ALL.map(|s| (s.csts().rdy(), s.csts().cfs(), s.csts().shst()));
        let want = [(0, 0, 0), (0, 0, 0), (1, 0, 0), (1, 0, 1), (1, 0, 2), (0, 0, 2), (1, 0, 0), (0, 1, 0)];
        assert_eq!(shown, want);
        assert_eq!(State::ALL.iter().filter(|s| s.executes_commands()).count(), 1);
    }

    #[test]
    fn cc_writes() {
        let cc = |en, shn| Cc(0x0046_0000).with_en(en).with_shn(shn);
        let events = |old, new| Event::of_cc_write(old, new);
        assert_eq!(events(cc(0, 0), cc(1, 0)), [Some(Event::Enable), None]);
        assert_eq!(events(cc(1, 0), cc(1, 0)), [None, None]);
        assert_eq!(events(cc(1, 0), cc(1, 1)), [None, Some(Event::Shutdown)]);
        assert_eq!(events(cc(1, 1), cc(1, 1)), [None, None]);
        assert_eq!(events(cc(1, 1), cc(1, 2)), [None, Some(Event::Shutdown)]);
        assert_eq!(events(cc(1, 1), cc(1, 0)), [None, None]);
        assert_eq!(events(cc(1, 0), cc(1, 3)), [None, None]);
        assert_eq!(events(cc(1, 0), cc(0, 1)), [Some(Event::Disable), None]);
        assert_eq!(events(cc(0, 0), cc(1, 1)), [Some(Event::Enable), Some(Event::Shutdown)]);
        assert_eq!(events(cc(0, 0), cc(0, 1)), [None, Some(Event::Shutdown)]);
    }
}
