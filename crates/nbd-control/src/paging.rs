//! Lists over all shards, page by page.
//!
//! Every shard sorts its own; here they are merged. A page ends at a place in the common order, so
//! that place is all that the next page needs to know: it is what the cursor holds, for all shards
//! alike, and nothing has to be remembered in between.

use std::collections::{BTreeSet, VecDeque};
use std::future::Future;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nbd_topology::ShardId;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::cluster::CallError;
use crate::overview::each;

/// Longest cursor that is looked at: a volume's longest name, escaped, and some.
const CURSOR_BYTES_MAX: usize = 40_000;

/// Puts a place in a list into a form that clients hand back and do not look into.
pub(crate) fn cursor<P: Serialize>(place: &P) -> String {
    // Places are made of numbers and text, and always have a JSON form.
    let json = serde_json::to_vec(place).unwrap_or_default();
    URL_SAFE_NO_PAD.encode(json)
}

/// The place that a cursor stands for; `None` if it stands for none of this kind.
pub(crate) fn place<P: DeserializeOwned>(cursor: &str) -> Option<P> {
    if cursor.len() > CURSOR_BYTES_MAX {
        return None;
    }
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(cursor).ok()?).ok()
}

/// A part of a merged list.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Merged<T> {
    pub(crate) items: Vec<T>,
    /// There is more behind the last one.
    pub(crate) more: bool,
    /// Shards that did not answer, and whose share is left out.
    pub(crate) missing: Vec<u32>,
}

/// What one shard has given and not yet been taken.
#[derive(Debug)]
struct Source<T, P> {
    shard: ShardId,
    items: VecDeque<T>,
    /// The shard has more behind the last item.
    more: bool,
    /// Where what comes next begins.
    after: Option<P>,
}

/// The first `limit` items of all shards together behind `after`, in the order of their places.
///
/// `fetch` gives a shard's items behind a place, in order and at most so many, and whether there
/// are more.
///
/// # Errors
/// What a shard refuses. One that does not answer is left out.
pub(crate) async fn merge<T, P, C>(
    shards: Vec<ShardId>,
    limit: usize,
    after: Option<P>,
    place: impl Fn(&T) -> P,
    fetch: impl Fn(ShardId, Option<P>, u32) -> C,
) -> Result<Merged<T>, CallError>
where
    T: Send + 'static,
    P: Ord + Clone + Send + 'static,
    C: Future<Output = Result<(Vec<T>, bool), CallError>> + Send + 'static,
{
    // Of many shards each is asked for its fair share and some, and again if that was not enough.
    let share = (limit / shards.len().max(1)) * 2 + 16;
    let share = u32::try_from(share.min(limit)).unwrap_or(u32::MAX);
    let source = |shard| Source { shard, items: VecDeque::new(), more: true, after: after.clone() };
    let mut sources: Vec<Source<T, P>> = shards.into_iter().map(source).collect();
    let mut missing = BTreeSet::new();
    let mut items = Vec::new();
    while items.len() < limit {
        let dry = sources.iter().enumerate().filter(|(_, source)| source.is_dry());
        let dry: Vec<_> =
            dry.map(|(index, source)| (index, source.shard, source.after.clone())).collect();
        let fetched = each(dry, |(index, shard, after)| {
            let answer = fetch(shard, after, share);
            async move { (index, answer.await) }
        });
        for (index, answer) in fetched.await {
            let source = &mut sources[index];
            match answer {
                Ok((found, more)) => {
                    // A shard that has more and gives nothing would be asked for ever.
                    source.more = more && !found.is_empty();
                    source.after = found.last().map(&place).or_else(|| source.after.take());
                    source.items = found.into();
                }
                Err(CallError::Unavailable { shard, .. }) => {
                    source.more = false;
                    missing.insert(shard.0);
                }
                Err(error) => return Err(error),
            }
        }
        while items.len() < limit && !sources.iter().any(Source::is_dry) {
            let heads = sources.iter().enumerate();
            let heads =
                heads.filter_map(|(index, source)| Some((place(source.items.front()?), index)));
            let Some((_, first)) = heads.min() else { break };
            items.extend(sources[first].items.pop_front());
        }
        if sources.iter().all(Source::is_spent) {
            break;
        }
    }
    let more = !sources.iter().all(Source::is_spent);
    Ok(Merged { items, more, missing: missing.into_iter().collect() })
}

impl<T, P> Source<T, P> {
    /// What comes next is not known yet.
    fn is_dry(&self) -> bool {
        self.items.is_empty() && self.more
    }

    /// Nothing comes next.
    fn is_spent(&self) -> bool {
        self.items.is_empty() && !self.more
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shard `n` of `count` has the numbers below 200 that leave `n`, and gives at most 7 at once.
    async fn numbers(shard: u32, count: u32, after: Option<u32>, limit: u32) -> (Vec<u32>, bool) {
        let from = after.map_or(0, |after| after + 1);
        let own = |number: &u32| number % count == shard;
        let all: Vec<u32> = (from..200).filter(own).collect();
        let give = all.len().min(limit.min(7) as usize);
        (all[..give].to_vec(), give < all.len())
    }

    async fn page(count: u32, limit: usize, after: Option<u32>, silent: u32) -> Merged<u32> {
        let shards = (0..count).map(ShardId).collect();
        let fetch = move |shard: ShardId, after, limit| async move {
            if shard.0 == silent {
                return Err(CallError::Unavailable { shard, reason: "silent".to_owned() });
            }
            Ok(numbers(shard.0, count, after, limit).await)
        };
        merge(shards, limit, after, |number| *number, fetch).await.unwrap()
    }

    #[tokio::test]
    async fn pages_follow_each_other_without_gap_or_repetition() {
        for (count, limit) in [(1, 10), (3, 10), (3, 1), (64, 10), (5, 1000)] {
            let (mut all, mut after) = (Vec::new(), None);
            loop {
                let page = page(count, limit, after, u32::MAX).await;
                assert!(page.items.len() <= limit);
                assert!(page.items.len() == limit || !page.more, "a page is full but for the last");
                after = page.items.last().copied();
                all.extend(page.items);
                if !page.more {
                    break;
                }
            }
            assert_eq!(all, (0..200).collect::<Vec<_>>(), "{count} shards, pages of {limit}");
        }
    }

    #[tokio::test]
    async fn a_silent_shard_is_named_and_left_out() {
        let page = page(3, 1000, None, 1).await;
        assert_eq!(page.missing, [1]);
        assert!(page.items.iter().all(|number| number % 3 != 1));
        assert_eq!(page.items.len(), 133);
    }

    #[tokio::test]
    async fn a_refusal_is_passed_on() {
        let refuse = |_, _: Option<u32>, _| async {
            Err::<(Vec<u32>, bool), _>(CallError::Invalid { message: "no".to_owned() })
        };
        let refused = merge(vec![ShardId(0)], 5, None, |number| *number, refuse).await;
        assert_eq!(refused, Err(CallError::Invalid { message: "no".to_owned() }));
    }

    #[test]
    fn cursors_are_opaque_and_checked() {
        let text = cursor(&("é/", 7));
        assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)), "{text}");
        assert_eq!(place::<(String, u64)>(&text), Some(("é/".to_owned(), 7)));
        for bad in ["", "!", "e30", &text[1..], &"A".repeat(CURSOR_BYTES_MAX + 1)] {
            assert_eq!(place::<(String, u64)>(bad), None, "{bad}");
        }
    }
}
