//! Batches in JSON files.
//!
//! ```
//! use packinfer_batch::BatchFile;
//!
//! let file = BatchFile::from_json(
//!     r#"{"num_qo_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "bf16", "page_size": 16, "causal": true,
//!         "block_tokens": 512,
//!         "requests": [{"query_len": 1, "kv_len": 600, "blocks": [7]}, {"query_len": 1, "kv_len": 520, "blocks": [7]}]}"#,
//! )?;
//! let batch = file.to_batch(0)?;
//! assert_eq!(batch.distinct_slots(), 512 + 88 + 8); // both requests read the same block
//! # Ok::<(), packinfer_batch::BatchFileError>(())
//! ```

use std::fs;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{AttentionShape, Batch, BatchError, DType, KvDType, KvLayout, Mask, PageOrder, PagedLayout};

/// One attention call of one layer, as a file says it.
///
/// The KV lies in pages of `page_size` slots. Requests whose `blocks` begin with the same ids hold the same tokens there, and
/// share those pages.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchFile {
    /// What to call it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What it is and where it comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Query heads of Q and O.
    pub num_qo_heads: u32,
    /// KV heads of K and V, a divisor of `num_qo_heads`.
    pub num_kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Element type of Q and O.
    pub dtype: DType,
    /// Element type of K and V.
    #[serde(default, skip_serializing_if = "is_default")]
    pub kv_dtype: KvDType,
    /// Slots of a page.
    pub page_size: u32,
    /// The order of a page's dimensions.
    #[serde(default, skip_serializing_if = "is_default")]
    pub page_order: PageOrder,
    /// Pages from one page of K to the next, and from one page of V to the next: see [`PagedLayout`].
    #[serde(default = "adjoining", skip_serializing_if = "is_adjoining")]
    pub page_stride: NonZeroU32,
    /// Whether a query token sees no tokens after it. The query tokens are the last of the KV tokens then.
    #[serde(default = "causal_by_default")]
    pub causal: bool,
    /// KV tokens that a query token sees at the most, itself and those just before it: a sliding window, of causal attention.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<NonZeroU32>,
    /// Bound of the scores: each score `s` becomes `cap · tanh(s / cap)` before the softmax.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logit_soft_cap: Option<f32>,
    /// Whether each query head has a sink: a further logit in its softmax, to which no V belongs.
    #[serde(default, skip_serializing_if = "is_default")]
    pub sinks: bool,
    /// Tokens of a block, a multiple of `page_size`. Needed where a request names blocks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_tokens: Option<u32>,
    /// The requests.
    pub requests: Vec<RequestLengths>,
}

/// One request of a [`BatchFile`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestLengths {
    /// Query tokens it brings to this step.
    pub query_len: u32,
    /// KV tokens it has, those of this step included.
    pub kv_len: u32,
    /// Content ids of its leading blocks of `block_tokens` tokens. What comes after them is its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blocks: Vec<u64>,
}

fn causal_by_default() -> bool {
    true
}

fn adjoining() -> NonZeroU32 {
    NonZeroU32::MIN
}

fn is_adjoining(page_stride: &NonZeroU32) -> bool {
    *page_stride == adjoining()
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl BatchFile {
    /// The most pages that the requests of a file may name together: a full pool in pages of 16 slots.
    ///
    /// It keeps a file of a few bytes from asking for more memory than a machine has.
    pub const MAX_PAGES: u64 = Batch::MAX_SLOTS as u64 / 16;

    /// Reads and checks a file.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or is no batch; the error names the file.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, BatchFileError> {
        let path = path.as_ref();
        let text = fs::read_to_string(path).map_err(|error| BatchFileError::Read { path: path.into(), error })?;
        Self::from_json(&text).map_err(|error| BatchFileError::InFile { path: path.into(), error: Box::new(error) })
    }

    /// Reads and checks a batch in JSON.
    ///
    /// # Errors
    ///
    /// Text that is not JSON or lacks something, with its line and column; or what [`Self::check`] finds.
    pub fn from_json(text: &str) -> Result<Self, BatchFileError> {
        let file: Self = serde_json::from_str(text).map_err(BatchFileError::Json)?;
        file.check()?;
        Ok(file)
    }

    /// The batch in JSON, one line for each request.
    pub fn to_json(&self) -> String {
        let head = Self { requests: Vec::new(), ..self.clone() };
        let head = serde_json::to_string(&head).expect("a batch file has only strings, numbers and lists");
        let requests: Vec<String> = self
            .requests
            .iter()
            .map(|request| serde_json::to_string(request).expect("a request has only numbers and lists"))
            .collect();
        format!("{}[{}]}}\n", head.trim_end_matches("[]}"), requests.join(",\n"))
    }

    /// Heads, head dimension, element types.
    ///
    /// # Errors
    ///
    /// See [`AttentionShape::new`].
    pub fn shape(&self) -> Result<AttentionShape, BatchError> {
        let shape = AttentionShape::new(self.num_qo_heads, self.num_kv_heads, self.head_dim, self.dtype)?;
        Ok(shape.with_kv_dtype(self.kv_dtype))
    }

    /// Which KV tokens a query token sees.
    pub fn mask(&self) -> Mask {
        match self.window {
            Some(window) => Mask::Window(window),
            None if self.causal => Mask::Causal,
            None => Mask::None,
        }
    }

    /// How K and V lie in their pool.
    ///
    /// # Errors
    ///
    /// See [`PagedLayout::new`]. Where pages adjoin and have no order of their own, they may be of any size.
    pub fn kv_layout(&self) -> Result<KvLayout, BatchError> {
        let Self { page_size, page_order, page_stride, .. } = *self;
        match page_order {
            PageOrder::Nhd if is_adjoining(&page_stride) => Ok(KvLayout::Slots),
            _ => Ok(PagedLayout::new(page_size, page_order)?.with_stride(page_stride).into()),
        }
    }

    /// Whether the numbers make sense together.
    ///
    /// # Errors
    ///
    /// Everything that [`AttentionShape`] and [`Batch`] reject; a sliding window that is not causal; a soft-cap that is no
    /// positive number; a page size of 0; blocks that are longer than their request,
    /// of unknown length, or not made of whole pages; more than [`Self::MAX_PAGES`].
    pub fn check(&self) -> Result<(), BatchFileError> {
        let page_size = self.page_size;
        if let Some(window) = self.window.filter(|_| !self.causal) {
            return Err(BatchFileError::WindowNotCausal { window });
        }
        if let Some(cap) = self.logit_soft_cap.filter(|cap| !cap.is_finite() || *cap <= 0.0) {
            return Err(BatchFileError::SoftCap { cap });
        }
        if page_size == 0 {
            return Err(BatchFileError::EmptyPage);
        }
        if let Some(block_tokens) = self.block_tokens
            && (block_tokens == 0 || !block_tokens.is_multiple_of(page_size))
        {
            return Err(BatchFileError::BlockNotInPages { block_tokens, page_size });
        }
        let shape = self.shape()?;
        self.kv_layout()?.check(shape)?;
        // Lengths are checked by a batch of them that lies anywhere.
        let mut lengths = Batch::new(shape, self.mask());
        let mut pages = 0;
        for (index, request) in self.requests.iter().enumerate() {
            lengths.push_contiguous(request.query_len, request.kv_len, 0)?;
            self.check_blocks(index, request)?;
            pages += u64::from(request.kv_len.div_ceil(page_size));
            if pages > Self::MAX_PAGES {
                return Err(BatchFileError::TooManyPages { request: index, pages, page_size, most: Self::MAX_PAGES });
            }
        }
        Ok(())
    }

    fn check_blocks(&self, index: usize, request: &RequestLengths) -> Result<(), BatchFileError> {
        let blocks = request.blocks.len() as u64;
        if blocks == 0 {
            return Ok(());
        }
        let block_tokens = self.block_tokens.ok_or(BatchFileError::NoBlockTokens { request: index })?;
        match blocks.checked_mul(u64::from(block_tokens)) {
            Some(tokens) if tokens <= u64::from(request.kv_len) => Ok(()),
            _ => Err(BatchFileError::BlocksTooLong { request: index, blocks, block_tokens, kv_len: request.kv_len }),
        }
    }
}

/// A file that is no batch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BatchFileError {
    /// The file cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
    /// A file is wrong.
    #[error("{}: {error}", path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: Box<BatchFileError>,
    },
    /// Not JSON, or not the JSON of a batch. The message ends with line and column.
    #[error("not a batch: {0}")]
    Json(serde_json::Error),
    /// Shape or lengths that no batch can have.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// A window of something else than causal attention.
    #[error("window is {window}, but causal is false: a sliding window ends with the query token, so it needs causal attention")]
    WindowNotCausal {
        /// Tokens of the window.
        window: NonZeroU32,
    },
    /// A soft-cap that is no positive number.
    #[error("logit_soft_cap is {cap}: it must be finite and greater than 0")]
    SoftCap {
        /// The soft-cap.
        cap: f32,
    },
    /// A page size of zero.
    #[error("page_size is 0: a page holds at least one slot")]
    EmptyPage,
    /// Blocks that do not fill pages cannot share them.
    #[error("block_tokens is {block_tokens} and page_size {page_size}: a block must be one or more whole pages")]
    BlockNotInPages {
        /// Tokens of a block.
        block_tokens: u32,
        /// Slots of a page.
        page_size: u32,
    },
    /// Blocks of unknown length.
    #[error("request {request} names blocks, but the batch has no block_tokens to say how long they are")]
    NoBlockTokens {
        /// Index of the request.
        request: usize,
    },
    /// Blocks reach past the end of the request.
    #[error("request {request} names {blocks} blocks of {block_tokens} tokens, which is more than its {kv_len} KV tokens")]
    BlocksTooLong {
        /// Index of the request.
        request: usize,
        /// Blocks that it names.
        blocks: u64,
        /// Tokens of a block.
        block_tokens: u32,
        /// KV tokens of the request.
        kv_len: u32,
    },
    /// More pages than a list of them should take.
    #[error(
        "request {request} brings the batch to {pages} pages of {page_size} slots: at most {most} are supported, so make pages larger or the KV shorter"
    )]
    TooManyPages {
        /// Index of the request.
        request: usize,
        /// Pages with it, shared ones counted for each request.
        pages: u64,
        /// Slots of a page.
        page_size: u32,
        /// The limit.
        most: u64,
    },
    /// More slots than can be numbered.
    #[error("the batch needs {pages} pages of {page_size} slots: slots are numbered up to {most}")]
    TooManySlots {
        /// Distinct pages.
        pages: u64,
        /// Slots of a page.
        page_size: u32,
        /// One past the last slot number.
        most: u32,
    },
}
