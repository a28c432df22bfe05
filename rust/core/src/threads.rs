//! Scoped threads that share a queue of items; where the system refuses a thread, the others do its work.

use std::sync::atomic::Ordering::{AcqRel, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

/// `f` of each item, in the order of the items, on up to `threads` threads, this one included.
pub(crate) fn map<I: Send, R: Send>(
    threads: usize,
    items: impl Iterator<Item = I> + Send,
    f: impl Fn(I) -> R + Sync,
) -> Vec<R> {
    let queue = Mutex::new(items.enumerate());
    let (mut done, others) = on(threads, || {
        let mut done = Vec::new();
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((place, item)) = next else { return done };
            done.push((place, f(item)));
        }
    });
    done.extend(others.into_iter().flatten());
    done.sort_unstable_by_key(|(place, _)| *place);
    done.into_iter().map(|(_, result)| result).collect()
}

/// Two passes over items, on up to `threads` threads that are started once: `first` of each item, then `between` once, then
/// `second` of each item with what `between` returned, unless that is None or there are no items; true if it came to that.
///
/// A thread takes first, the last one first, the items of its own first pass, which may still be in its core's cache.
pub(crate) fn map_twice<I: Send, B: Send + Sync>(
    threads: usize,
    items: &[Mutex<I>],
    first: impl Fn(&mut I) + Sync,
    between: impl Fn() -> Option<B> + Sync,
    second: impl Fn(&mut I, &B) + Sync,
) -> bool {
    if items.is_empty() {
        return false; // nobody would finish the last one
    }
    let (next, left) = (AtomicUsize::new(0), AtomicUsize::new(items.len()));
    let taken: Vec<_> = items.iter().map(|_| AtomicBool::new(false)).collect();
    let value = OnceLock::new();
    let item = |place: usize| items[place].lock().unwrap_or_else(PoisonError::into_inner);
    on(threads, || {
        let _release = Release(&value);
        let mut own = Vec::new();
        loop {
            let place = next.fetch_add(1, Relaxed);
            if place >= items.len() {
                break;
            }
            first(&mut item(place));
            own.push(place);
            if left.fetch_sub(1, AcqRel) == 1 {
                value.get_or_init(&between);
            }
        }
        let Some(value) = value.wait() else { return };
        for place in own.into_iter().rev().chain((0..items.len()).rev()) {
            if !taken[place].swap(true, Relaxed) {
                second(&mut item(place), value);
            }
        }
    });
    value.into_inner().flatten().is_some()
}

/// Lets the threads that wait for a value go where its maker panics: a bug of ours, passed on by [`on`].
struct Release<'a, B>(&'a OnceLock<Option<B>>);

impl<B> Drop for Release<'_, B> {
    fn drop(&mut self) {
        if thread::panicking() {
            let _ = self.0.set(None);
        }
    }
}

/// What `work` returns on this thread, and on each of the others, up to `threads` with this one.
fn on<R: Send>(threads: usize, work: impl Fn() -> R + Sync) -> (R, Vec<R>) {
    if threads <= 1 {
        return (work(), Vec::new()); // a scope is not free
    }
    thread::scope(|scope| {
        let start = |_| thread::Builder::new().spawn_scoped(scope, &work).ok();
        let others: Vec<_> = (1..threads).map_while(start).collect();
        let own = work();
        // A panic of a worker is a bug of ours; pass it on as it is.
        let join = |other: thread::ScopedJoinHandle<'_, R>| {
            other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        (own, others.into_iter().map(join).collect())
    })
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;
    use std::sync::Mutex;

    use super::{map, map_twice};

    #[test]
    fn order_is_that_of_the_items() {
        for threads in [1, 2, 5] {
            assert_eq!(map(threads, 0..100, |i| i * i), (0..100).map(|i| i * i).collect::<Vec<_>>());
        }
    }
    #[test]
    fn every_item_goes_through_both_passes_once() {
        for (threads, len) in [(1, 9), (2, 9), (5, 3), (3, 0)] {
            let items: Vec<_> = (0..len).map(Mutex::new).collect();
            let sum = || Some(items.iter().map(|item| *item.lock().unwrap()).sum::<u64>());
            let done = map_twice(threads, &items, |item| *item += 1, sum, |item, sum| *item += 1000 * sum);
            assert!(done || len == 0);
            let total = len * (len + 1) / 2;
            assert!(items.iter().zip(1..).all(|(item, i)| *item.lock().unwrap() == i + 1000 * total));
        }
    }

    #[test]
    fn without_a_value_there_is_no_second_pass() {
        let items: Vec<_> = (0..4).map(Mutex::new).collect();
        assert!(!map_twice(2, &items, |_| (), || None::<()>, |item, ()| *item += 100));
        assert!(items.iter().zip(0..).all(|(item, i)| *item.lock().unwrap() == i));
    }

    #[test]
    fn a_panic_is_passed_on_and_nobody_waits_for_ever() {
        for threads in [1, 3] {
            let run = || {
                let items: Vec<_> = (0..6).map(Mutex::new).collect();
                map_twice(threads, &items, |item| assert_ne!(*item, 3), || Some(()), |_, ()| ())
            };
            assert!(catch_unwind(run).is_err());
        }
    }
}
