//! raft-rs logs through slog; this hands its lines to `tracing`.

use std::fmt::{self, Write as _};

use nbd_topology::ShardId;
use slog::{Drain, KV as _, Key, Level, Logger, Never, OwnedKVList, Record, Serializer, o};

/// A logger for raft-rs whose lines carry the shard.
pub(crate) fn logger(shard: ShardId) -> Logger {
    Logger::root(TracingDrain, o!("shard" => shard.0))
}

/// Forwards records one level down: raft-rs reports each election in a dozen lines at INFO, while
/// the owner of the group logs what came of it.
struct TracingDrain;

impl Drain for TracingDrain {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, values: &OwnedKVList) -> Result<(), Never> {
        macro_rules! forward {
            ($level:ident) => {
                if tracing::enabled!(target: "raft", tracing::Level::$level) {
                    let fields = fields(record, values);
                    tracing::event!(
                        target: "raft", tracing::Level::$level, "{}{}", record.msg(), fields
                    );
                }
            };
        }
        match record.level() {
            Level::Critical | Level::Error => forward!(ERROR),
            Level::Warning => forward!(WARN),
            Level::Info => forward!(DEBUG),
            Level::Debug | Level::Trace => forward!(TRACE),
        }
        Ok(())
    }
}

/// The record's key-value pairs as ` key=value`. Formatting into a string does not fail.
fn fields(record: &Record<'_>, values: &OwnedKVList) -> String {
    let mut text = FieldText(String::new());
    let _ = values.serialize(record, &mut text);
    let _ = record.kv().serialize(record, &mut text);
    text.0
}

struct FieldText(String);

impl Serializer for FieldText {
    fn emit_arguments(&mut self, key: Key, value: &fmt::Arguments<'_>) -> slog::Result {
        write!(self.0, " {key}={value}").map_err(slog::Error::from)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing::field::{Field, Visit};
    use tracing::span::{Attributes, Id, Record as SpanRecord};
    use tracing::{Event, Metadata, Subscriber};

    use super::*;

    /// Collects what is logged above TRACE.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<String>>>);

    impl Subscriber for Lines {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            *metadata.level() < tracing::Level::TRACE
        }

        fn event(&self, event: &Event<'_>) {
            struct Text(String);
            impl Visit for Text {
                fn record_debug(&mut self, _field: &Field, value: &dyn fmt::Debug) {
                    self.0 = format!("{value:?}");
                }
            }
            let mut text = Text(String::new());
            event.record(&mut text);
            let line = format!("{} {}", event.metadata().level(), text.0);
            self.0.lock().unwrap().push(line);
        }

        fn new_span(&self, _span: &Attributes<'_>) -> Id {
            Id::from_u64(1)
        }
        fn record(&self, _span: &Id, _values: &SpanRecord<'_>) {}
        fn record_follows_from(&self, _span: &Id, _follows: &Id) {}
        fn enter(&self, _span: &Id) {}
        fn exit(&self, _span: &Id) {}
    }

    #[test]
    fn lines_arrive_one_level_down_with_their_fields() {
        let lines = Lines::default();
        tracing::subscriber::with_default(lines.clone(), || {
            let logger = logger(ShardId(3)).new(o!("raft_id" => 7));
            slog::error!(logger, "error {}", 1);
            slog::warn!(logger, "warning"; "term" => 9);
            slog::info!(logger, "info");
            slog::debug!(logger, "not wanted");
        });
        let lines = lines.0.lock().unwrap();
        let expected = [
            "ERROR error 1 raft_id=7 shard=3",
            "WARN warning raft_id=7 shard=3 term=9",
            "DEBUG info raft_id=7 shard=3",
        ];
        assert_eq!(*lines, expected);
    }
}
