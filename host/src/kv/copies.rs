//! Copies of slots: checked, cut into pieces of equal work, and done in all layers by one launch.

use std::fmt;
use std::mem::take;

use packinfer_abi::{KV_MOVE_THREADS, KvCopyPiece, KvMoveParams, PIECE_VECTORS, VECTOR_BYTES};
use packinfer_kv::SlotCopy;

use super::arena::Form;
use super::{KvArena, KvMemoryError};
use crate::kernels::{MAX_BLOCKS, parameter};
use crate::stream::Stream;
use crate::upload::Upload;
use crate::{Element, Engine, EngineError, KvElement};

/// Pieces that a thread block copies: one for each warp.
const PIECES_PER_BLOCK: usize = KV_MOVE_THREADS as usize / 32;

/// Words of a piece.
const PIECE_WORDS: usize = size_of::<KvCopyPiece>() / size_of::<u32>();

/// A checked list of copies on the device, for arenas of one form. Keep it: [`Self::update`] uses its memory again.
pub struct SlotCopies {
    pieces: Upload,
    num_pieces: usize,
    form: SlotForm,
    scratch: Scratch,
}

impl SlotCopies {
    /// Replaces the copies, in order with the work of `stream`, and does not wait for it: the upload waits for launches that read
    /// the old ones, on whatever streams.
    ///
    /// # Errors
    ///
    /// As [`Engine::upload_copies`]; the list is as before then, unless it is the driver that fails.
    pub fn update(&mut self, copies: &[SlotCopy], stream: &Stream) -> Result<(), EngineError> {
        stream.check_not_captured("uploading a list of copies")?;
        self.scratch.check(copies, self.form.num_slots)?;
        self.scratch.cut(copies, self.form.slot_vectors());
        // What copies nothing, lest an error leave half a list.
        self.num_pieces = 0;
        self.pieces.replace(&[(0, bytemuck::cast_slice(&self.scratch.words))], stream)?;
        self.num_pieces = self.scratch.words.len() / PIECE_WORDS;
        Ok(())
    }

    /// Whether nothing is copied.
    pub fn is_empty(&self) -> bool {
        self.num_pieces == 0
    }
}

impl fmt::Debug for SlotCopies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { num_pieces, form, .. } = self;
        f.debug_struct("SlotCopies").field("num_pieces", num_pieces).field("form", form).finish_non_exhaustive()
    }
}

impl Engine {
    /// A list of copies on the device, for arenas with as many slots of the same size as `arena`. It is copied there in order
    /// with the work of `stream`; other streams that use the list wait for that by themselves.
    ///
    /// # Errors
    ///
    /// Copies that reach past the last slot, write a slot twice, or write one that the list also reads; not enough device memory.
    pub fn upload_copies<E: Element, K: KvElement<E>>(
        &self,
        arena: &KvArena<E, K>,
        copies: &[SlotCopy],
        stream: &Stream,
    ) -> Result<SlotCopies, EngineError> {
        self.check("the stream", stream.shared())?;
        let mut list = SlotCopies {
            pieces: Upload::new("a list of copies", 0, stream)?,
            num_pieces: 0,
            form: SlotForm { num_slots: arena.num_slots(), slot_bytes: arena.slot_bytes() },
            scratch: Scratch::default(),
        };
        list.update(copies, stream)?;
        Ok(list)
    }

    /// Copies slots in K and V of all layers: one launch, which is given to `stream` and not waited for.
    ///
    /// # Errors
    ///
    /// Copies that were listed for an arena of another form, more of them than a launch can do, objects of another device, or
    /// what the driver reports.
    pub fn kv_move<E: Element, K: KvElement<E>>(
        &self,
        arena: &mut KvArena<E, K>,
        copies: &SlotCopies,
        stream: &Stream,
    ) -> Result<(), EngineError> {
        self.check("the stream", stream.shared())?;
        self.check("the arena", arena.elements().shared())?;
        self.check("the list of copies", copies.pieces.shared())?;
        let form = arena.form();
        copies.form.check(form)?;
        let num_pieces = copies.num_pieces;
        if num_pieces == 0 {
            return Ok(());
        }
        let blocks = num_blocks("copying slots", num_pieces.div_ceil(PIECES_PER_BLOCK) as u64, form.num_pools())?;
        self.shared().enter()?;
        copies.pieces.read_on(stream)?;
        let params = KvMoveParams {
            pools: arena.elements().address(),
            pool_bytes: form.pool_bytes(),
            pieces: copies.pieces.address(0),
            num_pieces: num_pieces as u32,
            slot_vectors: copies.form.slot_vectors(),
        };
        // SAFETY: the kernel has this one parameter. The pieces are on the device when the stream gets there, within pools of the
        // checked form. Freeing any of this memory waits for the device.
        unsafe { arena.move_kernel.launch(blocks, &mut [parameter(&params)], stream) }
    }
}

/// What arenas have in common that a list is right for.
#[derive(Clone, Copy, Debug)]
struct SlotForm {
    num_slots: u32,
    slot_bytes: u64,
}

impl SlotForm {
    fn slot_vectors(&self) -> u32 {
        (self.slot_bytes / u64::from(VECTOR_BYTES)) as u32
    }

    /// Checks that an arena is of this form.
    fn check(&self, arena: Form) -> Result<(), KvMemoryError> {
        let &Self { num_slots, slot_bytes } = self;
        let (arena_slots, arena_slot_bytes) = (arena.num_slots, arena.slot_bytes());
        if (num_slots, slot_bytes) == (arena_slots, arena_slot_bytes) {
            Ok(())
        } else {
            Err(KvMemoryError::OtherArena { num_slots, slot_bytes, arena_slots, arena_slot_bytes })
        }
    }
}

/// Blocks of a launch with `each` for each of `times`.
pub(super) fn num_blocks(what: &'static str, each: u64, times: u64) -> Result<u32, KvMemoryError> {
    let blocks = each.saturating_mul(times);
    let fits = u32::try_from(blocks).ok().filter(|&blocks| blocks <= MAX_BLOCKS);
    fits.ok_or(KvMemoryError::TooManyBlocks { what, blocks, most: MAX_BLOCKS })
}

/// First slots and those after the last.
type Ranges = Vec<(u32, u32)>;

/// Memory that is used again for each list.
#[derive(Default)]
struct Scratch {
    sources: Ranges,
    targets: Ranges,
    /// The pieces, word by word.
    words: Vec<u32>,
}

impl Scratch {
    /// Checks that the copies may be done in any order, and at the same time.
    fn check(&mut self, copies: &[SlotCopy], pool_slots: u32) -> Result<(), KvMemoryError> {
        for (index, &copy) in copies.iter().enumerate() {
            let fits = |first: u32| first.checked_add(copy.num_slots).is_some_and(|end| end <= pool_slots);
            if !fits(copy.from) || !fits(copy.to) {
                return Err(KvMemoryError::CopyOutOfRange { index, copy, pool_slots });
            }
        }
        let filled = || copies.iter().filter(|copy| copy.num_slots > 0);
        let sources = sorted(take(&mut self.sources), filled().map(|copy| (copy.from, copy.from + copy.num_slots)));
        let targets = sorted(take(&mut self.targets), filled().map(|copy| (copy.to, copy.to + copy.num_slots)));
        (self.sources, self.targets) = (sources, targets);
        if let Some(pair) = self.targets.windows(2).find(|pair| pair[1].0 < pair[0].1) {
            return Err(KvMemoryError::TargetTwice { slot: pair[1].0 });
        }
        // No two targets overlap, so the one that ends first is passed first; sources may, and are taken by their beginning.
        let mut targets = self.targets.iter().peekable();
        for &(begin, end) in &self.sources {
            while targets.next_if(|target| target.1 <= begin).is_some() {}
            if let Some(target) = targets.peek().filter(|target| target.0 < end) {
                return Err(KvMemoryError::SourceIsTarget { slot: begin.max(target.0) });
            }
        }
        Ok(())
    }

    /// Cuts checked copies of slots with `slot_vectors` vectors into pieces.
    fn cut(&mut self, copies: &[SlotCopy], slot_vectors: u32) {
        self.words.clear();
        for &SlotCopy { from, to, num_slots } in copies {
            let end = u64::from(num_slots) * u64::from(slot_vectors);
            for begin in (0..end).step_by(PIECE_VECTORS as usize) {
                let (slot, skip) = ((begin / u64::from(slot_vectors)) as u32, (begin % u64::from(slot_vectors)) as u32);
                let num_vectors = (end - begin).min(u64::from(PIECE_VECTORS)) as u32;
                let KvCopyPiece { from_slot, to_slot, skip, num_vectors } =
                    KvCopyPiece { from_slot: from + slot, to_slot: to + slot, skip, num_vectors };
                self.words.extend([from_slot, to_slot, skip, num_vectors]);
            }
        }
    }
}

/// Sorted ranges, in the memory of others.
fn sorted(mut memory: Ranges, ranges: impl Iterator<Item = (u32, u32)>) -> Ranges {
    memory.clear();
    memory.extend(ranges);
    memory.sort_unstable();
    memory
}

#[cfg(test)]
mod tests {
    use packinfer_batch::{AttentionShape, DType};

    use super::*;

    const SLOTS: u32 = 100;

    fn check(copies: &[(u32, u32, u32)]) -> Result<(), KvMemoryError> {
        let copies: Vec<_> = copies.iter().map(|&(from, to, num_slots)| SlotCopy { from, to, num_slots }).collect();
        Scratch::default().check(&copies, SLOTS)
    }

    #[test]
    fn copies_in_any_order_are_right() {
        // The same slots twice to different places, targets between sources, and nothing.
        assert_eq!(check(&[(0, 50, 10), (5, 70, 10), (90, 60, 10), (15, 80, 1), (0, 0, 0), (100, 0, 0)]), Ok(()));
        assert_eq!(check(&[]), Ok(()));
        assert_eq!(check(&[(0, 50, 50)]), Ok(()));
    }

    #[test]
    fn slots_past_the_last_are_errors() {
        for copy in [(0, 91, 10), (91, 0, 10), (0, 101, 0), (u32::MAX, 0, 2), (0, u32::MAX, u32::MAX)] {
            let error = check(&[(0, 50, 1), copy]).expect_err("there is no such slot");
            let expected = SlotCopy { from: copy.0, to: copy.1, num_slots: copy.2 };
            assert_eq!(error, KvMemoryError::CopyOutOfRange { index: 1, copy: expected, pool_slots: SLOTS });
        }
    }

    #[test]
    fn a_slot_is_written_once() {
        assert_eq!(check(&[(0, 50, 10), (20, 59, 3)]), Err(KvMemoryError::TargetTwice { slot: 59 }));
        assert_eq!(check(&[(0, 50, 1), (20, 50, 1)]), Err(KvMemoryError::TargetTwice { slot: 50 }));
    }

    #[test]
    fn a_slot_that_is_written_is_not_read() {
        // Within one copy, forwards and backwards, and in another one, behind a longer source.
        assert_eq!(check(&[(0, 5, 10)]), Err(KvMemoryError::SourceIsTarget { slot: 5 }));
        assert_eq!(check(&[(5, 0, 10)]), Err(KvMemoryError::SourceIsTarget { slot: 5 }));
        assert_eq!(check(&[(7, 7, 1)]), Err(KvMemoryError::SourceIsTarget { slot: 7 }));
        assert_eq!(check(&[(0, 50, 30), (1, 80, 1), (90, 25, 2)]), Err(KvMemoryError::SourceIsTarget { slot: 25 }));
    }

    /// Each vector of each copy is in one piece, and those are as large as they may be.
    #[test]
    fn pieces_are_the_copies() {
        let copies = [(10, 40, 20), (0, 70, 1), (3, 80, 0), (5, 90, 3)];
        let copies = copies.map(|(from, to, num_slots)| SlotCopy { from, to, num_slots });
        for slot_vectors in [4, 24, 64, 128, 300, 2048] {
            let mut scratch = Scratch::default();
            scratch.cut(&copies, slot_vectors);
            let (pieces, rest) = scratch.words.as_chunks::<PIECE_WORDS>();
            assert!(rest.is_empty());
            let vector = |slot: u32, vector: u32| u64::from(slot) * u64::from(slot_vectors) + u64::from(vector);
            let of_pieces = pieces.iter().flat_map(|&[from, to, skip, num_vectors]| {
                assert!((1..=PIECE_VECTORS).contains(&num_vectors));
                (skip..skip + num_vectors).map(move |index| (vector(from, index), vector(to, index)))
            });
            let of_copies = copies.iter().flat_map(|copy| {
                (0..copy.num_slots * slot_vectors).map(move |index| (vector(copy.from, index), vector(copy.to, index)))
            });
            assert!(of_pieces.eq(of_copies), "{slot_vectors} vectors a slot");
            let least: usize = copies.iter().map(|copy| (copy.num_slots * slot_vectors).div_ceil(PIECE_VECTORS) as usize).sum();
            assert_eq!(pieces.len(), least);
        }
    }

    #[test]
    fn a_list_is_for_arenas_of_its_form() {
        let shape = AttentionShape::new(32, 8, 128, DType::Bf16).expect("a good shape");
        let arena = Form { shape, num_layers: 7, num_slots: 100 };
        let list = SlotForm { num_slots: 100, slot_bytes: 2048 };
        assert_eq!((list.slot_vectors(), list.check(arena)), (128, Ok(())));
        let other = SlotForm { slot_bytes: 1024, ..list }.check(arena);
        let error = KvMemoryError::OtherArena { num_slots: 100, slot_bytes: 1024, arena_slots: 100, arena_slot_bytes: 2048 };
        assert_eq!(other, Err(error));
        assert!(list.check(Form { num_slots: 99, ..arena }).is_err());
    }

    #[test]
    fn launches_have_a_limit() {
        assert_eq!(num_blocks("a test", 1 << 20, 64), Ok(1 << 26));
        assert!(
            matches!(num_blocks("a test", 1 << 31, 1), Err(KvMemoryError::TooManyBlocks { blocks, .. }) if blocks == 1 << 31)
        );
        assert!(num_blocks("a test", u64::MAX, 2).is_err());
    }
}
