//! The description as one page of HTML: no scripts, nothing fetched. Made from the document alone.

use serde_json::Value as Json;

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1b1f;background:#fff}\
code{font:14px ui-monospace,monospace}h2{margin-top:3rem;text-transform:capitalize}details{border:1px solid #d5d5dc;border-radius:6px;margin:.4rem 0;padding:.4rem .8rem}\
summary{cursor:pointer}b{display:inline-block;min-width:4rem}table{border-collapse:collapse;width:100%}td{border-top:1px solid #e6e6ea;padding:.25rem .5rem;vertical-align:top}\
@media(prefers-color-scheme:dark){body{color:#e4e4e8;background:#16161a}details{border-color:#3a3a42}td{border-color:#2c2c33}}";

/// Renders the document.
pub(super) fn render(document: &Json) -> String {
    let mut html = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>baton: the API</title><style>{STYLE}</style><h1>baton</h1><p>{}</p>\
         <p>For programs: <a href=\"/openapi.json\">openapi.json</a>. Keys go into <code>Authorization: Bearer KEY</code> \
         or <code>x-api-key: KEY</code>.</p>",
        escaped(text(&document["info"]["description"]))
    );
    for tag in ["inference", "reading", "administration", "health"] {
        html += &format!("<h2>{tag}</h2>");
        for (path, operations) in document["paths"].as_object().into_iter().flatten() {
            for (method, operation) in operations.as_object().into_iter().flatten() {
                if operation["tags"][0] == tag {
                    one(method, path, operation, &mut html);
                }
            }
        }
    }
    html
}

fn one(method: &str, path: &str, operation: &Json, html: &mut String) {
    *html += &format!(
        "<details><summary><b>{}</b> <code>{}</code> {}</summary>",
        escaped(&method.to_uppercase()),
        escaped(path),
        escaped(text(&operation["summary"]))
    );
    let parameters = operation["parameters"].as_array();
    let mut rows = String::new();
    for parameter in parameters.into_iter().flatten() {
        row(text(&parameter["name"]), text(&parameter["in"]), "", &mut rows);
    }
    let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
    let required: Vec<&str> = schema["required"].as_array().into_iter().flatten().map(text).collect();
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let kind = kind(field)
            + if required.contains(&name.as_str()) {
                ", needed"
            } else {
                ""
            };
        row(name, &kind, text(&field["description"]), &mut rows);
    }
    if !rows.is_empty() {
        *html += &format!("<table>{rows}</table>");
    }
    for example in schema["examples"].as_array().into_iter().flatten() {
        *html += &format!("<p>For example <code>{}</code></p>", escaped(&example.to_string()));
    }
    let statuses: Vec<&str> = operation["responses"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(status, _)| status.as_str())
        .collect();
    *html += &format!("<p>Answers: {}.</p></details>", escaped(&statuses.join(", ")));
}

fn row(name: &str, kind: &str, about: &str, rows: &mut String) {
    let (name, kind, about) = (escaped(name), escaped(kind), escaped(about));
    *rows += &format!("<tr><td><code>{name}</code><td>{kind}<td>{about}");
}

fn kind(schema: &Json) -> String {
    match &schema["type"] {
        Json::String(kind) => kind.clone(),
        Json::Array(kinds) => kinds.iter().map(text).collect::<Vec<_>>().join(" or "),
        _ => String::from("any"),
    }
}

fn text(value: &Json) -> &str {
    value.as_str().unwrap_or_default()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn nothing_in_the_document_becomes_markup() {
        let operation = json!({"summary": "<script>", "tags": ["inference"], "responses": {"200": {}},
            "requestBody": {"content": {"application/json": {"schema": {"properties": {"<b>": {"type": ["string", "null"]}}}}}}});
        let page = render(&json!({"info": {"description": "d"}, "paths": {"/x": {"post": operation}}}));
        assert!(!page.contains("<script>") && page.contains("&lt;script&gt;") && page.contains("string or null"));
    }
}
