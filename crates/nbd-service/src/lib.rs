//! What every process does alike: configuration, telemetry, health, shutdown.
