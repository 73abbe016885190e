//! Sizes that an arrow file states, compared with the file before its reader takes memory by them: a damaged one could
//! ask for more than there is, which ends the process.
//!
//! A file has messages, each with metadata and a body of buffers, and those of the file format are listed in its
//! footer. A compressed buffer begins with its uncompressed length.

use arrow_ipc::{
    Block, CompressionType, Message, RecordBatch, reader::read_footer_length, root_as_footer, root_as_message,
};
use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
};

/// The first four bytes of a message, before the length of its metadata.
const CONTINUATION: [u8; 4] = [0xff; 4];
/// Bytes of a compressed buffer's uncompressed length; -1 there: it is not compressed.
const PREFIX: u64 = 8;
/// Bytes that a byte of lz4 stands for, at most.
const LZ4_RATIO: u64 = 255;
/// Bytes that a buffer may claim unseen, and those for each of its compressed bytes. One that claims more is
/// unpacked and counted.
const UNSEEN: u64 = 16 << 20;
const UNSEEN_RATIO: u64 = 256;
/// Rows that a batch may have without a byte for eight of them.
const FREE_ROWS: u64 = 1 << 20;

/// Compares the sizes in `file`, of the file format.
///
/// # Errors
/// The first size that does not fit.
pub(super) fn check_file(file: &File) -> Result<(), String> {
    let sizes = Sizes::of(file)?;
    let tail = sizes.length.checked_sub(10).ok_or("it has no footer")?;
    let tail: [u8; 10] = sizes.read(tail, 10)?.try_into().map_err(|_| "it has no footer")?;
    let footer = read_footer_length(tail).map_err(|error| error.to_string())? as u64;
    let start = sizes.length.checked_sub(10 + footer).ok_or("its footer is longer than the file")?;
    let bytes = sizes.read(start, footer)?;
    let footer = root_as_footer(&bytes).map_err(|error| format!("its footer: {error}"))?;
    let lists = [footer.dictionaries(), footer.recordBatches()];
    lists.into_iter().flatten().flat_map(|blocks| blocks.iter()).try_for_each(|block| sizes.block(block))
}

/// Compares the sizes in `file`, of the stream format.
///
/// # Errors
/// The first size that does not fit.
pub(super) fn check_stream(file: &File) -> Result<(), String> {
    let sizes = Sizes::of(file)?;
    let mut at = 0;
    while let Some((metadata, start)) = sizes.metadata(at)? {
        let message = root_as_message(&metadata).map_err(|error| format!("a message: {error}"))?;
        let body = u64::try_from(message.bodyLength()).map_err(|_| "a message has a negative length")?;
        at = sizes.within(start, body)?;
        sizes.body(&message, start, body)?;
    }
    Ok(())
}

struct Sizes<'a> {
    file: &'a File,
    length: u64,
}

impl<'a> Sizes<'a> {
    fn of(file: &'a File) -> Result<Self, String> {
        let length = file.metadata().map_err(|error| error.to_string())?.len();
        Ok(Self { file, length })
    }

    /// The end of `count` bytes from `start` on.
    fn within(&self, start: u64, count: u64) -> Result<u64, String> {
        let end = start.checked_add(count).filter(|&end| end <= self.length);
        end.ok_or_else(|| {
            format!("it states {count} bytes from byte {start} on, and the file has {}", self.length)
        })
    }

    fn read(&self, start: u64, count: u64) -> Result<Vec<u8>, String> {
        self.within(start, count)?;
        let mut bytes = vec![0; count as usize];
        self.file.read_exact_at(&mut bytes, start).map_err(|error| error.to_string())?;
        Ok(bytes)
    }

    /// The metadata of the message at `start`, and the place behind them; `None`: there is no message.
    fn metadata(&self, start: u64) -> Result<Option<(Vec<u8>, u64)>, String> {
        let word = |at: u64| -> Result<Option<[u8; 4]>, String> {
            let bytes = if at + 4 > self.length { return Ok(None) } else { self.read(at, 4)? };
            Ok(bytes.try_into().ok())
        };
        let (mut at, mut found) = (start + 4, word(start)?);
        if found == Some(CONTINUATION) {
            (at, found) = (at + 4, word(at)?);
        }
        let Some(length) = found.map(i32::from_le_bytes).filter(|&length| length != 0) else {
            return Ok(None);
        };
        let length = u64::try_from(length).map_err(|_| format!("metadata of {length} bytes"))?;
        Ok(Some((self.read(at, length)?, at + length)))
    }

    fn block(&self, block: &Block) -> Result<(), String> {
        let [start, metadata, body] = [block.offset(), block.metaDataLength().into(), block.bodyLength()]
            .map(|number| u64::try_from(number).map_err(|_| format!("a block of its footer has {number}")));
        let (start, body) = (start?, body?);
        let of_body = self.within(start, metadata?)?;
        self.within(of_body, body)?;
        match self.metadata(start)? {
            Some((metadata, _)) => {
                let message = root_as_message(&metadata).map_err(|error| format!("a message: {error}"))?;
                self.body(&message, of_body, body)
            }
            None => Err("a block of its footer has no message".into()),
        }
    }

    /// Compares the buffers of `message` with its body, `body` bytes from `start` on.
    fn body(&self, message: &Message<'_>, start: u64, body: u64) -> Result<(), String> {
        let of_dictionary = message.header_as_dictionary_batch().and_then(|dictionary| dictionary.data());
        match message.header_as_record_batch().or(of_dictionary) {
            Some(batch) => self.batch(&batch, start, body),
            None => Ok(()),
        }
    }

    fn batch(&self, batch: &RecordBatch<'_>, start: u64, body: u64) -> Result<(), String> {
        let mut unpacked = 0u64;
        for buffer in batch.buffers().into_iter().flatten() {
            let [offset, length] = [buffer.offset(), buffer.length()].map(u64::try_from);
            let (Ok(offset), Ok(length)) = (offset, length) else {
                return Err(format!("a buffer of {} bytes at {}", buffer.length(), buffer.offset()));
            };
            if offset.checked_add(length).is_none_or(|end| end > body) {
                return Err(format!("a buffer of {length} bytes at {offset}, in a body of {body}"));
            }
            let codec = batch.compression().map(|compression| compression.codec());
            unpacked = unpacked.saturating_add(match codec.filter(|_| length >= PREFIX) {
                Some(codec) => self.unpacked(codec, start + offset, length)?,
                None => length,
            });
        }
        let rows = u64::try_from(batch.length()).map_err(|_| "a batch has a negative number of rows")?;
        if rows > unpacked.saturating_mul(8).saturating_add(FREE_ROWS) {
            return Err(format!("a batch of {rows} rows in {unpacked} bytes"));
        }
        Ok(())
    }

    /// Uncompressed bytes of the buffer of `length` bytes at `start`.
    fn unpacked(&self, codec: CompressionType, start: u64, length: u64) -> Result<u64, String> {
        let prefix: [u8; 8] = self.read(start, PREFIX)?.try_into().unwrap_or_default();
        let (stated, packed) = (i64::from_le_bytes(prefix), length - PREFIX);
        // The reader refuses other negative numbers, without memory.
        let Ok(stated) = u64::try_from(stated) else { return Ok(packed) };
        let refused = || format!("a buffer of {packed} packed bytes states {stated} unpacked ones");
        if codec == CompressionType::LZ4_FRAME {
            return if stated > packed.saturating_mul(LZ4_RATIO) { Err(refused()) } else { Ok(stated) };
        }
        if stated > packed.saturating_mul(UNSEEN_RATIO).saturating_add(UNSEEN) {
            let packed = Section { file: self.file, at: start + PREFIX, left: packed };
            let counted = zstd::stream::read::Decoder::new(packed)
                .and_then(|decoder| io::copy(&mut decoder.take(stated + 1), &mut io::sink()));
            if !counted.is_ok_and(|counted| counted == stated) {
                return Err(refused());
            }
        }
        Ok(stated)
    }
}

/// Bytes of a file.
struct Section<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Section<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let most = out.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = self.file.read_at(&mut out[..most], self.at)?;
        (self.at, self.left) = (self.at + count as u64, self.left - count as u64);
        Ok(count)
    }
}
