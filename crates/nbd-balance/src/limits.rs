//! What is bounded, and by how much.

use std::time::Duration;

/// Time a load balancer has to greet before the next one is asked as well. One that is well greets
/// within a millisecond or two.
pub const STAGGER: Duration = Duration::from_millis(250);

/// Time a load balancer has to accept and to greet; then it counts as one that does not.
pub const GREETING_MAX: Duration = Duration::from_secs(2);

/// Time to find a load balancer for a client, who is disconnected then.
pub const FIND_MAX: Duration = Duration::from_secs(5);

/// Wait before all are asked again, when all have failed.
pub const RETRY: Duration = Duration::from_millis(100);

/// Wait between two looks at whether a load balancer greets.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Wait between two look-ups of a load balancer's name.
pub const RESOLVE_INTERVAL: Duration = Duration::from_secs(1);

/// Addresses kept of one name.
pub const ADDRESSES_MAX: usize = 8;

/// Load balancers that may be configured.
pub const BACKENDS_MAX: usize = 256;

/// Bytes with which an NBD server begins: `NBDMAGIC`, `IHAVEOPT`, flags.
pub const GREETING_BYTES: usize = 18;
