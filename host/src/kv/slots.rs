//! Where new tokens go.

use std::fmt;

use super::KvMemoryError;
use crate::context::Shared;
use crate::stream::Stream;
use crate::upload::Upload;
use crate::{Engine, EngineError};

/// The slot and the position of each new token of a step, checked, on the device. All layers use the same; [`Self::update`] makes
/// it the next step's, without an allocation as long as there is room.
pub struct AppendSlots {
    /// Slots, then positions.
    words: Upload,
    num_tokens: u32,
    num_slots: u32,
    /// Memory that is used again for each list.
    sorted: Vec<u32>,
}

impl AppendSlots {
    /// Replaces slots and positions, in order with the work of `stream`, and does not wait for it: the upload waits for launches
    /// that read the old ones, on whatever streams. Graphs that were captured with so many tokens stay right as long as no list
    /// is longer.
    ///
    /// # Errors
    ///
    /// As [`Engine::upload_append_slots`]; they are as before then, unless it is the driver that fails.
    pub fn update(&mut self, slots: &[u32], positions: &[u32], stream: &Stream) -> Result<(), EngineError> {
        stream.check_not_captured("uploading slots of new tokens")?;
        let num_tokens = check(slots, positions, self.num_slots, &mut self.sorted)?;
        // What appends nothing, lest an error leave half a list.
        self.num_tokens = 0;
        let parts = [(0, bytemuck::cast_slice(slots)), (size_of_val(slots), bytemuck::cast_slice(positions))];
        self.words.replace(&parts, stream)?;
        self.num_tokens = num_tokens;
        Ok(())
    }

    /// Addresses of slots and positions, for launches on a stream, which waits for them.
    pub(super) fn read_on(&self, stream: &Stream) -> Result<[u64; 2], EngineError> {
        self.words.read_on(stream)?;
        Ok([0, self.num_tokens as usize * size_of::<u32>()].map(|offset| self.words.address(offset)))
    }

    pub(super) fn shared(&self) -> &Shared {
        self.words.shared()
    }

    /// New tokens.
    pub fn num_tokens(&self) -> u32 {
        self.num_tokens
    }

    /// Slots of the pool that they were checked for.
    pub fn num_slots(&self) -> u32 {
        self.num_slots
    }
}

impl fmt::Debug for AppendSlots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { num_tokens, num_slots, .. } = self;
        f.debug_struct("AppendSlots").field("num_tokens", num_tokens).field("num_slots", num_slots).finish_non_exhaustive()
    }
}

impl Engine {
    /// The slots that new tokens go to, in a pool of `num_slots`, and their positions, which RoPE turns them by. They are copied
    /// to the device in order with the work of `stream`; other streams that use them wait for that by themselves.
    ///
    /// # Errors
    ///
    /// Not as many positions as slots, slots that the pool does not have, a slot for two tokens, or not enough device memory.
    pub fn upload_append_slots(
        &self,
        slots: &[u32],
        positions: &[u32],
        num_slots: u32,
        stream: &Stream,
    ) -> Result<AppendSlots, EngineError> {
        self.check("the stream", stream.shared())?;
        let words = Upload::new("slots of new tokens", size_of_val(slots) + size_of_val(positions), stream)?;
        let mut list = AppendSlots { words, num_tokens: 0, num_slots, sorted: Vec::new() };
        list.update(slots, positions, stream)?;
        Ok(list)
    }
}

/// Checks slots and positions, and returns how many tokens they are for.
fn check(slots: &[u32], positions: &[u32], num_slots: u32, sorted: &mut Vec<u32>) -> Result<u32, KvMemoryError> {
    if slots.len() != positions.len() {
        return Err(KvMemoryError::PositionsLength { slots: slots.len(), positions: positions.len() });
    }
    if let Some((token, &slot)) = slots.iter().enumerate().find(|&(_, &slot)| slot >= num_slots) {
        return Err(KvMemoryError::SlotOutOfRange { token, slot, num_slots });
    }
    sorted.clear();
    sorted.extend_from_slice(slots);
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(KvMemoryError::SlotTwice { slot: pair[0] }),
        // No slot is there twice, so there are no more than can be numbered.
        None => Ok(slots.len() as u32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(slots: &[u32], positions: &[u32]) -> Result<u32, KvMemoryError> {
        super::check(slots, positions, 10, &mut Vec::new())
    }

    #[test]
    fn tokens_have_slots_of_their_own() {
        assert_eq!(check(&[9, 0, 5], &[0, 0, u32::MAX]), Ok(3));
        assert_eq!(check(&[], &[]), Ok(0));
        assert_eq!(check(&[1, 2], &[0]), Err(KvMemoryError::PositionsLength { slots: 2, positions: 1 }));
        assert_eq!(check(&[1, 10], &[0, 0]), Err(KvMemoryError::SlotOutOfRange { token: 1, slot: 10, num_slots: 10 }));
        assert_eq!(check(&[3, 1, 3], &[0, 1, 2]), Err(KvMemoryError::SlotTwice { slot: 3 }));
    }
}
