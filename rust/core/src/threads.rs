//! Scoped threads that share a queue of items; where the system refuses a thread, the others do its work.

use std::sync::{Mutex, PoisonError};
use std::thread;

/// `f` of each item, in the order of the items, on up to `threads` threads, this one included.
pub(crate) fn map<I: Send, R: Send>(
    threads: usize,
    items: impl Iterator<Item = I> + Send,
    f: impl Fn(I) -> R + Sync,
) -> Vec<R> {
    let queue = Mutex::new(items.enumerate());
    let work = || {
        let mut done = Vec::new();
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((place, item)) = next else { return done };
            done.push((place, f(item)));
        }
    };
    let mut done = thread::scope(|scope| {
        let start = |_| thread::Builder::new().spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..threads).map_while(start).collect();
        let mut done = work();
        for other in others {
            // A panic of a worker is a bug of ours; pass it on as it is.
            done.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        done
    });
    done.sort_unstable_by_key(|(place, _)| *place);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::map;

    #[test]
    fn order_is_that_of_the_items() {
        for threads in [1, 2, 5] {
            assert_eq!(map(threads, 0..100, |i| i * i), (0..100).map(|i| i * i).collect::<Vec<_>>());
        }
    }
}
