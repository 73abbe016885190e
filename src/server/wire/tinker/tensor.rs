//! Tensors as clients send them, dense or CSR, in protobuf or JSON, made dense.

use super::proto::{self, DType, Encoding};
use half::bf16;
use serde::Deserialize;
use utoipa::ToSchema;

/// Why a tensor was refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TensorError {
    #[error("no values: send dense or sparse_csr")]
    NoValues,
    #[error("dtype {got}: expected {expected}")]
    Type { got: String, expected: &'static str },
    #[error("{bytes} bytes are no whole number of {dtype} values")]
    Bytes { bytes: usize, dtype: &'static str },
    #[error("value {index} is {value}: expected a whole number")]
    NotWhole { index: usize, value: f64 },
    #[error("shape {shape:?}: expected [{tokens}] or [{tokens}, k], one row for each token")]
    Shape { shape: Vec<i64>, tokens: usize },
    #[error("{values} values: expected {expected}, as shape {shape:?} says")]
    Count { values: usize, expected: usize, shape: Vec<i64> },
    #[error("sparse_csr: {0}")]
    Csr(&'static str),
    #[error(
        "shape {shape:?} is more than the {most} values that a request may hold: send fewer data at once"
    )]
    TooLarge { shape: Vec<i64>, most: usize },
}

/// Positions of the listed values of a CSR tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Csr {
    /// `[rows + 1]`
    pub crow_indices: Vec<i64>,
    /// `[listed]`
    pub col_indices: Vec<i64>,
}

/// A tensor as it was sent.
pub(super) struct SentTensor<T> {
    /// All values, or the listed ones.
    values: Vec<T>,
    /// Empty where the client left it out.
    shape: Vec<i64>,
    csr: Option<Csr>,
}

/// A tensor with a row for each token.
#[derive(Debug, PartialEq)]
pub(super) struct Dense<T> {
    /// Row by row.
    pub values: Vec<T>,
    /// `k` of shape `[tokens, k]`; `None` of shape `[tokens]`.
    pub columns: Option<usize>,
}

impl<T: Copy + Default> SentTensor<T> {
    /// Positions of the values, of a tensor as CSR.
    pub(super) fn csr(&self) -> Option<&Csr> {
        self.csr.as_ref()
    }

    /// All values, those that CSR does not list being 0. `most`: values at most, checked before memory is taken.
    pub(super) fn into_dense(self, tokens: usize, most: usize) -> Result<Dense<T>, TensorError> {
        self.into_filled(tokens, most, T::default())
    }

    /// The same, with `absent` for values that CSR does not list.
    pub(super) fn into_filled(self, tokens: usize, most: usize, absent: T) -> Result<Dense<T>, TensorError> {
        let shape = if self.shape.is_empty() { vec![tokens as i64] } else { self.shape };
        let columns = match shape[..] {
            [rows] if rows == tokens as i64 => None,
            [rows, k] if rows == tokens as i64 && k > 0 => Some(k as usize),
            _ => return Err(TensorError::Shape { shape, tokens }),
        };
        let Some(expected) = tokens.checked_mul(columns.unwrap_or(1)).filter(|&values| values <= most) else {
            return Err(TensorError::TooLarge { shape, most });
        };
        let values = match (self.csr, columns) {
            (Some(csr), Some(k)) => csr.fill(&self.values, tokens, k, absent)?,
            (Some(_), None) => return Err(TensorError::Csr("expected a shape of two sizes")),
            (None, _) if self.values.len() != expected => {
                return Err(TensorError::Count { values: self.values.len(), expected, shape });
            }
            (None, _) => self.values,
        };
        Ok(Dense { values, columns })
    }
}

impl Csr {
    fn fill<T: Copy>(self, listed: &[T], rows: usize, k: usize, absent: T) -> Result<Vec<T>, TensorError> {
        let crow = &self.crow_indices;
        let is_rising = crow.windows(2).all(|pair| pair[0] <= pair[1]);
        if crow.len() != rows + 1 || crow[0] != 0 || crow[rows] != listed.len() as i64 || !is_rising {
            return Err(TensorError::Csr(
                "crow_indices must have a value more than rows and rise from 0 to the number of values",
            ));
        }
        if self.col_indices.len() != listed.len() {
            return Err(TensorError::Csr("expected as many col_indices as values"));
        }
        let mut dense = vec![absent; rows * k];
        for (row, bounds) in dense.chunks_exact_mut(k).zip(crow.windows(2)) {
            let of_row = bounds[0] as usize..bounds[1] as usize;
            let columns = &self.col_indices[of_row.clone()];
            let is_rising = columns.windows(2).all(|pair| pair[0] < pair[1]);
            if !is_rising || columns.iter().any(|&column| column < 0 || column >= k as i64) {
                return Err(TensorError::Csr("col_indices of a row must rise and lie within the columns"));
            }
            for (&column, &value) in columns.iter().zip(&listed[of_row]) {
                row[column as usize] = value;
            }
        }
        Ok(dense)
    }
}

/// Little-endian values of `N` bytes each.
pub(super) fn read_values<const N: usize, T>(
    bytes: &[u8],
    dtype: &'static str,
    value: impl Fn([u8; N]) -> T,
) -> Result<Vec<T>, TensorError> {
    let (values, rest) = bytes.as_chunks::<N>();
    if !rest.is_empty() {
        return Err(TensorError::Bytes { bytes: bytes.len(), dtype });
    }
    Ok(values.iter().map(|&bytes| value(bytes)).collect())
}

impl proto::Tensor {
    pub(super) fn into_integers(self) -> Result<SentTensor<i64>, TensorError> {
        let dtype = self.dtype;
        self.into_sent(|bytes| match DType::try_from(dtype) {
            Ok(DType::Int64) => read_values(bytes, "int64", i64::from_le_bytes),
            Ok(DType::Int32) => read_values(bytes, "int32", |bytes| i32::from_le_bytes(bytes).into()),
            _ => Err(wrong_type(dtype, "int64 or int32")),
        })
    }

    /// Integers are converted.
    pub(super) fn into_floats(self) -> Result<SentTensor<f32>, TensorError> {
        let dtype = self.dtype;
        self.into_sent(|bytes| match DType::try_from(dtype) {
            Ok(DType::Float32) => read_values(bytes, "float32", f32::from_le_bytes),
            Ok(DType::Bfloat16) => {
                read_values(bytes, "bfloat16", |bytes| bf16::from_le_bytes(bytes).to_f32())
            }
            Ok(DType::Int64) => read_values(bytes, "int64", |bytes| i64::from_le_bytes(bytes) as f32),
            Ok(DType::Int32) => read_values(bytes, "int32", |bytes| i32::from_le_bytes(bytes) as f32),
            _ => Err(wrong_type(dtype, "float32, bfloat16, int64 or int32")),
        })
    }

    fn into_sent<T>(
        self,
        read: impl Fn(&[u8]) -> Result<Vec<T>, TensorError>,
    ) -> Result<SentTensor<T>, TensorError> {
        let (values, csr) = match self.encoding.ok_or(TensorError::NoValues)? {
            Encoding::Dense(bytes) => (read(&bytes)?, None),
            Encoding::SparseCsr(sparse) => {
                let crow_indices = read_values(&sparse.crow_indices, "int64", i64::from_le_bytes)?;
                let col_indices = read_values(&sparse.col_indices, "int64", i64::from_le_bytes)?;
                (read(&sparse.values)?, Some(Csr { crow_indices, col_indices }))
            }
        };
        Ok(SentTensor { values, shape: self.shape, csr })
    }
}

fn wrong_type(dtype: i32, expected: &'static str) -> TensorError {
    let got = DType::try_from(dtype).map_or_else(|_| dtype.to_string(), |dtype| format!("{dtype:?}"));
    TensorError::Type { got: got.to_lowercase(), expected }
}

/// A tensor of the JSON wire. Its dtype is not read: numbers carry it.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(as = tinker::Tensor)]
pub(super) struct JsonTensor {
    data: Vec<f64>,
    #[serde(default)]
    shape: Option<Vec<i64>>,
    #[serde(default)]
    sparse_crow_indices: Option<Vec<i64>>,
    #[serde(default)]
    sparse_col_indices: Option<Vec<i64>>,
}

impl JsonTensor {
    pub(super) fn into_integers(self) -> Result<SentTensor<i64>, TensorError> {
        match self.data.iter().position(|value| value.fract() != 0.0) {
            Some(index) => Err(TensorError::NotWhole { index, value: self.data[index] }),
            None => self.into_sent(|value| value as i64),
        }
    }

    pub(super) fn into_floats(self) -> Result<SentTensor<f32>, TensorError> {
        self.into_sent(|value| value as f32)
    }

    fn into_sent<T>(self, convert: impl Fn(f64) -> T) -> Result<SentTensor<T>, TensorError> {
        let csr = match (self.sparse_crow_indices, self.sparse_col_indices) {
            (None, None) => None,
            (Some(crow_indices), Some(col_indices)) => Some(Csr { crow_indices, col_indices }),
            _ => return Err(TensorError::Csr("sparse_crow_indices and sparse_col_indices come together")),
        };
        let values = self.data.into_iter().map(convert).collect();
        Ok(SentTensor { values, shape: self.shape.unwrap_or_default(), csr })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn csr(shape: &[i64], values: Vec<i64>, crow: Vec<i64>, col: Vec<i64>) -> SentTensor<i64> {
        let csr = Some(Csr { crow_indices: crow, col_indices: col });
        SentTensor { values, shape: shape.to_vec(), csr }
    }

    #[test]
    fn a_csr_tensor_is_refused_when_its_indices_break_a_rule() {
        let good = csr(&[2, 3], vec![7, 8, 9], vec![0, 2, 3], vec![0, 2, 1]).into_dense(2, 6);
        assert_eq!(good, Ok(Dense { values: vec![7, 0, 8, 0, 9, 0], columns: Some(3) }));
        let broken = [
            csr(&[2, 3], vec![7, 8, 9], vec![0, 2], vec![0, 2, 1]),
            csr(&[2, 3], vec![7, 8, 9], vec![0, 4, 3], vec![0, 2, 1]),
            csr(&[2, 3], vec![7, 8, 9], vec![1, 2, 3], vec![0, 2, 1]),
            csr(&[2, 3], vec![7, 8, 9], vec![0, 2, i64::MAX], vec![0, 2, 1]),
            csr(&[2, 3], vec![7, 8, 9], vec![0, -1, 3], vec![0, 2, 1]),
            csr(&[2, 3], vec![7, 8, 9], vec![0, 2, 3], vec![0, 2]),
            csr(&[2, 3], vec![7, 8, 9], vec![0, 2, 3], vec![0, 3, 1]),
            csr(&[2, 3], vec![7, 8, 9], vec![0, 2, 3], vec![-1, 2, 1]),
            csr(&[2, 3], vec![7, 8, 9], vec![0, 2, 3], vec![2, 2, 1]),
            csr(&[2], vec![7, 8], vec![0, 1, 2], vec![0, 0]),
        ];
        for tensor in broken {
            assert!(matches!(tensor.into_dense(2, 6), Err(TensorError::Csr(_))));
        }
    }

    #[test]
    fn a_tensor_that_would_fill_memory_is_refused_before() {
        for k in [4, 1 << 40, i64::MAX] {
            let error = csr(&[2, k], vec![], vec![0, 0, 0], vec![]).into_dense(2, 6);
            assert_eq!(error, Err(TensorError::TooLarge { shape: vec![2, k], most: 6 }));
        }
    }

    proptest! {
        #[test]
        fn csr_gives_back_the_dense_tensor_that_it_was_made_of(
            rows in prop::collection::vec(prop::collection::vec(-2_i64..3, 4), 0..9),
        ) {
            let (mut values, mut crow, mut col) = (vec![], vec![0], vec![]);
            for row in &rows {
                for (column, &value) in row.iter().enumerate().filter(|(_, value)| **value != 0) {
                    values.push(value);
                    col.push(column as i64);
                }
                crow.push(values.len() as i64);
            }
            let dense = csr(&[rows.len() as i64, 4], values, crow, col).into_dense(rows.len(), 1000).unwrap();
            prop_assert_eq!(dense.values, rows.concat());
        }
    }
}
