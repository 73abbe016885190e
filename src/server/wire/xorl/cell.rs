//! Fields of data: numbers as a list, a list of lists, or `{data, dtype, shape}`. They are read without a tree of JSON,
//! which takes many times the bytes of the text.

use crate::server::{fault::Fault, wire::scalar::LARGEST_WHOLE};
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use std::{borrow::Cow, fmt};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{
        Array, Object, RefOr, Schema,
        schema::{AnyOf, SchemaType, Type},
    },
};

/// A field of a datum or row: numbers as a list, a list of lists or `{data, dtype, shape}`, or something else.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    Numbers { values: Vec<f64>, shape: Vec<usize> },
    Other,
}

/// An element of a list in a [`Cell`].
enum Element {
    Number(f64),
    List(Vec<f64>),
    Other,
}

struct CellVisitor;
struct ElementVisitor;

impl<'de> Visitor<'de> for CellVisitor {
    type Value = Cell;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a list of numbers, a list of lists, or {data, dtype, shape}")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Cell, A::Error> {
        let (mut values, mut rows, mut width, mut is_whole) = (Vec::new(), 0, None, true);
        while let Some(element) = elements.next_element()? {
            rows += 1;
            let found = match element {
                Element::Number(number) => {
                    values.push(number);
                    None
                }
                Element::List(list) => {
                    values.extend_from_slice(&list);
                    Some(list.len())
                }
                Element::Other => {
                    is_whole = false;
                    continue;
                }
            };
            is_whole &= *width.get_or_insert(found) == found;
        }
        let shape = [rows].into_iter().chain(width.flatten()).collect();
        Ok(if is_whole { Cell::Numbers { values, shape } } else { Cell::Other })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Cell, A::Error> {
        let (mut data, mut given) = (Cell::Other, None::<Vec<usize>>);
        while let Some(name) = fields.next_key::<String>()? {
            match name.as_str() {
                "data" => data = fields.next_value()?,
                "shape" => given = fields.next_value()?,
                _ => drop(fields.next_value::<IgnoredAny>()?),
            }
        }
        let product = |shape: &[usize]| shape.iter().try_fold(1_usize, |all, &size| all.checked_mul(size));
        Ok(match (data, given) {
            (Cell::Numbers { values, .. }, Some(shape)) if product(&shape) == Some(values.len()) => {
                Cell::Numbers { values, shape }
            }
            (_, Some(_)) => Cell::Other,
            (data, None) => data,
        })
    }

    fn visit_bool<E>(self, _: bool) -> Result<Cell, E> {
        Ok(Cell::Other)
    }
    fn visit_i64<E>(self, _: i64) -> Result<Cell, E> {
        Ok(Cell::Other)
    }
    fn visit_u64<E>(self, _: u64) -> Result<Cell, E> {
        Ok(Cell::Other)
    }
    fn visit_f64<E>(self, _: f64) -> Result<Cell, E> {
        Ok(Cell::Other)
    }
    fn visit_str<E>(self, _: &str) -> Result<Cell, E> {
        Ok(Cell::Other)
    }
    fn visit_unit<E>(self) -> Result<Cell, E> {
        Ok(Cell::Other)
    }
}

impl<'de> Visitor<'de> for ElementVisitor {
    type Value = Element;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a number or a list of numbers")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Element, A::Error> {
        let (mut list, mut is_whole) = (Vec::new(), true);
        while let Some(element) = elements.next_element()? {
            match element {
                Element::Number(number) => list.push(number),
                _ => is_whole = false,
            }
        }
        Ok(if is_whole { Element::List(list) } else { Element::Other })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Element, A::Error> {
        while fields.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Element::Other)
    }

    fn visit_bool<E>(self, flag: bool) -> Result<Element, E> {
        Ok(Element::Number(f64::from(u8::from(flag))))
    }
    fn visit_i64<E>(self, number: i64) -> Result<Element, E> {
        Ok(Element::Number(number as f64))
    }
    fn visit_u64<E>(self, number: u64) -> Result<Element, E> {
        Ok(Element::Number(number as f64))
    }
    fn visit_f64<E>(self, number: f64) -> Result<Element, E> {
        Ok(Element::Number(number))
    }
    fn visit_str<E>(self, _: &str) -> Result<Element, E> {
        Ok(Element::Other)
    }
    fn visit_unit<E>(self) -> Result<Element, E> {
        Ok(Element::Other)
    }
}

impl<'de> Deserialize<'de> for Cell {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(CellVisitor)
    }
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ElementVisitor)
    }
}

impl PartialSchema for Cell {
    fn schema() -> RefOr<Schema> {
        let of = |kind| Object::with_type(SchemaType::Type(kind));
        let (list, sizes) = (|| Array::new(of(Type::Number)), Array::new(of(Type::Integer)));
        let tensor = Object::builder()
            .property("data", list())
            .property("dtype", of(Type::String))
            .property("shape", sizes)
            .required("data");
        let any = AnyOf::builder().item(list()).item(Array::new(list())).item(tensor);
        any.description(Some("Numbers as a list, a list of lists, or with a shape.")).into()
    }
}

impl ToSchema for Cell {
    fn name() -> Cow<'static, str> {
        "xorl.Numbers".into()
    }
}

impl Cell {
    /// Numbers in it.
    pub fn count(&self) -> usize {
        if let Self::Numbers { values, .. } = self { values.len() } else { 0 }
    }

    /// The numbers, with the shape.
    pub fn numbers(&self, at: &str) -> Result<(&[f64], &[usize]), Fault> {
        match self {
            Self::Numbers { values, shape } => Ok((values, shape)),
            Self::Other => Err(Fault::user(format!(
                "{at}: expected a list of numbers, or {{data, dtype, shape}} with as many numbers as the shape says"
            ))),
        }
    }

    /// Whole numbers.
    pub fn integers(&self, at: &str) -> Result<Vec<i64>, Fault> {
        let (values, _) = self.numbers(at)?;
        let integer = |(i, &value): (usize, &f64)| {
            let is_whole = value.fract() == 0.0 && value.abs() < LARGEST_WHOLE;
            is_whole
                .then_some(value as i64)
                .ok_or_else(|| Fault::user(format!("{at}[{i}]: expected an integer, got {value}")))
        };
        values.iter().enumerate().map(integer).collect()
    }
}
