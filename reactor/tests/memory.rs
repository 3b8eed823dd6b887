//! Buffers against models, and the pools' accounts. One test at a time looks at the accounts: they are the process's.

use cryptfold_reactor::memory::{self, ALIGNMENT, Buf, PageKind, SecretBytes, SgList};
use proptest::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

static ACCOUNTS: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ACCOUNTS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone, Debug)]
enum Op {
    Alloc(usize, u8),
    Zeroes(usize),
    Clone(usize),
    Slice(usize, usize, usize),
    SplitTo(usize, usize),
    Truncate(usize, usize),
    MakeMut(usize, u8),
    GetMut(usize, u8),
    Drop(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let len = prop_oneof![0usize..200, 4_000usize..5_000, 60_000usize..70_000, 1_040_000usize..1_060_000];
    let op = prop_oneof![
        (len.clone(), any::<u8>()).prop_map(|(len, fill)| Op::Alloc(len, fill)),
        len.prop_map(Op::Zeroes),
        any::<usize>().prop_map(Op::Clone),
        any::<(usize, usize, usize)>().prop_map(|(which, a, b)| Op::Slice(which, a, b)),
        any::<(usize, usize)>().prop_map(|(which, n)| Op::SplitTo(which, n)),
        any::<(usize, usize)>().prop_map(|(which, n)| Op::Truncate(which, n)),
        any::<(usize, u8)>().prop_map(|(which, fill)| Op::MakeMut(which, fill)),
        any::<(usize, u8)>().prop_map(|(which, fill)| Op::GetMut(which, fill)),
        any::<usize>().prop_map(Op::Drop),
    ];
    prop::collection::vec(op, 1..60)
}

/// A buffer with its expected bytes and the block it shares (None: the read-only zeroes).
type Modelled = (Buf, Vec<u8>, Option<usize>);

fn apply(bufs: &mut Vec<Modelled>, op: Op, blocks: &mut usize) {
    let count = bufs.len();
    let fresh = |blocks: &mut usize| {
        *blocks += 1;
        Some(*blocks)
    };
    match op {
        Op::Alloc(len, fill) => {
            let mut buf = Buf::alloc(len);
            assert_eq!((buf.len(), buf.as_ptr() as usize % ALIGNMENT), (len, 0));
            buf.make_mut().fill(fill);
            bufs.push((buf, vec![fill; len], if len > 0 { fresh(blocks) } else { None }));
        }
        Op::Zeroes(len) => bufs.push((Buf::zeroes(len), vec![0; len], None)),
        _ if count == 0 => {}
        Op::Clone(which) => bufs.push(bufs[which % count].clone()),
        Op::Slice(which, a, b) => {
            let (buf, bytes, block) = &bufs[which % count];
            let (a, b) = (a % (bytes.len() + 1), b % (bytes.len() + 1));
            let range = a.min(b)..a.max(b);
            let part = (buf.slice(range.clone()), bytes[range].to_vec(), *block);
            bufs.push(part);
        }
        Op::SplitTo(which, n) => {
            let (buf, bytes, block) = &mut bufs[which % count];
            let n = n % (bytes.len() + 1);
            let tail = bytes.split_off(n);
            let head = (buf.split_to(n), std::mem::replace(bytes, tail), *block);
            bufs.push(head);
        }
        Op::Truncate(which, n) => {
            let (buf, bytes, _) = &mut bufs[which % count];
            buf.truncate(n % (bytes.len() + 2));
            bytes.truncate(n % (bytes.len() + 2));
        }
        Op::MakeMut(which, fill) => {
            let which = which % count;
            let unique = is_unique(bufs, which);
            let (buf, bytes, block) = &mut bufs[which];
            let before = buf.as_ptr();
            buf.make_mut().fill(fill);
            bytes.fill(fill);
            if !unique {
                *block = if bytes.is_empty() { None } else { fresh(blocks) };
            }
            assert!(!unique || buf.as_ptr() == before, "no copy when unique");
        }
        Op::GetMut(which, fill) => {
            let which = which % count;
            let unique = is_unique(bufs, which);
            let (buf, bytes, _) = &mut bufs[which];
            assert_eq!(buf.is_unique(), unique);
            assert_eq!(buf.get_mut().map(|slice| slice.fill(fill)).is_some(), unique);
            if unique {
                bytes.fill(fill);
            }
        }
        Op::Drop(which) => drop(bufs.swap_remove(which % count)),
    }
}

fn is_unique(bufs: &[Modelled], which: usize) -> bool {
    let block = bufs[which].2;
    block.is_some() && bufs.iter().filter(|(.., other)| *other == block).count() == 1
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Writes through one buffer never show in another, and uniqueness is exact.
    #[test]
    fn buffers_behave_like_vectors(ops in ops()) {
        let _alone = alone();
        let before = memory::stats();
        let (mut bufs, mut blocks) = (Vec::new(), 0);
        for op in ops {
            apply(&mut bufs, op, &mut blocks);
            for (buf, bytes, _) in &bufs {
                assert_eq!(buf.as_slice(), &bytes[..]);
                assert_eq!(buf.is_zero(), bytes.iter().all(|&byte| byte == 0));
            }
        }
        drop(bufs);
        let after = memory::stats();
        prop_assert_eq!((after.in_use_bytes, after.large_bytes), (before.in_use_bytes, before.large_bytes));
    }

    /// Scatter lists behave like the string of their bytes.
    #[test]
    fn scatter_lists_behave_like_vectors(
        cuts in prop::collection::vec(0usize..60, 0..8),
        other_cuts in prop::collection::vec(1usize..40, 1..8),
        a in any::<usize>(), b in any::<usize>(), flip in any::<usize>(),
    ) {
        let _alone = alone();
        let total = cuts.iter().sum::<usize>();
        let bytes: Vec<u8> = (0..total).map(|n| n as u8).collect();
        let cut = |cuts: &[usize]| {
            let mut rest = &bytes[..];
            let mut list = SgList::new();
            for &n in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (head, tail) = rest.split_at(n.min(rest.len()));
                list.push(Buf::from_slice(head));
                rest = tail;
            }
            list
        };
        let flat = |list: &SgList| list.iter().flat_map(|buf| buf.to_vec()).collect::<Vec<u8>>();
        let mut list = cut(&cuts);
        prop_assert_eq!(list.len_bytes(), total);
        prop_assert_eq!(list.is_empty(), total == 0);
        prop_assert_eq!(flat(&list), &bytes[..]);
        prop_assert!(list.eq_bytes(&cut(&other_cuts)));
        let (a, b) = (a % (total + 1), b % (total + 1));
        let range = a.min(b)..a.max(b);
        let part = list.slice(range.clone());
        prop_assert_eq!(flat(&part), &bytes[range.clone()]);
        prop_assert_eq!(&part.clone().to_contiguous()[..], &bytes[range.clone()]);
        let mut copy = vec![0; range.len()];
        part.copy_to_slice(&mut copy);
        prop_assert_eq!(&copy[..], &bytes[range.clone()]);
        prop_assert_eq!(list.copy_from_slice(&bytes), part.is_empty(), "refused while shared");
        drop(part);

        if total > 0 {
            let mut changed = bytes.clone();
            changed[flip % total] ^= 0x80;
            prop_assert!(list.copy_from_slice(&changed));
            prop_assert!(!list.eq_bytes(&cut(&other_cuts)));
            prop_assert_eq!(flat(&list), &changed[..]);
            prop_assert!(list.copy_from(&cut(&other_cuts)));
            prop_assert_eq!(flat(&list), &bytes[..]);
            prop_assert!(!list.copy_from(&list.slice(0..total - 1)), "another length");
        }
        let head = list.split_to(a);
        prop_assert_eq!(flat(&head), &bytes[..a]);
        prop_assert_eq!(flat(&list), &bytes[a..]);
        let mut joined = head;
        joined.append(list);
        prop_assert_eq!(flat(&joined), &bytes[..]);
        prop_assert!(joined.segments().iter().all(|buf| !buf.is_empty()));
    }
}

#[test]
fn zeroes_are_shared_and_read_only() {
    let _alone = alone();
    let before = memory::stats();
    let mut zeroes = Buf::zeroes(1 << 20);
    let list = SgList::zeroes(10 << 20);
    assert_eq!(list.len_bytes(), 10 << 20);
    assert!(list.is_zero() && zeroes.is_zero());
    assert_eq!(zeroes.as_ptr(), list.segments()[3].as_ptr());
    assert_eq!(memory::stats().in_use_bytes, before.in_use_bytes, "no allocation");
    assert!(zeroes.get_mut().is_none());
    zeroes.make_mut()[5] = 1;
    assert!(!zeroes.is_zero() && list.is_zero());
    let big = Buf::zeroes(5 << 20);
    assert!(big.is_zero() && big.len() == 5 << 20);
    assert!(Buf::alloc_zeroed(100_000).is_zero() && Buf::alloc_zeroed(3 << 20).is_zero());
}

#[test]
fn lent_memory_goes_back_with_the_last_reference() {
    struct Owner(Vec<u8>, Arc<AtomicUsize>);
    impl Drop for Owner {
        fn drop(&mut self) {
            self.1.fetch_add(1, Ordering::SeqCst);
        }
    }
    let _alone = alone();
    let lent_before = memory::stats().lent_blocks;
    let dropped = Arc::new(AtomicUsize::new(0));
    let owner = Box::new(Owner((0..100).collect(), dropped.clone()));
    let (ptr, len) = (owner.0.as_ptr(), owner.0.len());
    // SAFETY: the vector's memory lives as long as the owner and nobody writes it.
    let mut buf = unsafe { Buf::from_owner(ptr, len, owner) };
    assert_eq!((buf.as_ptr(), memory::stats().lent_blocks), (ptr, lent_before + 1));
    assert!(!buf.is_unique() && buf.get_mut().is_none(), "lent memory is never written");
    let tail = buf.slice(90..100);
    buf.make_mut()[0] = 7;
    assert_ne!(buf.as_ptr(), ptr, "copied");
    drop(buf);
    assert_eq!(dropped.load(Ordering::SeqCst), 0);
    assert_eq!(tail[..], [90, 91, 92, 93, 94, 95, 96, 97, 98, 99]);
    std::thread::spawn(move || drop(tail)).join().unwrap();
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
    assert_eq!(memory::stats().lent_blocks, lent_before);
}

/// One thread allocates, another frees: the blocks must come back instead of new ones being cut.
#[test]
fn buffers_that_wander_between_threads_do_not_pile_up() {
    let _alone = alone();
    let before = memory::stats();
    let (sender, receiver) = mpsc::sync_channel::<Buf>(64);
    let freer = std::thread::spawn(move || receiver.into_iter().map(|buf| buf.len()).sum::<usize>());
    let mut sent = 0;
    let mut warm = None;
    for n in 0..100_000usize {
        let len = [4096, 70_000, 16_000, 200_000][n % 4];
        sent += len;
        sender.send(Buf::alloc(len)).unwrap();
        if n == 20_000 {
            warm = Some(memory::stats().slab_bytes);
        }
    }
    drop(sender);
    assert_eq!(freer.join().unwrap(), sent);
    let after = memory::stats();
    assert_eq!(after.in_use_bytes, before.in_use_bytes);
    let grown = after.slab_bytes - warm.unwrap();
    assert!(grown <= 4 << 20, "{grown} bytes more after warming up");
    assert!(after.slab_bytes - before.slab_bytes < 64 << 20);
    assert!(after.mapped_bytes >= after.slab_bytes && after.pages != PageKind::Unused);
}

/// Threads that come and go give their lists back.
#[test]
fn a_threads_lists_outlive_it() {
    let _alone = alone();
    let run = || {
        std::thread::spawn(|| drop((0..300).map(|_| Buf::alloc(16 << 10)).collect::<Vec<_>>()))
            .join()
            .unwrap();
    };
    run();
    let before = memory::stats();
    (0..20).for_each(|_| run());
    let after = memory::stats();
    assert_eq!((after.slab_bytes, after.in_use_bytes), (before.slab_bytes, before.in_use_bytes));
}

/// Many threads share, slice and drop the same blocks; the last reference frees, once.
#[test]
fn counts_hold_under_contention() {
    let _alone = alone();
    let before = memory::stats();
    for round in 0..200u8 {
        let mut buf = Buf::alloc(8192);
        buf.make_mut().fill(round);
        let threads: Vec<_> = (0..4)
            .map(|n| {
                let mut mine = buf.clone();
                std::thread::spawn(move || {
                    for _ in 0..50 {
                        let part = mine.slice(n..mine.len() - n);
                        assert!(part.iter().all(|&byte| byte == round));
                        mine = mine.clone();
                    }
                    mine.make_mut().fill(99);
                })
            })
            .collect();
        drop(buf);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
    assert_eq!(memory::stats().in_use_bytes, before.in_use_bytes);
}

/// What the kernel says about the mapping that holds `address`.
fn mapping_flags(address: *const u8) -> String {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in maps.lines() {
        let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
        let bounds = range.and_then(|(from, to)| {
            Some((usize::from_str_radix(from, 16).ok()?, usize::from_str_radix(to, 16).ok()?))
        });
        if let Some((from, to)) = bounds {
            inside = (from..to).contains(&(address as usize));
        }
        if inside && let Some(flags) = line.strip_prefix("VmFlags:") {
            return flags.to_owned();
        }
    }
    panic!("not mapped")
}

/// VmFlags: "dd" do not dump, "lo" locked, "dc" do not copy on fork.
#[test]
fn plaintext_and_keys_stay_out_of_core_dumps() {
    let _alone = alone();
    let (pooled, large) = (Buf::alloc(4096), Buf::alloc(3 << 20));
    let secret = SecretBytes::random(64);
    for address in [pooled.as_ptr(), large.as_ptr(), secret.expose().as_ptr()] {
        assert!(mapping_flags(address).contains(" dd"), "{}", mapping_flags(address));
    }
    for len in [16, 100_000] {
        let at = cryptfold_reactor::memory::heap::alloc(len);
        let flags = mapping_flags(at);
        assert!(flags.contains(" dd") && flags.contains(" dc"), "{flags}");
        // SAFETY: given once, and not used any more.
        unsafe { cryptfold_reactor::memory::heap::free(at) };
    }
    let flags = mapping_flags(secret.expose().as_ptr());
    assert!(flags.contains(" lo") && flags.contains(" dc"), "{flags}");
}

#[test]
fn secrets() {
    let secret = SecretBytes::from_vec(b"open sesame".to_vec());
    assert_eq!(secret.expose(), b"open sesame");
    assert_eq!(secret, secret.clone());
    assert_ne!(secret, SecretBytes::from_slice(b"open sesamE"));
    assert_ne!(secret, SecretBytes::from_slice(b"open sesame "));
    assert_eq!(format!("{secret:?}"), "SecretBytes(11 bytes, redacted)");
    assert_ne!(SecretBytes::random(32), SecretBytes::random(32));
    assert!(SecretBytes::zeroed(0).is_empty());
    let mut filled = SecretBytes::zeroed(5000);
    filled.expose_mut()[4999] = 1;
    assert_eq!((filled.len(), filled.expose()[4999]), (5000, 1));
}

#[test]
fn an_immortal_buffer_is_read_only_and_outlives_its_views() {
    let _alone = alone();
    let buf = Buf::immortal(10_000, |bytes| bytes.iter_mut().zip(0u32..).for_each(|(b, n)| *b = n as u8));
    let (mut copy, part) = (buf.clone(), buf.slice(300..400));
    drop(buf);
    assert!(!copy.is_unique() && copy.get_mut().is_none(), "nobody may write what anybody may hold");
    copy.make_mut()[300] = 0;
    drop(copy);
    let from_elsewhere = std::thread::spawn(move || part.slice(0..2).to_vec()).join().unwrap();
    assert_eq!(from_elsewhere, [300u32 as u8, 301u32 as u8]);
}

#[test]
fn contents_are_not_printed() {
    let _alone = alone();
    let buf = Buf::from_slice(b"secret");
    assert_eq!(
        format!("{buf:?} {:?}", SgList::from(buf.clone())),
        "Buf(6 bytes) SgList(6 bytes, 1 segments)"
    );
}

#[test]
#[should_panic(expected = "slice 2..9 of a buffer of 5 bytes")]
fn slices_are_checked() {
    Buf::zeroes(5).slice(2..9);
}

#[test]
fn a_whole_buffer_goes_through_a_word_and_back() {
    let _alone = alone();
    let mut buf = Buf::alloc(4096);
    buf.make_mut().fill(7);
    let other = buf.clone();
    let raw = buf.into_raw().unwrap();
    assert!(!other.is_unique(), "the word holds a reference");
    // SAFETY: from `into_raw`, taken back once.
    let back = unsafe { Buf::from_raw(raw) };
    assert_eq!((back.len(), back.as_ptr()), (4096, other.as_ptr()));
    drop(back);
    assert!(other.is_unique(), "and gives it back");
    // A view of a part, zeros and large buffers stay what they are.
    for kept in [other.slice(0..512), other.slice(512..4096), Buf::zeroes(4096), Buf::alloc(4 << 20)] {
        let len = kept.len();
        assert_eq!(kept.into_raw().map_err(|buf| buf.len()), Err(len));
    }
    let mut list = SgList::from(other);
    assert_eq!(list.take_single().map(|buf| buf.len()), Some(4096));
    assert!(list.is_empty() && list.take_single().is_none());
}

#[test]
fn core_dumps_can_be_forbidden() {
    // SAFETY: takes and gives integers only.
    let dumpable = || unsafe { libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0) };
    assert_eq!(dumpable(), 1);
    memory::forbid_core_dumps().unwrap();
    assert_eq!(dumpable(), 0);
}

#[test]
fn a_place_leads_to_the_bytes() {
    use cryptfold_reactor::memory::{slab_at, slab_count};
    let whole = Buf::alloc(64 << 10);
    for buf in [whole.clone(), whole.slice(4096..8192), Buf::alloc(1 << 20)] {
        let place = buf.place().expect("pool buffers are in the arena");
        assert!(usize::from(place.slab) < slab_count());
        let address = slab_at(place.slab.into()).addr() + place.offset as usize;
        assert_eq!(address, buf.as_ptr().addr());
    }
    assert_eq!(Buf::zeroes(4096).place(), None);
    assert_eq!(Buf::alloc(3 << 20).place(), None);
}
