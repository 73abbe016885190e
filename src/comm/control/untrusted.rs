//! The bytes of a connection, read without one: tests of broken bytes call this.

use super::{
    frame::{Assembler, Decoder, Frame, FrameError, read_message},
    threads::{FromRoot, ToRoot},
};

/// Reads `bytes` as what a peer sends, `chunk` bytes at a time: its messages and commands, of which the numbers are
/// returned.
///
/// # Errors
/// The fault of the first bytes that are refused.
pub fn read_stream(bytes: &[u8], chunk: usize) -> Result<[usize; 2], String> {
    let (mut decoder, mut assembler) = (Decoder::default(), Assembler::default());
    let (mut messages, mut commands) = (0, 0);
    let mut take = |frame: Frame<'_>| -> Result<(), FrameError> {
        match frame {
            Frame::Message(json) => {
                messages += 1;
                read_message::<ToRoot>(json).map(drop).or_else(|_| read_message::<FromRoot>(json).map(drop))
            }
            Frame::Part(part) => {
                commands += usize::from(assembler.add(&part)?.is_some());
                Ok(())
            }
        }
    };
    for read in bytes.chunks(chunk.max(1)) {
        decoder.push(read);
        while let Some(frame) = decoder.next().map_err(|error| error.to_string())? {
            take(frame).map_err(|error| error.to_string())?;
        }
    }
    decoder.end().map_err(|error| error.to_string())?;
    Ok([messages, commands])
}
