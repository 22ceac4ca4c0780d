//! Reading from sockets with a time limit.

use std::io::{ErrorKind, Read, Result};

/// Reads as [`Read::read`] does, and goes on when a signal cut it short.
///
/// The kernel does not take up a read of a socket with a time limit after a signal (signal(7)): the
/// read ends with [`ErrorKind::Interrupted`], which says nothing of the server. After one the time
/// limit runs anew.
///
/// # Errors
/// As `read`, [`ErrorKind::Interrupted`] apart.
pub fn read_some(source: &mut impl Read, buffer: &mut [u8]) -> Result<usize> {
    loop {
        match source.read(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            ended => return ended,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Signals come twice, then a byte.
    struct Interrupted(u32);

    impl Read for Interrupted {
        fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
            self.0 += 1;
            if self.0 <= 2 {
                return Err(ErrorKind::Interrupted.into());
            }
            buffer[0] = 7;
            Ok(1)
        }
    }

    #[test]
    fn a_signal_is_no_answer() {
        let mut buffer = [0; 4];
        assert_eq!(read_some(&mut Interrupted(0), &mut buffer).unwrap(), 1);
        assert_eq!(buffer, [7, 0, 0, 0]);
    }
}
