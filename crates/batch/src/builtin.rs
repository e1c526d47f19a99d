//! The batch that is there without a file.

use std::num::NonZeroU32;

use crate::file::RequestLengths;
use crate::{BatchFile, DType, KvDType, PageOrder};

impl BatchFile {
    /// A mixed batch, as a server that chunks its prefill sees it: two chunks of long prompts, 48 decode requests of 64 to 3,870
    /// tokens and 16 short prompts. Small enough that a CPU takes well under a second for it.
    pub fn builtin() -> Self {
        let chunks = [(256, 1536), (128, 128)].map(|(query_len, kv_len)| request(query_len, kv_len));
        let decodes = (0..48).map(|i| request(1, 64 + 81 * (i * 29 % 48)));
        let prompts = (0..16).map(|i| 8 + 5 * (i * 7 % 16)).map(|len| request(len, len));
        Self {
            name: Some("builtin_mixed".into()),
            description: Some("two prefill chunks, 48 decode requests and 16 short prompts".into()),
            num_qo_heads: 32,
            num_kv_heads: 8,
            head_dim: 128,
            dtype: DType::Bf16,
            kv_dtype: KvDType::Same,
            page_size: 16,
            page_order: PageOrder::Nhd,
            page_stride: NonZeroU32::MIN,
            causal: true,
            window: None,
            logit_soft_cap: None,
            sinks: false,
            block_tokens: None,
            requests: chunks.into_iter().chain(decodes).chain(prompts).collect(),
        }
    }
}

fn request(query_len: u32, kv_len: u32) -> RequestLengths {
    RequestLengths { query_len, kv_len, blocks: Vec::new() }
}
