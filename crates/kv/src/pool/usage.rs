//! How full a pool is.

use serde::{Deserialize, Serialize};

/// How the slots of a pool are used; all counts are slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// All slots.
    pub total: u32,
    /// Slots that have an owner, counted once.
    pub used: u32,
    /// Slots that can be allocated.
    pub free: u32,
    /// Used slots that have more than one owner.
    pub shared: u32,
    /// Slots without owner that plans in flight may still read; `used + free + retiring == total`.
    pub retiring: u32,
    /// Slots of the largest free extent.
    pub largest_free: u32,
    /// Used slots that a prefix tree would give up ([`PrefixTree::usage`](crate::PrefixTree::usage)); the pool itself knows none.
    pub evictable: u32,
}

impl Usage {
    /// Share of the free slots outside the largest free extent: 0 when they are one extent, or none.
    pub fn fragmentation(&self) -> f64 {
        if self.free == 0 { 0.0 } else { 1.0 - f64::from(self.largest_free) / f64::from(self.free) }
    }

    /// Share of the slots that can neither be allocated nor evicted.
    pub fn pressure(&self) -> f64 {
        if self.total == 0 { 1.0 } else { 1.0 - (f64::from(self.free) + f64::from(self.evictable)) / f64::from(self.total) }
    }
}
