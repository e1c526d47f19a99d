//! Which K and V the L2 cache is to give up first.
//!
//! A call finds the cache full of what others have left there, some of which must be stored in memory before anything can take
//! its place. If it reads little, it does without most of that room: what it brings takes the place of what it brought before. If
//! it reads much, it is faster if it takes all the room first, and only then goes on so. In FP8 it then never does, which is
//! faster still.

use packinfer_abi::TileKind;
use packinfer_batch::KvDType;

use crate::Plan;

/// A call that reads so much of K and V reads little: about five times what an H100's L2 cache holds, by measurement …
const LITTLE_BYTES: u64 = 250 << 20;
/// … or some less, if there are prefixes that it keeps meanwhile.
const LITTLE_BYTES_BESIDE_PREFIXES: u64 = 170 << 20;
/// Bytes of K, and as many of V, that a block brings until the cache is full of what the call has brought.
const SETTLED_BYTES: u32 = 512 << 10;
/// So many bytes that no block brings them.
const NEVER_SETTLED: u32 = u32::MAX;

/// How the work items of a kind use the K and V that they read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum KvUse {
    /// No two read the same.
    Once,
    /// Those that read the same are tiles of requests that share it: they do so at about the same time.
    AtOnce,
    /// Several read the same, one after the other.
    Often,
}

impl KvUse {
    fn of(plan: &Plan, kind: TileKind) -> Self {
        if plan.heads.groups_per_kv_head() != 1 {
            return Self::Often;
        }
        let items = plan.items.iter().zip(&plan.fresh).zip(&plan.shared).filter(|((item, _), _)| item.tile == kind);
        let uses = items.map(|((_, &fresh), &shared)| match (fresh == 1.0, shared) {
            (true, _) => Self::Once,
            (false, true) => Self::AtOnce,
            (false, false) => Self::Often,
        });
        uses.max().unwrap_or(Self::Once)
    }
}

/// By kind of tile, the bytes of K, and as many of V, that a block brings before the cache is to give up first what it brings.
pub(crate) fn settled_bytes(plan: &Plan) -> [u32; 2] {
    let uses = [TileKind::Wide, TileKind::Narrow].map(|kind| KvUse::of(plan, kind));
    let little = if uses.contains(&KvUse::AtOnce) { LITTLE_BYTES_BESIDE_PREFIXES } else { LITTLE_BYTES };
    let reads_little = plan.kv_memory_bytes() <= little;
    let of_much = |kind| if plan.shape_of(kind).kv_dtype() == KvDType::Same { SETTLED_BYTES } else { NEVER_SETTLED };
    [TileKind::Wide, TileKind::Narrow].map(|kind| match uses[kind as usize] {
        KvUse::Once if reads_little => 0,
        KvUse::AtOnce if reads_little => NEVER_SETTLED,
        KvUse::Once | KvUse::AtOnce => of_much(kind),
        KvUse::Often => NEVER_SETTLED,
    })
}

#[cfg(test)]
mod tests {
    use packinfer_abi::KvRun;
    use packinfer_batch::{AttentionShape, Batch, DType, Mask};

    use super::*;
    use crate::Planner;

    /// 4 KiB of K and V a token.
    fn shape() -> AttentionShape {
        AttentionShape::new(32, 8, 128, DType::Bf16).expect("a good shape")
    }

    /// What is planned for so many requests, each of so many queries and KV tokens, the first `shared` of which are the same.
    fn settled(shape: AttentionShape, requests: u32, query_len: u32, kv_len: u32, shared: u32) -> [u32; 2] {
        let mut batch = Batch::new(shape, Mask::Causal);
        for request in 0..requests {
            let own = shared + request * (kv_len - shared);
            let runs = [KvRun { first_slot: 0, num_slots: shared }, KvRun { first_slot: own, num_slots: kv_len - shared }];
            let runs = runs.into_iter().filter(|run| run.num_slots > 0);
            batch.push_runs(query_len, kv_len, runs).expect("a good request");
        }
        Planner::default().plan(&batch).expect("little enough").settled_bytes()
    }

    const WIDE: usize = TileKind::Wide as usize;
    const NARROW: usize = TileKind::Narrow as usize;

    #[test]
    fn a_call_that_reads_little_leaves_the_cache_alone_and_another_fills_it_first() {
        // 128 MiB, 512 MiB.
        assert_eq!(settled(shape(), 32, 1, 1 << 10, 0)[NARROW], 0);
        assert_eq!(settled(shape(), 32, 1, 4 << 10, 0)[NARROW], SETTLED_BYTES);
        // As many tokens are half the bytes.
        let stored_in_fp8 = shape().with_kv_dtype(KvDType::E4m3);
        assert_eq!(settled(stored_in_fp8, 32, 1, 3 << 10, 0)[NARROW], 0);
        assert_eq!(settled(stored_in_fp8, 32, 1, 5 << 10, 0)[NARROW], NEVER_SETTLED);
    }

    #[test]
    fn what_others_read_too_is_kept() {
        // Eight queries are 32 rows, a single tile that nobody else reads for; 512 are 16 tiles that read the same.
        assert_eq!(settled(shape(), 32, 8, 1 << 10, 0)[WIDE], 0);
        assert_eq!(settled(shape(), 32, 8, 4 << 10, 0)[WIDE], SETTLED_BYTES);
        assert_eq!(settled(shape(), 4, 512, 16 << 10, 0)[WIDE], NEVER_SETTLED);
    }

    #[test]
    fn a_shared_prefix_is_kept_while_there_is_room() {
        // 64 requests are two tiles of 128 rows.
        let settled = |own: u32| {
            let of_kind = settled(shape(), 64, 1, (8 << 10) + own, 8 << 10);
            (of_kind[WIDE], of_kind[NARROW])
        };
        // 64 MiB; 192 MiB, which would be little without the prefix.
        assert_eq!(settled(128), (NEVER_SETTLED, 0));
        assert_eq!(settled(640), (SETTLED_BYTES, SETTLED_BYTES));
    }
}
