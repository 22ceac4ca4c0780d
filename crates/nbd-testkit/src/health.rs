//! What a node says of itself.

use serde_json::Value;

/// A node's answer to `GET /health`.
#[derive(Debug, Clone, PartialEq)]
pub struct Health {
    /// The status code: 200, or 503 if a shard's counter did not move.
    pub status: u16,
    /// Why the whole node is not well.
    pub error: Option<String>,
    /// The shards that the node has replicas of.
    pub shards: Vec<ShardHealth>,
}

/// One shard in a [`Health`].
#[derive(Debug, Clone, PartialEq)]
pub struct ShardHealth {
    /// The shard.
    pub shard: u64,
    /// `leader`, `follower`, `candidate`, `learner`.
    pub role: String,
    /// Raft's term.
    pub term: u64,
    /// The node that leads, if this one knows.
    pub leader: Option<String>,
    /// The replicated counter behind the probe's own change.
    pub counter: Option<i64>,
    /// Highest index known to be committed.
    pub committed: u64,
    /// Highest index applied.
    pub applied: u64,
    /// Why the counter did not move.
    pub error: Option<String>,
    /// The whole object, for fields not named here.
    pub all: Value,
}

impl Health {
    /// Reads the answer's body. `None` if it is not of the documented form.
    pub fn parse(status: u16, body: &Value) -> Option<Self> {
        let shards = body["shards"].as_array()?.iter().map(ShardHealth::parse);
        let shards = shards.collect::<Option<_>>()?;
        Some(Self { status, error: text(&body["error"]), shards })
    }

    /// Whether every shard's counter moved.
    pub fn is_ok(&self) -> bool {
        self.status == 200
    }
}

impl ShardHealth {
    fn parse(value: &Value) -> Option<Self> {
        Some(Self {
            shard: value["shard"].as_u64()?,
            role: text(&value["role"])?,
            term: value["term"].as_u64()?,
            leader: text(&value["leader"]),
            counter: value["counter"].as_i64(),
            committed: value["committed"].as_u64()?,
            applied: value["applied"].as_u64()?,
            error: text(&value["error"]),
            all: value.clone(),
        })
    }
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// What a replica's own store holds, by `GET /debug/digest`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardDigest {
    /// The shard.
    pub shard: u64,
    /// Index up to which the log is in the digest.
    pub applied: u64,
    /// Over all that the replica holds of the shard; equal for equal content.
    pub digest: String,
}

impl ShardDigest {
    /// Reads the answer's body. `None` if it is not of the documented form.
    pub fn parse_all(body: &Value) -> Option<Vec<Self>> {
        let parse = |value: &Value| {
            let (shard, applied) = (value["shard"].as_u64()?, value["applied"].as_u64()?);
            Some(Self { shard, applied, digest: text(&value["digest"])? })
        };
        body["shards"].as_array()?.iter().map(parse).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_documented_forms_parse() {
        let body = json!({"status": "unavailable", "node": "a", "shards": [
            {"shard": 0, "role": "follower", "term": 3, "leader": null, "committed": 9,
             "applied": 8, "elapsed_ms": 1.2, "error": "no majority"}]});
        let health = Health::parse(503, &body).unwrap();
        let shard = &health.shards[0];
        assert_eq!((shard.term, shard.committed, shard.applied), (3, 9, 8));
        assert_eq!((&shard.leader, shard.counter), (&None, None));
        assert_eq!(shard.error.as_deref(), Some("no majority"));
        assert!(!health.is_ok() && health.error.is_none());
        assert_eq!(Health::parse(200, &json!({"shards": [{}]})), None);

        let body = json!({"shards": [{"shard": 1, "applied": 7, "digest": "ab"}]});
        let digest = ShardDigest { shard: 1, applied: 7, digest: "ab".to_owned() };
        assert_eq!(ShardDigest::parse_all(&body), Some(vec![digest]));
    }
}
