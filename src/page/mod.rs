//! Style, curves and nodes of the pages for browsers: the server's, which sends them as files, and the report's, which
//! has them inside.

/// Colours, panels, tables and forms.
pub const STYLE: &str = include_str!("style.css");
/// Curves as SVG (`curves.js`), a module that imports [`NODES`].
pub const CURVES: &str = include_str!("curves.js");
/// Nodes of a page, and words for its numbers (`nodes.js`).
pub const NODES: &str = include_str!("nodes.js");
/// The choice of light and dark (`theme.js`).
pub const THEME: &str = include_str!("theme.js");
