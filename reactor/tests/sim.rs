//! The simulator and, through it, everything of the core that needs no operating system.

use cryptfold_reactor::{
    Deferred, Elapsed, Handle, Nanos, Poller, PollerGuard, ReactorGone, Sim, SleepVerdict, current, defer,
    fill_random, now, random_u64, register_poller, sleep, sleep_until, spawn_local, timeout, try_current,
    yield_now,
};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const MS: Duration = Duration::from_millis(1);

/// Several cores that talk, sleep and draw numbers. Returns the order of events and the scheduler's trace.
fn busy_run(seed: u64) -> (Vec<(u32, u64)>, u64, Nanos, Vec<u64>) {
    let mut sim = Sim::new(seed).cores(4);
    let handles = sim.handles().to_vec();
    let (order, numbers) = sim.run(move || async move {
        let log = Arc::new(std::sync::Mutex::new(Vec::new()));
        let mut numbers = Vec::new();
        let mut calls = Vec::new();
        for n in 0..40u64 {
            let handle = handles[n as usize % 4].clone();
            let log = log.clone();
            calls.push(spawn_local(async move {
                handle
                    .call(move || async move {
                        sleep(Duration::from_nanos(random_u64() % 1_000)).await;
                        log.lock().unwrap().push((current().id().0, n));
                        yield_now().await;
                        random_u64()
                    })
                    .await
                    .unwrap()
            }));
        }
        for call in calls {
            numbers.push(call.await);
        }
        let order = log.lock().unwrap().clone();
        (order, numbers)
    });
    (order, sim.trace(), sim.now(), numbers)
}

#[test]
fn the_seed_decides_the_run() {
    for seed in 0..20 {
        assert_eq!(busy_run(seed), busy_run(seed), "seed {seed}");
    }
    let mut orders: Vec<_> = (0..20).map(|seed| busy_run(seed).0).collect();
    orders.sort();
    orders.dedup();
    assert!(orders.len() > 15, "different seeds give different interleavings: {}", orders.len());
}

#[test]
fn time_is_virtual_and_jumps() {
    let wall = std::time::Instant::now();
    let (start, end) = Sim::new(1).run(|| async {
        let start = now();
        sleep(Duration::from_secs(3_600)).await;
        (start, now())
    });
    assert!(start < Nanos(1_000), "{start:?}");
    assert!(end - start >= Duration::from_secs(3_600) && end - start < Duration::from_secs(3_601));
    assert!(wall.elapsed() < Duration::from_secs(10));
}

#[test]
fn timers_fire_in_order_and_can_be_cancelled() {
    let order = Sim::new(2).run(|| async {
        let order = Rc::new(RefCell::new(Vec::new()));
        let base = now() + MS;
        let tasks: Vec<_> = [5u64, 1, 3, 3, 9]
            .into_iter()
            .enumerate()
            .map(|(n, after)| {
                let order = order.clone();
                spawn_local(async move {
                    sleep_until(base + MS * after as u32).await;
                    order.borrow_mut().push((after, n));
                })
            })
            .collect();
        let mut tasks = tasks;
        drop(tasks.pop());
        for task in tasks {
            task.await;
        }
        assert!(now() < base + MS * 6, "the cancelled timer is not waited for");
        sleep(MS * 20).await;
        order.take()
    });
    assert_eq!(order, [(1, 1), (3, 2), (3, 3), (5, 0)]);
}

#[test]
fn timeouts() {
    Sim::new(3).run(|| async {
        assert_eq!(timeout(MS, sleep(MS * 5)).await, Err(Elapsed));
        assert_eq!(
            timeout(MS * 5, async {
                sleep(MS).await;
                7
            })
            .await,
            Ok(7)
        );
        assert_eq!(timeout(Duration::ZERO, async { 8 }).await, Ok(8), "a result that is there wins");
        assert_eq!(timeout(Duration::MAX, async { 9 }).await, Ok(9));
    });
}

struct Push(Rc<RefCell<Vec<u32>>>, u32);

impl Deferred for Push {
    fn run(self: Box<Self>) {
        self.0.borrow_mut().push(self.1);
        if self.1 == 1 {
            let log = self.0.clone();
            defer(Box::new(Push(log, 10)));
            assert_eq!(self.0.borrow().last(), Some(&1), "not inside the caller's frame");
        }
    }
}

#[test]
fn deferred_calls_run_in_order_outside_of_the_caller() {
    let log = Sim::new(4).run(|| async {
        let log = Rc::new(RefCell::new(Vec::new()));
        for n in 0..4 {
            defer(Box::new(Push(log.clone(), n)));
        }
        assert!(log.borrow().is_empty());
        while log.borrow().len() < 5 {
            yield_now().await;
        }
        log.take()
    });
    assert_eq!(log, [0, 1, 2, 3, 10]);
}

struct Once {
    polls: Cell<u32>,
    guard: RefCell<Option<PollerGuard>>,
    verdict: SleepVerdict,
}

impl Poller for Once {
    fn poll(&self) -> bool {
        self.polls.set(self.polls.get() + 1);
        self.guard.take();
        true
    }

    fn prepare_sleep(&self) -> SleepVerdict {
        self.verdict
    }
}

#[test]
fn a_poller_may_unregister_itself_while_polled() {
    for verdict in [SleepVerdict::KeepPolling, SleepVerdict::MaySleep] {
        Sim::new(5).run(move || async move {
            let once = Rc::new(Once { polls: Cell::new(0), guard: RefCell::new(None), verdict });
            let other = Rc::new(Once { polls: Cell::new(0), guard: RefCell::new(None), verdict });
            let guard = register_poller("once", once.clone());
            *once.guard.borrow_mut() = Some(guard);
            let other_guard = register_poller("other", other.clone());
            let names = || current().stats().pollers.into_iter().map(|p| p.name).collect::<Vec<_>>();
            assert_eq!(names(), ["once", "other"]);
            while other.polls.get() < 10 {
                yield_now().await;
            }
            assert_eq!(once.polls.get(), 1);
            assert_eq!(Rc::strong_count(&once), 1, "the reactor lets go of it");
            assert_eq!(names(), ["other"]);
            let stats = current().stats().pollers.remove(0);
            assert!(stats.run_count >= 9 && stats.busy_count == stats.run_count, "{stats:?}");
            drop(other_guard);
            let polls = other.polls.get();
            sleep(MS).await;
            assert_eq!(other.polls.get(), polls);
            assert!(names().is_empty());
        });
    }
}

/// A poller without wake-up source on an otherwise idle core must be polled while another core is busy.
#[test]
fn pollers_are_not_starved() {
    struct Count(Arc<AtomicUsize>);
    impl Poller for Count {
        fn poll(&self) -> bool {
            self.0.fetch_add(1, Ordering::Relaxed);
            false
        }
    }
    let mut sim = Sim::new(6).cores(2);
    let polls = Arc::new(AtomicUsize::new(0));
    let (seen, other) = (polls.clone(), sim.handles()[1].clone());
    sim.run(move || async move {
        let counter = polls.clone();
        other
            .call(move || async move { std::mem::forget(register_poller("count", Rc::new(Count(counter)))) })
            .await
            .unwrap();
        while polls.load(Ordering::Relaxed) < 5 {
            yield_now().await;
        }
    });
    assert!(seen.load(Ordering::Relaxed) >= 5);
}

#[test]
fn messages_keep_their_order_and_calls_answer() {
    let mut sim = Sim::new(7).cores(3);
    let handles = sim.handles().to_vec();
    sim.run(move || async move {
        assert!(handles[0].is_current() && !handles[1].is_current());
        let log = Arc::new(std::sync::Mutex::new(Vec::new()));
        for n in 0..20 {
            let log = log.clone();
            handles[1].send(move || log.lock().unwrap().push((current().id().0, n)));
        }
        let me = handles[0].clone();
        let answer = handles[1]
            .call(move || async move { me.call(|| async { current().id().0 }).await.unwrap() + 100 })
            .await;
        assert_eq!(answer, Ok(100), "there and back");
        assert_eq!(*log.lock().unwrap(), (0..20).map(|n| (1, n)).collect::<Vec<_>>());
        assert_eq!(handles[0].call(|| async { 5 }).await, Ok(5), "also to itself");
        assert_eq!(handles[2].block_on(|| async { 5 }), Err(ReactorGone::OnReactor));
        assert_eq!(handles[1].stats().messages, 21);
    });
    assert_eq!(sim.handles()[1].block_on(|| async { 5 }), Err(ReactorGone::OnReactor));
}

#[test]
fn a_stall_is_an_error_with_its_seed() {
    let stalled = Sim::new(99).try_run(std::future::pending::<()>).unwrap_err();
    assert_eq!(stalled.seed, 99);
    assert!(stalled.to_string().contains("seed 99"));
    struct Lazy;
    impl Poller for Lazy {
        fn poll(&self) -> bool {
            false
        }
    }
    let stalled = Sim::new(98).try_run(|| async {
        let _guard = register_poller("lazy", Rc::new(Lazy));
        std::future::pending::<()>().await;
    });
    assert_eq!(stalled.unwrap_err().seed, 98, "a poller that never works is a stall too");
}

#[test]
#[should_panic(expected = "stalled")]
fn run_panics_when_stalled() {
    Sim::new(1).run(std::future::pending::<()>);
}

#[test]
fn a_panic_of_a_call_reaches_the_caller() {
    let result = std::panic::catch_unwind(|| {
        let mut sim = Sim::new(8).cores(2);
        let other = sim.handles()[1].clone();
        sim.run(move || async move { other.call(|| async { panic!("over there") }).await })
    });
    assert_eq!(result.unwrap_err().downcast_ref(), Some(&"over there"));
}

/// Counts live objects that tasks own, some with destructors that spawn, wake and send.
struct Alive(Arc<AtomicUsize>, Option<Handle>);

impl Alive {
    fn new(count: &Arc<AtomicUsize>, peer: Option<Handle>) -> Alive {
        count.fetch_add(1, Ordering::Relaxed);
        Alive(count.clone(), peer)
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
        if let Some(peer) = self.1.take() {
            let alive = Alive::new(&self.0, None);
            peer.send(move || drop(alive));
            let alive = Alive::new(&self.0, None);
            spawn_local(async move { drop(alive) }).detach();
            defer(Box::new(Push(Rc::default(), 0)));
        }
    }
}

/// A power cut: the run is abandoned anywhere, everything is dropped.
#[test]
fn abandoning_a_run_anywhere_drops_everything() {
    let mut cut_midway = 0;
    for seed in 0..100 {
        let alive = Arc::new(AtomicUsize::new(0));
        let mut sim = Sim::new(seed).cores(3);
        let handles = sim.handles().to_vec();
        let count = alive.clone();
        sim.spawn(0, move || async move {
            let (sender, mut receiver) = cryptfold_reactor::sync::mpsc::channel(2);
            for n in 0..30usize {
                let (handle, peer) = (handles[n % 3].clone(), handles[(n + 1) % 3].clone());
                let (count, sender) = (count.clone(), sender.clone());
                spawn_local(async move {
                    let alive = Alive::new(&count, Some(peer));
                    let there = Alive::new(&count, None);
                    let answer = handle.call(move || async move {
                        sleep(Duration::from_nanos(random_u64() % 5_000)).await;
                        there
                    });
                    let _ = sender.send((alive, answer.await)).await;
                })
                .detach();
            }
            drop(sender);
            while let Some((alive, _)) = receiver.recv().await {
                sleep(Duration::from_nanos(200)).await;
                drop(alive);
            }
        })
        .detach();
        sim.run_for(seed * 7);
        cut_midway += usize::from(alive.load(Ordering::Relaxed) > 0);
        drop(sim);
        assert_eq!(alive.load(Ordering::Relaxed), 0, "seed {seed}");
    }
    assert!(cut_midway > 20, "{cut_midway} runs had something to drop");
}

#[test]
fn run_until_stops_where_told() {
    let mut sim = Sim::new(9);
    let count = Rc::new(Cell::new(0));
    let counter = count.clone();
    let task = sim.spawn(0, move || async move {
        loop {
            counter.set(counter.get() + 1);
            sleep(MS).await;
        }
        #[allow(unreachable_code)]
        ()
    });
    let seen = count.clone();
    assert!(sim.run_until(move || seen.get() == 5));
    assert_eq!(count.get(), 5);
    drop(task);
    let seen = count.clone();
    assert!(!sim.run_until(move || seen.get() == 6), "the task was cancelled: nothing can run");
}

#[test]
fn randomness_is_repeatable() {
    let draw = |seed| {
        Sim::new(seed).run(|| async {
            let mut bytes = [0; 13];
            fill_random(&mut bytes);
            (random_u64(), bytes)
        })
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
}

#[test]
fn outside_of_a_reactor() {
    assert!(try_current().is_none());
    assert!(now() > Nanos(0));
    assert_ne!(random_u64(), random_u64());
    let panic = std::panic::catch_unwind(|| spawn_local(async {}).detach()).unwrap_err();
    assert!(panic.downcast_ref::<&str>().unwrap().contains("outside of a reactor"));
}

#[test]
fn a_cancelled_task_is_dropped_soon() {
    Sim::new(10).run(|| async {
        let alive = Arc::new(AtomicUsize::new(0));
        let held = Alive::new(&alive, None);
        let task = spawn_local(async move {
            let _held = held;
            std::future::pending::<()>().await;
        });
        yield_now().await;
        assert_eq!(task.cancel().await, None);
        assert_eq!(alive.load(Ordering::Relaxed), 0);
        assert_eq!(current().stats().tasks, 1, "only this one is left");
    });
}
