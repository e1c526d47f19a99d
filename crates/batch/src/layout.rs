//! How K and V lie in a pool: slot after slot, or in the pages of another engine.
//!
//! Kernels find head `h` of a slot at `number * slot stride + h * head stride` from the tensor's first element. They read any
//! layout in which slots can be *numbered* to make that true:
//!
//! ```text
//! NHD   page │ slot 0: head 0, head 1, … │ slot 1: head 0, head 1, … │ …     slot stride num_kv_heads * head_dim, head stride head_dim
//! HND   page │ head 0: slot 0, slot 1, … │ head 1: slot 0, slot 1, … │ …     slot stride head_dim, head stride page_size * head_dim
//! ```
//!
//! The numbers of a page's slots follow each other. Those of the next page begin where it does, counted in slot strides: behind
//! the other heads of this page, and behind the pages of V or of other layers that lie between the two.

use std::fmt;
use std::num::NonZeroU32;

use packinfer_abi::KvRun;
use serde::{Deserialize, Serialize};

use crate::{AttentionShape, Batch, BatchError};

/// How K and V lie in a pool.
///
/// Pages, slots and runs are named in the same way in all layouts: slot `i` of page `p` is slot `p * page_size + i`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvLayout {
    /// K and V are each `[slots, num_kv_heads, head_dim]`, divided into pages of any size or not at all.
    #[default]
    Slots,
    /// K and V lie in pages of one size.
    Paged(PagedLayout),
}

/// Pages as another engine has them.
///
/// | tensors | stride | K begins at | V begins at |
/// | --- | --- | --- | --- |
/// | K and V, each `[pages, …]` | 1 | its first page | its first page |
/// | `[pages, 2, …]` | 2 | page 0 | page 1 |
/// | `[pages, layers, 2, …]`, layer `l` | 2 · layers | page 2 · `l` | page 2 · `l` + 1 |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PagedLayout {
    page_size: u32,
    order: PageOrder,
    page_stride: NonZeroU32,
}

/// The order of a page's dimensions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PageOrder {
    /// `[page_size, num_kv_heads, head_dim]`.
    #[default]
    Nhd,
    /// `[num_kv_heads, page_size, head_dim]`.
    Hnd,
}

/// Elements between places in K, and in V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvStrides {
    /// From a slot to the one with the next number.
    pub slot: u64,
    /// From a head of a slot to its next head.
    pub head: u64,
}

impl KvLayout {
    /// Strides of slots and heads.
    pub fn strides(&self, shape: AttentionShape) -> KvStrides {
        let head_dim = u64::from(shape.head_dim());
        match self {
            Self::Paged(PagedLayout { page_size, order: PageOrder::Hnd, .. }) => {
                KvStrides { slot: head_dim, head: u64::from(*page_size) * head_dim }
            }
            _ => KvStrides { slot: shape.kv_elements_per_slot(), head: head_dim },
        }
    }

    /// Elements of K, and of V, from the first to the last that a pool of `num_slots` slots has of it: those of whole pages, and
    /// what lies between them.
    pub fn num_elements(&self, shape: AttentionShape, num_slots: u32) -> u64 {
        match self {
            Self::Slots => u64::from(num_slots) * shape.kv_elements_per_slot(),
            Self::Paged(pages) => match u64::from(num_slots.div_ceil(pages.page_size)) {
                0 => 0,
                count => {
                    let pages_between = (count - 1) * u64::from(pages.page_stride.get());
                    (pages_between + 1).saturating_mul(pages.page_elements(shape))
                }
            },
        }
    }

    /// Slots of a page, where the layout has pages of its own.
    #[inline]
    pub fn page_size(&self) -> Option<u32> {
        match self {
            Self::Slots => None,
            Self::Paged(pages) => Some(pages.page_size),
        }
    }

    /// Slots of the largest pool: their numbers stay below [`Batch::MAX_SLOTS`].
    #[inline]
    pub fn most_slots(&self, shape: AttentionShape) -> u32 {
        match self {
            Self::Slots => Batch::MAX_SLOTS,
            Self::Paged(pages) => {
                let pages_numbered = u64::from(Batch::MAX_SLOTS) / pages.numbers(shape);
                pages_numbered as u32 * pages.page_size
            }
        }
    }

    /// Slots of the smallest pool that has slots up to `end`: whole pages.
    #[inline]
    pub fn pool_slots(&self, end: u32) -> u32 {
        self.page_size().map_or(end, |page_size| end.checked_next_multiple_of(page_size).unwrap_or(u32::MAX))
    }

    /// The numbers of the slots from `first` on, as many as follow each other before `end`, which is at most
    /// [`Self::most_slots`].
    #[inline]
    pub fn number(&self, shape: AttentionShape, first: u32, end: u32) -> KvRun {
        match self {
            Self::Slots => KvRun { first_slot: first, num_slots: end.saturating_sub(first) },
            Self::Paged(pages) => {
                let (page, place) = (first / pages.page_size, first % pages.page_size);
                let num_slots = (pages.page_size - place).min(end.saturating_sub(first));
                let first_of_page = u64::from(page).saturating_mul(pages.numbers(shape)) as u32;
                KvRun { first_slot: first_of_page.saturating_add(place), num_slots }
            }
        }
    }

    /// Checks that kernels can find everything in a page, and number at least one.
    pub(crate) fn check(&self, shape: AttentionShape) -> Result<(), BatchError> {
        let Self::Paged(pages) = self else { return Ok(()) };
        let page_size = pages.page_size;
        let most = (PagedLayout::MOST_PAGE_BYTES / (shape.kv_elements_per_slot() * shape.kv_element_bytes())) as u32;
        if page_size > most {
            return Err(BatchError::PageTooLarge { page_size, most });
        }
        if pages.numbers(shape) > u64::from(Batch::MAX_SLOTS) {
            return Err(BatchError::PageStride { layout: *self, most: Batch::MAX_SLOTS });
        }
        Ok(())
    }
}

impl PagedLayout {
    /// What the size of a page is a multiple of: slots that the `sm_90a` kernels copy at a time. What is left of a page would
    /// come in smaller pieces.
    pub const SIZE_MULTIPLE: u32 = packinfer_abi::KV_BOX_GROUP;

    /// The most bytes of a page of K, so that kernels can count its bytes in 32 bits.
    const MOST_PAGE_BYTES: u64 = 1 << 31;

    /// Pages of `page_size` slots, of tensors that have nothing but K, or nothing but V.
    ///
    /// # Errors
    ///
    /// A page size that is no multiple of [`Self::SIZE_MULTIPLE`].
    pub fn new(page_size: u32, order: PageOrder) -> Result<Self, BatchError> {
        let multiple = Self::SIZE_MULTIPLE;
        if page_size == 0 || !page_size.is_multiple_of(multiple) {
            return Err(BatchError::PageSize { page_size, multiple });
        }
        Ok(Self { page_size, order, page_stride: NonZeroU32::MIN })
    }

    /// The same pages, in a tensor that has `page_stride` pages from one page of K to the next, and as many from one page of V to
    /// the next.
    pub fn with_stride(self, page_stride: NonZeroU32) -> Self {
        Self { page_stride, ..self }
    }

    /// Elements of a page of K, and of V.
    pub fn page_elements(&self, shape: AttentionShape) -> u64 {
        u64::from(self.page_size) * shape.kv_elements_per_slot()
    }

    /// Slot strides from a page to the next.
    fn numbers(&self, shape: AttentionShape) -> u64 {
        let of_page = self.page_elements(shape) / KvLayout::Paged(*self).strides(shape).slot;
        of_page.saturating_mul(self.page_stride.get().into())
    }
}

impl From<PagedLayout> for KvLayout {
    fn from(pages: PagedLayout) -> Self {
        Self::Paged(pages)
    }
}

impl fmt::Display for PageOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            PageOrder::Nhd => "NHD",
            PageOrder::Hnd => "HND",
        })
    }
}

impl fmt::Display for KvLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slots => f.write_str("slots one after the other"),
            Self::Paged(PagedLayout { page_size, order, page_stride }) => {
                write!(f, "{order} pages of {page_size} slots, {page_stride} pages apart")
            }
        }
    }
}
