//! Work is balanced: the lanes of a device are predicted to end together.
//!
//! They do where there is work enough to divide. The shortest part of a tile that is worth its partial results and its merge
//! takes some microseconds, so calls of less than [`LEAST_US`] may end less evenly; as may those with long wide tiles and little
//! else, where dividing these would take longer than waiting for them.

use packinfer_batch::{AttentionShape, Batch, DType, Mask};
use packinfer_planner::{DeviceModel, Packing, Planner};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rand_distr::LogNormal;

/// The latest lane ends at most this much later than lanes do on average.
const BALANCED: f64 = 1.03;
/// Calls that are predicted to take less are not looked at.
const LEAST_US: f64 = 150.0;

type Lengths = Vec<(u32, u32)>;

/// KV lengths around a median.
fn around(rng: &mut SmallRng, median: f64, sigma: f64, most: f64) -> u32 {
    rng.sample(LogNormal::new(median.ln(), sigma).expect("a finite deviation")).clamp(8.0, most) as u32
}

fn decodes(rng: &mut SmallRng, count: usize, median: f64, sigma: f64, most: f64) -> Lengths {
    (0..count).map(|_| (1, around(rng, median, sigma, most))).collect()
}

/// What steps of servers look like: chats, code, long contexts, a straggler, prompts, chunks beside decodes, drafts to verify.
fn steps(rng: &mut SmallRng) -> Vec<(&'static str, Lengths)> {
    let prompts = |rng: &mut SmallRng, count, median| -> Lengths {
        (0..count).map(|_| around(rng, median, 0.9, 8000.0)).map(|len| (len, len)).collect()
    };
    let chunks = [vec![(2048, 8000), (512, 4096)], decodes(rng, 128, 930.0, 0.75, 6000.0)].concat();
    vec![
        ("chats", decodes(rng, 256, 930.0, 0.75, 6000.0)),
        ("code", decodes(rng, 96, 1900.0, 0.7, 8000.0)),
        ("long contexts", decodes(rng, 48, 9000.0, 1.0, 130_000.0)),
        ("a straggler", [vec![(1, 131_072)], vec![(1, 512); 63]].concat()),
        ("alike", vec![(1, 4096); 128]),
        ("prompts", prompts(rng, 24, 1200.0)),
        ("short prompts", (0..512).map(|_| rng.random_range(8..=160)).map(|len| (len, len)).collect()),
        ("long prompts", vec![(8192, 8192); 4]),
        ("chunks beside decodes", chunks),
        ("drafts", (0..128).map(|_| (8, around(rng, 3000.0, 0.5, 16_000.0))).collect()),
    ]
}

/// Tiles of one prompt follow each other, so that they find their KV in the L2 cache; but the device does not wait for the last
/// prompt's long ones.
#[test]
fn lanes_end_together_where_the_last_prompt_has_no_short_tiles() {
    let shape = AttentionShape::new(8, 1, 128, DType::Bf16).expect("a good shape");
    let mut batch = Batch::new(shape, Mask::Causal);
    for (query_len, kv_len) in [(889, 2937), (507, 6651), (8838, 9350), (6150, 6662)] {
        batch.push_contiguous(query_len, kv_len, batch.num_slots()).expect("a good request");
    }
    for model in DeviceModel::estimates_for_device("H100", (9, 0), 132) {
        let plan = Planner::new(model).plan(&batch).expect("a batch that can be planned");
        let latest = 1.0 / plan.explain(&model).balance;
        assert!(latest <= BALANCED, "{} kernels: the latest lane is at {latest:.3}", model.kernel_family);
    }
}

#[test]
fn lanes_end_together() {
    let shape = AttentionShape::new(32, 8, 128, DType::Bf16).expect("a good shape");
    let measured =
        DeviceModel::all_for_device("H100", (9, 0), 132).into_iter().filter(|model| model.head_dim == shape.head_dim());
    let models: Vec<_> = DeviceModel::estimates_for_device("H100", (9, 0), 132).into_iter().chain(measured).collect();
    let mut rng = SmallRng::seed_from_u64(3);
    let mut looked_at = 0;
    for (name, lengths) in (0..5).flat_map(|_| steps(&mut rng)) {
        let mut batch = Batch::new(shape, Mask::Causal);
        for (query_len, kv_len) in lengths {
            batch.push_contiguous(query_len, kv_len, batch.num_slots()).expect("a good request");
        }
        for model in &models {
            let plan = Planner::new(*model).with_packing(Packing::Unshared).plan(&batch).expect("a batch that can be planned");
            let explanation = plan.explain(model);
            if explanation.predicted_us >= LEAST_US {
                let latest = 1.0 / explanation.balance;
                assert!(latest <= BALANCED, "{name}, {} kernels: the latest lane is at {latest:.3}", model.kernel_family);
                looked_at += 1;
            }
        }
    }
    assert!(looked_at >= 90, "only {looked_at} plans are long enough to look at");
}

/// A few decodes: every lane has one part at most, and hardly any has none while parts have 256 columns.
#[test]
fn few_decodes_are_shared_out_among_all_lanes() {
    let models = DeviceModel::all_for_device("H100", (9, 0), 132);
    for (heads, lengths) in [
        ((8, 1), vec![16_384]),
        ((32, 8), vec![16_384]),
        ((28, 4), vec![16_384]),
        ((32, 32), vec![100_000]),
        ((32, 8), vec![8192, 8000, 7800, 9000]),
        ((8, 1), vec![40_000, 3000, 512, 20_000, 128, 1000]),
        ((8, 1), vec![2048, 600]),
    ] {
        let shape = AttentionShape::new(heads.0, heads.1, 128, DType::Bf16).expect("a good shape");
        let mut batch = Batch::new(shape, Mask::Causal);
        for &kv_len in &lengths {
            batch.push_contiguous(1, kv_len, batch.num_slots()).expect("a good request");
        }
        for model in models.iter().filter(|model| (model.head_dim, model.blocks_per_sm) == (128, 1)) {
            let plan = Planner::new(*model).plan(&batch).expect("a batch that can be planned");
            let (num_items, groups) = (plan.items().len() as u32, plan.heads().num_groups);
            let name = format!("{lengths:?} with heads {heads:?}: {num_items} items of {groups} head groups");
            assert!(num_items * groups <= model.lanes(), "{name}");
            let longest = plan.items().iter().map(|item| item.column_end - item.column_begin).max().expect("an item");
            assert!(longest <= 256 || num_items * groups >= model.lanes() * 9 / 10, "{name}, the longest of {longest} columns");
            let mean = lengths.iter().sum::<u32>() / num_items;
            assert!(longest <= mean * 5 / 4 + 128, "{name}, the longest of {longest} columns");
        }
    }
}
