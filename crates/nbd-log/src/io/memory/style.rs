/// What a crash does to writes that were not yet durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CrashStyle {
    /// All of them are lost.
    Clean,
    /// All of them had made it: only the process died.
    Kept,
    /// Each block of 4,096 bytes is found as after any number of its unsynced writes, whatever
    /// happened to other blocks; each change of a name is found or not.
    Blocks,
    /// The same for each sector of 512 bytes: the weakest promise that a disk makes.
    Sectors,
}
