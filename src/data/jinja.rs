//! The template environment that transformers gives chat templates, on minijinja: the same whitespace rules,
//! filters, functions, Python methods and `{% generation %}` blocks.

use super::{
    chat_template::Clock,
    integers::Digits,
    jinja_methods::{self, UNCALLED},
    jinja_values::{python_str, tojson},
};
use minijinja::{
    Environment, Error, ErrorKind, State, Value, escape_formatter,
    syntax::SyntaxConfig,
    value::{Kwargs, ValueKind},
};
use std::{borrow::Cow, cell::Cell};

/// Steps that a template may take to render a chat, 64 bytes of what it makes among them: a second, and 1 GB. Templates
/// of known models take some hundred for a message.
pub(super) const FUEL: u64 = 1 << 24;

/// Name that `{% generation %}` calls; the output of a call block is recorded under this expression.
const GENERATION: &str = "__generation()";

/// Names that are methods of Python's dict where they follow a dot, and never its keys.
const METHODS_OF_DICT: [&str; 11] =
    ["clear", "copy", "fromkeys", "get", "items", "keys", "pop", "popitem", "setdefault", "update", "values"];

thread_local! {
    /// Generation blocks with text that were evaluated on this thread, to notice those whose text was captured.
    static GENERATED: Cell<usize> = const { Cell::new(0) };
}

/// An environment like transformers' sandbox.
pub(super) fn environment(clock: Clock) -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_fuel(Some(FUEL));
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    jinja_methods::add_to(&mut env);
    env.set_formatter(|out, state, value| match value.kind() {
        ValueKind::Number | ValueKind::Seq | ValueKind::Map => Ok(out.write_str(&python_str(value))?),
        _ => escape_formatter(out, state, value),
    });
    env.add_filter("tojson", tojson);
    env.add_filter("string", |value: &Value| python_str(value));
    // As in Jinja2, where whatever has a length and items is a sequence.
    env.add_test("sequence", |value: &Value| {
        value.is_undefined() || matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    env.add_test("iterable", |value: &Value| {
        use ValueKind::{Iterable, Map, Seq, String, Undefined};
        matches!(value.kind(), Seq | String | Map | Iterable | Undefined)
    });
    let is_integer = |value: &Value| value.is_integer() || value.downcast_object_ref::<Digits>().is_some();
    env.add_test("integer", is_integer);
    // Python's True and False are numbers.
    env.add_test("number", move |value: &Value| {
        value.is_number() || value.kind() == ValueKind::Bool || is_integer(value)
    });
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", move |format: String| clock.format(&format));
    env.add_function("__generation", |state: &mut State, kwargs: Kwargs| -> Result<Value, Error> {
        let body = kwargs.get::<Value>("caller")?.call(state, &[])?;
        if !body.to_string().is_empty() {
            GENERATED.set(GENERATED.get() + 1);
        }
        Ok(body)
    });
    Ok(env)
}

/// A rendered template with the byte ranges that its generation blocks wrote.
pub(super) struct Rendered {
    pub text: String,
    pub generated: Vec<std::ops::Range<usize>>,
    /// Some generation block wrote into a captured value, so that its place in the text is not known.
    pub captured: bool,
}

/// Renders template `name` of `env`.
pub(super) fn render(env: &Environment<'_>, name: &str, context: Value) -> Result<Rendered, Error> {
    GENERATED.set(0);
    let template = env.get_template(name)?;
    let (text, spans) = template.render_with_spans(context)?;
    let is_generated =
        |span: &&minijinja::OutputSpan| template.source().get(span.source_range()) == Some(GENERATION);
    let generated: Vec<_> = spans.iter().filter(is_generated).map(|span| span.output_range()).collect();
    let captured = generated.len() != GENERATED.get();
    Ok(Rendered { text, generated, captured })
}

/// Turns `{% generation %}` … `{% endgeneration %}`, which minijinja does not know, into call blocks, which is
/// what transformers' extension makes of them. Has `{% set ns.name = … %}` read `ns`, without which minijinja does
/// not hand the namespace to the block, and `x.items` without a call ask for the method. Whitespace marks stay.
/// Returns whether there were generation blocks.
pub(super) fn rewrite(source: &str) -> (Cow<'_, str>, bool) {
    let mut out = String::new();
    let (mut copied, mut at, mut marked) = (0, 0, false);
    let namespaces = namespaces(source);
    while let Some((start, tag)) = next_tag(source, at) {
        let end = match tag {
            Tag::Comment => end_of(source, start, "#}"),
            Tag::Expression => end_of_code(source, start + 2, "}}"),
            Tag::Block => end_of_code(source, start + 2, "%}"),
        };
        let (code, mut replacement) = (&source[start..end], None);
        at = end;
        if tag == Tag::Block {
            let words = code.trim_start_matches("{%").trim_end_matches("%}").trim_matches(['-', '+']).trim();
            marked |= words == "generation";
            replacement = block(code, words);
            if words == "raw" {
                at = end_of_raw(source, end);
            }
        }
        if tag != Tag::Comment {
            replacement = replacement.or_else(|| uncalled(code, &namespaces));
        }
        if let Some(replacement) = replacement {
            out.push_str(&source[copied..start]);
            out.push_str(&replacement);
            copied = end;
        }
    }
    if copied == 0 {
        return (Cow::Borrowed(source), false);
    }
    out.push_str(&source[copied..]);
    (Cow::Owned(out), marked)
}

/// The block tag `code` that says `words`, as minijinja takes it; `None`: as it is.
fn block(code: &str, words: &str) -> Option<String> {
    let words = match words {
        "generation" => format!(" call {GENERATION} "),
        "endgeneration" => " endcall ".to_owned(),
        words => set_of_namespace(words)?,
    };
    let inner = code.strip_prefix("{%")?;
    let inner = inner.strip_suffix("%}").unwrap_or(inner);
    let mark = |c: Option<char>| c.filter(|c| "+-".contains(*c)).map(String::from).unwrap_or_default();
    let (left, right) = (mark(inner.chars().next()), mark(inner.chars().next_back()));
    Some(format!("{{%{left}{words}{right}%}}"))
}

/// `set ns.name = value` as `set ns.name = [(value), ns][0]`.
fn set_of_namespace(code: &str) -> Option<String> {
    let (target, value) = code.strip_prefix("set")?.split_once('=')?;
    let (namespace, name) = target.strip_prefix(char::is_whitespace)?.split_once('.')?;
    let is_name = |name: &str| {
        let name = name.trim();
        !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '_')
    };
    (is_name(namespace) && is_name(name))
        .then(|| format!(" set{target}= [({value}), {}][0] ", namespace.trim()))
}

/// The variables of a template that are namespaces, whose names may be any.
fn namespaces(source: &str) -> Vec<&str> {
    let before = |(at, _): (usize, &str)| source[..at].trim_end().strip_suffix('=').map(last_name);
    source.match_indices("namespace(").filter_map(before).collect()
}

/// The name at the end of `code`, or nothing.
fn last_name(code: &str) -> &str {
    let code = code.trim_end();
    let start = code.rfind(|c: char| !c.is_alphanumeric() && c != '_');
    start.map_or(code, |at| &code[at + code[at..].chars().next().map_or(0, char::len_utf8)..])
}

/// `code` with `x.items` that is not called as `x.__uncalled('items')`, which refuses a dict: in Python that is the
/// method, whatever keys there are. `None` if there is none.
fn uncalled(code: &str, namespaces: &[&str]) -> Option<String> {
    let (mut out, mut copied, mut quote) = (String::new(), 0, None);
    let mut characters = code.char_indices();
    while let Some((at, c)) = characters.next() {
        match quote {
            Some(_) if c == '\\' => drop(characters.next()),
            Some(open) if c == open => quote = None,
            None if matches!(c, '"' | '\'') => quote = Some(c),
            None if c == '.' => {
                let rest = &code[at + 1..];
                let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                let (name, behind) = rest.split_at(end);
                let is_called = behind.trim_start().starts_with('(');
                if METHODS_OF_DICT.contains(&name)
                    && !is_called
                    && !namespaces.contains(&last_name(&code[..at]))
                {
                    out.push_str(&code[copied..=at]);
                    out.push_str(&format!("{UNCALLED}('{name}')"));
                    copied = at + 1 + end;
                }
            }
            _ => {}
        }
    }
    (copied > 0).then(|| out + &code[copied..])
}

#[derive(PartialEq)]
enum Tag {
    Comment,
    Expression,
    Block,
}

fn next_tag(source: &str, from: usize) -> Option<(usize, Tag)> {
    let bytes = source.as_bytes();
    (from..bytes.len().saturating_sub(1)).find_map(|at| match &bytes[at..at + 2] {
        b"{#" => Some((at, Tag::Comment)),
        b"{{" => Some((at, Tag::Expression)),
        b"{%" => Some((at, Tag::Block)),
        _ => None,
    })
}

/// Just behind the next `close`, or the end.
fn end_of(source: &str, from: usize, close: &str) -> usize {
    source[from..].find(close).map_or(source.len(), |offset| from + offset + close.len())
}

/// As [`end_of`], skipping string literals.
fn end_of_code(source: &str, from: usize, close: &str) -> usize {
    let bytes = source.as_bytes();
    let mut quote = None;
    let mut at = from;
    while at < bytes.len() {
        match (quote, bytes[at]) {
            (Some(_), b'\\') => at += 1,
            (Some(open), byte) if byte == open => quote = None,
            (None, byte @ (b'"' | b'\'')) => quote = Some(byte),
            (None, _) if bytes[at..].starts_with(close.as_bytes()) => return at + close.len(),
            _ => {}
        }
        at += 1;
    }
    source.len()
}

/// Just behind the `{% endraw %}` that closes a raw block.
fn end_of_raw(source: &str, from: usize) -> usize {
    let mut at = from;
    while let Some(offset) = source[at..].find("{%") {
        let end = end_of(source, at + offset, "%}");
        let inner = source[at + offset + 2..end].trim_end_matches("%}");
        if inner.trim_matches(['-', '+']).trim() == "endraw" {
            return end;
        }
        at += offset + 2;
    }
    source.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn generation_tags_become_call_blocks_and_keep_their_whitespace_marks() {
        let (text, found) = rewrite("a {%- generation -%} b {% endgeneration +%}\nc");
        assert!(found);
        assert_eq!(text, "a {%- call __generation() -%} b {% endcall +%}\nc");
    }

    #[test]
    fn methods_that_are_not_called_are_asked_for() {
        let source = "{% set ns = namespace(items=[]) %}{% for k, v in a.b.items %}{{ x['y'].keys | list }}{% endfor %}";
        let (text, _) = rewrite(source);
        assert_eq!(
            text,
            "{% set ns = namespace(items=[]) %}{% for k, v in a.b.__uncalled('items') %}{{ x['y'].__uncalled('keys') | \
             list }}{% endfor %}"
        );
        for source in [
            "{% set ns = namespace() %}{% set ns.items = 1 %}{{ ns.items }}",
            "{{ a.items() }}{{ a.items () }}{{ a['items'] }}{{ 'b.items' }}{{ a.itemset }}{{ a|map(attribute='b.items') }}",
            "a.items {# a.items #}{% raw %}{{ a.items }}{% endraw %}",
        ] {
            let kept = rewrite(source).0.replace("[( 1), ns][0] ", "1 ");
            assert_eq!(kept, source);
        }
    }

    #[test]
    fn what_python_would_print_otherwise_is_refused_with_a_remedy() {
        let told = |source: &str| {
            let mut env = environment(Clock::Fixed(0)).unwrap();
            env.add_template_owned("t", rewrite(source).0.into_owned()).unwrap();
            let message = serde_json::json!({"items": [1], "text": "x"});
            let message = Value::from(minijinja::value::Serde(&message));
            let rendered = render(&env, "t", minijinja::context! { m => message });
            rendered
                .map(|rendered| rendered.text)
                .map_err(|error| error.detail().unwrap_or_default().to_owned())
        };
        assert!(told("{{ m.items }}").unwrap_err().contains("write `.items()`, or `['items']`"));
        assert!(told("{% for k in m.keys %}{{ k }}{% endfor %}").unwrap_err().contains("write `.keys()`"));
        assert!(told("{{ m | pprint }}").unwrap_err().contains("write tojson"));
        assert_eq!(told("{{ m['items'] }}{{ m.items() | length }}{{ m.text }}"), Ok("[1]2x".to_owned()));
        assert_eq!(told("{% set ns = namespace(items=2) %}{{ ns.items }}"), Ok("2".to_owned()));
    }

    #[test]
    fn what_only_looks_like_a_generation_tag_stays() {
        let (text, found) =
            rewrite("{%- set ns.a = b.c == 1 -%}{% set ns . d='%}' %}{% set x = ns.a %}{% set a, b = c.d %}");
        assert_eq!(
            text,
            "{%- set ns.a = [( b.c == 1), ns][0] -%}{% set ns . d= [('%}'), ns][0] %}{% set x = ns.a %}{% set a, b = c.d %}"
        );
        assert!(!found);
        for source in [
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{% set x = \"{% generation %}\\\" %}\" %}",
            "{% raw %}{% generation %}{% endraw %}",
            "{% generations %} {%",
            "{% raw %} {{ ' {% ",
        ] {
            assert_eq!(rewrite(source), (Cow::Borrowed(source), false));
        }
        let (text, found) = rewrite("{%- raw %}{{ '{%- endraw -%}{% generation %}");
        assert!(found && text.ends_with("{% call __generation() %}"), "{text}");
    }

    #[test]
    fn spans_of_generation_blocks_are_found_without_marks_in_the_text() {
        let source = "{% for m in ms %}<{{ m }}>\n  {% generation %}\n{{ m }}{{ loop.index }}!{% endgeneration %}\n{% endfor %}";
        let mut env = environment(Clock::Fixed(0)).unwrap();
        env.add_template_owned("t", rewrite(source).0.into_owned()).unwrap();
        let rendered = render(&env, "t", minijinja::context! { ms => ["aé", "b", ""] }).unwrap();
        assert_eq!(rendered.text, "<aé>\naé1!<b>\nb2!<>\n3!");
        let texts: Vec<&str> = rendered.generated.iter().map(|range| &rendered.text[range.clone()]).collect();
        assert_eq!(texts, ["aé1!", "b2!", "3!"]);
        assert!(!rendered.captured);
    }

    #[test]
    fn generation_blocks_see_and_change_namespaces() {
        let source = "{% set ns = namespace(n=0) %}{% for m in ms %}{% generation %}{% set ns.n = loop.index %}{{ m }}{% endgeneration %}{{ ns.n }}{% endfor %}";
        let mut env = environment(Clock::Fixed(0)).unwrap();
        env.add_template_owned("t", rewrite(source).0.into_owned()).unwrap();
        let rendered = render(&env, "t", minijinja::context! { ms => ["a", "b"] }).unwrap();
        assert_eq!((rendered.text.as_str(), rendered.generated), ("a1b2", vec![0..1, 2..3]));
    }

    #[test]
    fn captured_generation_blocks_are_noticed() {
        let source = "{% set x %}a{% generation %}b{% endgeneration %}{% endset %}{{ x }}";
        let mut env = environment(Clock::Fixed(0)).unwrap();
        env.add_template_owned("t", rewrite(source).0.into_owned()).unwrap();
        assert!(render(&env, "t", Value::UNDEFINED).unwrap().captured);
    }

    proptest! {
        #[test]
        fn no_source_makes_the_rewriting_panic(source in "([{}%#'\"\\\\ é+-]|raw|endraw|generation|endgeneration){0,30}") {
            let _ = rewrite(&source);
        }
    }
}
