//! Declaration of a section, one line a field. The struct field with its doc comment, default, help, schema, reading
//! and writing follow from it.

use super::error::Issues;
use super::source::Node;

/// The entry of a field in help and schema.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldInfo {
    /// Its name in the file, without the section.
    pub key: &'static str,
    /// Its type and range, `number > 0`.
    pub type_name: String,
    /// Its default, as YAML.
    pub default: String,
    /// Its meaning, in one or more sentences.
    pub meaning: String,
}

/// A section of the configuration, seen by its field names.
pub(super) trait Section {
    /// All fields in the order of declaration, with the defaults of the type.
    fn fields(&self) -> Vec<FieldInfo>;

    /// Sets the field `key`. `false`: there is none of that name.
    fn set(&mut self, key: &str, node: &Node) -> Result<bool, Issues>;
}

/// Doc comment lines as running text.
pub(super) fn meaning(lines: &[&str]) -> String {
    lines.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
}

/// Declares a struct whose every line is `/// meaning`, `name [as "key"]: type = default [=> rule];`. A line
/// `..name: type;` stands for the fields of another section, among its own.
macro_rules! section {
    (
        $(#[doc = $struct_doc:literal])+
        pub struct $name:ident {
            $(
                $(#[doc = $doc:literal])+
                $field:ident $(as $key:literal)? : $ty:ty = $default:expr $(=> $rule:ident)? ;
            )*
            $(
                ..$part:ident : $part_ty:ty ;
                $(
                    $(#[doc = $later_doc:literal])+
                    $later:ident $(as $later_key:literal)? : $later_ty:ty = $later_default:expr
                        $(=> $later_rule:ident)? ;
                )*
            )*
        }
    ) => {
        $(#[doc = $struct_doc])+
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(default)]
        pub struct $name {
            $( $(#[doc = $doc])+ $(#[serde(rename = $key)])? pub $field: $ty, )*
            $(
                #[doc = concat!("The fields of [`", stringify!($part_ty), "`].")]
                #[serde(flatten)]
                pub $part: $part_ty,
                $( $(#[doc = $later_doc])+ $(#[serde(rename = $later_key)])? pub $later: $later_ty, )*
            )*
        }

        impl Default for $name {
            fn default() -> Self {
                Self {
                    $( $field: $default, )*
                    $( $part: <$part_ty>::default(), $( $later: $later_default, )* )*
                }
            }
        }

        impl $crate::config::section::Section for $name {
            fn fields(&self) -> Vec<$crate::config::section::FieldInfo> {
                let defaults = Self::default();
                let parts = [
                    vec![$( $crate::config::section::info!(
                        [$($doc),+] defaults $field [$($key)?] $ty [$($rule)?]
                    ), )*],
                    $(
                        $crate::config::section::Section::fields(&defaults.$part),
                        vec![$( $crate::config::section::info!(
                            [$($later_doc),+] defaults $later [$($later_key)?] $later_ty [$($later_rule)?]
                        ), )*],
                    )*
                ];
                parts.concat()
            }

            fn set(
                &mut self,
                key: &str,
                node: &$crate::config::source::Node,
            ) -> Result<bool, $crate::config::error::Issues> {
                $( $crate::config::section::read!(self key node $field [$($key)?] $ty [$($rule)?]); )*
                $(
                    if $crate::config::section::Section::set(&mut self.$part, key, node)? {
                        return Ok(true);
                    }
                    $( $crate::config::section::read!(
                        self key node $later [$($later_key)?] $later_ty [$($later_rule)?]
                    ); )*
                )*
                Ok(false)
            }
        }
    };
}

/// The entry of a field in help and schema.
macro_rules! info {
    ([$($doc:literal),+] $defaults:ident $field:ident [$($key:literal)?] $ty:ty [$($rule:ident)?]) => {{
        use $crate::config::value::Value;
        $crate::config::section::FieldInfo {
            key: $crate::config::section::key!($field $($key)?),
            type_name: <$ty>::describe($crate::config::section::rule!($($rule)?)).short,
            default: $defaults.$field.write(),
            meaning: $crate::config::section::meaning(&[$($doc),+]),
        }
    }};
}

/// Reads a field and returns from `set`, if `key` is its name.
macro_rules! read {
    ($me:ident $given:ident $node:ident $field:ident [$($key:literal)?] $ty:ty [$($rule:ident)?]) => {
        if $given == $crate::config::section::key!($field $($key)?) {
            use $crate::config::value::Value;
            $me.$field = <$ty>::read($node, $crate::config::section::rule!($($rule)?))?;
            return Ok(true);
        }
    };
}

/// The name of a field in the file.
macro_rules! key {
    ($field:ident) => {
        stringify!($field)
    };
    ($field:ident $key:literal) => {
        $key
    };
}

/// The rule of a field.
macro_rules! rule {
    () => {
        $crate::config::value::Rule::Any
    };
    ($rule:ident) => {
        $crate::config::value::Rule::$rule
    };
}

pub(super) use {info, key, read, rule, section};
