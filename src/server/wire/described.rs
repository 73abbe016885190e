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
    /// The body of a POST.
    pub body: Option<Shape>,
    /// The body of the answer.
    pub reply: Shape,
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
}

impl Shape {
    pub fn of<T: ToSchema>() -> Self {
        let mut parts = vec![(T::name().into_owned(), T::schema())];
        T::schemas(&mut parts);
        Self { schema: Ref::from_schema_name(T::name()).into(), parts }
    }

    /// A body that is this and `other` at once.
    pub fn and(mut self, other: Self) -> Self {
        self.parts.extend(other.parts);
        let schema = AllOf::builder().item(self.schema).item(other.schema).into();
        Self { schema, parts: self.parts }
    }

    /// A body that is any of `shapes`.
    pub fn any_of(shapes: impl IntoIterator<Item = Self>) -> Self {
        let (mut any, mut parts) = (AnyOf::builder(), Vec::new());
        for shape in shapes {
            any = any.item(shape.schema);
            parts.extend(shape.parts);
        }
        Self { schema: any.into(), parts }
    }

    /// A body that has at least one of `fields`, of these types.
    pub fn with_any(self, fields: &[(&str, Type)]) -> Self {
        let has = |(name, kind): &(&str, Type)| {
            let field = Object::with_type(SchemaType::from(kind.clone()));
            Object::builder().property(*name, field).required(*name).build()
        };
        let any = fields.iter().fold(AnyOf::builder(), |any, field| any.item(has(field)));
        self.and(Self { schema: any.into(), parts: Vec::new() })
    }
}
