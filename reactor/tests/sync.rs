//! The local synchronisation, on simulated cores.

use cryptfold_reactor::sync::{Event, Mutex, Notify, Semaphore, mpsc, oneshot};
use cryptfold_reactor::{Sim, Task, random_u64, sleep, spawn_local, timeout, yield_now};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

const MS: Duration = Duration::from_millis(1);

async fn all<T>(tasks: Vec<Task<T>>) -> Vec<T> {
    let mut results = Vec::new();
    for task in tasks {
        results.push(task.await);
    }
    results
}

#[test]
fn oneshot_delivers_or_says_why_not() {
    Sim::new(1).run(|| async {
        let (sender, receiver) = oneshot::channel();
        let task = spawn_local(receiver);
        yield_now().await;
        assert!(!sender.is_closed());
        assert_eq!(sender.send(5), Ok(()));
        assert_eq!(task.await, Ok(5));
        let (sender, mut receiver) = oneshot::channel::<u8>();
        assert_eq!(receiver.try_recv(), None);
        drop(sender);
        assert_eq!(receiver.await, Err(oneshot::Closed));
        let (sender, receiver) = oneshot::channel();
        drop(receiver);
        assert!(sender.is_closed());
        assert_eq!(sender.send("back"), Err("back"));
        let (sender, mut receiver) = oneshot::channel();
        sender.send(1).unwrap();
        assert_eq!(receiver.try_recv(), Some(1));
        assert_eq!(receiver.await, Err(oneshot::Closed), "only one value");
    });
}

#[test]
fn the_semaphore_is_fair() {
    Sim::new(2).run(|| async {
        let semaphore = Rc::new(Semaphore::new(3));
        let order = Rc::new(RefCell::new(Vec::new()));
        let first = semaphore.try_acquire(2).unwrap();
        let spawn = |amount: usize| {
            let (semaphore, order) = (semaphore.clone(), order.clone());
            spawn_local(async move {
                let permit = semaphore.acquire(amount).await;
                order.borrow_mut().push(permit.amount());
                yield_now().await;
            })
        };
        let big = spawn(3);
        yield_now().await;
        let small = spawn(1);
        yield_now().await;
        assert!(semaphore.try_acquire(1).is_none(), "one is free, but others wait");
        assert!(order.borrow().is_empty(), "the small one does not overtake");
        drop(first);
        all(vec![big, small]).await;
        assert_eq!(*order.borrow(), [3, 1]);
        assert_eq!(semaphore.available(), 3);
        semaphore.try_acquire(3).unwrap().forget();
        assert_eq!(semaphore.available(), 0);
        semaphore.add_permits(1);
        assert_eq!(semaphore.available(), 1);
    });
}

#[test]
fn a_waiter_that_leaves_lets_the_next_pass() {
    Sim::new(3).run(|| async {
        let semaphore = Semaphore::new(1);
        let held = semaphore.acquire(1).await;
        assert!(timeout(MS, semaphore.acquire(1)).await.is_err());
        let mut big = Box::pin(semaphore.acquire(2));
        assert!(timeout(MS, big.as_mut()).await.is_err());
        let mut small = Box::pin(semaphore.acquire(1));
        assert!(timeout(MS, small.as_mut()).await.is_err());
        drop(held);
        assert_eq!(semaphore.available(), 1, "the big one waits in front");
        drop(big);
        assert_eq!(semaphore.available(), 0, "granted to the small one");
        drop(small);
        assert_eq!(semaphore.available(), 1, "which left without taking it");
    });
}

/// Random users, some of which give up: never more than the permits, none lost.
#[test]
fn the_semaphore_counts_under_random_use() {
    for seed in 0..200 {
        Sim::new(seed).run(move || async move {
            let semaphore = Rc::new(Semaphore::new(5));
            let used = Rc::new(Cell::new(0));
            let tasks = (0..40)
                .map(|_| {
                    let (semaphore, used) = (semaphore.clone(), used.clone());
                    spawn_local(async move {
                        sleep(Duration::from_nanos(random_u64() % 3_000)).await;
                        let amount = 1 + random_u64() as usize % 5;
                        let patience = Duration::from_nanos(random_u64() % 20_000);
                        let Ok(permit) = timeout(patience, semaphore.acquire(amount)).await else { return 0 };
                        used.set(used.get() + amount);
                        assert!(used.get() <= 5, "seed {seed}");
                        sleep(Duration::from_nanos(random_u64() % 2_000)).await;
                        used.set(used.get() - amount);
                        drop(permit);
                        1
                    })
                })
                .collect();
            assert!(all(tasks).await.iter().sum::<u32>() > 0);
            assert_eq!(semaphore.available(), 5, "seed {seed}");
        });
    }
}

#[test]
fn the_mutex_excludes_in_order() {
    Sim::new(4).run(|| async {
        let mutex = Rc::new(Mutex::new(Vec::new()));
        let guard = mutex.try_lock().unwrap();
        assert!(mutex.try_lock().is_none());
        let tasks = (0..5)
            .map(|n| {
                let mutex = mutex.clone();
                spawn_local(async move {
                    let mut list = mutex.lock().await;
                    let before = list.len();
                    sleep(MS).await;
                    assert_eq!(list.len(), before);
                    list.push(n);
                })
            })
            .collect();
        yield_now().await;
        drop(guard);
        all(tasks).await;
        assert_eq!(Rc::into_inner(mutex).unwrap().into_inner(), [0, 1, 2, 3, 4]);
    });
}

#[test]
fn notify_keeps_one_and_passes_on() {
    Sim::new(5).run(|| async {
        let notify = Rc::new(Notify::new());
        notify.notify_one();
        notify.notify_one();
        notify.notified().await;
        assert!(timeout(MS, notify.notified()).await.is_err(), "only one is kept");
        notify.notify_waiters();
        assert!(timeout(MS, notify.notified()).await.is_err(), "nobody waited");

        let count = Rc::new(Cell::new(0));
        let spawn = || {
            let (notify, count) = (notify.clone(), count.clone());
            spawn_local(async move {
                notify.notified().await;
                count.set(count.get() + 1);
            })
        };
        let tasks: Vec<_> = (0..3).map(|_| spawn()).collect();
        sleep(MS).await;
        notify.notify_one();
        sleep(MS).await;
        assert_eq!(count.get(), 1);
        notify.notify_waiters();
        all(tasks).await;
        assert_eq!(count.get(), 3);

        let (leaver, stayer) = (spawn(), spawn());
        sleep(MS).await;
        notify.notify_one();
        drop(leaver);
        assert_eq!(timeout(MS, stayer).await, Ok(()), "a notification of one that left goes to the next");
    });
}

#[test]
fn events_stay_set() {
    Sim::new(6).run(|| async {
        let event = Rc::new(Event::new());
        let waiters = (0..3)
            .map(|_| {
                let event = event.clone();
                spawn_local(async move { event.wait().await })
            })
            .collect();
        sleep(MS).await;
        assert!(!event.is_set());
        event.set();
        all(waiters).await;
        event.wait().await;
        event.reset();
        assert!(timeout(MS, event.wait()).await.is_err());
    });
}

#[test]
fn the_queue_is_bounded_ordered_and_ends() {
    for seed in 0..50 {
        Sim::new(seed).run(move || async move {
            let (sender, mut receiver) = mpsc::channel(3);
            let senders: Vec<_> = (0..4u32)
                .map(|who| {
                    let sender = sender.clone();
                    spawn_local(async move {
                        for n in 0..25u32 {
                            if random_u64().is_multiple_of(3) {
                                sleep(Duration::from_nanos(random_u64() % 1_000)).await;
                            }
                            sender.send((who, n)).await.unwrap();
                        }
                    })
                })
                .collect();
            drop(sender);
            let mut next = [0; 4];
            while let Some((who, n)) = receiver.recv().await {
                assert!(receiver.len() <= 3, "bounded");
                assert_eq!(n, next[who as usize], "in order");
                next[who as usize] += 1;
                if random_u64().is_multiple_of(5) {
                    sleep(Duration::from_nanos(random_u64() % 2_000)).await;
                }
            }
            assert_eq!(next, [25; 4]);
            all(senders).await;
        });
    }
}

#[test]
fn a_queue_without_receiver_refuses() {
    Sim::new(7).run(|| async {
        let (sender, mut receiver) = mpsc::channel(1);
        assert_eq!(sender.try_send(1), Ok(()));
        assert_eq!(sender.try_send(2), Err(mpsc::SendError::Full(2)));
        let waiting = sender.clone();
        let task = spawn_local(async move { waiting.send(3).await });
        yield_now().await;
        assert_eq!(receiver.recv().await, Some(1));
        assert_eq!(sender.try_send(4), Err(mpsc::SendError::Full(4)), "the one that waits comes first");
        assert_eq!(task.await, Ok(()));
        let waiting = sender.clone();
        let task = spawn_local(async move { waiting.send(5).await });
        yield_now().await;
        drop(receiver);
        assert_eq!(task.await, Err(mpsc::SendError::Closed(5)));
        assert_eq!(sender.try_send(6), Err(mpsc::SendError::Closed(6)));
        assert!(sender.is_closed());
    });
}
