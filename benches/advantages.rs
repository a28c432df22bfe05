//! Criterion benchmarks of the core, without Python: `cargo bench -p ebpo-core`.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ebpo_core::{Batch, GroupStats, Keys, Layout, Options, State, apply, equal_advantages};

fn rewards(len: usize) -> Vec<f32> {
    // A fixed linear congruential sequence of zeros and ones: verifiable rewards, without a dependency.
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from(u8::from(state >> 30 == 0))
    };
    (0..len).map(|_| next()).collect()
}

fn advantages(c: &mut Criterion) {
    let mut group = c.benchmark_group("ebpo");
    for (groups, size) in [(64, 8), (512, 8), (512, 17), (4096, 16), (65_536, 16)] {
        let rewards = rewards(groups * size);
        let mut out = vec![0.0_f32; rewards.len()];
        let name = format!("{groups}x{size}");
        group.throughput(Throughput::Elements(rewards.len() as u64));
        group.bench_with_input(BenchmarkId::new("equal", &name), &size, |b, &size| {
            b.iter(|| equal_advantages(&rewards, size, 1e-6, 1, &mut out));
        });
        if rewards.len() > 1 << 19 {
            // Whether a second core helps, or shares the vector units of the first, is the machine's own.
            group.bench_with_input(BenchmarkId::new("equal, 2 threads", &name), &size, |b, &size| {
                b.iter(|| equal_advantages(&rewards, size, 1e-6, 2, &mut out));
            });
        }
        let batch = Batch::new(&rewards, Layout::Equal { size }, None).expect("the sizes above divide");
        group.bench_with_input(BenchmarkId::new("general", &name), &batch, |b, batch| {
            b.iter(|| {
                let stats = GroupStats::collect(batch).expect("zeros and ones are in range");
                let scored = State::default().advance(&Options::default(), &stats, &Keys::ROOT, true, None);
                let scored = scored.expect("the root needs no room");
                apply(batch, &scored.affine, &mut out);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, advantages);
criterion_main!(benches);
