//! The text of a continuation as its tokens come, up to the first of some texts that end it: pure.
//!
//! Text is decoded by short windows of tokens, of which the first have been told and are context: a decoder drops the
//! space before the first word of what it gets. A character whose bytes have not all come is held back, and so is what
//! may be the beginning of a text that ends the continuation.

use crate::data::Tokenizer;
use std::sync::Arc;

/// Tokens of the prompt that are context, at most.
const CONTEXT: usize = 8;
/// Tokens of a window at most, however long no character is whole.
const WINDOW: usize = 64;
/// Tokens after which a U+FFFD stays: a character has at most four bytes.
const SETTLED: usize = 3;

/// Turns tokens to text.
pub trait Decode {
    /// The text of `ids`; U+FFFD in place of bytes that are no character.
    fn decode(&self, ids: &[i64]) -> String;
}

/// A decoder that requests share.
pub type SharedDecode = Arc<dyn Decode + Send + Sync>;

impl Decode for Tokenizer {
    /// Special tokens are written out, since a text that ends a continuation may name them.
    fn decode(&self, ids: &[i64]) -> String {
        decoded(self, ids, false)
    }
}

/// The text of a tokenizer without its special tokens, as people read it.
#[derive(Clone, Debug)]
pub struct WithoutSpecialTokens(pub Arc<Tokenizer>);

impl Decode for WithoutSpecialTokens {
    fn decode(&self, ids: &[i64]) -> String {
        decoded(&self.0, ids, true)
    }
}

/// Tokens of which a decoder makes no text are shown as one U+FFFD.
fn decoded(tokenizer: &Tokenizer, ids: &[i64], skip_special_tokens: bool) -> String {
    tokenizer.decode(ids, skip_special_tokens).unwrap_or_else(|_| char::REPLACEMENT_CHARACTER.into())
}

/// Text of a continuation, token by token.
pub struct Text {
    tokens: Detokenizer,
    stops: Stops,
}

impl Text {
    /// The text behind `prompt`, up to the first of the texts `stops`, none of which is empty.
    pub fn new(decode: SharedDecode, prompt: &[i64], stops: &[String]) -> Self {
        Self { tokens: Detokenizer::new(decode, prompt), stops: Stops::new(stops) }
    }

    /// The text that can be told after one more token. None comes once a text of `stops` is complete.
    pub fn push(&mut self, id: i64) -> String {
        let text = self.tokens.push(id);
        self.stops.push(&text)
    }

    /// The rest, where no further token comes.
    pub fn finish(mut self) -> String {
        let text = self.tokens.rest();
        let mut last = self.stops.push(&text);
        last.push_str(&self.stops.held);
        last
    }

    /// The text of `stops` that is complete, by its number. The text before it has been told, none of it and nothing
    /// after it.
    pub fn stopped(&self) -> Option<usize> {
        self.stops.found
    }
}

/// Decodes windows of tokens.
struct Detokenizer {
    decode: Arc<dyn Decode + Send + Sync>,
    /// The window.
    ids: Vec<i64>,
    /// Tokens of the window at whose end the text was whole the last time.
    whole: usize,
    /// Characters of the window's text that have been told.
    told: usize,
    /// Characters of the window's text when it was whole the last time, and after each token since.
    lengths: Vec<usize>,
}

impl Detokenizer {
    fn new(decode: Arc<dyn Decode + Send + Sync>, prompt: &[i64]) -> Self {
        // A window must not begin inside a character: some decoders then spoil what follows.
        let tails: Vec<&[i64]> =
            (1..=CONTEXT.min(prompt.len())).rev().map(|n| &prompt[prompt.len() - n..]).collect();
        let whole = tails.iter().find(|ids| {
            let text = decode.decode(ids);
            !text.is_empty() && !text.starts_with(char::REPLACEMENT_CHARACTER)
        });
        let ids = whole.or(tails.first()).map_or(vec![], |ids| ids.to_vec());
        let text = decode.decode(&ids);
        let told = text.chars().count() - unfinished(&text);
        Self { decode, whole: 0, told, lengths: vec![told], ids }
    }

    /// The text that one more token makes certain.
    fn push(&mut self, id: i64) -> String {
        self.ids.push(id);
        let text = self.decode.decode(&self.ids);
        let (length, unfinished) = (text.chars().count(), unfinished(&text));
        let settled = self.lengths.len().checked_sub(SETTLED).map_or(0, |at| self.lengths[at]);
        let certain = (length - unfinished).max(settled.min(length));
        let new = text.chars().take(certain).skip(self.told).collect();
        self.told = self.told.max(certain);
        self.lengths.push(length);
        if unfinished == 0 {
            self.move_window();
        }
        if self.ids.len() > WINDOW {
            self.cut_window(length);
        }
        new
    }

    /// Makes the tokens of the last whole piece of text the context of the next.
    fn move_window(&mut self) {
        let context = self.decode.decode(&self.ids[self.whole..]);
        if !context.is_empty() {
            self.ids.drain(..self.whole);
            self.told = context.chars().count();
        }
        self.whole = self.ids.len();
        self.lengths = vec![self.told];
    }

    /// Drops the older half of a window. Its text is `length` characters long; the ends of both texts are the same.
    fn cut_window(&mut self, length: usize) {
        let dropped = self.ids.len() - WINDOW / 2;
        self.ids.drain(..dropped);
        self.whole = self.whole.saturating_sub(dropped);
        let left = self.decode.decode(&self.ids).chars().count();
        let moved = |at: usize| (left + at).saturating_sub(length);
        self.told = moved(self.told);
        self.lengths.iter_mut().for_each(|at| *at = moved(*at));
    }

    /// The text that was held back.
    fn rest(&self) -> String {
        self.decode.decode(&self.ids).chars().skip(self.told).collect()
    }
}

/// The number of U+FFFD at the end of a text, which may be characters of which bytes are missing.
fn unfinished(text: &str) -> usize {
    text.chars().rev().take_while(|&c| c == char::REPLACEMENT_CHARACTER).count()
}

/// Looks for texts in a text that comes in pieces.
struct Stops {
    patterns: Vec<Pattern>,
    /// Text that may be the beginning of one of them.
    held: String,
    found: Option<usize>,
}

/// A text to find, by the automaton of Knuth, Morris and Pratt.
struct Pattern {
    text: Vec<u8>,
    /// For each number of its bytes from 1: the bytes of its longest own beginning, not the whole, that they end with.
    borders: Vec<usize>,
    /// Bytes of its beginning that the text so far ends with.
    matched: usize,
}

impl Stops {
    fn new(texts: &[String]) -> Self {
        Self {
            patterns: texts.iter().map(|text| Pattern::new(text)).collect(),
            held: String::new(),
            found: None,
        }
    }

    /// The text that can be told. Of texts that are complete at the same place, the longest is found.
    fn push(&mut self, text: &str) -> String {
        if self.found.is_some() {
            return String::new();
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            let mut longest = 0;
            for (number, pattern) in self.patterns.iter_mut().enumerate() {
                if pattern.push(byte) && pattern.text.len() > longest {
                    longest = pattern.text.len();
                    self.found = Some(number);
                }
            }
            if longest > 0 {
                self.held.truncate(before + at + 1 - longest);
                return std::mem::take(&mut self.held);
            }
        }
        let kept = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        self.held.drain(..self.held.len() - kept).collect()
    }
}

impl Pattern {
    fn new(text: &str) -> Self {
        let mut pattern = Self { text: text.as_bytes().to_vec(), borders: vec![0], matched: 0 };
        for at in 1..pattern.text.len() {
            pattern.push(pattern.text[at]);
            pattern.borders.push(pattern.matched);
        }
        pattern.matched = 0;
        pattern
    }

    /// True where `byte` makes it complete.
    fn push(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.text.get(self.matched) != Some(&byte) {
            self.matched = self.borders[self.matched - 1];
        }
        if self.text.get(self.matched) == Some(&byte) {
            self.matched += 1;
        }
        self.matched == self.text.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{path::Path, sync::Mutex};

    fn tokenizer(name: &str) -> Arc<Tokenizer> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat").join(name);
        Arc::new(Tokenizer::load(&dir).unwrap())
    }

    /// A token is a byte; notes the longest window.
    #[derive(Default)]
    struct Bytes(Mutex<usize>);

    impl Decode for Bytes {
        fn decode(&self, ids: &[i64]) -> String {
            let mut longest = self.0.lock().unwrap();
            *longest = ids.len().max(*longest);
            String::from_utf8_lossy(&ids.iter().map(|&id| id as u8).collect::<Vec<u8>>()).into_owned()
        }
    }

    fn bytes(text: &[u8]) -> Vec<i64> {
        text.iter().map(|&byte| i64::from(byte)).collect()
    }

    /// The pieces that are told after each token, and at the end.
    fn pieces(decode: Arc<dyn Decode + Send + Sync>, prompt: &[i64], ids: &[i64]) -> Vec<String> {
        let mut text = Text::new(decode, prompt, &[]);
        let mut pieces: Vec<String> = ids.iter().map(|&id| text.push(id)).collect();
        pieces.push(text.finish());
        pieces
    }

    const TEXTS: [&str; 4] = [
        "The quick brown fox.",
        "  two spaces, a tab\tand\n\nlines ",
        "Grüße, 你好世界, नमस्ते, e\u{301} — \u{1F468}\u{200D}\u{1F469}\u{200D}\u{1F467}!",
        "code: fn f(x) { x += 1; } <|im_end|> after",
    ];

    #[test]
    fn pieces_of_a_text_add_up_to_what_the_tokenizer_decodes() {
        for name in ["byte_level", "sentence"] {
            let tokenizer = tokenizer(name);
            for text in TEXTS {
                let ids = tokenizer.encode(text).unwrap();
                let all = pieces(tokenizer.clone(), &[], &ids);
                assert_eq!(all.concat(), tokenizer.decode(&ids, false).unwrap(), "{name}");
                assert!(all.iter().all(|piece| !piece.contains('\u{FFFD}')), "{name}: {all:?}");
                assert_eq!(all.last().unwrap(), "", "{name}: all was told with the last token");
                let clean = pieces(Arc::new(WithoutSpecialTokens(tokenizer.clone())), &[], &ids);
                assert_eq!(clean.concat(), tokenizer.decode(&ids, true).unwrap(), "{name}");
            }
        }
    }

    #[test]
    fn a_continuation_goes_on_where_its_prompt_ends() {
        for name in ["byte_level", "sentence"] {
            let tokenizer = tokenizer(name);
            for text in TEXTS {
                let ids = tokenizer.encode(text).unwrap();
                let whole = tokenizer.decode(&ids, false).unwrap();
                // A prompt that ends within a character has its beginning, which the continuation then tells.
                let ends = |cut: &usize| !tokenizer.decode(&ids[..*cut], false).unwrap().contains('\u{FFFD}');
                for cut in (1..ids.len()).filter(ends) {
                    let prompt = tokenizer.decode(&ids[..cut], false).unwrap();
                    let rest = pieces(tokenizer.clone(), &ids[..cut], &ids[cut..]).concat();
                    assert_eq!(format!("{prompt}{rest}"), whole, "{name}, cut at {cut}");
                }
            }
        }
        assert_eq!(pieces(Arc::new(Bytes::default()), &bytes(b"a\xE2\x82"), &bytes(b"\xACb")).concat(), "€b");
    }

    #[test]
    fn text_is_told_as_soon_as_it_is_certain() {
        let decode = Arc::new(Bytes::default());
        assert_eq!(pieces(decode.clone(), &[], &bytes("a€b".as_bytes())), ["a", "", "", "€", "b", ""]);
        assert_eq!(pieces(decode, &[], &bytes(b"a\xE2\x82")), ["a", "", "", "\u{FFFD}"]);
        // A special token that stands alone leaves no trace, and the word after it keeps its space.
        let tokenizer = tokenizer("sentence");
        let ids = [tokenizer.encode("The").unwrap(), vec![423], tokenizer.encode("fox").unwrap()].concat();
        let clean = pieces(Arc::new(WithoutSpecialTokens(tokenizer)), &[], &ids);
        assert_eq!(clean.concat(), "The fox");
    }

    #[test]
    fn bytes_that_are_no_text_are_told_too_and_windows_stay_short() {
        let decode = Arc::new(Bytes::default());
        let mut text = Text::new(decode.clone(), &[], &["!".into()]);
        let told: String = [0xFF; 1000].iter().map(|&id| text.push(id)).collect();
        assert!(told.chars().count() >= 997, "{} of 1000", told.chars().count());
        assert!(*decode.0.lock().unwrap() <= WINDOW + 1);
        assert_eq!(text.push(i64::from(b'!')).chars().count() + told.chars().count(), 1000);
        assert_eq!(text.stopped(), Some(0));
    }

    #[test]
    fn a_stop_text_across_tokens_ends_the_text_before_it() {
        let stops = ["\nUser:".to_string(), "##".into()];
        let mut text = Text::new(Arc::new(Bytes::default()), &[], &stops);
        let told: Vec<String> = bytes(b"a#b\nUs\nUser:c").iter().map(|&id| text.push(id)).collect();
        assert_eq!(told, ["a", "", "#b", "", "", "", "\nUs", "", "", "", "", "", ""]);
        assert_eq!(text.stopped(), Some(0));
        assert_eq!(text.finish(), "");
        let mut text = Text::new(Arc::new(Bytes::default()), &[], &stops);
        let told: String = bytes(b"a\nUse").iter().map(|&id| text.push(id)).collect();
        assert_eq!(told, "a");
        assert_eq!(
            (text.stopped(), text.finish()),
            (None, "\nUse".into()),
            "what did not become a stop is told"
        );
    }

    #[test]
    fn a_stop_text_may_name_a_special_token() {
        for name in ["byte_level", "sentence"] {
            let tokenizer = tokenizer(name);
            let stops = ["<|im_end|>".to_string()];
            let mut text = Text::new(tokenizer.clone(), &[], &stops);
            let ids = tokenizer.encode("Yes.<|im_end|>").unwrap();
            let told: String = ids.iter().map(|&id| text.push(id)).collect();
            assert_eq!((told.as_str(), text.stopped()), ("Yes.", Some(0)), "{name}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_told_as_when_decoded_at_once(
            parts in proptest::collection::vec(
                prop_oneof![4 => "[a-c é€\u{1F600}]{1,6}".prop_map(String::into_bytes),
                            1 => proptest::collection::vec(any::<u8>(), 1..6)], 0..40),
        ) {
            let text = parts.concat();
            let decode = Arc::new(Bytes::default());
            let all = pieces(decode.clone(), &[], &bytes(&text));
            prop_assert_eq!(all.concat(), String::from_utf8_lossy(&text));
            prop_assert!(*decode.0.lock().unwrap() <= WINDOW + 1);
        }

        #[test]
        fn text_ends_before_the_first_stop_that_is_complete(
            text in "[abé]{0,40}", stops in proptest::collection::vec("[abé]{1,5}", 0..4),
        ) {
            // The earliest end counts; of those that end there, the longest, then the first.
            let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
            let expected = ends.into_iter().find_map(|end| {
                let complete = stops.iter().enumerate().filter(|(_, stop)| text[..end].ends_with(*stop));
                complete.max_by_key(|(i, stop)| (stop.len(), std::cmp::Reverse(*i)))
                    .map(|(i, stop)| (i, end, &text[..end - stop.len()]))
            });
            let mut watched = Text::new(Arc::new(Bytes::default()), &[], &stops);
            let mut told = String::new();
            for (at, id) in bytes(text.as_bytes()).into_iter().enumerate() {
                told.push_str(&watched.push(id));
                let is_complete = expected.is_some_and(|(_, end, _)| end <= at + 1);
                prop_assert_eq!(watched.stopped().is_some(), is_complete);
                prop_assert!(expected.map_or(&*text, |(.., before)| before).starts_with(&told));
            }
            prop_assert_eq!(watched.stopped(), expected.map(|(i, ..)| i));
            told.push_str(&watched.finish());
            prop_assert_eq!(&*told, expected.map_or(&*text, |(.., before)| before));
        }
    }
}
