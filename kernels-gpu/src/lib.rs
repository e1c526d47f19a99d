//! PackInfer's device code: attention over packed query-key regions, in Rust that compiles to PTX.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`attention`] | the packed-region attention kernel, for `sm_80` and for `sm_90a`, each with a way for many rows (`wide`) and one for few (`narrow`) |
//! | [`merge`] | merges the partial results of split tiles by log-sum-exp |
//! | [`kv_append`], [`kv_move`] | write new tokens to KV pools, and copy slots within them |
//! | [`kv_widen`] | makes K and V in FP8 what Q is, for calls that use them many times |
//! | [`rows`], [`columns`] | which query row and which KV slot a tile's rows and columns are |
//! | [`softmax`] | online softmax over score fragments |
//! | [`shared_tile`] | a swizzled tile in shared memory |
//! | [`element`] | bf16 and f16 |
//! | [`e4m3`] | FP8 |
//! | [`stored`] | how K and V are stored, as Q is or in FP8, for products of a warp |
//! | [`mma_rate`] | measures the tensor cores |
//! | [`ptx`] | one function an instruction, one file a family; the only place with assembly |
//!
//! The structures that kernels read are those of `packinfer-abi`. Entry points are declared with [`kernel!`].
#![cfg_attr(not(target_feature = "compute_80"), no_std)]
#![feature(abi_ptx, asm_experimental_arch, stdarch_nvptx)]
// Device code reads and writes memory by address throughout: that the addresses are good is the host's promise, which
// `packinfer` keeps by checking plans and buffers before a launch. An unsafe function here is one unsafe block; private
// ones ask for what the function that calls them asks for.
#![allow(unsafe_op_in_unsafe_fn)]

#[macro_use]
mod entry;

pub mod attention;
pub mod columns;
pub mod e4m3;
pub mod element;
#[cfg(feature = "sm_80")]
pub mod kv_append;
#[cfg(feature = "sm_80")]
pub mod kv_move;
#[cfg(feature = "sm_90a")]
pub mod kv_widen;
pub mod merge;
pub mod mma_rate;
pub mod ptx;
pub mod rows;
pub mod shared_tile;
pub mod softmax;
pub mod stored;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    ptx::control::trap()
}
