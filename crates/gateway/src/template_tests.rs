//! Templates as published models write them, and hostile ones.

use std::time::UNIX_EPOCH;

use serde_json::json;

use super::*;

fn template(source: &str) -> ChatTemplate {
    let files = ModelFiles {
        tokenizer_config: Some(
            r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}"#.to_owned(),
        ),
        chat_template: Some(source.to_owned()),
        ..ModelFiles::default()
    };
    let limits = RequestLimits { template_bytes: 1000, ..RequestLimits::default() };
    ChatTemplate::new(&files, &limits).expect("parses").expect("is there")
}

fn render(source: &str, messages: &Value) -> Result<String, ApiError> {
    let variables = json!({"style": "short"});
    let rendering = Rendering {
        messages: messages.as_array().expect("a list"),
        add_generation_prompt: true,
        continue_final: false,
        variables: variables.as_object().expect("an object"),
        now: UNIX_EPOCH,
    };
    template(source).render(&rendering, &Marker::random())
}

fn shown(source: &str) -> String {
    let messages = json!([{"role": "user", "content": " <Hi> & 'you' é "}]);
    render(source, &messages).expect("renders")
}

#[test]
fn variables_methods_and_blocks() {
    let source = "{{ bos_token }}{%- for m in messages %}
    {%- if loop.last and m.get('name') is none %}
[{{ m['role'].upper() }}]{{ m.content.strip().split(' ')[0] }}{{ eos_token }}
    {% endif %}
{%- endfor %}{% if add_generation_prompt %}[{{ style }}]{% endif %}";
    assert_eq!(shown(source), "<s>[USER]<Hi></s>\n[short]");
    assert_eq!(shown("{{ strftime_now('%d %b %Y') }}"), "01 Jan 1970");
    assert_eq!(shown("{{ true }} {{ none }} {{ tools is none }}"), "True None True");
}

#[test]
fn tojson_is_pythons() {
    assert_eq!(shown("{{ messages[0].content | tojson }}"), "\" <Hi> & 'you' é \"");
    assert_eq!(shown("{{ {'b': [1, 2.5], 'a': none} | tojson }}"), r#"{"b": [1, 2.5], "a": null}"#);
    assert_eq!(
        shown("{{ {'b': 'é', 'a': []} | tojson(ensure_ascii=true, sort_keys=true) }}"),
        r#"{"a": [], "b": "\u00e9"}"#
    );
    assert_eq!(shown("{{ {'b': [1]} | tojson(indent=2) }}"), "{\n  \"b\": [\n    1\n  ]\n}");
    assert_eq!(shown("{{ {'b': 1} | tojson(separators=(',', ':')) }}"), r#"{"b":1}"#);
}

#[test]
fn generation_tags_do_nothing() {
    let source = "a {%- generation -%} b {% endgeneration %}c{% if true %}d{% endif %}";
    assert_eq!(shown(source), "ab cd");
}

#[test]
fn raised_exceptions_are_the_clients_fault_others_ours() {
    let messages = json!([{"role": "user", "content": "x"}]);
    let raised = render("{{ raise_exception('no ' ~ messages[0].role) }}", &messages);
    let raised = raised.expect_err("raises");
    assert_eq!(raised.status.as_u16(), 400);
    assert_eq!(raised.message, "the chat template says: no user");
    let broken = render("{{ messages[0].content.nothing() }}", &messages).expect_err("fails");
    assert_eq!(broken.status.as_u16(), 500);
}

#[test]
fn steps_and_output_are_limited() {
    let messages = json!([{"role": "user", "content": "x"}]);
    let nest = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
    let steps = render(nest, &messages).expect_err("runs out of fuel");
    assert!(steps.message.contains("steps"), "{steps}");
    let bytes = render("{{ 'x' * 1001 }}", &messages).expect_err("is too long");
    assert!(bytes.message.contains("1000 bytes"), "{bytes}");
    assert_eq!(render("{{ 'x' * 1000 }}", &messages).expect("fits").len(), 1000);
}

#[test]
fn named_templates_and_inline_templates() {
    let config = json!({"chat_template": [
        {"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"},
    ]});
    let files = ModelFiles { tokenizer_config: Some(config.to_string()), ..ModelFiles::default() };
    let limits = RequestLimits::default();
    let template = ChatTemplate::new(&files, &limits).expect("parses").expect("is there");
    let rendering = Rendering {
        messages: &[],
        add_generation_prompt: false,
        continue_final: false,
        variables: &Map::new(),
        now: UNIX_EPOCH,
    };
    assert_eq!(template.render(&rendering, &Marker::random()), Ok("yes".to_owned()));
    assert!(ChatTemplate::new(&ModelFiles::default(), &limits).expect("fine").is_none());
    let broken = ModelFiles { chat_template: Some("{% if %}".into()), ..ModelFiles::default() };
    assert!(ChatTemplate::new(&broken, &limits).is_err());
}

#[test]
fn the_final_message_can_stay_open() {
    let source = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}";
    let messages = [json!({"content": "a"}), json!({"content": " the sky is "})];
    let rendering = Rendering {
        messages: &messages,
        add_generation_prompt: false,
        continue_final: true,
        variables: &Map::new(),
        now: UNIX_EPOCH,
    };
    let text = template(source).render(&rendering, &Marker::random());
    assert_eq!(text, Ok("[a][the sky is".to_owned()));
}
