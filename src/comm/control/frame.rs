//! Frames, the units that a control connection carries. Pure: bytes in, frames out.
//!
//! A frame is an 8-byte header and a payload. The header is `"XC"`, version, kind, and the payload's length (u32,
//! little-endian). A message's payload is JSON. A part's payload is the sequence number of a command, the command's
//! length and the offset of the piece (u64 each, little-endian), then the piece. Commands travel in parts of [`PART`]
//! bytes, so a message waits for one part at most.
//!
//! Every length is checked before memory is allocated for it.

use super::commands::{Command, Outgoing};
use serde::{Serialize, de::DeserializeOwned};

const MAGIC: [u8; 2] = *b"XC";
const VERSION: u8 = 1;
const MESSAGE: u8 = 1;
const COMMAND_PART: u8 = 2;
const HEADER: usize = 8;
/// Bytes before the piece in a part's payload.
const PART_HEADER: usize = 24;
/// Largest payload of a frame (bytes).
const MAX_PAYLOAD: usize = 1 << 20;
/// Piece of a command in one part (bytes).
pub(super) const PART: usize = 1 << 16;
/// Largest command (bytes).
pub(super) const MAX_COMMAND: usize = 1 << 28;
/// Memory reserved for a command when its first part arrives; more is reserved as the parts arrive.
const RESERVED: usize = 8 << 20;

/// Bytes that are no valid frame, or a frame that is not valid at this point. The text continues "rank 3 (process 7
/// on host) sent …".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameError {
    #[error("bytes that are no control frame ({0:02x?})")]
    Magic([u8; 2]),
    #[error("a control frame of version {0}, expected {VERSION}")]
    Version(u8),
    #[error("a control frame of unknown kind {0}")]
    Kind(u8),
    #[error("a control frame of {0} bytes, more than {1}")]
    Length(usize, usize),
    #[error("the first {0} bytes of a control frame and no more")]
    Torn(usize),
    #[error("a control message that cannot be read: {0}")]
    Message(String),
    #[error("a command part of {0} bytes, shorter than its header")]
    ShortPart(usize),
    #[error("a command of {0} bytes, more than {MAX_COMMAND}")]
    CommandLength(u64),
    #[error("bytes {offset}.. of {total} of command {sequence}, expected {expected}")]
    Order { sequence: u64, offset: u64, total: u64, expected: String },
    #[error("a part of {piece} bytes of command {sequence}, which has {missing} left")]
    Piece { sequence: u64, piece: usize, missing: u64 },
    #[error("a command, which only rank 0 sends")]
    Direction,
    #[error("an acknowledgement of command {sequence}, expected {expected} of {sent} sent")]
    Acknowledgement { sequence: u64, expected: u64, sent: u64 },
}

/// A complete frame. It borrows from the [`Decoder`] that found it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame<'a> {
    /// JSON of a message.
    Message(&'a [u8]),
    Part(Part<'a>),
}

/// A piece of a command.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Part<'a> {
    pub sequence: u64,
    /// Length of the whole command (bytes).
    pub total: u64,
    pub offset: u64,
    pub piece: &'a [u8],
}

/// Reads the JSON of a message.
///
/// # Errors
/// The JSON is not an `M`.
pub(super) fn read_message<M: DeserializeOwned>(json: &[u8]) -> Result<M, FrameError> {
    serde_json::from_slice(json).map_err(|error| FrameError::Message(error.to_string()))
}

/// A frame of `message`.
///
/// # Errors
/// The message cannot be written as JSON, or is too long.
pub(super) fn message(message: &impl Serialize) -> Result<Vec<u8>, FrameError> {
    let mut frame = header(MESSAGE, 0).to_vec();
    serde_json::to_writer(&mut frame, message).map_err(|error| FrameError::Message(error.to_string()))?;
    let length = frame.len() - HEADER;
    if length > MAX_PAYLOAD {
        return Err(FrameError::Length(length, MAX_PAYLOAD));
    }
    frame[..HEADER].copy_from_slice(&header(MESSAGE, length));
    Ok(frame)
}

/// All of the frame of a part but its piece, which is `piece` bytes at `offset` of `command`.
pub(super) fn part_head(command: &Outgoing, offset: usize, piece: usize) -> Vec<u8> {
    let mut head = header(COMMAND_PART, PART_HEADER + piece).to_vec();
    for number in [command.sequence, command.payload.len() as u64, offset as u64] {
        head.extend_from_slice(&number.to_le_bytes());
    }
    head
}

fn header(kind: u8, length: usize) -> [u8; HEADER] {
    let [a, b, c, d] = (length as u32).to_le_bytes();
    [MAGIC[0], MAGIC[1], VERSION, kind, a, b, c, d]
}

/// Bytes that have arrived, cut into frames. Holds one incomplete frame and the last read at most.
#[derive(Debug)]
pub(super) struct Decoder {
    bytes: Vec<u8>,
    /// Length of the frames that were handed out.
    done: usize,
    /// Largest payload that is taken (bytes).
    most: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::of_at_most(MAX_PAYLOAD)
    }
}

impl Decoder {
    /// A decoder that refuses frames with a longer payload than `most` bytes.
    pub(super) fn of_at_most(most: usize) -> Self {
        Self { bytes: Vec::new(), done: 0, most: most.min(MAX_PAYLOAD) }
    }

    /// Takes frames of every length that is valid from now on.
    pub(super) fn take_all(&mut self) {
        self.most = MAX_PAYLOAD;
    }

    /// Appends `bytes`, as read.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.done);
        self.done = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next complete frame, if there is one.
    ///
    /// # Errors
    /// The next bytes are no valid frame. Nothing after them can be read.
    pub(super) fn next(&mut self) -> Result<Option<Frame<'_>>, FrameError> {
        let rest = &self.bytes[self.done..];
        let Some(&[m0, m1, version, kind, l0, l1, l2, l3]) = rest.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        match (kind, [m0, m1]) {
            (_, magic) if magic != MAGIC => return Err(FrameError::Magic(magic)),
            _ if version != VERSION => return Err(FrameError::Version(version)),
            (MESSAGE | COMMAND_PART, _) if length > self.most => {
                return Err(FrameError::Length(length, self.most));
            }
            (MESSAGE | COMMAND_PART, _) => {}
            _ => return Err(FrameError::Kind(kind)),
        }
        let Some(payload) = rest.get(HEADER..HEADER + length) else { return Ok(None) };
        let frame = if kind == MESSAGE { Frame::Message(payload) } else { Frame::Part(part(payload)?) };
        self.done += HEADER + length;
        Ok(Some(frame))
    }

    /// Checks that no incomplete frame is left when the connection ends.
    ///
    /// # Errors
    /// One is left.
    pub(super) fn end(&self) -> Result<(), FrameError> {
        match self.bytes.len() - self.done {
            0 => Ok(()),
            rest => Err(FrameError::Torn(rest)),
        }
    }
}

fn part(payload: &[u8]) -> Result<Part<'_>, FrameError> {
    let (head, piece) =
        payload.split_first_chunk::<PART_HEADER>().ok_or(FrameError::ShortPart(payload.len()))?;
    let number = |index: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&head[8 * index..8 * (index + 1)]);
        u64::from_le_bytes(bytes)
    };
    Ok(Part { sequence: number(0), total: number(1), offset: number(2), piece })
}

/// Parts of commands, joined to commands. Sequence numbers are 1, 2, 3, …; parts come in order.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    /// Sequence number of the last complete command.
    complete: u64,
    /// Length and bytes so far of the next one, once its first part is here.
    next: Option<(u64, Vec<u8>)>,
}

impl Assembler {
    /// Adds a part; returns the command that it completes.
    ///
    /// # Errors
    /// The part is not the next one, goes past the command's end, or belongs to a command that is too long.
    pub(super) fn add(&mut self, part: &Part<'_>) -> Result<Option<Command>, FrameError> {
        let &Part { sequence, total, offset, piece } = part;
        if total > MAX_COMMAND as u64 {
            return Err(FrameError::CommandLength(total));
        }
        let (expected_total, have) =
            self.next.as_ref().map_or((total, 0), |(total, bytes)| (*total, bytes.len()));
        let next = self.complete + 1;
        if (sequence, total, offset) != (next, expected_total, have as u64) {
            let expected = format!("{have}.. of {expected_total} of {next}");
            return Err(FrameError::Order { sequence, offset, total, expected });
        }
        let missing = total - offset;
        // An empty piece is valid only as an empty command: otherwise parts could come forever.
        if piece.len() as u64 > missing || (piece.is_empty() && missing > 0) {
            return Err(FrameError::Piece { sequence, piece: piece.len(), missing });
        }
        let (_, bytes) =
            self.next.get_or_insert_with(|| (total, Vec::with_capacity(RESERVED.min(total as usize))));
        bytes.extend_from_slice(piece);
        if (bytes.len() as u64) < total {
            return Ok(None);
        }
        self.complete = next;
        let payload = self.next.take().map(|(_, bytes)| bytes).unwrap_or_default();
        Ok(Some(Command { sequence, payload }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Frames of `command` as they are sent, with pieces of `piece` bytes.
    fn parts(command: &Outgoing, piece: usize) -> Vec<Vec<u8>> {
        let n = command.payload.len();
        let starts = (0..n.max(1)).step_by(piece);
        let frame = |start: usize| {
            let end = n.min(start + piece);
            [part_head(command, start, end - start), command.payload[start..end].to_vec()].concat()
        };
        starts.map(frame).collect()
    }

    /// Frames of messages (numbers) between those of commands.
    fn frames(numbers: &[u32], commands: &[Vec<u8>], piece: usize) -> Vec<Vec<u8>> {
        let mut messages = numbers.iter().map(|number| message(number).unwrap());
        let mut frames = Vec::new();
        for (i, payload) in commands.iter().enumerate() {
            let command = Outgoing { sequence: i as u64 + 1, payload: payload.clone() };
            for part in parts(&command, piece) {
                frames.push(part);
                frames.extend(messages.next());
            }
        }
        frames.extend(messages);
        frames
    }

    /// Decodes `bytes`, pushed in chunks of `chunk`: messages, commands and the error that ended it.
    fn decoded(bytes: &[u8], chunk: usize) -> (Vec<u32>, Vec<Vec<u8>>, Option<FrameError>) {
        let (mut decoder, mut assembler) = (Decoder::default(), Assembler::default());
        let (mut numbers, mut commands) = (Vec::new(), Vec::new());
        for chunk in bytes.chunks(chunk) {
            decoder.push(chunk);
            assert!(decoder.bytes.len() < HEADER + MAX_PAYLOAD + chunk.len(), "one frame and one read");
            loop {
                let frame = match decoder.next() {
                    Ok(Some(frame)) => frame,
                    Ok(None) => break,
                    Err(error) => return (numbers, commands, Some(error)),
                };
                let result = match frame {
                    Frame::Message(json) => read_message(json).map(|number| numbers.push(number)),
                    Frame::Part(part) => assembler.add(&part).map(|command| {
                        commands.extend(command.map(|command| command.payload));
                    }),
                };
                if let Err(error) = result {
                    return (numbers, commands, Some(error));
                }
            }
        }
        (numbers, commands, None)
    }

    #[test]
    fn a_header_is_eight_bytes() {
        assert_eq!(message(&7).unwrap(), b"XC\x01\x01\x01\0\0\x007");
        let command = Outgoing { sequence: 3, payload: vec![9; 5] };
        let head = part_head(&command, 2, 3);
        assert_eq!(&head[..HEADER], b"XC\x01\x02\x1b\0\0\0");
        assert_eq!(
            head[HEADER..],
            [&[3, 0, 0, 0, 0, 0, 0, 0][..], &[5, 0, 0, 0, 0, 0, 0, 0], &[2, 0, 0, 0, 0, 0, 0, 0]].concat()
        );
    }

    #[test]
    fn broken_frames_are_refused_by_kind() {
        let refused = |bytes: &[u8]| decoded(bytes, 1 << 16).2.map(|error| error.to_string());
        let of = |magic: &[u8; 2], version, kind, length: u32| {
            [&magic[..], &[version, kind], &length.to_le_bytes(), &[0; 30]].concat()
        };
        assert_eq!(refused(&of(b"XC", 1, MESSAGE, 31)), None, "incomplete");
        let said = |text: &str| Some(text.to_owned());
        assert_eq!(refused(b"GET / HTTP/1.1"), said("bytes that are no control frame ([47, 45])"));
        assert_eq!(refused(&of(b"XC", 2, MESSAGE, 3)), said("a control frame of version 2, expected 1"));
        assert_eq!(refused(&of(b"XC", 1, 9, 3)), said("a control frame of unknown kind 9"));
        assert_eq!(
            refused(&of(b"XC", 1, COMMAND_PART, 3)),
            said("a command part of 3 bytes, shorter than its header")
        );
        let long = said("a control frame of 4294967295 bytes, more than 1048576");
        assert_eq!(refused(&of(b"XC", 1, MESSAGE, u32::MAX)), long);
        assert_eq!(refused(&of(b"XC", 1, COMMAND_PART, u32::MAX)), long);
        let text = refused(&of(b"XC", 1, MESSAGE, 3)).unwrap();
        assert!(text.starts_with("a control message that cannot be read: "), "{text}");
        let error = message(&"x".repeat(MAX_PAYLOAD)).unwrap_err();
        assert_eq!(error, FrameError::Length(MAX_PAYLOAD + 2, MAX_PAYLOAD));
    }

    #[test]
    fn parts_out_of_order_are_refused() {
        let add = |parts: &[(u64, u64, u64, usize)]| {
            let mut assembler = Assembler::default();
            parts.iter().try_for_each(|&(sequence, total, offset, n)| {
                assembler.add(&Part { sequence, total, offset, piece: &[1; 9][..n] }).map(drop)
            })
        };
        assert_eq!(add(&[(1, 8, 0, 5), (1, 8, 5, 3), (2, 0, 0, 0), (3, 1, 0, 1)]), Ok(()));
        let order = |sequence, total, offset, expected: &str| {
            Err(FrameError::Order { sequence, total, offset, expected: expected.into() })
        };
        assert_eq!(add(&[(2, 8, 0, 5)]), order(2, 8, 0, "0.. of 8 of 1"));
        assert_eq!(add(&[(1, 8, 3, 5)]), order(1, 8, 3, "0.. of 8 of 1"));
        assert_eq!(add(&[(1, 8, 0, 5), (1, 9, 5, 3)]), order(1, 9, 5, "5.. of 8 of 1"));
        assert_eq!(add(&[(1, 8, 0, 5), (1, 8, 0, 5)]), order(1, 8, 0, "5.. of 8 of 1"));
        assert_eq!(add(&[(1, 8, 0, 9)]), Err(FrameError::Piece { sequence: 1, piece: 9, missing: 8 }));
        assert_eq!(add(&[(1, 8, 0, 0)]), Err(FrameError::Piece { sequence: 1, piece: 0, missing: 8 }));
        assert_eq!(add(&[(1, u64::MAX, 0, 5)]), Err(FrameError::CommandLength(u64::MAX)));
    }

    #[test]
    fn the_largest_command_reserves_little_before_it_arrives() {
        let mut assembler = Assembler::default();
        let part = Part { sequence: 1, total: MAX_COMMAND as u64, offset: 0, piece: &[1; 9] };
        assert_eq!(assembler.add(&part), Ok(None));
        assert!(assembler.next.is_some_and(|(_, bytes)| bytes.capacity() <= RESERVED));
    }

    fn streams() -> impl Strategy<Value = (Vec<u32>, Vec<Vec<u8>>, usize)> {
        let commands = prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..6);
        (prop::collection::vec(any::<u32>(), 0..12), commands, 1usize..70)
    }

    proptest! {
        #[test]
        fn frames_arrive_as_sent_however_they_are_cut((numbers, commands, piece) in streams(), chunk in 1usize..300) {
            let bytes = frames(&numbers, &commands, piece).concat();
            prop_assert_eq!(decoded(&bytes, chunk), (numbers, commands, None));
        }

        #[test]
        fn arbitrary_bytes_are_refused_or_incomplete(
            bytes in prop::collection::vec(any::<u8>(), 0..400), chunk in 1usize..50,
        ) {
            let (numbers, commands, error) = decoded(&bytes, chunk);
            prop_assert!(numbers.is_empty() && commands.is_empty());
            prop_assert!(error.is_some() || bytes.len() < HEADER);
        }

        #[test]
        fn arbitrary_payloads_do_not_panic(
            kind in 0u8..4, length in 0u32..60, bytes in prop::collection::vec(any::<u8>(), 0..120),
        ) {
            let frame = [&header(kind, length as usize)[..], &bytes].concat();
            let _ = decoded(&frame, 7);
        }

        #[test]
        fn a_torn_stream_gives_a_prefix((numbers, commands, piece) in streams(), cut in any::<prop::sample::Index>()) {
            let frames = frames(&numbers, &commands, piece);
            let bytes = frames.concat();
            let n = cut.index(bytes.len() + 1);
            let (some_numbers, some_commands, error) = decoded(&bytes[..n], 64);
            prop_assert_eq!(error, None);
            prop_assert!(numbers.starts_with(&some_numbers) && commands.starts_with(&some_commands));
            let mut decoder = Decoder::default();
            decoder.push(&bytes[..n]);
            while decoder.next().unwrap().is_some() {}
            let (mut whole, mut frames) = (0, frames.iter());
            while let Some(frame) = frames.next().filter(|frame| whole + frame.len() <= n) {
                whole += frame.len();
            }
            prop_assert_eq!(decoder.end(), if whole == n { Ok(()) } else { Err(FrameError::Torn(n - whole)) });
        }

        #[test]
        fn a_changed_byte_leaves_the_frames_before_it(
            (numbers, commands, piece) in streams(), at in any::<prop::sample::Index>(), value in any::<u8>(),
            chunk in 1usize..300,
        ) {
            let mut bytes = frames(&numbers, &commands, piece).concat();
            prop_assume!(!bytes.is_empty());
            let at = at.index(bytes.len());
            bytes[at] = value;
            let (numbers_before, commands_before, _) = decoded(&bytes[..at], chunk);
            let (some_numbers, some_commands, _) = decoded(&bytes, chunk);
            prop_assert!(some_numbers.starts_with(&numbers_before) && some_commands.starts_with(&commands_before));
            prop_assert!(some_numbers.len() <= numbers.len() && some_commands.len() <= commands.len());
        }
    }
}
