//! Calls as the OpenAPI document describes them: each wire gives a [`Described`] for every call that it answers.

use axum::http::Method;
use utoipa::{
    ToSchema,
    openapi::{
        AllOf, Object, Ref, RefOr, Schema,
        schema::{AnyOf, SchemaType, Type},
    },
};

/// A call of a client.
pub struct Described {
    pub method: Method,
    /// `/api/v1/create_model`
    pub path: String,
    /// Its effect, as a sentence.
    pub about: &'static str,
    pub query: &'static [QueryField],
    /// The body of a POST or PUT.
    pub body: Option<Shape>,
    /// The body of the answer; `None`: there is none, by 204.
    pub reply: Option<Shape>,
}

/// A parameter in the query of a GET. All may be left out.
#[derive(Clone, Copy, Debug)]
pub struct QueryField {
    pub name: &'static str,
    pub about: &'static str,
    pub is_integer: bool,
}

/// The schema of a body, with those that it names.
pub struct Shape {
    pub schema: RefOr<Schema>,
    /// By name.
    pub parts: Vec<(String, RefOr<Schema>)>,
    /// True: a message of protobuf may come in place of the JSON.
    pub has_protobuf: bool,
}

impl Shape {
    pub fn of<T: ToSchema>() -> Self {
        let mut parts = vec![(T::name().into_owned(), T::schema())];
        T::schemas(&mut parts);
        Self { schema: Ref::from_schema_name(T::name()).into(), parts, has_protobuf: false }
    }

    /// A body of one schema that names no other.
    pub fn alone(schema: impl Into<RefOr<Schema>>) -> Self {
        Self { schema: schema.into(), parts: Vec::new(), has_protobuf: false }
    }

    /// This, or a message of protobuf in its place.
    pub fn or_protobuf(self) -> Self {
        Self { has_protobuf: true, ..self }
    }

    /// A body that is this and `other` at once.
    pub fn and(mut self, other: Self) -> Self {
        self.parts.extend(other.parts);
        let schema = AllOf::builder().item(self.schema).item(other.schema).into();
        Self { schema, ..self }
    }

    /// A body that is any of `shapes`.
    pub fn any_of(shapes: impl IntoIterator<Item = Self>) -> Self {
        let (mut any, mut parts, mut has_protobuf) = (AnyOf::builder(), Vec::new(), false);
        for shape in shapes {
            any = any.item(shape.schema);
            parts.extend(shape.parts);
            has_protobuf |= shape.has_protobuf;
        }
        Self { schema: any.into(), parts, has_protobuf }
    }

    /// A body that has at least one of `fields`, of these types.
    pub fn with_any(self, fields: &[(&str, Type)]) -> Self {
        let has = |(name, kind): &(&str, Type)| {
            let field = Object::with_type(SchemaType::from(kind.clone()));
            Object::builder().property(*name, field).required(*name).build()
        };
        let any = fields.iter().fold(AnyOf::builder(), |any, field| any.item(has(field)));
        self.and(Self::alone(any))
    }
}
