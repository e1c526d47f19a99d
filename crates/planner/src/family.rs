//! Families of kernels.

use std::fmt;
use std::str::FromStr;

use packinfer_abi::{COLUMN_STEP, TALL_TILE_ROWS, WIDE_TILE_ROWS, hopper_column_step, wide_tile_rows};
use packinfer_batch::{AttentionShape, KvDType};
use serde::{Deserialize, Serialize};

/// Kernels compiled for one architecture. A plan is for one family: how large tiles may be, and what they cost, is another for
/// each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum KernelFamily {
    /// For Ampere and later: small blocks, several at a time on a multiprocessor, that overlap each other's loads and products.
    #[serde(rename = "sm_80")]
    Sm80,
    /// For Hopper alone: one persistent block a multiprocessor, with the products of whole warpgroups. Much faster where products
    /// are the limit, and as fast where memory is.
    #[serde(rename = "sm_90a")]
    Sm90a,
}

impl KernelFamily {
    /// All families.
    pub const ALL: [Self; 2] = [Self::Sm80, Self::Sm90a];

    /// Columns that a thread block takes at a time.
    pub(crate) fn column_step(self, head_dim: u32) -> u32 {
        match self {
            Self::Sm80 => COLUMN_STEP,
            Self::Sm90a => hopper_column_step(head_dim),
        }
    }

    /// Rows of a wide tile of the kernels that every launch may use.
    pub(crate) fn wide_tile_rows(self, head_dim: u32) -> u32 {
        match self {
            Self::Sm80 => wide_tile_rows(head_dim),
            Self::Sm90a => WIDE_TILE_ROWS,
        }
    }

    /// Rows of a wide tile of the kernels for launches of wide tiles alone, if there are any.
    pub(crate) fn tall_tile_rows(self, shape: AttentionShape) -> Option<u32> {
        let has = self == Self::Sm90a && shape.head_dim() <= 128 && shape.kv_dtype() == KvDType::Same;
        has.then_some(TALL_TILE_ROWS)
    }

    /// Rows of a wide tile that skip a step of columns together, because none of them sees any of it: those of a warp, or of a
    /// warpgroup.
    pub(crate) const fn wide_rows_together(self) -> u32 {
        match self {
            Self::Sm80 => 32,
            Self::Sm90a => 64,
        }
    }

    /// Whether there is a kernel that does narrow tiles beside wide ones, on the same multiprocessor at the same time, where wide
    /// ones read K and V in this shape: those of narrow ones may be in FP8 even so.
    pub fn does_narrow_beside_wide(self, shape: AttentionShape) -> bool {
        self == Self::Sm90a && matches!(shape.head_dim(), 64 | 128) && shape.kv_dtype() == KvDType::Same
    }

    /// Whether a device of a compute capability, major and minor number, can run them.
    pub fn runs_on(self, compute_capability: (u32, u32)) -> bool {
        match self {
            Self::Sm80 => compute_capability >= (8, 0),
            Self::Sm90a => compute_capability == (9, 0),
        }
    }
}

impl FromStr for KernelFamily {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|family| family.to_string() == name);
        found.ok_or_else(|| format!("there are no {name} kernels: the families are sm_80 and sm_90a"))
    }
}

impl fmt::Display for KernelFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Sm80 => "sm_80",
            Self::Sm90a => "sm_90a",
        })
    }
}
