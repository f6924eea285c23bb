//! Python's `json.dumps(value, ensure_ascii=False, …)` as a filter, for templates that show tools: models saw exactly its
//! spelling in training.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// Nesting of a value. JSON that came in with a request has at most 128.
const DEPTH_MAX: usize = 256;

/// How it is laid out.
struct Layout {
    /// One level of indentation; `None` writes one line.
    indent: Option<String>,
    between_items: String,
    after_name: String,
    sort_keys: bool,
    ensure_ascii: bool,
}

/// The filter `tojson`.
pub(super) fn tojson(value: &Value, indent: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => kwargs.get("indent")?,
    };
    let indent = indent.filter(|indent| !indent.is_none() && !indent.is_undefined());
    let indent = indent.map(|indent| match indent.as_str() {
        Some(text) => text.to_owned(),
        None => " ".repeat(usize::try_from(indent.as_i64().unwrap_or(0).clamp(0, 64)).unwrap_or(0)),
    });
    let separators: Option<Value> = kwargs.get("separators")?;
    let separators = separators.filter(|separators| !separators.is_none());
    let separator = |at: usize, usual: &str| {
        let given = separators.as_ref().and_then(|both| both.get_item_by_index(at).ok());
        given
            .and_then(|text| text.as_str().map(str::to_owned))
            .unwrap_or_else(|| usual.to_owned())
    };
    let layout = Layout {
        between_items: separator(0, if indent.is_some() { "," } else { ", " }),
        after_name: separator(1, ": "),
        indent,
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    let mut out = String::new();
    write(value, &layout, 0, &mut out)?;
    Ok(Value::from(out))
}

fn write(value: &Value, layout: &Layout, depth: usize, out: &mut String) -> Result<(), Error> {
    if depth > DEPTH_MAX {
        return Err(Error::new(ErrorKind::BadSerialization, "tojson: nested too deeply"));
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => number(value, out),
        ValueKind::String => string(value.as_str().unwrap_or_default(), layout, out),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            group('[', ']', items.len(), layout, depth, out, |at, out| {
                write(&items[at], layout, depth + 1, out)
            })?;
        }
        ValueKind::Map => {
            let mut names: Vec<Value> = value.try_iter()?.collect();
            if layout.sort_keys {
                names.sort_by_key(Value::to_string);
            }
            group('{', '}', names.len(), layout, depth, out, |at, out| {
                string(&names[at].to_string(), layout, out);
                out.push_str(&layout.after_name);
                write(&value.get_item(&names[at])?, layout, depth + 1, out)
            })?;
        }
        kind => {
            let message = format!("tojson: a value of kind {kind} is not JSON");
            return Err(Error::new(ErrorKind::BadSerialization, message));
        }
    }
    Ok(())
}

fn group(
    open: char,
    close: char,
    len: usize,
    layout: &Layout,
    depth: usize,
    out: &mut String,
    mut item: impl FnMut(usize, &mut String) -> Result<(), Error>,
) -> Result<(), Error> {
    out.push(open);
    let line = |depth: usize, out: &mut String| {
        if let Some(indent) = &layout.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    };
    for at in 0..len {
        if at > 0 {
            out.push_str(&layout.between_items);
        }
        line(depth + 1, out);
        item(at, out)?;
    }
    if len > 0 {
        line(depth, out);
    }
    out.push(close);
    Ok(())
}

/// As Python's `repr`: an integral float keeps its `.0`, large and small ones have an exponent of at least two digits.
fn number(value: &Value, out: &mut String) {
    if value.is_integer() {
        out.push_str(&value.to_string());
        return;
    }
    let float = f64::try_from(value.clone()).unwrap_or_default();
    let size = float.abs();
    if float.is_nan() {
        out.push_str("NaN");
    } else if float.is_infinite() {
        out.push_str(if float > 0.0 { "Infinity" } else { "-Infinity" });
    } else if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{float:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(exponent) => ('-', exponent),
            None => ('+', exponent),
        };
        out.push_str(&format!("{digits}e{sign}{exponent:0>2}"));
    } else {
        out.push_str(&format!("{float:?}"));
    }
}

fn string(text: &str, layout: &Layout, out: &mut String) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            control if control < ' ' => out.push_str(&format!("\\u{:04x}", control as u32)),
            wide if layout.ensure_ascii && !wide.is_ascii() => {
                let mut units = [0; 2];
                let units = wide.encode_utf16(&mut units);
                units.iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
            }
            plain => out.push(plain),
        }
    }
    out.push('"');
}
