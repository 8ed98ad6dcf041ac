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
        tools: &[],
        add_generation_prompt: true,
        continue_final: false,
        variables: variables.as_object().expect("an object"),
        now: UNIX_EPOCH,
    };
    template(source).render(&rendering)
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
    for source in ["{{ raise_exception('no users') }}", "{{ raise_exception(\"no users\") }}"] {
        let raised = render(source, &messages).expect_err("raises");
        assert_eq!(raised.status.as_u16(), 400);
        assert_eq!(raised.message, "the chat template says: no users");
    }
    let role = "{{ raise_exception('no ' ~ messages[0].role) }}";
    let raised = render(role, &messages).expect_err("raises");
    assert_eq!(raised.message, "the chat template says: no user");
    let broken = render("{{ messages[0].content.nothing() }}", &messages).expect_err("fails");
    assert_eq!(broken.status.as_u16(), 500);
}

#[test]
fn raised_messages_with_a_part_of_the_prompt_are_not_shown() {
    for content in ["secret", "s", "users"] {
        let messages = json!([{"role": "user", "content": content}]);
        for shown in ["messages[0].content", "messages[0].content | upper", "'no ' ~ messages"] {
            let source = format!("{{{{ raise_exception('no ' ~ {shown}) }}}}");
            let raised = render(&source, &messages).expect_err("raises");
            assert_eq!(raised.message, "the chat template refused the messages");
        }
    }
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
        tools: &[],
        add_generation_prompt: false,
        continue_final: false,
        variables: &Map::new(),
        now: UNIX_EPOCH,
    };
    assert_eq!(template.render(&rendering), Ok("yes".to_owned()));
    assert!(ChatTemplate::new(&ModelFiles::default(), &limits).expect("fine").is_none());
    let broken = ModelFiles { chat_template: Some("{% if %}".into()), ..ModelFiles::default() };
    let named = |files: &ModelFiles| {
        let refused = ChatTemplate::new(files, &limits).map(|_| ());
        refused.expect_err("is broken").to_string()
    };
    assert!(named(&broken).contains("chat_template.jinja"));
    let inline = r#"{"chat_template": "{% if %}"}"#.to_owned();
    let broken = ModelFiles { tokenizer_config: Some(inline), ..ModelFiles::default() };
    assert!(named(&broken).contains("tokenizer_config.json"));
}

#[test]
fn the_final_message_can_stay_open() {
    let source = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}";
    let messages = [json!({"content": "a"}), json!({"content": " the sky is "})];
    let rendering = Rendering {
        messages: &messages,
        tools: &[],
        add_generation_prompt: false,
        continue_final: true,
        variables: &Map::new(),
        now: UNIX_EPOCH,
    };
    let text = template(source).render(&rendering);
    assert_eq!(text, Ok("[a][the sky is".to_owned()));
}

/// Each would take gigabytes, or for ever, without a bound of its own.
#[test]
fn no_step_makes_a_huge_value() {
    let messages = json!([{"role": "user", "content": "x"}]);
    let shared = "{% set n = namespace(l=['x']) %}\
                  {% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}";
    let steps = [
        "{{ '{:>99999999999}'.format('x') }}",
        "{{ '{:.99999999999f}'.format(1.5) }}",
        "{{ '{0:>{1}}'.format('x', 99999999999) }}",
        "{{ '%99999999999d' | format(1) }}",
        "{{ '%.99999999999f' | format(1.5) }}",
        "{{ ('{0}' * 1000000).format('x' * 1000000) }}",
        "{{ ('%(a)s' * 1000000) | format(a='x' * 1000000) }}",
        "{{ 'x' | indent(99999999999, true) }}",
        "{{ 'x' | indent(width=99999999999, first=true) }}",
        "{{ ('x' * 1000000) | replace('x', 'y' * 1000000) }}",
        "{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}",
        "{{ ''.join(['x' * 1000000] * 1000000) }}",
        "{{ ['x' * 1000000] * 1000000 | join }}",
        "{{ (['x' * 1000000] * 1000000) | join }}",
        "{{ (['x' * 1000000] * 1000000) | string }}",
        "{{ (['x' * 1000000] * 1000000) | upper }}",
        "{{ (['x' * 1000000] * 1000000) | tojson }}",
        "{{ (['x' * 1000000] * 1000000) | sum(start='') }}",
        "{{ ('x' * 10000000) | split('x') | length }}",
        "{{ ('x' * 10000000).split('x') | length }}",
        "{{ ('x' * 1000000000000) }}",
        "{{ raise_exception(['x' * 1000000] * 1000000) }}",
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}\
         {% endfor %}",
        &format!("{shared}{{{{ n.l | tojson }}}}"),
        &format!("{shared}{{{{ n.l | string }}}}"),
        &format!("{shared}{{{{ ''.join(n.l) }}}}"),
        &format!("{shared}{{{{ '{{}}'.format(n.l) }}}}"),
        &format!("{shared}{{{{ n.l }}}}"),
    ];
    for source in steps {
        let refused = render(source, &messages).map(|text| text.len());
        assert!(refused.is_err(), "{source}: {refused:?}");
    }
}

#[test]
fn guarded_filters_and_methods_still_do_their_work() {
    assert_eq!(shown("{{ '{:>4}|{a}|{}'.format('x', [1], a=2) }}"), "   x|2|[1]");
    assert_eq!(shown("{{ '%s-%03d' | format('x', 7) }}"), "x-007");
    assert_eq!(
        shown("{{ 'a\nb' | indent(2, true) }}{{ 'a\nb' | indent(width=1) }}"),
        "  a\n  ba\n b"
    );
    assert_eq!(
        shown("{{ 'aab' | replace('a', 'xy') }}{{ 'aab'.replace('a', 'c', 1) }}"),
        "xyxybcab"
    );
    assert_eq!(shown("{{ [1, 'b'] | join('-') }}{{ '+'.join(['a', 'b']) }}"), "1-ba+b");
    assert_eq!(shown("{{ [{'n': 1}, {'n': 2}] | join(',', attribute='n') }}"), "1,2");
    assert_eq!(shown("{{ ' A ' | trim | lower }}{{ [1] | string | upper }}"), "a[1]");
    assert_eq!(shown("{{ 'a,b'.split(',')[1] }}{{ 'a b' | split | last }}"), "bb");
    assert_eq!(shown("{{ [1, 2] | sum }}{{ [1, 1].count(1) }}{{ '<' | e }}"), "32&lt;");
    assert_eq!(shown("{{ {1: none, 'l': range(2)} | tojson }}"), r#"{"1": null, "l": [0, 1]}"#);
}

#[test]
fn deeply_nested_values_do_not_break_the_process() {
    let messages = json!([{"role": "user", "content": "x"}]);
    let nest = "{% set n = namespace(l=[]) %}{% for i in range(1000) %}{% for j in range(1000) %}\
                {% set n.l = [n.l] %}{% if i == 200 and j == 0 %}";
    for last in ["", "{{ n.l }}", "{{ n.l | string }}", "{{ n.l | tojson }}", "{{ n.l == [n.l] }}"]
    {
        let source = format!("{nest}{last}{{% endif %}}{{% endfor %}}{{% endfor %}}");
        let refused = render(&source, &messages).map(|text| text.len());
        assert!(refused.is_err(), "{last}: {refused:?}");
    }
}

#[test]
fn an_empty_final_message_cannot_stay_open() {
    let source = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}";
    for empty in ["", " \n"] {
        let messages = [json!({"content": "a"}), json!({"content": empty})];
        let rendering = Rendering {
            messages: &messages,
            tools: &[],
            add_generation_prompt: false,
            continue_final: true,
            variables: &Map::new(),
            now: UNIX_EPOCH,
        };
        let refused = template(source).render(&rendering).expect_err("has no place to go on");
        assert_eq!(refused.param.as_deref(), Some("messages"));
    }
}

#[test]
fn iterable_and_sequence_mean_what_they_mean_in_jinja2() {
    let values = ["none", "1", "true", "'x'", "[]", "{}", "nowhere"];
    let tell = |test: &str| {
        let one = |value: &&str| shown(&format!("{{{{ {value} is {test} }}}}")) == "True";
        values.iter().map(one).collect::<Vec<_>>()
    };
    assert_eq!(tell("iterable"), [false, false, false, true, true, true, true]);
    assert_eq!(tell("sequence"), [false, false, false, true, true, true, true]);
    // As published templates ask; what they mean is that there are any.
    let source =
        "{% if tools is iterable and tools | length > 0 %}some{% else %}no{% endif %} tools";
    assert_eq!(shown(source), "no tools");
}
