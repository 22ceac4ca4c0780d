//! The client side of a session: exactly once over any number of attachments.
