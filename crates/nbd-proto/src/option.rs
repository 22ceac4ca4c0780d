//! Options and their replies as bytes, for both sides of a handshake.

use bytes::{BufMut, BytesMut};

use crate::constants::{
    OPTION_HEADER_BYTES, OPTION_MAGIC, OPTION_REPLY_HEADER_BYTES, OPTION_REPLY_MAGIC, info,
};
use crate::export::{ExportName, ExportNameError};
use crate::limits::{META_QUERIES_MAX, STRING_BYTES_MAX};
use crate::wire::Reader;

/// Appends an option with its data. A client waits for the last reply to one option before it sends
/// the next.
///
/// # Panics
///
/// If the data is longer than 32 bits can tell.
pub fn encode_option(out: &mut BytesMut, option: u32, data: &[u8]) {
    out.reserve(OPTION_HEADER_BYTES + data.len());
    out.put_u64(OPTION_MAGIC);
    out.put_u32(option);
    out.put_u32(u32::try_from(data.len()).expect("option data is bounded far below 32 bits"));
    out.put_slice(data);
}

/// Appends a reply of type `reply` to `option`.
///
/// # Panics
///
/// If the data is longer than 32 bits can tell.
pub fn encode_option_reply(out: &mut BytesMut, option: u32, reply: u32, data: &[&[u8]]) {
    let length: usize = data.iter().map(|piece| piece.len()).sum();
    out.reserve(OPTION_REPLY_HEADER_BYTES + length);
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(reply);
    out.put_u32(u32::try_from(length).expect("option replies are bounded far below 32 bits"));
    for piece in data {
        out.put_slice(piece);
    }
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoOption {
    /// The export asked about.
    pub name: ExportName,
    /// What is asked about it.
    pub requests: InfoRequests,
}

/// Kinds of information asked for. `NBD_INFO_EXPORT` is answered without being asked for, unknown
/// kinds are not answered, and a kind asked for twice is answered once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct InfoRequests {
    /// `NBD_INFO_NAME`.
    pub name: bool,
    /// `NBD_INFO_DESCRIPTION`.
    pub description: bool,
    /// `NBD_INFO_BLOCK_SIZE`.
    pub block_size: bool,
}

impl InfoOption {
    /// The data as it is on the wire.
    pub fn encode(&self) -> BytesMut {
        let kinds = [
            (self.requests.name, info::NAME),
            (self.requests.description, info::DESCRIPTION),
            (self.requests.block_size, info::BLOCK_SIZE),
        ];
        let mut out = BytesMut::new();
        put_prefixed(&mut out, self.name.as_bytes());
        let asked = kinds.iter().filter(|(asked, _)| *asked);
        out.put_u16(u16::try_from(asked.clone().count()).unwrap_or_default());
        asked.for_each(|(_, kind)| out.put_u16(*kind));
        out
    }

    /// Reads all of `data`.
    pub fn decode(data: &[u8]) -> Result<Self, OptionDataError> {
        let mut reader = Reader::new(data);
        let name = read_name(&mut reader)?;
        let count = reader.u16().ok_or(OptionDataError::Truncated)?;
        let mut requests = InfoRequests::default();
        for _ in 0..count {
            match reader.u16().ok_or(OptionDataError::Truncated)? {
                info::NAME => requests.name = true,
                info::DESCRIPTION => requests.description = true,
                info::BLOCK_SIZE => requests.block_size = true,
                _ => {}
            }
        }
        if !reader.is_empty() {
            return Err(OptionDataError::TrailingBytes);
        }
        Ok(Self { name, requests })
    }
}

/// Data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaContextOption<'a> {
    /// The export asked about.
    pub name: ExportName,
    /// The queries, each `namespace:leaf` by convention, at most
    /// [`META_QUERIES_MAX`]. Not checked to be UTF-8: they are only compared.
    pub queries: Vec<&'a [u8]>,
}

impl<'a> MetaContextOption<'a> {
    /// The data as it is on the wire.
    ///
    /// # Panics
    ///
    /// If a query is longer than 32 bits can tell.
    pub fn encode(&self) -> BytesMut {
        let mut out = BytesMut::new();
        put_prefixed(&mut out, self.name.as_bytes());
        out.put_u32(u32::try_from(self.queries.len()).unwrap_or(u32::MAX));
        self.queries.iter().for_each(|query| put_prefixed(&mut out, query));
        out
    }

    /// Reads all of `data`.
    pub fn decode(data: &'a [u8]) -> Result<Self, OptionDataError> {
        let mut reader = Reader::new(data);
        let name = read_name(&mut reader)?;
        let count = reader.u32().ok_or(OptionDataError::Truncated)?;
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        if count > META_QUERIES_MAX {
            return Err(OptionDataError::TooManyQueries);
        }
        let mut queries = Vec::with_capacity(count);
        for _ in 0..count {
            let query = reader.prefixed().ok_or(OptionDataError::Truncated)?;
            if query.len() > STRING_BYTES_MAX {
                return Err(OptionDataError::QueryTooLong);
            }
            queries.push(query);
        }
        if !reader.is_empty() {
            return Err(OptionDataError::TrailingBytes);
        }
        Ok(Self { name, queries })
    }
}

/// Why an option's data makes no sense. The option is refused, the handshake goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionDataError {
    /// A length or count inside the data passes its end.
    #[error("option data ends too early")]
    Truncated,
    /// Data is left over. Taken for the start of another option it brought down qemu-nbd.
    #[error("option data has bytes left over")]
    TrailingBytes,
    /// The export name is none.
    #[error("option data has an invalid export name")]
    Name(#[source] ExportNameError),
    /// More than [`META_QUERIES_MAX`].
    #[error("option data has more than {META_QUERIES_MAX} queries")]
    TooManyQueries,
    /// A query longer than [`STRING_BYTES_MAX`].
    #[error("option data has a query of more than {STRING_BYTES_MAX} bytes")]
    QueryTooLong,
}

fn read_name(reader: &mut Reader<'_>) -> Result<ExportName, OptionDataError> {
    let bytes = reader.prefixed().ok_or(OptionDataError::Truncated)?;
    ExportName::from_bytes(bytes).map_err(OptionDataError::Name)
}

fn put_prefixed(out: &mut BytesMut, bytes: &[u8]) {
    out.put_u32(u32::try_from(bytes.len()).expect("strings are bounded far below 32 bits"));
    out.put_slice(bytes);
}
