//! What attention can be asked for besides the plain softmax of all scores.

use half::{bf16, f16};
use packinfer::{Mask, Packing};

use crate::case::{Case, contiguous, engine, paged, shape};
use crate::{DECODE, MIXED, PREFILL};

#[test]
fn sliding_windows() {
    let Some(engine) = engine() else { return };
    for tokens in [1, 16, 64, 100, 1000, u32::MAX] {
        let window = Mask::Window(tokens.try_into().expect("not zero"));
        for packing in [Packing::Packed, Packing::PerRequest] {
            for lengths in [&MIXED[..], &PREFILL, &DECODE] {
                let case = Case::<bf16>::new(paged(shape::<bf16>(4, 128), window, lengths, 16));
                case.check(&case.run(engine, packing));
                let case = Case::<f16>::new(contiguous(shape::<f16>(7, 64), window, lengths));
                case.check(&case.run(engine, packing));
            }
        }
    }
}
