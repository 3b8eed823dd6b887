//! The life of a connection: one transition table, and nothing else moves a connection between states.
//!
//! ```text
//!            IcReq                Connected
//! AwaitIcReq ------> AwaitConnect ---------> Ready
//!     |   |              |   |               |   |
//!     |   +--------------|---+---------------|---+--- Fatal ---> Terminating
//!     |                  |                   |                       |
//!     +------------------+-------------------+-----------------------+--- PeerGone, Deleted, Expired ---> Draining
//!                                                                                                            |
//!                                                                                       Closed <--- Drained -+
//! ```
//!
//! In `Draining` the socket is shut and the connection waits for its I/O to come back from the devices; `Closed` is
//! reached once, and only there resources are freed.

/// Where a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// The socket is connected; ICReq has to come first.
    AwaitIcReq,
    /// ICResp is queued; the only command accepted is Fabrics Connect.
    AwaitConnect,
    /// The queue exists: commands and data flow.
    Ready,
    /// A fatal error was found: C2HTermReq is on its way out, what comes in is thrown away.
    Terminating,
    /// The socket is shut; I/O that devices still hold is waited for.
    Draining,
    /// Nothing is left.
    Closed,
}

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// A legal ICReq arrived.
    IcReq,
    /// Connect succeeded.
    Connected,
    /// A transport error that is answered with a termination request.
    Fatal,
    /// End of file, reset, or a termination request from the peer.
    PeerGone,
    /// Removed by us: controller, subsystem, listener or target go away, or Disconnect.
    Deleted,
    /// A deadline passed.
    Expired,
    /// No I/O is outstanding any more.
    Drained,
}

impl State {
    /// All states.
    #[cfg(test)]
    const ALL: [State; 6] = [
        State::AwaitIcReq,
        State::AwaitConnect,
        State::Ready,
        State::Terminating,
        State::Draining,
        State::Closed,
    ];

    /// The table: where `event` leads, `None` where it has no meaning (a caller's bug, or too late to matter).
    pub const fn next(self, event: Event) -> Option<State> {
        use Event as E;
        use State as S;
        Some(match (self, event) {
            (S::AwaitIcReq, E::IcReq) => S::AwaitConnect,
            (S::AwaitConnect, E::Connected) => S::Ready,
            (S::AwaitIcReq | S::AwaitConnect | S::Ready, E::Fatal) => S::Terminating,
            (
                S::AwaitIcReq | S::AwaitConnect | S::Ready | S::Terminating,
                E::PeerGone | E::Deleted | E::Expired,
            ) => S::Draining,
            (S::Draining, E::Drained) => S::Closed,
            _ => return None,
        })
    }

    /// Whether PDUs are taken from the socket.
    pub const fn receives(self) -> bool {
        matches!(self, State::AwaitIcReq | State::AwaitConnect | State::Ready)
    }

    /// Whether responses may still be queued.
    pub const fn answers(self) -> bool {
        matches!(self, State::AwaitIcReq | State::AwaitConnect | State::Ready)
    }

    /// Whether the socket is still open.
    pub const fn is_open(self) -> bool {
        !matches!(self, State::Draining | State::Closed)
    }
}

impl Event {
    /// All events.
    #[cfg(test)]
    const ALL: [Event; 7] = [
        Event::IcReq,
        Event::Connected,
        Event::Fatal,
        Event::PeerGone,
        Event::Deleted,
        Event::Expired,
        Event::Drained,
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table once more, as a picture: rows are states, columns are events in the order of `Event::ALL`.
    #[test]
    fn every_cell_of_the_table() {
        use State::*;
        let n = None;
        #[rustfmt::skip]
        let table: [(State, [Option<State>; 7]); 6] = [
            //             IcReq               Connected    Fatal              PeerGone        Deleted         Expired         Drained
            (AwaitIcReq,   [Some(AwaitConnect), n, Some(Terminating), Some(Draining), Some(Draining), Some(Draining), n]),
            (AwaitConnect, [n, Some(Ready), Some(Terminating), Some(Draining), Some(Draining), Some(Draining), n]),
            (Ready,        [n, n, Some(Terminating), Some(Draining), Some(Draining), Some(Draining), n]),
            (Terminating,  [n, n, n, Some(Draining), Some(Draining), Some(Draining), n]),
            (Draining,     [n, n, n, n, n, n, Some(Closed)]),
            (Closed,       [n, n, n, n, n, n, n]),
        ];
        for (state, row) in table {
            for (event, want) in Event::ALL.into_iter().zip(row) {
                assert_eq!(state.next(event), want, "{state:?} on {event:?}");
            }
        }
    }

    /// Whatever happens, in whatever order: no way back, and every open state has a way to `Closed`.
    #[test]
    fn states_only_move_forward_and_always_end() {
        let rank = |s: State| State::ALL.iter().position(|x| *x == s).unwrap_or(usize::MAX);
        for s in State::ALL {
            for e in Event::ALL {
                if let Some(next) = s.next(e) {
                    assert!(rank(next) > rank(s), "{s:?} on {e:?} goes back to {next:?}");
                }
            }
            if s != State::Closed {
                let end = s.next(Event::Deleted).unwrap_or(s).next(Event::Drained);
                assert_eq!(end, Some(State::Closed), "{s:?} can be deleted");
            }
        }
    }
}
