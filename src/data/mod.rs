//! From data files to rows of token ids, in an order that depends on (seed, epoch, position) alone.

/// Label of a token that carries no loss.
pub const IGNORE_INDEX: i64 = -100;

/// One row: a sample, or a pack of documents, formed before and independently of the world.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Row {
    /// Token ids `[tokens]`.
    pub input_ids: Vec<i64>,
    /// Aligned with `input_ids` (not shifted), [`IGNORE_INDEX`] where there is no loss.
    pub labels: Vec<i64>,
    /// Lengths of the documents, in order; they add up to the row. Padding is a last document of its own
    /// with no labels. Documents never attend to each other and their positions start at 0.
    pub document_lengths: Vec<usize>,
}
