//! Tensors in a file of torch.save: a zip archive of `{name}/data.pkl`, a pickle of the dict, and the storages,
//! `{name}/data/{key}`. Nothing in the pickle is executed: it may name what a dict of tensors needs, and nothing else.

use super::adapter_file::Entry;
use safetensors::Dtype;
use std::{
    collections::HashMap,
    io::{Cursor, Read},
};
use zip::ZipArchive;

/// A value on the pickle machine's stack.
#[derive(Clone, Debug)]
enum Value {
    /// A value that no tensor depends on.
    Other,
    Mark,
    Int(i64),
    Text(String),
    /// A function or class: `module.name`.
    Global(String),
    Tuple(Vec<Self>),
    Dict(Vec<(Self, Self)>),
    Storage {
        dtype: Dtype,
        key: String,
    },
    Tensor(View),
}

/// A tensor's part of a storage.
#[derive(Clone, Debug)]
struct View {
    dtype: Dtype,
    storage: String,
    /// First element.
    first: usize,
    shape: Vec<usize>,
}

/// The tensors of the file `bytes`, and the data that their places refer to.
///
/// # Errors
/// What is no dict of tensors, or another file than torch.save writes since 1.6.
pub(super) fn tensors(bytes: &[u8]) -> Result<(Vec<(String, Entry)>, Vec<u8>), String> {
    if !bytes.starts_with(b"PK") {
        return Err("not a zip archive of torch.save: load it in PEFT and save it as safetensors".into());
    }
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|error| error.to_string())?;
    let pickle = archive.file_names().find(|name| name.ends_with("/data.pkl")).map(str::to_owned);
    let pickle = pickle.ok_or("the archive has no data.pkl")?;
    let folder = pickle.trim_end_matches("data.pkl").to_owned();
    let mut read = |name: &str| -> Result<Vec<u8>, String> {
        let mut content = Vec::new();
        let mut file = archive.by_name(name).map_err(|error| format!("{name}: {error}"))?;
        file.read_to_end(&mut content).map_err(|error| format!("{name}: {error}"))?;
        Ok(content)
    };
    let Value::Dict(items) = PickleReader::new(&read(&pickle)?).run()? else {
        return Err("the pickle is no dict of tensors".into());
    };
    let (mut named, mut data) = (Vec::new(), Vec::new());
    let mut storages: HashMap<String, Vec<u8>> = HashMap::new();
    for item in items {
        let (Value::Text(name), Value::Tensor(View { dtype, storage, first, shape })) = item else {
            return Err("the pickle is no dict of tensors".into());
        };
        if !storages.contains_key(&storage) {
            storages.insert(storage.clone(), read(&format!("{folder}data/{storage}"))?);
        }
        let size = if dtype == Dtype::F32 { 4 } else { 2 };
        let elements = shape.iter().try_fold(1usize, |all, &n| all.checked_mul(n));
        let end = elements.and_then(|n| first.checked_add(n)?.checked_mul(size));
        let own = end.and_then(|end| storages[&storage].get(first * size..end));
        let own = own.ok_or_else(|| format!("{name} reaches past its storage"))?;
        let start = data.len();
        data.extend_from_slice(own);
        named.push((name, Entry { dtype, shape, data: start..data.len() }));
    }
    Ok((named, data))
}

/// The pickle machine, as far as torch.save uses it (protocols 2 to 4).
struct PickleReader<'a> {
    rest: &'a [u8],
    stack: Vec<Value>,
    memo: HashMap<u32, Value>,
}

const TRUNCATED: &str = "the pickle ends early";

impl<'a> PickleReader<'a> {
    fn new(pickle: &'a [u8]) -> Self {
        Self { rest: pickle, stack: Vec::new(), memo: HashMap::new() }
    }

    fn run(mut self) -> Result<Value, String> {
        loop {
            let [operation] = self.take()?;
            match operation {
                b'.' => return self.pop(),
                // PROTO, FRAME
                0x80 => drop(self.take::<1>()?),
                0x95 => drop(self.take::<8>()?),
                b'(' => self.stack.push(Value::Mark),
                b'N' | 0x88 | 0x89 | b']' => self.stack.push(Value::Other),
                b'}' => self.stack.push(Value::Dict(Vec::new())),
                b')' => self.stack.push(Value::Tuple(Vec::new())),
                b'J' => {
                    let value = i32::from_le_bytes(self.take()?);
                    self.stack.push(Value::Int(value.into()));
                }
                b'K' => {
                    let [value] = self.take()?;
                    self.stack.push(Value::Int(value.into()));
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.take()?);
                    self.stack.push(Value::Int(value.into()));
                }
                0x8a => self.long()?,
                b'X' => {
                    let length = u32::from_le_bytes(self.take()?);
                    self.text(length as usize)?;
                }
                0x8c => {
                    let [length] = self.take()?;
                    self.text(length.into())?;
                }
                b'c' => {
                    let name = format!("{}.{}", self.line()?, self.line()?);
                    self.stack.push(Value::Global(name));
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Value::Text(module), Value::Text(name)) = (module, name) else {
                        return Err(unknown());
                    };
                    self.stack.push(Value::Global(format!("{module}.{name}")));
                }
                b'q' | b'h' => {
                    let [place] = self.take()?;
                    self.remember_or_recall(operation == b'q', place.into())?;
                }
                b'r' | b'j' => {
                    let place = u32::from_le_bytes(self.take()?);
                    self.remember_or_recall(operation == b'r', place)?;
                }
                0x94 => self.remember_or_recall(true, self.memo.len() as u32)?,
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.stack.push(Value::Tuple(items));
                }
                0x85..=0x87 => {
                    let first = self.stack.len().checked_sub(usize::from(operation - 0x84));
                    let items = self.stack.split_off(first.ok_or(TRUNCATED)?);
                    self.stack.push(Value::Tuple(items));
                }
                b'Q' => {
                    let storage = storage(self.pop()?)?;
                    self.stack.push(storage);
                }
                b'R' => {
                    let (arguments, function) = (self.pop()?, self.pop()?);
                    self.stack.push(call(function, arguments)?);
                }
                b's' | b'u' => {
                    let items = if operation == b'u' {
                        self.pop_to_mark()?
                    } else {
                        self.stack.split_off(self.stack.len().checked_sub(2).ok_or(TRUNCATED)?)
                    };
                    let Some(Value::Dict(dict)) = self.stack.last_mut() else { return Err(unknown()) };
                    let (pairs, []) = items.as_chunks() else { return Err(unknown()) };
                    dict.extend(pairs.iter().map(|[key, value]| (key.clone(), value.clone())));
                }
                // BUILD: attributes of the dict, as its `_metadata`.
                b'b' => drop(self.pop()?),
                _ => return Err(unknown()),
            }
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (head, rest) = self.rest.split_first_chunk().ok_or(TRUNCATED)?;
        self.rest = rest;
        Ok(*head)
    }

    fn text(&mut self, length: usize) -> Result<(), String> {
        let (text, rest) = self.rest.split_at_checked(length).ok_or(TRUNCATED)?;
        self.rest = rest;
        let text = std::str::from_utf8(text).map_err(|error| error.to_string())?;
        self.stack.push(Value::Text(text.to_owned()));
        Ok(())
    }

    fn line(&mut self) -> Result<String, String> {
        let end = self.rest.iter().position(|&byte| byte == b'\n').ok_or(TRUNCATED)?;
        let line = String::from_utf8_lossy(&self.rest[..end]).into_owned();
        self.rest = &self.rest[end + 1..];
        Ok(line)
    }

    /// A little-endian number of any length.
    fn long(&mut self) -> Result<(), String> {
        let [length] = self.take()?;
        let (bytes, rest) = self.rest.split_at_checked(length.into()).ok_or(TRUNCATED)?;
        self.rest = rest;
        if bytes.len() > 8 {
            return Err(unknown());
        }
        let fill = if bytes.last().is_some_and(|&last| last > 127) { 0xff } else { 0 };
        let mut all = [fill; 8];
        all[..bytes.len()].copy_from_slice(bytes);
        self.stack.push(Value::Int(i64::from_le_bytes(all)));
        Ok(())
    }

    fn pop(&mut self) -> Result<Value, String> {
        self.stack.pop().ok_or_else(|| TRUNCATED.to_owned())
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value>, String> {
        let mark = self.stack.iter().rposition(|value| matches!(value, Value::Mark)).ok_or(TRUNCATED)?;
        let items = self.stack.split_off(mark + 1);
        self.stack.pop();
        Ok(items)
    }

    fn remember_or_recall(&mut self, remember: bool, place: u32) -> Result<(), String> {
        if remember {
            let value = self.stack.last().ok_or(TRUNCATED)?.clone();
            self.memo.insert(place, value);
        } else {
            self.stack.push(self.memo.get(&place).ok_or_else(unknown)?.clone());
        }
        Ok(())
    }
}

fn unknown() -> String {
    "its pickle has more than a dict of tensors: load it in PEFT and save it as safetensors".to_owned()
}

/// The storage of `("storage", class, key, device, elements)`.
fn storage(id: Value) -> Result<Value, String> {
    let Value::Tuple(parts) = id else { return Err(unknown()) };
    let [_, Value::Global(class), Value::Text(key), ..] = &parts[..] else { return Err(unknown()) };
    let dtype = match class.as_str() {
        "torch.FloatStorage" => Dtype::F32,
        "torch.HalfStorage" => Dtype::F16,
        "torch.BFloat16Storage" => Dtype::BF16,
        other => return Err(format!("a tensor of {other}; only fp32, fp16 and bf16 are read")),
    };
    Ok(Value::Storage { dtype, key: key.clone() })
}

/// The value of a call of a function that torch.save names.
fn call(function: Value, arguments: Value) -> Result<Value, String> {
    let (Value::Global(name), Value::Tuple(arguments)) = (function, arguments) else { return Err(unknown()) };
    match (name.as_str(), &arguments[..]) {
        ("collections.OrderedDict", []) => Ok(Value::Dict(Vec::new())),
        ("torch._utils._rebuild_parameter", [tensor @ Value::Tensor(_), ..]) => Ok(tensor.clone()),
        (
            "torch._utils._rebuild_tensor_v2",
            [Value::Storage { dtype, key }, Value::Int(first), Value::Tuple(shape), Value::Tuple(stride), ..],
        ) => {
            let (shape, stride) = (lengths(shape)?, lengths(stride)?);
            // The stride that rows one after another have; that of a dimension of 1 does not count.
            let mut expected = 1;
            for (&n, &stride) in shape.iter().zip(&stride).rev() {
                if n > 1 && stride != expected {
                    return Err(
                        "a tensor is not contiguous: load it in PEFT and save it as safetensors".into()
                    );
                }
                expected = n.saturating_mul(expected);
            }
            let first = usize::try_from(*first).map_err(|_| unknown())?;
            Ok(Value::Tensor(View { dtype: *dtype, storage: key.clone(), first, shape }))
        }
        _ => Err(unknown()),
    }
}

fn lengths(values: &[Value]) -> Result<Vec<usize>, String> {
    let length = |value: &Value| match value {
        Value::Int(n) => usize::try_from(*n).map_err(|_| unknown()),
        _ => Err(unknown()),
    };
    values.iter().map(length).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;
    use zip::{ZipWriter, write::FileOptions};

    /// `{"k": tensor [2, 3] of FloatStorage "0" from element 1}`, as torch.save pickles it.
    fn pickle() -> Vec<u8> {
        let text = |word: &str| [&b"X"[..], &(word.len() as u32).to_le_bytes(), word.as_bytes()].concat();
        let parts: &[&[u8]] = &[
            b"\x80\x02}q\x00(",
            &text("k"),
            b"ctorch._utils\n_rebuild_tensor_v2\nq\x01((",
            &text("storage"),
            b"ctorch\nFloatStorage\n",
            &text("0"),
            &text("cpu"),
            b"K\x07tQK\x01K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n)Rq\x02tRq\x03u.",
        ];
        parts.concat()
    }

    fn archive(pickle: &[u8]) -> Vec<u8> {
        let storage: Vec<u8> = (0..7u8).flat_map(|i| f32::from(i).to_le_bytes()).collect();
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, content) in [("a/data.pkl", pickle), ("a/data/0", &storage)] {
            zip.start_file(name, FileOptions::default().compression_method(zip::CompressionMethod::Stored))
                .unwrap();
            zip.write_all(content).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    #[test]
    fn a_dict_of_tensors_is_read() {
        let (named, data) = tensors(&archive(&pickle())).unwrap();
        let [(name, entry)] = &named[..] else { panic!("one tensor") };
        assert_eq!((name.as_str(), entry.dtype, &entry.shape[..]), ("k", Dtype::F32, &[2, 3][..]));
        let values: Vec<f32> = data.as_chunks().0.iter().map(|&word| f32::from_le_bytes(word)).collect();
        assert_eq!(values, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }

    #[test]
    fn code_and_places_outside_are_refused() {
        let replaced = |from: &[u8], to: &[u8]| {
            let pickle = pickle();
            let at = pickle.windows(from.len()).position(|window| window == from).unwrap();
            let changed = [&pickle[..at], to, &pickle[at + from.len()..]].concat();
            tensors(&archive(&changed)).err().unwrap()
        };
        assert!(
            replaced(b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nsystem\n").contains("more than a dict")
        );
        assert!(replaced(b"K\x07tQK\x01", b"K\x07tQK\x02").contains("reaches past"));
        assert!(replaced(b"K\x03K\x01\x86", b"K\x01K\x02\x86").contains("not contiguous"));
        assert!(replaced(b"FloatStorage", b"LongStorage").contains("torch.LongStorage"));
        assert!(tensors(b"\x80\x02}.").err().unwrap().contains("not a zip archive"));
    }

    proptest! {
        #[test]
        fn broken_pickles_are_errors(flips in prop::collection::vec((0usize..200, any::<u8>()), 1..8), cut in 0usize..60) {
            let mut bytes = pickle();
            for (at, byte) in flips {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            bytes.truncate(bytes.len() - cut);
            // A result or an error, never a panic.
            let _ = tensors(&archive(&bytes));
        }
    }
}
