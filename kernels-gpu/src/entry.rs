//! How a kernel is declared: the one place that knows how the two compiler backends differ.

/// Declares kernel entry points.
///
/// ```ignore
/// kernel! {
///     /// What it does.
///     #[launch_bounds(threads = 128, blocks_per_sm = 2)]
///     #[expect("bar.sync" = 2)]
///     fn name(params: Params) { body }
/// }
/// ```
///
/// `expect` says how many instructions of a kind the PTX must have, and `cargo xtask build-ptx` fails if it has others: compilers
/// know nothing of what warps do together, and have been seen to copy a barrier into both branches of a condition, where a kernel
/// then hangs.
///
/// `launch_bounds` are the threads of a block and the blocks that a multiprocessor must be able to hold. Neither backend can
/// express them, so they are left in the PTX as a comment that `cargo xtask build-ptx` turns into `.maxntid` and `.minnctapersm`.
macro_rules! kernel {
    ($($(#[doc = $doc:literal])* #[launch_bounds(threads = $threads:literal, blocks_per_sm = $blocks:literal)]
       $(#[expect($($instruction:literal = $count:literal),*)])?
       fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block)*) => {$(
        core::arch::global_asm!(concat!("// packinfer.launch_bounds ", stringify!($name), " ", $threads, " ", $blocks));
        $($(core::arch::global_asm!(concat!("// packinfer.expect ", stringify!($name), " ", $instruction, " ", $count));)*)?

        $(#[doc = $doc])*
        ///
        /// # Safety
        ///
        /// Launched with parameters that are valid as their type says.
        #[unsafe(no_mangle)]
        #[cfg_attr(target_feature = "compute_80", nvvm_internal::kernel)]
        pub unsafe extern "ptx-kernel" fn $name($($arg: $ty),*) $body
    )*};
}
