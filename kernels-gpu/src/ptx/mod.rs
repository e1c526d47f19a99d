//! PTX instructions as functions, one file a family. Comments name the section of the PTX ISA, by its title since numbers move,
//! that defines them.

pub mod control;
pub mod cp_async;
pub mod math;
#[cfg(feature = "sm_90a")]
pub mod mbarrier;
pub mod memory;
pub mod mma;
pub mod packed;
pub mod special;
#[cfg(feature = "sm_90a")]
pub mod tma;
pub mod warp;
#[cfg(feature = "sm_90a")]
pub mod warpgroup;
#[cfg(feature = "sm_90a")]
pub mod wgmma;
