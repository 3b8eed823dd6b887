//! A reactor that its owner's thread runs.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cryptfold_reactor::{self as reactor, IdlePolicy, Inline, MemoryConfig, RuntimeConfig};

fn inline(policy: IdlePolicy) -> Inline {
    let memory = MemoryConfig { fixed_buffers: false, arena_bytes: 4 << 20, ..Default::default() };
    Inline::new(&RuntimeConfig { policy, memory, ..RuntimeConfig::default() }).expect("a reactor")
}

#[test]
fn turns_run_tasks_timers_and_messages() {
    let mut reactor = inline(IdlePolicy::default());
    assert!(reactor::try_current().is_none(), "nothing is entered between turns");
    let done = Rc::new(Cell::new(0));
    let counted = done.clone();
    reactor.enter(|| reactor::spawn_local(async move { counted.set(counted.get() + 1) }).detach());
    assert_eq!(done.get(), 0, "a task waits for a turn");
    assert!(reactor.turn(false));
    assert_eq!(done.get(), 1);
    // A sleeping reactor is woken by another thread.
    let handle = reactor.handle();
    let (told, mut hear) = reactor::sync::oneshot::channel();
    let woken = Arc::new(AtomicBool::new(false));
    let answered = woken.clone();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        let answer = move || async move {
            answered.store(true, Ordering::Release);
            7
        };
        handle.block_on(answer).expect("the reactor lives")
    });
    reactor.enter(|| reactor::spawn_local(async move { drop(told.send(thread)) }).detach());
    let thread = reactor.block_on(async move {
        reactor::sleep(Duration::from_millis(1)).await;
        (&mut hear).await.expect("told")
    });
    // Not until the thread has ended: it may be late, and nothing would end a further sleep.
    while !woken.load(Ordering::Acquire) {
        reactor.turn(true);
    }
    assert_eq!(thread.join().expect("no panic"), 7);
}

#[test]
fn waiting_without_work_sleeps_until_a_timer() {
    let mut reactor = inline(IdlePolicy::Interrupt);
    let begin = Instant::now();
    reactor.block_on(reactor::sleep(Duration::from_millis(30)));
    assert!(begin.elapsed() >= Duration::from_millis(30));
    assert!(reactor.handle().stats().sleeps > 0);
}

#[test]
fn what_is_left_is_dropped_with_it() {
    struct Noted(Rc<Cell<bool>>);
    impl Drop for Noted {
        fn drop(&mut self) {
            assert!(reactor::try_current().is_some(), "dropped on its reactor");
            self.0.set(true);
        }
    }
    let dropped = Rc::new(Cell::new(false));
    let mut reactor = inline(IdlePolicy::default());
    let noted = Noted(dropped.clone());
    reactor.enter(|| {
        reactor::spawn_local(async move {
            let _noted = noted;
            std::future::pending::<()>().await;
        })
        .detach();
    });
    reactor.turn(false);
    let handle = reactor.handle();
    drop(reactor);
    assert!(dropped.get());
    assert!(handle.is_gone() && handle.block_on(|| async {}).is_err());
}
