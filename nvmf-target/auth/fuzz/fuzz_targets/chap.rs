//! Any messages in any order to both sides of DH-HMAC-CHAP, and any text as a secret: nobody is authenticated who does not
//! know the secret, one failure is the end, no panic.
//!
//! The first byte has switches; then come steps: a byte that says what happens and, for messages, a length byte and bytes.
#![no_main]

use cryptfold_nvmf_auth::{
    Concat, Controller, DhGroup, Entropy, HashId, Host, HostNext, Names, Offer, Progress, Secret,
};
use cryptfold_nvmf_spec::auth::{FromController, FromHost, Reply};
use libfuzzer_sys::fuzz_target;

fn names() -> Names {
    Names { host: "nqn.2024-01.io.cryptfold:h".into(), subsystem: "nqn.2024-01.io.cryptfold:s".into() }
}

/// Small groups only: the arithmetic is not what is tested here.
fn offer() -> Offer {
    Offer { hashes: HashId::ALL.to_vec(), groups: vec![DhGroup::Null, DhGroup::Ffdhe2048] }
}

fuzz_target!(|bytes: &[u8]| {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(secret) = Secret::parse(text)
    {
        assert_eq!(Secret::parse(&secret.to_text()), Ok(secret));
    }
    let Some((switches, mut rest)) = bytes.split_first() else { return };
    let secret = |n: u8| Secret::new(&[n; 32], None).expect("32 bytes");
    let own = (switches & 1 != 0).then(|| secret(2));
    let concat = Concat::ALL[usize::from(switches >> 1) % Concat::ALL.len()];
    let mut controller = Controller::new(names(), secret(1), own, offer(), Concat::ALL);
    // The host of this fuzzer has another secret: whatever it says, it must not get in, nor believe the controller.
    let theirs = (switches & 8 == 0).then(|| secret(4));
    let asks = theirs.is_some();
    let (mut host, negotiate) = Host::start(names(), secret(3), theirs, offer(), concat, 7);
    let mut answer = negotiate;
    let mut entropy = 1u8;
    let mut failed = None;
    while let Some((step, tail)) = rest.split_first() {
        rest = tail;
        entropy = entropy.wrapping_add(1);
        let fresh = Entropy::draw(|b| b.fill(entropy));
        match step % 5 {
            0 => {
                let Some((len, tail)) = rest.split_first() else { return };
                let (message, tail) = tail.split_at(usize::from(*len).min(tail.len()));
                rest = tail;
                let _ = (FromHost::parse(message), FromController::parse(message));
                for concat in Concat::ALL {
                    let _ = Reply::parse(message, HashId::Sha256, DhGroup::Ffdhe2048, *concat);
                }
                controller.receive(message, &fresh);
            }
            1 => {
                controller.receive(&answer, &fresh);
            }
            2 => {
                if let Some(message) = controller.send() {
                    match host.receive(&message, &fresh) {
                        HostNext::Send(m) | HostNext::Failed(_, Some(m)) => answer = m,
                        HostNext::Done if !asks => {}
                        HostNext::Finish(_) | HostNext::Done => panic!("the host believes a stranger"),
                        HostNext::Failed(_, None) => {}
                    }
                }
            }
            3 => {
                // Bits of the host's own message.
                if let (Some((at, tail)), true) = (rest.split_first(), !answer.is_empty()) {
                    rest = tail;
                    let at = usize::from(*at) % answer.len();
                    answer[at] ^= 1 << (step / 5 % 8);
                }
            }
            _ => answer.truncate(answer.len().saturating_sub(1 + usize::from(step / 5))),
        }
        let now = controller.progress();
        assert!(!matches!(now, Progress::Done(..)), "a stranger is authenticated");
        assert!(controller.take_key().is_none() && host.take_key().is_none(), "a stranger has a key");
        assert!(failed.is_none_or(|f| f == now), "a failure is final");
        if matches!(now, Progress::Failed(_)) {
            failed = Some(now);
        }
    }
});
