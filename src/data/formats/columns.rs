//! Tables of columns: parquet files, and arrow files and streams as HF datasets writes them.
//!
//! A null stands for an absent field, for arrow gives each struct all fields of its column. A message's `content` alone
//! stays null, as JSON has it beside `tool_calls`.

use super::{
    Fault, Place, Record, START, Visit,
    arrow_sizes::{check_file, check_stream},
};
use crate::data::{error::one_line, guard};
use arrow_array::{Array, ArrayRef, ArrowPrimitiveType, RecordBatch, cast::AsArray, types::*};
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{ArrowError, DataType};
use parquet::{
    arrow::arrow_reader::ParquetRecordBatchReaderBuilder,
    file::metadata::{ColumnChunkMetaData, RowGroupMetaData},
};
use serde_json::{Map, Number, Value};
use std::{fs::File, io::BufReader};

/// Rows that are decoded at a time at most, and their bytes, as the file's metadata has them.
const ROWS: usize = 1024;
const BATCH: u64 = 64 << 20;

/// Bytes of a row in the mean at most, and those that a value of a list counts.
const MOST_OF_A_ROW: u64 = 256 << 20;
const VALUE: u64 = 8;

/// The one field that stays where it is null.
const KEPT_NULL: &str = "content";

pub(super) fn parquet(file: File, visit: &mut Visit) -> Result<(), Fault> {
    let builder = guarded("parquet", || ParquetRecordBatchReaderBuilder::try_new(file))?;
    let row = largest_row(builder.metadata().row_groups());
    if row > MOST_OF_A_ROW {
        let (mean, most) = (row >> 20, MOST_OF_A_ROW >> 20);
        return Err(Fault::Broken(format!(
            "rows of {mean} MB in the mean, more than {most} MB; cut them into several"
        )));
    }
    let rows = (BATCH / row.max(1)).clamp(1, ROWS as u64) as usize;
    batches("parquet", guarded("parquet", || builder.with_batch_size(rows).build())?, visit)
}

/// Bytes of a row in the mean, of the row group where that is most: a few bytes of a file can stand for any number of
/// values, in a page that is packed well or by a dictionary.
fn largest_row(groups: &[RowGroupMetaData]) -> u64 {
    let bytes = |column: &ColumnChunkMetaData| {
        let [packed, values] =
            [column.uncompressed_size(), column.num_values()].map(|n| u64::try_from(n).unwrap_or(0));
        packed.max(values.saturating_mul(VALUE))
    };
    let row = |group: &RowGroupMetaData| {
        let rows = u64::try_from(group.num_rows()).unwrap_or(0).max(1);
        group.columns().iter().map(bytes).fold(0, u64::saturating_add) / rows
    };
    groups.iter().map(row).max().unwrap_or(0)
}

pub(super) fn arrow_file(file: File, visit: &mut Visit) -> Result<(), Fault> {
    guarded("arrow", || check_file(&file))?;
    batches("arrow", guarded("arrow", || FileReader::try_new_buffered(file, None))?, visit)
}

pub(super) fn arrow_stream(file: File, visit: &mut Visit) -> Result<(), Fault> {
    guarded("arrow", || check_stream(&file))?;
    let reader = BufReader::with_capacity(START, file);
    batches("arrow", guarded("arrow", || StreamReader::try_new(reader, None))?, visit)
}

/// The result of a reader. Damaged files make some readers panic.
fn guarded<T, E: std::fmt::Display>(format: &str, read: impl FnOnce() -> Result<T, E>) -> Result<T, Fault> {
    let broken = |why: String| {
        Fault::Broken(format!(
            "not a whole {format} file ({why}); it is cut or damaged: copy or write it again"
        ))
    };
    match guard::guarded(read) {
        Some(read) => read.map_err(|error| broken(one_line(error))),
        None => Err(broken("its reader failed".into())),
    }
}

fn batches(
    format: &str,
    mut reader: impl Iterator<Item = Result<RecordBatch, ArrowError>>,
    visit: &mut Visit,
) -> Result<(), Fault> {
    let mut row = 0;
    loop {
        let behind = |row: usize| {
            move |fault| match fault {
                Fault::Broken(problem) if row > 0 => Fault::Broken(format!("{problem} (behind row {row})")),
                fault => fault,
            }
        };
        let read = guarded(format, || reader.next().transpose()).map_err(behind(row));
        let Some(batch) = read? else { return Ok(()) };
        // Batches of arrow files may be as large as these.
        for start in (0..batch.num_rows()).step_by(ROWS) {
            let some = guarded(format, || {
                Ok::<_, ArrowError>(rows(&batch.slice(start, ROWS.min(batch.num_rows() - start))))
            });
            for fields in some.map_err(behind(row))? {
                row += 1;
                if visit(Place::Row(row), Ok(Record::Fields(fields))).is_break() {
                    return Ok(());
                }
            }
        }
    }
}

/// The rows of a batch.
fn rows(batch: &RecordBatch) -> Vec<Map<String, Value>> {
    let mut rows = vec![Map::new(); batch.num_rows()];
    for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
        fill(field.name(), column, &mut rows);
    }
    rows
}

/// Sets a field of each object.
fn fill(name: &str, column: &ArrayRef, objects: &mut [Map<String, Value>]) {
    for (object, value) in objects.iter_mut().zip(values(column)) {
        if !value.is_null() || name == KEPT_NULL {
            object.insert(name.to_owned(), value);
        }
    }
}

/// All values of an array. One that JSON does not have is an object that names its type.
fn values(array: &ArrayRef) -> Vec<Value> {
    match array.data_type() {
        DataType::Null => vec![Value::Null; array.len()],
        DataType::Boolean => array.as_boolean().iter().map(Value::from).collect(),
        DataType::Int8 => numbers::<Int8Type>(array, Number::from),
        DataType::Int16 => numbers::<Int16Type>(array, Number::from),
        DataType::Int32 => numbers::<Int32Type>(array, Number::from),
        DataType::Int64 => numbers::<Int64Type>(array, Number::from),
        DataType::UInt8 => numbers::<UInt8Type>(array, Number::from),
        DataType::UInt16 => numbers::<UInt16Type>(array, Number::from),
        DataType::UInt32 => numbers::<UInt32Type>(array, Number::from),
        DataType::UInt64 => numbers::<UInt64Type>(array, Number::from),
        DataType::Float32 => floats::<Float32Type>(array),
        DataType::Float64 => floats::<Float64Type>(array),
        DataType::Utf8 => array.as_string::<i32>().iter().map(Value::from).collect(),
        DataType::LargeUtf8 => array.as_string::<i64>().iter().map(Value::from).collect(),
        DataType::Utf8View => array.as_string_view().iter().map(Value::from).collect(),
        DataType::List(_) => {
            let list = array.as_list::<i32>();
            lists(array, list.values(), |row| list.value_offsets()[row] as usize)
        }
        DataType::LargeList(_) => {
            let list = array.as_list::<i64>();
            lists(array, list.values(), |row| list.value_offsets()[row] as usize)
        }
        DataType::FixedSizeList(_, length) => {
            let list = array.as_fixed_size_list();
            let first = list.value_offset(0) as usize;
            lists(array, list.values(), |row| first + row * (*length).max(0) as usize)
        }
        DataType::Struct(fields) => {
            let (structs, mut objects) = (array.as_struct(), vec![Map::new(); array.len()]);
            for (field, column) in fields.iter().zip(structs.columns()) {
                fill(field.name(), column, &mut objects);
            }
            let value = |(row, object)| if array.is_null(row) { Value::Null } else { Value::Object(object) };
            objects.into_iter().enumerate().map(value).collect()
        }
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            if dictionary.values().is_empty() {
                return vec![Value::Null; array.len()];
            }
            let of_keys = values(dictionary.values());
            let keys = dictionary.normalized_keys();
            let value = |(row, key): (usize, usize)| {
                if array.is_null(row) { Value::Null } else { of_keys.get(key).cloned().unwrap_or_default() }
            };
            keys.into_iter().enumerate().map(value).collect()
        }
        other => {
            let named = Map::from_iter([("arrow type".to_owned(), Value::from(other.to_string()))]);
            let value = |row| if array.is_null(row) { Value::Null } else { Value::Object(named.clone()) };
            (0..array.len()).map(value).collect()
        }
    }
}

fn numbers<T: ArrowPrimitiveType>(array: &ArrayRef, number: impl Fn(T::Native) -> Number) -> Vec<Value> {
    let value = |value: Option<T::Native>| value.map_or(Value::Null, |value| Value::Number(number(value)));
    array.as_primitive::<T>().iter().map(value).collect()
}

fn floats<T: ArrowPrimitiveType>(array: &ArrayRef) -> Vec<Value>
where
    T::Native: Into<f64>,
{
    // NaN is what tables of numbers write for a gap.
    let value =
        |value: Option<T::Native>| value.map_or(Value::Null, |value| Value::from(Into::<f64>::into(value)));
    array.as_primitive::<T>().iter().map(value).collect()
}

/// Lists of `items`, each from its own `start` to the next one's.
fn lists(array: &ArrayRef, items: &ArrayRef, start: impl Fn(usize) -> usize) -> Vec<Value> {
    if array.is_empty() {
        return Vec::new();
    }
    let first = start(0);
    let used = items.slice(first, start(array.len()).saturating_sub(first));
    let mut items = values(&used).into_iter();
    let list = |row: usize| {
        let own: Vec<Value> = items.by_ref().take(start(row + 1) - start(row)).collect();
        if array.is_null(row) { Value::Null } else { Value::Array(own) }
    };
    (0..array.len()).map(list).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::ListArray;
    use parquet::arrow::ArrowWriter;
    use std::{ops::ControlFlow, sync::Arc};

    /// Rows read from a file with a list of so many zeros in each, or the words of the fault.
    fn rows_of(lengths: &[usize]) -> Result<usize, String> {
        let zeros = lengths.iter().map(|&length| Some(vec![Some(0); length]));
        let list: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Int8Type, _, _>(zeros));
        let batch = RecordBatch::try_from_iter([("input_ids", list)]).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let mut writer = ArrowWriter::try_new(&mut file, batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let mut count = 0;
        let read = parquet(file, &mut |_, _| {
            count += 1;
            ControlFlow::Continue(())
        });
        read.map(|()| count).map_err(|fault| format!("{fault:?}"))
    }

    #[test]
    fn a_row_of_values_without_end_is_refused() {
        assert_eq!(rows_of(&[3; 3000]), Ok(3000));
        assert_eq!(rows_of(&[1 << 20; 3]), Ok(3));
        let fault = rows_of(&[40 << 20]).unwrap_err();
        assert!(
            fault.contains("rows of 320 MB in the mean, more than 256 MB; cut them into several"),
            "{fault}"
        );
    }
}
