//! Lists and maps of bodies with a bound on their parts. A part takes some hundred bytes of memory for a few bytes of
//! JSON, so a body within its limit could fill memory without one.

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, SeqAccess, Visitor},
};
use std::{collections::BTreeMap, fmt, marker::PhantomData, ops::Deref};

/// Parts of a list, at most: data or chunks. Clients send 2048.
const LONGEST_LIST: usize = 1 << 14;

/// Fields of a map, at most: inputs or parameters of a loss.
const LARGEST_MAP: usize = 64;

/// A list of at most 16384 parts.
#[derive(Clone, Debug, PartialEq)]
pub struct List<T>(pub Vec<T>);

/// A map of at most 64 fields. Of a name that comes twice the last counts.
#[derive(Clone, Debug, PartialEq)]
pub struct Fields<T>(pub BTreeMap<String, T>);

impl<T> Default for List<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Default for Fields<T> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<T> Deref for List<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T> Deref for Fields<T> {
    type Target = BTreeMap<String, T>;

    fn deref(&self) -> &BTreeMap<String, T> {
        &self.0
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for List<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Parts<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Parts<T> {
            type Value = List<T>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "a list of at most {LONGEST_LIST}")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sent: A) -> Result<List<T>, A::Error> {
                let mut list = Vec::new();
                while let Some(part) = sent.next_element()? {
                    if list.len() == LONGEST_LIST {
                        return Err(A::Error::invalid_length(LONGEST_LIST + 1, &self));
                    }
                    list.push(part);
                }
                Ok(List(list))
            }
        }

        deserializer.deserialize_seq(Parts(PhantomData))
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Fields<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Parts<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Parts<T> {
            type Value = Fields<T>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "an object of at most {LARGEST_MAP} fields")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut sent: A) -> Result<Fields<T>, A::Error> {
                let mut fields = BTreeMap::new();
                while let Some((name, value)) = sent.next_entry()? {
                    fields.insert(name, value);
                    if fields.len() > LARGEST_MAP {
                        return Err(A::Error::invalid_length(fields.len(), &self));
                    }
                }
                Ok(Fields(fields))
            }
        }

        deserializer.deserialize_map(Parts(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{from_value, json};

    #[test]
    fn what_has_too_many_parts_is_refused() {
        assert_eq!(*from_value::<List<u8>>(json!([1, 2])).unwrap(), [1, 2]);
        let error = from_value::<List<u8>>(json!(vec![1; 16385])).unwrap_err().to_string();
        assert_eq!(error, "invalid length 16385, expected a list of at most 16384");
        let map = |fields: usize| json!((0..fields).map(|i| (i.to_string(), i)).collect::<BTreeMap<_, _>>());
        assert_eq!(from_value::<Fields<usize>>(map(64)).unwrap().len(), 64);
        let error = from_value::<Fields<usize>>(map(65)).unwrap_err().to_string();
        assert_eq!(error, "invalid length 65, expected an object of at most 64 fields");
    }
}
