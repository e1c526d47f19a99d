//! Heads, their size and their type.

use std::fmt;

use packinfer_abi::{HeadGroups, MAX_HEADS_PER_GROUP, wide_tile_rows};
use serde::{Deserialize, Serialize};

use crate::BatchError;

/// Element type of Q, K, V and O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// bfloat16: 8 bits of exponent, 7 of fraction.
    Bf16,
    /// IEEE half precision: 5 bits of exponent, 10 of fraction.
    F16,
}

impl DType {
    /// Bytes of one element.
    pub const fn size_in_bytes(self) -> u64 {
        2
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
        })
    }
}

/// Element type of K and V.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDType {
    /// That of Q and O.
    #[default]
    Same,
    /// FP8: 4 bits of exponent, 3 of fraction, no infinities; K and V have a scale for each KV head.
    E4m3,
}

impl fmt::Display for KvDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            KvDType::Same => "same",
            KvDType::E4m3 => "e4m3",
        })
    }
}

/// Head counts, head dimension and element types of an attention call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionShape {
    num_qo_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
    dtype: DType,
    kv_dtype: KvDType,
}

impl AttentionShape {
    /// Head dimensions that the kernels are built for.
    pub const HEAD_DIMS: [u32; 4] = [64, 96, 128, 256];
    /// The most query heads.
    pub const MAX_QO_HEADS: u32 = 1024;

    /// A shape of `num_qo_heads` query heads, `num_kv_heads` KV heads (a divisor) and `head_dim` elements a head.
    ///
    /// # Errors
    ///
    /// No heads, more than [`Self::MAX_QO_HEADS`], query heads that the KV heads do not divide, or a head dimension that is not
    /// one of [`Self::HEAD_DIMS`].
    pub fn new(num_qo_heads: u32, num_kv_heads: u32, head_dim: u32, dtype: DType) -> Result<Self, BatchError> {
        if num_qo_heads == 0 || num_kv_heads == 0 {
            return Err(BatchError::NoHeads { num_qo_heads, num_kv_heads });
        }
        if num_qo_heads > Self::MAX_QO_HEADS {
            return Err(BatchError::TooManyHeads { num_qo_heads, most: Self::MAX_QO_HEADS });
        }
        if !num_qo_heads.is_multiple_of(num_kv_heads) {
            return Err(BatchError::HeadsNotDivisible { num_qo_heads, num_kv_heads });
        }
        if !Self::HEAD_DIMS.contains(&head_dim) {
            return Err(BatchError::HeadDim { head_dim });
        }
        Ok(Self { num_qo_heads, num_kv_heads, head_dim, dtype, kv_dtype: KvDType::Same })
    }

    /// The same shape with K and V of another type.
    pub fn with_kv_dtype(self, kv_dtype: KvDType) -> Self {
        Self { kv_dtype, ..self }
    }

    /// Query heads.
    pub fn num_qo_heads(&self) -> u32 {
        self.num_qo_heads
    }

    /// KV heads.
    pub fn num_kv_heads(&self) -> u32 {
        self.num_kv_heads
    }

    /// Elements of one head.
    pub fn head_dim(&self) -> u32 {
        self.head_dim
    }

    /// Element type of Q and O.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Element type of K and V.
    pub fn kv_dtype(&self) -> KvDType {
        self.kv_dtype
    }

    /// Bytes of one element of K or V.
    pub fn kv_element_bytes(&self) -> u64 {
        match self.kv_dtype {
            KvDType::Same => self.dtype.size_in_bytes(),
            KvDType::E4m3 => 1,
        }
    }

    /// Query heads of one KV head.
    pub fn gqa_ratio(&self) -> u32 {
        self.num_qo_heads / self.num_kv_heads
    }

    /// Head groups as large as a tile allows: all query heads of a KV head, or the largest equal part of them that fits.
    pub fn packed_head_groups(&self) -> HeadGroups {
        let ratio = self.gqa_ratio();
        let heads_per_group = (1..=ratio.min(MAX_HEADS_PER_GROUP)).rev().find(|&n| ratio.is_multiple_of(n)).unwrap_or(1);
        self.head_groups(heads_per_group)
    }

    /// One query head a group: GQA rows are not packed.
    pub fn single_head_groups(&self) -> HeadGroups {
        self.head_groups(1)
    }

    fn head_groups(&self, heads_per_group: u32) -> HeadGroups {
        HeadGroups {
            num_qo_heads: self.num_qo_heads,
            num_kv_heads: self.num_kv_heads,
            heads_per_group,
            num_groups: self.num_qo_heads / heads_per_group,
            wide_tile_rows: wide_tile_rows(self.head_dim),
        }
    }

    /// Elements of one token of Q or O: all query heads.
    pub fn qo_elements_per_token(&self) -> u64 {
        u64::from(self.num_qo_heads) * u64::from(self.head_dim)
    }

    /// Elements of one slot of K, and as many of V: all KV heads.
    pub fn kv_elements_per_slot(&self) -> u64 {
        u64::from(self.num_kv_heads) * u64::from(self.head_dim)
    }

    /// Bytes of K and V together in one slot.
    pub fn kv_bytes_per_slot(&self) -> u64 {
        2 * self.kv_elements_per_slot() * self.kv_element_bytes()
    }

    /// Bytes of Q and O together for one token.
    pub fn qo_bytes_per_token(&self) -> u64 {
        2 * self.qo_elements_per_token() * self.dtype.size_in_bytes()
    }
}
