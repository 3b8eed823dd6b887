//! The life of a connection: one transition table, and nothing else moves a connection between states.
//!
//! ```text
//!            IcReq                Connected
//! AwaitIcReq ------> AwaitConnect ------------------------> Ready
//!     |   |              |   |  AuthRequired                |   |
//!     |   |              |   |  ------> Authenticating -----+   |
//!     |   |              |   |             |       Authenticated|
//!     |   +--------------|---+-------------|-----------------|--+-- Fatal ---> Terminating
//!     |                  |                 |                 |                     |
//!     +------------------+-----------------+-----------------+---------------------+-- PeerGone, Deleted, Expired --> Draining
//!                                                                                                                       |
//!                                                                                                  Closed <--- Drained -+
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
    /// The queue exists, but the host has to prove who it is before anything else.
    Authenticating,
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
    /// Connect succeeded, and the host has to authenticate.
    AuthRequired,
    /// The host has authenticated.
    Authenticated,
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
    const ALL: [State; 7] = [
        State::AwaitIcReq,
        State::AwaitConnect,
        State::Authenticating,
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
            (S::AwaitConnect, E::AuthRequired) => S::Authenticating,
            (S::Authenticating, E::Authenticated) => S::Ready,
            (S::AwaitIcReq | S::AwaitConnect | S::Authenticating | S::Ready, E::Fatal) => S::Terminating,
            (
                S::AwaitIcReq | S::AwaitConnect | S::Authenticating | S::Ready | S::Terminating,
                E::PeerGone | E::Deleted | E::Expired,
            ) => S::Draining,
            (S::Draining, E::Drained) => S::Closed,
            _ => return None,
        })
    }

    /// Whether PDUs are taken from the socket.
    pub const fn receives(self) -> bool {
        matches!(self, State::AwaitIcReq | State::AwaitConnect | State::Authenticating | State::Ready)
    }

    /// Whether responses may still be queued.
    pub const fn answers(self) -> bool {
        matches!(self, State::AwaitIcReq | State::AwaitConnect | State::Authenticating | State::Ready)
    }

    /// Whether the socket is still open.
    pub const fn is_open(self) -> bool {
        !matches!(self, State::Draining | State::Closed)
    }
}

impl Event {
    /// All events.
    #[cfg(test)]
    const ALL: [Event; 9] = [
        Event::IcReq,
        Event::Connected,
        Event::AuthRequired,
        Event::Authenticated,
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
        let end = [Some(Draining), Some(Draining), Some(Draining), n];
        let row = |first: [Option<State>; 4], fatal: Option<State>, end: [Option<State>; 4]| {
            [first[0], first[1], first[2], first[3], fatal, end[0], end[1], end[2], end[3]]
        };
        let fatal = Some(Terminating);
        let table: [(State, [Option<State>; 9]); 7] = [
            // IcReq, Connected, AuthRequired, Authenticated; Fatal; PeerGone, Deleted, Expired, Drained
            (AwaitIcReq, row([Some(AwaitConnect), n, n, n], fatal, end)),
            (AwaitConnect, row([n, Some(Ready), Some(Authenticating), n], fatal, end)),
            (Authenticating, row([n, n, n, Some(Ready)], fatal, end)),
            (Ready, row([n; 4], fatal, end)),
            (Terminating, row([n; 4], n, end)),
            (Draining, row([n; 4], n, [n, n, n, Some(Closed)])),
            (Closed, row([n; 4], n, [n; 4])),
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
