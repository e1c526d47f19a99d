//! Which blocks of a launch have begun, and which have left; and so who merges what.

/// How many blocks of a launch have begun, and how many have left: a block leaves when no task is left for it. As all that is
/// said of blocks is in one word, they see it change in the same order.
///
/// The rows of O that are merged from partials are shared out among the blocks that leave when all have begun: these may wait for
/// what others have still to store, for whoever has begun gets to its end. Who leaves before
/// [gives up its share](Self::with_all_begun). So no block waits for one that may not begin before others have ended. The last to
/// begin always has a share.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attendance(pub u64);

impl Attendance {
    /// The most blocks that it can count.
    pub const MOST_BLOCKS: u32 = (1 << 15) - 1;

    /// What a block adds when it begins.
    pub const BEGUN: u64 = 1;
    /// What it adds when it leaves.
    pub const LEFT: u64 = 1 << 16;
    /// What its readers add when they leave, if it has any.
    pub const READERS_LEFT: u64 = 1 << 32;
    /// One of the blocks that have given up their share, which the last to begin counts.
    const GIVEN_UP: u64 = 1 << 48;
    /// What it sets besides.
    const ALL_HAVE_BEGUN: u64 = 1 << 63;

    /// Blocks that have begun.
    pub const fn begun(self) -> u32 {
        self.count_of(Self::BEGUN)
    }

    /// Blocks that have left.
    pub const fn left(self) -> u32 {
        self.count_of(Self::LEFT)
    }

    /// Blocks whose readers have left.
    pub const fn readers_left(self) -> u32 {
        self.count_of(Self::READERS_LEFT)
    }

    const fn count_of(self, one: u64) -> u32 {
        (self.0 >> one.trailing_zeros()) as u32 & Self::MOST_BLOCKS
    }

    /// The same, when all blocks have begun: those that have left have given up their share. The last to begin swaps the one for
    /// the other.
    pub const fn with_all_begun(self) -> Self {
        Self(self.0 | Self::ALL_HAVE_BEGUN | (self.left() as u64 * Self::GIVEN_UP))
    }

    /// Whether all blocks have begun.
    pub const fn have_all_begun(self) -> bool {
        self.0 & Self::ALL_HAVE_BEGUN != 0
    }

    /// The share of a block that leaves when `num_blocks` are so far.
    pub const fn share_of_next(self, num_blocks: u32) -> Share {
        if !self.have_all_begun() {
            return Share::NONE;
        }
        let given_up = self.count_of(Self::GIVEN_UP);
        Share { index: self.left() - given_up, of: num_blocks - given_up }
    }
}

/// A block's share of the rows that are merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Which share it is; the first are those of blocks that leave first.
    pub index: u32,
    /// How many shares there are; zero for whoever has none.
    pub of: u32,
}

impl Share {
    /// That of a block which has given it up.
    pub const NONE: Self = Self { index: 0, of: 0 };
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    /// How far a block is. It does one thing with the common word at a time.
    #[derive(Clone, Copy)]
    enum Block {
        Waits,
        Begins { before: Attendance },
        Completes { expected: Attendance },
        Works,
        HasLeft { share: Share },
    }

    impl Block {
        /// What a block does next, as in `Beginning::complete` and `leave` of the kernels.
        fn step(self, word: &mut Attendance, num_blocks: u32) -> Self {
            let before = *word;
            match self {
                Self::Waits => {
                    word.0 += Attendance::BEGUN;
                    Self::Begins { before }
                }
                Self::Begins { before } if before.begun() + 1 < num_blocks => Self::Works,
                Self::Begins { before } => Self::Completes { expected: Attendance(before.0 + Attendance::BEGUN) },
                Self::Completes { expected } if expected == before => {
                    *word = before.with_all_begun();
                    Self::Works
                }
                Self::Completes { .. } => Self::Completes { expected: before },
                Self::Works => {
                    word.0 += Attendance::LEFT;
                    Self::HasLeft { share: before.share_of_next(num_blocks) }
                }
                Self::HasLeft { .. } => self,
            }
        }
    }

    proptest! {
        /// Whatever the order in which blocks get on, all shares are taken, each once, by blocks that leave when all have begun.
        #[test]
        fn all_shares_are_taken(num_blocks in 1..24u32, turns in proptest::collection::vec(any::<u32>(), 0..400)) {
            let mut blocks = std::vec![Block::Waits; num_blocks as usize];
            let mut word = Attendance::default();
            // In the end, all get on.
            let rest = (0..6 * num_blocks).map(|turn| turn % num_blocks);
            for turn in turns.into_iter().map(|turn| turn % num_blocks).chain(rest) {
                let block = &mut blocks[turn as usize];
                let had_left = matches!(block, Block::HasLeft { .. });
                *block = block.step(&mut word, num_blocks);
                if let Block::HasLeft { share } = *block && !had_left && share != Share::NONE {
                    prop_assert!(!blocks.iter().any(|block| matches!(block, Block::Waits)));
                }
            }
            prop_assert_eq!((word.begun(), word.left(), word.readers_left()), (num_blocks, num_blocks, 0));
            let mut shares = Vec::new();
            for block in blocks {
                let Block::HasLeft { share } = block else { panic!("a block has not left") };
                shares.extend((share != Share::NONE).then_some(share));
            }
            shares.sort_by_key(|share| share.index);
            prop_assert!(!shares.is_empty());
            for (index, share) in (0..).zip(&shares) {
                prop_assert_eq!(*share, Share { index, of: shares.len() as u32 });
            }
        }
    }

    #[test]
    fn the_most_blocks_can_be_counted() {
        let most = Attendance::MOST_BLOCKS;
        let begun = Attendance(u64::from(most) * Attendance::BEGUN + u64::from(most - 1) * Attendance::LEFT).with_all_begun();
        assert_eq!(begun.share_of_next(most), Share { index: 0, of: 1 });
        let left = Attendance(begun.0 + Attendance::LEFT + u64::from(most) * Attendance::READERS_LEFT);
        assert_eq!([left.begun(), left.left(), left.readers_left()], [most; 3]);
    }
}
