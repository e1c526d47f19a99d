//! Cutting a sequence at block boundaries, for the prefix tree.

use std::ops::Range;

use super::{Part, Sequence};
use crate::{KvError, SlotPool};

impl Sequence {
    /// Appends a part that the caller has retained.
    pub(crate) fn push_part(&mut self, part: Part) {
        self.len += part.filled;
        self.parts.push(part);
    }

    /// Parts before token number `first`, if a part begins there.
    pub(crate) fn parts_before(&self, first: u32) -> Option<usize> {
        let (mut begin, mut index) = (self.len, self.parts.len());
        while begin > first {
            index -= 1;
            begin -= self.parts[index].filled;
        }
        (begin == first).then_some(index)
    }

    /// Cuts parts so that the next `tokens` tokens from part number `begin` on are the parts that are returned, whole. Pages
    /// behind the last token of the sequence are given back. `None` if there are fewer tokens, or the cut falls within a page
    /// or within slots that are shared.
    pub(crate) fn cut_out(&mut self, pool: &mut SlotPool, begin: usize, tokens: u32) -> Result<Option<Range<usize>>, KvError> {
        let (mut end, mut left) = (begin, tokens);
        while left > 0 {
            let Some(&Part { extent, filled }) = self.parts.get(end) else { return Ok(None) };
            if filled > left {
                let rest = match pool.split(extent, left) {
                    Ok(rest) => rest,
                    Err(KvError::Shared { .. } | KvError::Moving(_) | KvError::SplitPoint { .. }) => return Ok(None),
                    Err(error) => return Err(error),
                };
                self.parts[end].filled = left;
                self.parts.insert(end + 1, Part { extent: rest, filled: filled - left });
            }
            left -= self.parts[end].filled;
            end += 1;
        }
        if end == self.parts.len()
            && let Some(&last) = self.parts.last()
        {
            let used = last.filled.next_multiple_of(pool.page_size());
            // Shared slots cannot be cut; then the tree holds the headroom as well.
            if let Ok(headroom) = pool.split(last.extent, used) {
                pool.release(headroom)?;
            }
        }
        Ok(Some(begin..end))
    }

    /// Takes other parts with the same tokens in place of some.
    pub(crate) fn replace_parts(&mut self, pool: &mut SlotPool, range: Range<usize>, parts: &[Part]) -> Result<(), KvError> {
        for part in parts {
            pool.retain(part.extent)?;
        }
        for part in self.parts.splice(range, parts.iter().copied()) {
            pool.release_later(part.extent)?;
        }
        Ok(())
    }
}
