//! Groups of about as many tokens each.

/// Tokens of the largest group over the mean of all groups: 1 if they are alike, or have no tokens.
pub fn imbalance(tokens: &[u64]) -> f64 {
    let (sum, most) = (tokens.iter().sum::<u64>(), tokens.iter().copied().max().unwrap_or(0));
    if sum == 0 { 1.0 } else { most as f64 * tokens.len() as f64 / sum as f64 }
}

/// An exchange must even out this part of the difference of two groups, at least: a change of groups is not worth less.
const LEAST_PART: u64 = 8;

/// Evens out groups of at most `places` members, so that the [imbalance] is `aim` or less, as far as that can be done: again and
/// again, the largest group gives one of its members to the smallest one, or exchanges it for one of its members, whichever
/// brings the two nearest to each other. Everybody else remains where it was. Returns the indices of the groups that changed, in
/// order.
pub fn balance_groups<M>(groups: &mut [Vec<M>], places: usize, aim: f64, tokens: impl Fn(&M) -> u64) -> Vec<usize> {
    let mut sums: Vec<u64> = groups.iter().map(|group| group.iter().map(&tokens).sum()).collect();
    let mut changed = Vec::new();
    while imbalance(&sums) > aim
        && let Some((large, small)) = extremes(&sums)
        && let Some(Exchange { given, taken, difference }) =
            best_exchange(&groups[large], &groups[small], places, sums[large] - sums[small], &tokens)
    {
        let given = groups[large].swap_remove(given);
        if let Some(taken) = taken {
            let taken = groups[small].swap_remove(taken);
            groups[large].push(taken);
        }
        groups[small].push(given);
        sums[large] -= difference;
        sums[small] += difference;
        changed.extend([large, small]);
    }
    changed.sort_unstable();
    changed.dedup();
    changed
}

/// The largest and the smallest group, if they differ.
fn extremes(sums: &[u64]) -> Option<(usize, usize)> {
    let large = (0..sums.len()).max_by_key(|&index| sums[index])?;
    let small = (0..sums.len()).min_by_key(|&index| sums[index])?;
    (sums[large] > sums[small]).then_some((large, small))
}

/// A member of one group for a place or a member of another.
struct Exchange {
    /// Index of the member that leaves the larger group.
    given: usize,
    /// Index of the one that comes for it.
    taken: Option<usize>,
    /// Tokens that the larger group loses.
    difference: u64,
}

/// The exchange after which two groups that are `gap` tokens apart are nearest to each other, if it is worth it.
fn best_exchange<M>(large: &[M], small: &[M], places: usize, gap: u64, tokens: &impl Fn(&M) -> u64) -> Option<Exchange> {
    let alone = (small.len() < places).then_some((None, 0));
    let in_exchange = || small.iter().enumerate().map(|(index, member)| (Some(index), tokens(member))).chain(alone);
    let exchanges = large.iter().enumerate().flat_map(|(given, member)| {
        let tokens = tokens(member);
        in_exchange().map(move |(taken, back)| Exchange { given, taken, difference: tokens.saturating_sub(back) })
    });
    // Half the gap makes both alike, and what is as much as the gap only exchanges their roles.
    let left = |exchange: &Exchange| gap.abs_diff(exchange.difference.saturating_mul(2));
    let best = exchanges.min_by_key(left)?;
    (left(&best) <= gap - gap.div_ceil(LEAST_PART)).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sums(groups: &[Vec<u64>]) -> Vec<u64> {
        groups.iter().map(|group| group.iter().sum()).collect()
    }

    #[test]
    fn imbalance_of_nobody_is_none() {
        assert_eq!([imbalance(&[]), imbalance(&[0, 0]), imbalance(&[7, 7]), imbalance(&[30, 10, 20])], [1.0, 1.0, 1.0, 1.5]);
    }

    #[test]
    fn few_members_change_groups() {
        let mut groups = vec![vec![50, 60], vec![100, 90], vec![10, 20], vec![55, 55]];
        let changed = balance_groups(&mut groups, 2, 1.25, |&tokens| tokens);
        assert_eq!(changed, [1, 2]);
        assert_eq!(sums(&groups), [110, 110, 110, 110]);
        assert_eq!((&groups[0], &groups[3]), (&vec![50, 60], &vec![55, 55]));
    }

    #[test]
    fn free_places_are_taken() {
        let mut groups = vec![vec![40, 40, 40], vec![]];
        assert_eq!(balance_groups(&mut groups, 2, 1.0, |&tokens| tokens), [0, 1]);
        assert_eq!(groups, [vec![40, 40], vec![40]]);
        let mut full = vec![vec![40, 40], vec![40]];
        assert!(balance_groups(&mut full, 1, 1.0, |&tokens| tokens).is_empty(), "without a place there is nobody to change with");
    }

    #[test]
    fn what_cannot_be_evened_out_is_left() {
        let mut giant = vec![vec![1000], vec![10], vec![12]];
        assert!(balance_groups(&mut giant, 1, 1.2, |&tokens| tokens).is_empty());
        let mut alike = vec![vec![100, 101], vec![100, 100]];
        assert!(balance_groups(&mut alike, 2, 1.0, |&tokens| tokens).is_empty(), "they are as near as they get");
        assert!(balance_groups(&mut Vec::<Vec<u64>>::new(), 2, 1.0, |&tokens| tokens).is_empty());
    }

    #[test]
    fn many_groups_come_within_the_aim() {
        let length = |index: u64| 1 + index * index * 7919 % 4000;
        let mut groups: Vec<Vec<u64>> = (0..32).map(|group| (0..8).map(|place| length(group * 8 + place)).collect()).collect();
        let before = sums(&groups);
        assert!(imbalance(&before) > 1.4);
        balance_groups(&mut groups, 8, 1.1, |&tokens| tokens);
        assert!(imbalance(&sums(&groups)) <= 1.1 && groups.iter().all(|group| group.len() == 8));
        let mut members: Vec<u64> = groups.concat();
        let mut expected: Vec<u64> = (0..256).map(length).collect();
        members.sort_unstable();
        expected.sort_unstable();
        assert_eq!(members, expected, "nobody is lost");
    }
}
