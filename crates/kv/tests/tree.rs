//! What the prefix tree promises, one promise a test.

use packinfer_kv::{Branch, Filled, Growth, KvError, Prefix, PrefixTree, SlotPool};

const PAGE: u32 = 4;
const BLOCK: u32 = 8;

fn setup(slots: u32) -> (SlotPool, PrefixTree<u64>) {
    (SlotPool::new(slots, PAGE).unwrap(), PrefixTree::new(BLOCK).unwrap())
}

/// Computes a prompt whose blocks are known by `hashes` and inserts it.
fn compute(pool: &mut SlotPool, tree: &mut PrefixTree<u64>, hashes: &[u64], tokens: u32) -> Branch {
    let mut branch = tree.start(pool, hashes).unwrap();
    let missing = tokens - branch.kv.len();
    tree.append(pool, &mut branch, missing, Growth::Contiguous { headroom: 0 }).unwrap();
    tree.insert(pool, &mut branch, hashes).unwrap();
    branch
}

#[test]
fn finds_the_longest_prefix_at_any_depth() {
    let (mut pool, mut tree) = setup(1024);
    let deep: Vec<u64> = (0..50).collect();
    let branch = compute(&mut pool, &mut tree, &deep, 50 * BLOCK);
    tree.finish(&mut pool, branch).unwrap();
    assert_eq!(tree.num_blocks(), 50);
    let other: Vec<u64> = (0..30).chain([99, 31]).collect();
    let prefix = tree.match_prefix(&other);
    assert_eq!((prefix.blocks, prefix.tokens), (30, 30 * BLOCK));
    // The same block after another prefix is another block.
    assert_eq!(tree.match_prefix(&[1, 2]), Prefix::default());
    let node = prefix.node.unwrap();
    let parent = tree.parent(node).unwrap().unwrap();
    assert_eq!((tree.depth(node), tree.depth(parent)), (Ok(30), Ok(29)));
}

#[test]
fn tokens_are_keys_as_well() {
    let mut pool = SlotPool::new(64, PAGE).unwrap();
    let mut tree = PrefixTree::<[u32]>::new(BLOCK).unwrap();
    let prompt: Vec<u32> = (0..20).collect();
    let mut branch = tree.start(&mut pool, prompt.chunks(8)).unwrap();
    tree.append(&mut pool, &mut branch, 20, Growth::Pages).unwrap();
    assert_eq!(tree.insert(&mut pool, &mut branch, prompt.chunks(8)), Ok(3));
    assert_eq!(tree.match_prefix(prompt.chunks(8)).tokens, 20);
    let longer: Vec<u32> = (0..24).collect();
    assert_eq!(tree.match_prefix(longer.chunks(8)).tokens, 16, "the last block holds other tokens");
    tree.finish(&mut pool, branch).unwrap();
}

#[test]
fn equal_blocks_computed_twice_are_stored_once() {
    let (mut pool, mut tree) = setup(256);
    let mut one = tree.start(&mut pool, &[1, 2]).unwrap();
    let mut two = tree.start(&mut pool, &[1, 2]).unwrap();
    for branch in [&mut one, &mut two] {
        tree.append(&mut pool, branch, 2 * BLOCK, Growth::Contiguous { headroom: 0 }).unwrap();
    }
    assert_eq!(pool.usage().used, 4 * BLOCK);
    assert_eq!(tree.insert(&mut pool, &mut one, &[1, 2]), Ok(2));
    assert_eq!(tree.insert(&mut pool, &mut two, &[1, 2]), Ok(0));
    assert_eq!((pool.usage().used, pool.usage().retiring), (2 * BLOCK, 2 * BLOCK));
    assert_eq!(one.kv.runs(&pool), two.kv.runs(&pool));
    assert_eq!(one.prefix(), two.prefix());
}

#[test]
fn evicts_least_recently_used_leaves_first() {
    let (mut pool, mut tree) = setup(6 * BLOCK);
    for hashes in [[1, 10], [1, 11], [2, 20]] {
        let branch = compute(&mut pool, &mut tree, &hashes, 2 * BLOCK);
        tree.finish(&mut pool, branch).unwrap();
    }
    tree.match_prefix(&[1, 10]);
    assert_eq!((pool.free_slots(), tree.num_evictable_leaves()), (BLOCK, 3));
    let evicted = tree.evict(&mut pool, 2 * BLOCK).unwrap();
    assert_eq!((evicted.blocks, evicted.slots), (1, BLOCK));
    assert_eq!(tree.match_prefix(&[1, 11]).blocks, 1, "the oldest leaf went, its parent has another one");
    tree.evict(&mut pool, 4 * BLOCK).unwrap();
    assert_eq!(tree.match_prefix(&[2, 20]), Prefix::default(), "leaf, then parent");
    assert_eq!(tree.match_prefix(&[1, 10]).blocks, 2);
}

#[test]
fn what_is_pinned_stays() {
    let (mut pool, mut tree) = setup(8 * BLOCK);
    let running = compute(&mut pool, &mut tree, &[1, 2], 2 * BLOCK);
    let finished = compute(&mut pool, &mut tree, &[1, 2, 3], 3 * BLOCK);
    let node = finished.prefix().node.unwrap();
    tree.finish(&mut pool, finished).unwrap();
    assert_eq!(tree.evictable_slots(), u64::from(BLOCK));
    assert_eq!(tree.usage(&pool).evictable, BLOCK);
    tree.pin(node).unwrap();
    assert_eq!(tree.evict(&mut pool, 8 * BLOCK).unwrap().blocks, 0);
    tree.unpin(node).unwrap();
    assert_eq!(tree.evict(&mut pool, 8 * BLOCK).unwrap().blocks, 1);
    assert_eq!(tree.unpin(node), Err(KvError::StaleNode));
    let prefix = running.prefix().node.unwrap();
    tree.finish(&mut pool, running).unwrap();
    assert_eq!(tree.unpin(prefix), Err(KvError::NotPinned));
    assert_eq!(tree.evict(&mut pool, 8 * BLOCK).unwrap().blocks, 2);
    assert_eq!(pool.usage().used, 0);
}

#[test]
fn append_evicts_for_its_headroom() {
    let (mut pool, mut tree) = setup(6 * BLOCK);
    let branch = compute(&mut pool, &mut tree, &[1, 2, 3, 4, 5], 5 * BLOCK);
    tree.finish(&mut pool, branch).unwrap();
    let mut branch = tree.start(&mut pool, &[9]).unwrap();
    let appended = tree.append(&mut pool, &mut branch, BLOCK, Growth::Contiguous { headroom: BLOCK }).unwrap();
    assert_eq!(appended.evicted.blocks, 2, "16 slots, and two pages against what is copied on write");
    assert_eq!(branch.kv.room(&pool), BLOCK);
    let error = tree.append(&mut pool, &mut branch, 100, Growth::Pages).unwrap_err();
    assert!(matches!(error, KvError::OutOfSlots { needed: 92, .. }), "{error}");
}

#[test]
fn a_block_filled_in_part_is_copied_on_write() {
    let (mut pool, mut tree) = setup(256);
    let mut branch = compute(&mut pool, &mut tree, &[1, 2], BLOCK + 3);
    let again = tree.start(&mut pool, &[1, 2]).unwrap();
    assert_eq!(again.prefix().tokens, BLOCK + 3);
    let copy = tree.append(&mut pool, &mut branch, 1, Growth::Pages).unwrap().copy.unwrap();
    assert_eq!((copy.from, copy.num_slots), (BLOCK, 3));
    assert_eq!(again.kv.runs(&pool).unwrap()[0].num_slots, BLOCK + 3);
    // Nothing can follow a block that is not full.
    assert_eq!(tree.insert(&mut pool, &mut branch, &[1, 2, 3]), Ok(0));
}

#[test]
fn forks_can_both_be_inserted() {
    let (mut pool, mut tree) = setup(512);
    let mut one = tree.start(&mut pool, &[1]).unwrap();
    tree.append(&mut pool, &mut one, 2 * BLOCK + 2, Growth::Contiguous { headroom: 20 }).unwrap();
    let mut two = tree.fork(&mut pool, &mut one).unwrap();
    for (branch, last) in [(&mut one, 3), (&mut two, 4)] {
        tree.append(&mut pool, branch, BLOCK - 2, Growth::Pages).unwrap();
        tree.insert(&mut pool, branch, &[1, 2, last]).unwrap();
        assert_eq!(branch.prefix().blocks, 3);
    }
    assert_eq!(pool.usage().used, 4 * BLOCK, "the last block of each; the first two are common");
    assert_eq!(tree.num_blocks(), 4);
}

#[test]
fn the_last_owner_does_not_write_to_what_is_being_moved() {
    let (mut pool, mut tree) = setup(256);
    let branch = compute(&mut pool, &mut tree, &[1], 5);
    let mut fork = branch.kv.fork(&mut pool).unwrap();
    let extent = tree.extents(branch.prefix().node.unwrap()).unwrap().next().unwrap();
    let target = pool.allocate(BLOCK).unwrap();
    let begun = pool.begin_move(&[Filled { extent, num_slots: 5 }], target).unwrap();
    tree.finish(&mut pool, branch).unwrap();
    tree.evict(&mut pool, 256).unwrap();
    assert_eq!((pool.references(extent), fork.room(&pool)), (Ok(1), 0), "nobody would copy a token written now");
    assert!(fork.append(&mut pool, 1, Growth::Pages).unwrap().is_some());
    pool.commit_move(begun).unwrap();
    assert_eq!(fork.runs(&pool).unwrap()[0].num_slots, 4, "the first page; the fork has its own copy of the second");
}

#[test]
fn nodes_of_other_trees_are_refused() {
    let (mut pool, mut tree) = setup(64);
    let branch = compute(&mut pool, &mut tree, &[1], BLOCK);
    let (_, mut other) = setup(64);
    assert_eq!(other.pin(branch.prefix().node.unwrap()), Err(KvError::StaleNode));
    assert_eq!(PrefixTree::<u64>::new(0).unwrap_err(), KvError::EmptyBlock);
}
