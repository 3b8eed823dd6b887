//! What can be wrong with a simulated controller.

use std::time::Duration;

use cryptfold_nvmf_spec::Status;

/// A fault. Those of commands hit I/O commands (not admin ones), each once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Never becomes ready again: CSTS.RDY stays 0.
    NeverReady,
    /// Never becomes disabled: CSTS.RDY stays 1, not even the function's reset helps.
    NeverDisabled,
    /// Sets CSTS.CFS and stops, until it is reset.
    Fatal,
    /// Sets CSTS.CFS whenever it is enabled.
    FatalWhenEnabled,
    /// Is gone: all registers read as ones, and it touches nothing.
    Remove,
    /// Executes nothing any more, admin commands neither, until it is reset.
    Stuck,
    /// It can be shown no more memory.
    Unmappable,
    /// A command gets no completion; an Abort ends it.
    Drop,
    /// A command gets no completion, and an Abort does not find it.
    Lose,
    /// A command's completion comes so much later; an Abort does not find it.
    Late(Duration),
    /// A completion carries another command's identifier.
    WrongCid,
    /// A command is completed twice.
    Duplicate,
    /// A command ends with this status and does nothing.
    Fails(Status),
    /// A command takes so much longer; an Abort ends it.
    Slow(Duration),
}

/// How a fault changes a command.
impl Fault {
    pub(super) fn is_of_command(self) -> bool {
        use Fault as F;
        matches!(self, F::Drop | F::Lose | F::Late(_) | F::WrongCid | F::Duplicate | F::Fails(_) | F::Slow(_))
    }
}
